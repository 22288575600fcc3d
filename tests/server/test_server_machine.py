"""The round as a machine that hypothesis drives: whatever happens in whatever order."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
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
from sqlalchemy import select

from fleet import Fleet
from messages import check_in, report_metrics
from potluck.core import RefusedError
from potluck.server.rounds import audit_check
from potluck.server.rounds.changes import resume
from potluck.server.rounds.check_in import Assigned
from potluck.server.rounds.leases import extend_lease, fail
from potluck.server.storage.database_tables import assignments, rounds

COUNT, GOAL, MINIMUM, SLOTS = 5, 3, 2, 4
DEVICES = st.integers(0, COUNT - 1)
SEEN: Counter[str] = Counter()
"""How many runs there were, and how their rounds ended."""


def check_code(refused: RefusedError, *expected: str) -> None:
    assert refused.code in expected, refused


class Machine(RuleBasedStateMachine):
    """Five devices, goal 3, minimum 2, four slots; two server processes on one database.

    In half of the runs every second round is followed by a federated evaluation.
    """

    def __init__(self, places: Callable[[], tuple[str, str]] | None = None) -> None:
        super().__init__()
        self.places = places

    @initialize(selection=st.sampled_from(["open", "sampled"]), every=st.sampled_from([0, 2]))
    def begin(self, selection, every) -> None:
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        local = str(self.folder / "db"), str(self.folder / "blobs")
        self.fleet = Fleet(
            *(self.places() if self.places else local), count=COUNT, goal=GOAL,
            minimum=0.66, over_selection=1.3, lease_seconds=100.0, selection=selection,
            federated_every=every,
        )  # fmt: skip
        self.servers = [self.fleet.service, self.fleet.open()]
        self.works: list[tuple[int, Assigned]] = []
        self.accepted: dict[str, set[int]] = {}  # by the round's id
        self.version = 0

    @rule(which=st.integers(0, 1))
    def tick(self, which) -> None:
        before = self.fleet.status()["version"]
        leads = self.servers[which].tick()
        assert before <= self.fleet.status()["version"] <= before + 1
        if leads:
            self.nothing_is_overdue(self.servers[which])

    def nothing_is_overdue(self, server) -> None:
        """What a tick leaves: no deadline that has passed, no lease, no silent abandonment."""
        now = server.time.now()
        with server.database.read() as db:
            for row in db.execute(select(rounds)):
                if row.state == "TRAINING":
                    assert now < row.report_deadline_ms
                if row.state == "SELECTING":
                    assert row.selection_deadline_ms is None or now < row.selection_deadline_ms
                assert row.reason or row.state != "ABANDONED"
            active = select(assignments.c.lease_ms).where(assignments.c.state == "active")
            assert all(lease > now for lease in db.scalars(active))

    @rule(which=st.integers(0, 1), device=DEVICES)
    def check_in(self, which, device) -> None:
        answer = check_in(self.servers[which], self.fleet.devices[device])
        if isinstance(answer, Assigned) and (device, answer) not in self.works:
            assert answer.client == device
            self.works.append((device, answer))

    @rule(which=st.integers(0, 1), devices=st.permutations(range(COUNT)), count=st.integers(1, 5))
    def check_in_and_report(self, which, devices, count) -> None:
        """What an undisturbed round is made of; alone, the other rules seldom finish one."""
        self.tick(which)
        for device in devices[:count]:
            self.check_in(which, device)
        for device, work in self.works[-count:]:
            self.report_of(device, work)
        self.tick(which)

    @rule(data=st.data())
    def report(self, data) -> None:
        if self.works:
            self.report_of(*data.draw(st.sampled_from(self.works)))

    def report_of(self, device: int, work: Assigned) -> None:
        try:
            answer = self.send(device, work)
        except RefusedError as refused:
            check_code(refused, "late")
            assert device not in self.accepted.get(work.round, set())
            return
        assert (answer.round, answer.attempt) == (work.number, work.attempt)
        self.accepted.setdefault(work.round, set()).add(device)

    def send(self, device: int, work: Assigned, value: float | None = None):
        """A report of this kind of work; with a value it is not the device's own."""
        id = self.fleet.devices[device]
        if work.kind == "train":
            vector = None if value is None else np.full(COUNT, value, np.float32)
            return self.fleet.send(id, work.assignment, vector)
        metrics = {"correct": (float(device) if value is None else value, 10.0)}
        return report_metrics(self.fleet.service, id, work.assignment, metrics)

    @rule(data=st.data(), kind=st.sampled_from(["fail", "progress", "other", "bad"]))
    def disturb(self, data, kind) -> None:
        if not self.works:
            return
        device, work = data.draw(st.sampled_from(self.works))
        id, service = self.fleet.devices[device], self.fleet.service
        reported = device in self.accepted.get(work.round, set())
        try:
            if kind == "fail" and not reported:
                fail(service, id, work.assignment, "no power")
            elif kind == "progress":
                extend_lease(service, id, work.assignment)
            elif kind == "other" and reported:
                self.send(device, work, 7.0)
                raise AssertionError("two reports of one device")
            elif kind == "bad" and not reported:
                self.send(device, work, float("nan"))
                raise AssertionError("a report of NaN")
        except RefusedError as refused:
            check_code(refused, "late", "conflict", "bounds", "not_finite")

    @rule(seconds=st.sampled_from([1, 50, 121, 601]))
    def wait(self, seconds) -> None:
        self.fleet.clock.pass_(seconds)

    @rule()
    def everybody_is_silent(self) -> None:
        """A round ends whatever devices do; an open one begins with its first device."""
        before = self.fleet.status()["open"]
        for _ in range(5):  # one to lead, two for deadlines that so were moved, two for the next
            self.fleet.clock.pass_(860)
            self.tick(0)
        after = self.fleet.status()["open"]
        if before and (before["started_ms"] is not None or before["cohort"]):
            assert after is None or after["id"] != before["id"]

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
            resume(self.fleet.service, self.fleet.run, actor="test")

    @invariant()
    def the_model_is_the_sum_of_the_accepted_sets(self) -> None:
        if not hasattr(self, "fleet"):
            return
        status = self.fleet.status()
        assert status["version"] >= self.version  # never goes back
        self.version = status["version"]
        history = self.fleet.service.history(self.fleet.run)
        trained = [row for row in history if row["kind"] == "train"]
        assert [row["number"] for row in trained] == list(range(1, self.version + 1))
        assert all(row["number"] % 2 == 0 for row in history if row["kind"] == "evaluate")
        for row in history:
            assert self.minimum(row["round"]) <= row["accepted"] <= GOAL
            assert row["accepted"] == len(self.accepted[row["round"]])
        weights = np.zeros(COUNT, np.float32)
        for row in trained:  # an evaluation changes no model
            who = self.accepted[row["round"]]
            mean = [np.float32(1 / len(who)) if i in who else 0 for i in range(COUNT)]
            weights = weights + np.array(mean, np.float32)
        assert np.array_equal(self.fleet.weights(self.version), weights)
        if status["open"]:
            here = self.accepted.get(status["open"]["id"], set())
            assert len(here) == status["open"]["reported"]
            assert status["open"]["active"] + len(here) <= SLOTS

    def minimum(self, round: str) -> int:
        """It falls in drawn rounds, which silent devices are left out of, and never in others."""
        with self.fleet.service.database.read() as db:
            row = db.execute(select(rounds).where(rounds.c.id == round)).one()
        assert (row.minimum == MINIMUM) if row.cohort is None else (1 <= row.minimum <= MINIMUM)
        return row.minimum

    def teardown(self) -> None:
        if hasattr(self, "fleet"):
            with self.fleet.service.database.read() as db:
                ends = db.execute(select(rounds.c.kind, rounds.c.state)).all()
            SEEN.update(f"{row.kind} {row.state}" for row in ends)
            SEEN["runs"] += 1
            assert audit_check.check(self.fleet.service) is None
            for server in self.servers:
                server.database.close()
            shutil.rmtree(self.folder)


def run(examples: int, steps: int, places: Callable[[], tuple[str, str]] | None = None) -> None:
    """In memory, if there is any, or in these places: each run needs new ones."""
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    options = {"deadline": None, "suppress_health_check": checks, "print_blob": True}
    chosen = settings(max_examples=examples, stateful_step_count=steps, database=None, **options)
    run_state_machine_as_test(lambda: Machine(places), settings=chosen)


@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=[pytest.mark.soak] if part > 3 else []) for part in range(10)]
)
def test_the_round_keeps_its_invariants_in_100_runs_of_30_steps(part):
    run(10, 30)


def test_the_round_keeps_its_invariants_on_postgresql_and_s3(postgresql, s3):
    run(3, 30, lambda: (postgresql(), s3()))
