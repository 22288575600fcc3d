"""What the owner of a device is asked, what the policy stops, and what is kept of it all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from test_device_life import ENDLESS, given_back
from test_lies import manifest_of

from federation import Device, Federation, HastyClock, UnitTrainer
from intermediary import Intermediary
from potluck.cli.join import asking
from potluck.config.plan import read_plan
from potluck.core import ConfigError, Spec, Update
from potluck.data.own_data import from_text
from potluck.device import (
    DeclinedError,
    Enrolment,
    Home,
    Policy,
    TorchTrainer,
    load_policy,
    one_client,
)
from potluck.device.consent import Consent, differences, in_words
from potluck.device.enrol import bounded_memory
from potluck.protocol import CODECS, public_key, verify_manifest
from potluck.protocol.routes import ROUTES
from potluck.server.rounds.changes import change

LEAVES = Path(__file__).parents[2] / "docs" / "what-leaves.md"
ONE = "goal = 1\npopulation = 1\nover_selection = 1.0"


class Days(HastyClock):
    """Hours pass at once; at first it is `hour` o'clock here."""

    def __init__(self, hour=12):
        super().__init__()
        inner, now = self.now_ms, time.localtime()
        passed = now.tm_hour * 3600 + now.tm_min * 60 + now.tm_sec
        self._ahead_ms = (hour * 3600 - passed) * 1000
        self.now_ms = lambda: inner() + self._ahead_ms

    def wait(self, seconds):
        super().wait(seconds)
        if seconds > 600:
            self._ahead_ms += round(seconds * 1000) + 1


class Then(TorchTrainer):
    """Trains as usual, and then the operator does something."""

    def __init__(self, load, after):
        super().__init__(load)
        self._after = after

    def train(self, *arguments, **named):
        update = super().train(*arguments, **named)
        self._after()
        return update


def record_of(device):
    """All lines of what a device keeps of what it sent."""
    days = sorted((device.folder / "sent").glob("*.jsonl"))
    return [json.loads(line) for day in days for line in day.read_text().splitlines()]


