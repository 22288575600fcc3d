"""The round as a machine that hypothesis drives: whatever happens in whatever order."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from fleet import Fleet
from potluck.core import RefusedError
from potluck.server import Assigned

COUNT, GOAL, MINIMUM, SLOTS = 5, 3, 2, 4
DEVICES = st.integers(0, COUNT - 1)


def check_code(refused: RefusedError, *expected: str) -> None:
    assert refused.code in expected, refused


class Machine(RuleBasedStateMachine):
    """Five devices, goal 3, minimum 2, four slots; two server processes on one database."""

    @initialize(selection=st.sampled_from(["open", "sampled"]))
    def begin(self, selection) -> None:
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.fleet = Fleet(
            str(self.folder / "db"), self.folder / "blobs", count=COUNT, goal=GOAL,
            minimum=0.66, over_selection=1.3, lease_seconds=100.0, selection=selection,
        )  # fmt: skip
        self.servers = [self.fleet.service, self.fleet.open()]
        self.works: list[tuple[int, Assigned]] = []
        self.accepted: dict[str, set[int]] = {}  # by the round's id
        self.version = 0

    @rule(which=st.integers(0, 1))
    def tick(self, which) -> None:
        before = self.fleet.status()["version"]
        self.servers[which].tick()
        assert before <= self.fleet.status()["version"] <= before + 1

    @rule(which=st.integers(0, 1), device=DEVICES)
    def check_in(self, which, device) -> None:
        answer = self.servers[which].check_in(self.fleet.devices[device])
        if isinstance(answer, Assigned) and (device, answer) not in self.works:
            assert answer.client == device
            self.works.append((device, answer))

    @rule(data=st.data())
    def report(self, data) -> None:
        if not self.works:
            return
        device, work = data.draw(st.sampled_from(self.works))
        try:
            answer = self.fleet.send(self.fleet.devices[device], work.assignment)
        except RefusedError as refused:
            check_code(refused, "late")
            assert device not in self.accepted.get(work.round, set())
            return
        assert answer.round == work.round
        self.accepted.setdefault(work.round, set()).add(device)

    @rule(data=st.data(), kind=st.sampled_from(["fail", "progress", "other", "bad"]))
    def disturb(self, data, kind) -> None:
        if not self.works:
            return
        device, work = data.draw(st.sampled_from(self.works))
        id, service = self.fleet.devices[device], self.fleet.service
        reported = device in self.accepted.get(work.round, set())
        try:
            if kind == "fail" and not reported:
                service.fail(id, work.assignment, "no power")
            elif kind == "progress":
                service.extend_lease(id, work.assignment)
            elif kind == "other" and reported:
                self.fleet.send(id, work.assignment, np.full(COUNT, 7, np.float32))
                raise AssertionError("two reports of one device")
            elif kind == "bad" and not reported:
                self.fleet.send(id, work.assignment, np.full(COUNT, np.nan, np.float32))
                raise AssertionError("a model of NaN")
        except RefusedError as refused:
            check_code(refused, "late", "conflict", "bad_update", "not_finite")

    @rule(seconds=st.sampled_from([1, 50, 121, 601]))
    def wait(self, seconds) -> None:
        self.fleet.clock.pass_(seconds)

    @rule(seconds=st.sampled_from([3600, -3600]))
    def jump(self, seconds) -> None:
        self.fleet.clock.jump(seconds)

    @rule(which=st.integers(0, 1))
    def restart(self, which) -> None:
        self.servers[which].database.close()  # without resigning: as if killed
        self.servers[which] = self.fleet.open()
        self.fleet.service = self.servers[0]

    @rule()
    def resume(self) -> None:
        if self.fleet.status()["state"] == "paused":
            self.fleet.service.resume(self.fleet.run, actor="test")

    @invariant()
    def the_model_is_the_sum_of_the_accepted_sets(self) -> None:
        if not hasattr(self, "fleet"):
            return
        status = self.fleet.status()
        assert status["version"] >= self.version  # never goes back
        self.version = status["version"]
        history = self.fleet.service.history(self.fleet.run)
        assert [row["number"] for row in history] == list(range(1, self.version + 1))
        weights = np.zeros(COUNT, np.float32)
        for row in history:
            who = self.accepted[row["round"]]
            assert MINIMUM <= len(who) == row["accepted"] <= GOAL
            mean = [np.float32(1 / len(who)) if i in who else 0 for i in range(COUNT)]
            weights = weights + np.array(mean, np.float32)
        assert np.array_equal(self.fleet.weights(), weights)
        if status["open"]:
            here = self.accepted.get(status["open"]["id"], set())
            assert len(here) == status["open"]["reported"]
            assert status["open"]["active"] + len(here) <= SLOTS

    def teardown(self) -> None:
        if hasattr(self, "fleet"):
            assert self.fleet.service.verify_audit() is None
            for server in self.servers:
                server.database.close()
            shutil.rmtree(self.folder)


def run(examples: int, steps: int) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    options = {"deadline": None, "suppress_health_check": checks, "print_blob": True}
    chosen = settings(max_examples=examples, stateful_step_count=steps, database=None, **options)
    run_state_machine_as_test(Machine, settings=chosen)


@pytest.mark.parametrize("part", range(10))
def test_the_round_keeps_its_invariants_in_100_runs_of_30_steps(part):
    run(10, 30)


@pytest.mark.soak
def test_the_round_keeps_its_invariants_in_2000_runs_of_50_steps():
    run(2000, 50)