def paths_of(device):
    return Counter(line.get("path", "manifest") for line in record_of(device))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run of one device that has not begun."""
    folder = tmp_path_factory.mktemp("one")
    with Federation(folder, clients=3, rounds=20, server=ONE, plaintext=True) as federation:
        yield federation


def refused(one, **options):
    """A newcomer that is stopped, by the policy or the owner; its invitation is left."""
    one.refused = getattr(one, "refused", 0) + 1
    trainer = options.pop("trainer", None) or TorchTrainer(lambda _: one_client(one.data, 0))
    folder = one.folder / f"refused-{one.refused}"
    device = Device(one.server.address, one.invite(), folder, trainer, **options)
    device.end()
    assert set(paths_of(device)) == {"/v1/preview", "manifest"}
    assert not (folder / "enrolment.json").exists()
    return device.died


def test_the_owner_is_shown_the_signed_run_before_the_device_enrols(one):
    asked = []
    error = refused(one, ask=lambda told: asked.append(told))
    assert isinstance(error, DeclinedError)
    [told] = asked
    key = public_key(one.server.served.key).hex()
    for word in (
        *("small", key[:16], "10 classes", "logistic, 650 parameters: 2,600 bytes", "fedavg"),
        *("1 local epochs (E) in batches of 10 (B)", "client_lr 0.1", "server_lr 1.0"),
        *("rounds      20", "481 examples, 49 local steps a round", "docs/what-leaves.md"),
    ):
        assert word in told


@pytest.mark.parametrize(
    ("key", "limit", "got"),
    [
        ("min_batch_size", 11, 10),
        ("min_steps", 50, 49),
        ("max_rounds", 19, 20),
        ("max_model_bytes", 2599, 2600),
    ],
)
def test_a_run_beyond_the_policy_is_refused_before_anything_is_downloaded(one, key, limit, got):
    error = refused(one, policy=Policy(**{key: limit}), ask=lambda told: pytest.fail(told))
    assert isinstance(error, DeclinedError)
    assert f"{key} = {limit}, got {got}" in str(error)


def test_what_a_policy_bounds_is_bounded_at_the_figure_itself():
    manifest = type("M", (), {"length_bytes": 2**28, "rounds": 20, "plan": PLAN})()
    plan = read_plan(PLAN)
    Policy(max_model_bytes=2**28, max_memory_bytes=2**30, max_rounds=20).check_model(manifest)
    Policy(min_batch_size=10, min_steps=10, max_epochs=2).check_work(plan, 50)
    for wrong in ({"max_memory_bytes": 2**30 - 1}, {"max_rounds": 19}, {"max_model_bytes": 9}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Policy(**wrong).check_model(manifest)
    manifest.rounds = 0
    with pytest.raises(ConfigError, match="max_rounds = 5, got inf"):
        Policy(max_rounds=5).check_model(manifest)
    for wrong, num_examples in (
        *(({"min_batch_size": 10}, 9), ({"min_steps": 11}, 50), ({"max_epochs": 1}, 50)),
        ({"max_epochs": 1}, None),
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Policy(**wrong).check_work(plan, num_examples)
    with pytest.raises(ConfigError, match="min_steps = 4, got 3"):
        Policy(min_steps=4).bound(Update(np.ones(2, np.float32), 1.0, 0.0, 3))


PLAN = {
    "task": {"model": "2nn", "num_classes": 2},
    "algorithm": {"client_lr": 0.1, "local_epochs": 2, "batch_size": 10},
}


@pytest.mark.parametrize("answer", [True, False])
def test_a_plan_that_changes_needs_the_owners_word_again(tmp_path, answer):
    asked = []

    def ask(told):
        asked.append(told)
        return len(asked) == 1 or answer

    def change():
        federation.server.served.plan["algorithm"]["local_epochs"] = 9

    with Federation(tmp_path, clients=1, rounds=3, server=ONE) as federation:
        device = federation.join(0, UnitTrainer(change), ask=ask)
        device.end(120)
        assert len(asked) == 2
        assert "plan.algorithm.local_epochs: 1 → 9" in asked[1]
        if answer:
            assert device.died is None
            assert device.count("accepted") == 3
        else:
            assert isinstance(device.died, DeclinedError)
            assert device.count("accepted") == 1
            assert ("failed", "declined") in given_back(federation)
            [row] = federation.operator.get("devices")
            assert row["left"] == "declined"
            again = Device(
                federation.server.address, None, device.folder, UnitTrainer(), ask=ask
            )  # it is asked again, and not only once
            again.end()
            assert isinstance(again.died, DeclinedError)


def test_more_rounds_by_the_operator_are_signed_at_once_and_need_a_word(tmp_path):
    asked = []

    def more():
        change(federation.service, federation.run, {"run.rounds": 4}, actor="test")

    with Federation(tmp_path, clients=1, rounds=2, server=ONE) as federation:
        device = federation.join(
            0, UnitTrainer(more), ask=lambda told: asked.append(told) or len(asked) < 2
        )
        device.end(120)
        assert isinstance(device.died, DeclinedError)
        assert "rounds: 2 → 4" in str(device.died)
        assert device.count("accepted") == 1


def test_fewer_rounds_need_no_word_and_more_do():
    terms = {"run": "a", "rounds": 20, "plan": {"algorithm": {"client_lr": 0.1}, "needs": []}}
    assert differences(terms, terms | {"rounds": 10}) == []
    assert differences(terms, terms | {"rounds": 21}) == ["rounds: 20 → 21"]
    assert differences(terms, terms | {"rounds": 0}) == ["rounds: 20 → 0"]
    assert differences(terms | {"rounds": 0}, terms) == []  # a server that says more than it did
    other = terms | {"plan": {"algorithm": {}, "needs": [], "data": None}}
    assert differences(terms, other) == ["plan.algorithm.client_lr: 0.1 → None"]


def test_no_name_of_a_plan_can_forge_a_line_of_what_is_shown():
    names = ["age\nrounds      1\u2028here", "weight"]
    plan = PLAN | {"data": {"features": [{"name": n} for n in names], "targets": ["ill\r\n"]}}
    manifest = manifest_of(bytes(12)).model_copy(update={"plan": plan, "rounds": 900})
    told = in_words(manifest, read_plan(plan), "ab" * 32, 7, [])
    assert [line.split()[1] for line in told.splitlines() if line.startswith("rounds")] == ["900"]
    assert "ill (2 classes) from the columns age rounds 1 here, weight" in told


def test_a_device_of_before_agreements_were_kept_goes_on_and_keeps_one(tmp_path):
    home = Home(tmp_path)
    manifest = manifest_of(bytes(12)).model_copy(update={"plan": PLAN, "rounds": 2})
    consent = Consent(home, Policy(), UnitTrainer(), "ab" * 32, lambda told: False)
    with pytest.raises(DeclinedError):  # a newcomer, that is
        consent.require(manifest, read_plan(PLAN))
    home.keep_enrolment(
        Enrolment(url="u", device="a" * 32, run="r", server_key="b" * 64, certificate=None)
    )
    consent.require(manifest, read_plan(PLAN))
    assert json.loads((tmp_path / "agreed.json").read_text())["rounds"] == 2
    with pytest.raises(DeclinedError, match="rounds: 2 → 3"):
        consent.require(manifest.model_copy(update={"rounds": 3}), read_plan(PLAN))
    home.close()


def test_another_model_is_refused_before_it_is_downloaded(tmp_path):
    def grow():
        large = Spec(("linear.weight", "linear.bias"), ((10, 15_850_000), (10,)))  # 634 MB
        object.__setattr__(federation.server.served, "spec", large)

    with Federation(tmp_path, clients=1, rounds=3, server=ONE) as federation:
        trainer = Then(lambda _: one_client(federation.data, 0), grow)
        device = federation.join(0, trainer, offers=CODECS)
        device.end(120)
        assert "must fit the model of the run" in str(device.died)
        assert device.count("trained") == 1
        downloads = [path for path in paths_of(device) if path.startswith("/v1/models/")]
        assert len(downloads) == 1


def test_a_plan_for_a_giant_is_refused_without_making_one():
    """Its 120 billion weights would need 480 GB."""
    data = from_text({"a": ["the quick brown fox " * 9] * 2}, steps=5)
    task = {"model": "char-lstm", "num_classes": data.num_classes, "hidden": 100_000}
    plan = read_plan({"task": task | {"padding": data.padding}, "algorithm": {"client_lr": 0.1}})
    with pytest.raises(ConfigError, match="must fit the model of the run"):
        TorchTrainer(lambda _: data).fit(plan, Spec(("w",), ((3,),)))


def test_all_that_a_device_sends_is_in_its_record(tmp_path):
    """Each request byte for byte by its digest, each manifest as it was signed, each update."""
    arrived = []

    def note(answer):
        arrived.append((answer.method, answer.path, hashlib.sha256(answer.request).hexdigest()))
        return answer.content

    with Federation(tmp_path, clients=1, rounds=2, server=ONE) as federation:
        with Intermediary(federation.port, federation.operator._home, note) as between:
            device = federation.join(
                0, address=between.address, offers=CODECS, policy=Policy(keep_updates=True)
            )
            device.end(120)
            assert device.died is None
        lines = record_of(device)
        sent = [line for line in lines if "path" in line]
        assert Counter(arrived) == Counter((s["method"], s["path"], s["sha256"]) for s in sent)
        key, run = public_key(federation.server.served.key), federation.server.served.name
        signed = [
            verify_manifest(
                line["manifest"].encode(), bytes.fromhex(line["signature"]), key,
                run=run, now_ms=line["time_ms"], last_seen_version=0,
            )
            for line in lines if "manifest" in line
        ]  # fmt: skip
        assert [manifest.round for manifest in signed if manifest.round] == [1, 2]
        assert {manifest.rounds for manifest in signed} == {2}
        reports = [s["message"] for s in sent if s["path"] == "/v1/report"]
        for number, report in enumerate(reports):
            body = (device.folder / "sent" / "updates" / report["sha256"]).read_bytes()
            moved = federation.weights(number + 1) - federation.weights(number)
            np.testing.assert_allclose(np.frombuffer(body, "<f4"), moved, atol=1e-6)


def test_updates_are_clipped_with_noise_of_the_devices_own(tmp_path):
    rng = np.random.default_rng(0)
    update = Update(rng.normal(size=10_000).astype(np.float32), 3.0, 0.1, 5)
    clipped = Policy(clip_norm=0.5).bound(update)
    assert np.linalg.norm(clipped.delta) == pytest.approx(0.5, rel=1e-5)
    np.testing.assert_allclose(clipped.delta * np.linalg.norm(update.delta), update.delta / 2, 1e-4)
    assert clipped[1:] == update[1:]
    assert Policy(clip_norm=1e6).bound(update).delta.tobytes() == update.delta.tobytes()
    nothing = update._replace(delta=np.zeros(3, np.float32))
    assert not Policy(clip_norm=1.0).bound(nothing).delta.any()
    noisy = Policy(clip_norm=0.5, noise_multiplier=0.2)
    noises = [noisy.bound(update).delta - clipped.delta for _ in range(2)]
    assert not np.array_equal(*noises)
    for noise in noises:
        assert np.std(noise) == pytest.approx(0.1, rel=0.05)
        assert np.mean(noise) == pytest.approx(0.0, abs=0.005)
    with Federation(tmp_path, clients=1, rounds=2, server=ONE) as federation:
        device = federation.join(0, policy=Policy(clip_norm=0.01))
        device.end(120)
        for number in (0, 1):
            moved = federation.weights(number + 1) - federation.weights(number)
            assert np.linalg.norm(moved) == pytest.approx(0.01, rel=1e-3)


def test_a_device_takes_as_many_assignments_in_a_day_as_it_may(tmp_path):
    server = ONE + "\nselection_seconds = 0.3\nreport_seconds = 0.3\nattempts = 1000"
    with Federation(tmp_path, clients=1, rounds=3, server=server) as federation:
        device = federation.join(0, UnitTrainer(), clock=Days(), policy=Policy(max_rounds_a_day=1))
        device.end(120)
        assert device.died is None
        assert any("max_rounds_a_day = 1" in event.detail for event in device.events)
    days = list((device.folder / "sent").glob("*.jsonl"))
    assert len(days) >= 3
    for day in days:
        lines = [json.loads(line) for line in day.read_text().splitlines()]
        assert len({line["assignment"] for line in lines if "assignment" in line}) <= 1


def test_a_device_works_in_its_hours_alone(tmp_path):
    night = Policy(hours=[22, 6])
    with Federation(tmp_path, clients=1, rounds=2, server=ONE) as federation:
        device = federation.join(0, UnitTrainer(), clock=Days(12), policy=night)
        device.end(120)
        assert device.died is None
        assert any(event.detail.startswith("outside of hours") for event in device.events)
        [first, *_] = [s for s in record_of(device) if s.get("path") == "/v1/check-in"]
        assert time.localtime(first["time_ms"] / 1000).tm_hour in (22, 23)


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [([22, 6], (22, 23, 0, 5), (6, 12, 21)), ([9, 17], (9, 16), (8, 17)), ([0, 24], (0, 23), ())],
)
def test_hours_may_go_over_midnight(hours, inside, outside):
    def wait(hour):
        now = time.mktime((2026, 7, 15, hour, 30, 0, 0, 0, -1)) * 1000
        return Policy(hours=hours).seconds_to_hours(round(now))

    assert all(wait(hour) == 0 for hour in inside)
    for hour in outside:
        assert wait(hour) == (hours[0] - hour - 0.5) % 24 * 3600


def test_no_plan_trains_for_longer_than_the_owner_lets_it(tmp_path):
    class Quick(HastyClock):
        """A second of its is a millisecond."""

        def __init__(self):
            super().__init__()
            inner = self.monotonic
            self.monotonic = lambda: 1000.0 * inner()

    server = "goal = 1\nreport_seconds = 600.0"
    with Federation(tmp_path, clients=3, local_epochs=ENDLESS, server=server) as federation:
        device = federation.join(0, clock=Quick(), policy=Policy(max_seconds=60))
        federation.until(lambda: ("failed", "ineligible") in given_back(federation))
        device.stop()
        failed = [event.detail for event in device.events if event.what == "failed"]
        assert "max_seconds = 60" in failed[0]
        assert device.count("trained") == 0
    assert Policy().max_seconds == 86_400  # also without a file: not 115 days


def test_the_system_holds_a_device_to_its_memory():
    status = Path("/proc/self/status").read_text()
    now = 1024 * int(re.search(r"VmData:\s+(\d+)", status)[1])
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with bounded_memory(Policy(max_memory_bytes=now + 2**30)):
        np.ones(2**20)
        with pytest.raises(MemoryError):
            np.ones(2**29)  # 4 GiB
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_epoch = 3", "unknown key max_epoch: did you mean max_epochs?"),
        ("max_epochs = 0", "max_epochs must be at least 1, got max_epochs = 0."),
        ("max_epochs = 2.5", "max_epochs must be an integer, got max_epochs = 2.5."),
        ("max_seconds = 604801", "max_seconds must be at most 604800"),
        ("max_memory_bytes = 1000", "max_memory_bytes must be at least 536870912"),
        ("clip_norm = 0", "clip_norm must be above 0"),
        ("clip_norm = nan", "clip_norm must be a finite number"),
        ("keep_updates = 1", "keep_updates must be true or false"),
        ("hours = [22]", "hours must be a list of at least 2"),
        ("hours = [1, 2, 3]", "hours must be a list of at most 2"),
        ("hours = [8, 25]", "hours must be at most 24"),
        ('hours = "22-6"', "hours must be a list"),
        ("hours = [8, 8]", "hours must be two hours that differ, got hours = [8, 8]."),
        ("noise_multiplier = 1.0", "noise_multiplier must go with clip_norm, got none"),
        ("max_epochs", "is not a TOML file"),
        (None, "a policy must be a readable file"),
    ],
)
def test_a_policy_that_is_wrong_is_told_in_words(tmp_path, text, message):
    path = tmp_path / "policy.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_policy(path)


def test_the_document_names_all_that_leaves_and_every_key_of_a_policy(tmp_path):
    text = LEAVES.read_text()
    sent = {r.request for r in ROUTES if r.request not in (None, "bytes")}
    for field in {name for message in sent for name in message.model_fields}:
        assert f"`{field}`" in text, field
    keys = set(re.findall(r"^\| `(\w+)` \|", text[text.index("## A policy") :], re.MULTILINE))
    assert keys == set(Policy.model_fields)
    [example] = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "policy.toml").write_text(example)
    load_policy(tmp_path / "policy.toml")


def potluck(*words):
    command = [sys.executable, "-m", "potluck", "join", *map(str, words)]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_without_a_terminal_a_device_needs_a_word_or_a_policy(one, tmp_path):
    words = [one.server.address, "--token", one.invite(), "--experiment", one.file]
    words += ["--home", tmp_path / "device"]
    with potluck(*words) as nowhere:
        told, error = nowhere.communicate(timeout=120)
    assert nowhere.returncode == 1
    assert "481 examples, 49 local steps a round" in told
    assert "got no terminal to ask at. Give --yes, or --policy" in error
    policy = tmp_path / "policy.toml"
    policy.write_text("max_epochs = 1\nmax_rounds = 20")
    with potluck(*words, "--policy", policy) as unwatched:  # with the invitation of before
        one.until(lambda: one.status()["version"] >= 1 or unwatched.poll() is not None)
        assert unwatched.poll() is None, unwatched.communicate()
        unwatched.terminate()
        unwatched.communicate(timeout=120)


@pytest.mark.parametrize(("typed", "answer"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_at_a_terminal_the_owner_is_asked_but_for_the_first_time_with_yes(
    monkeypatch, typed, answer
):
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "r") as keyboard, os.fdopen(os.dup(theirs), "w") as screen:
        monkeypatch.setattr(sys, "stdin", keyboard)
        monkeypatch.setattr(sys, "stdout", screen)
        for ask in (asking(False, False), asking(False, True)):
            os.write(ours, typed.encode())
            assert ask("run         small") == answer
        ask = asking(True, False)
        assert ask("run         small")
        os.write(ours, typed.encode())
        assert ask("run         another") == answer
        screen.flush()
        shown = b""
        while shown.count(b"Take part? [y/N]") < 3:  # a terminal gives what it has piecewise
            shown += os.read(ours, 10_000)
    os.close(ours)
    assert b"run         another" in shown
