"""The life of a device with PyTorch and a real server: evaluations, stops, cuts and limits."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from sqlalchemy import select
from test_device import BATTERY, power

from fault_proxy import FaultProxy
from federation import Federation, HastyClock
from potluck.config.plan import plan_of
from potluck.core import DataError
from potluck.data.federated import Examples
from potluck.device import LinuxSensor, TorchTrainer, one_client, run_until_stopped
from potluck.engine import federated_evaluation
from potluck.engine.task import spec_of
from potluck.server.storage.database_tables import assignments
from potluck.simulation import build_task

ENDLESS = 100_000  # local epochs: minutes of training, if nobody ends it


class Process:
    """`potluck join` as a process of its own, playing the first client of an experiment."""

    def __init__(self, federation, address, *, invited=False, environment=None):
        words = [sys.executable, "-m", "potluck", "join", address, "--threads", 1]
        words += ["--experiment", federation.file, "--home", federation.folder / "device"]
        words += ["--token", federation.invite(), "--yes"] if invited else []
        self.lines, self._said = [], threading.Condition()
        self.process = subprocess.Popen(
            [*map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | (environment or {}),
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            with self._said:
                self.lines.append(line.strip())
                self._said.notify_all()

    def until(self, word):
        with self._said:
            assert self._said.wait_for(lambda: any(word in line for line in self.lines), 60), (
                self.lines
            )

    def end(self, number=0):
        """Its exit status, and how many seconds it took to end."""
        if number:
            self.process.send_signal(number)
        begun = time.monotonic()
        code = self.process.wait(60)
        seconds = time.monotonic() - begun
        self._reader.join()
        self.process.stdout.close()
        return code, seconds


def given_back(federation):
    """Why assignments ended without a report."""
    query = select(assignments.c.state, assignments.c.reason)
    with federation.service.database.read() as db:
        return [tuple(row) for row in db.execute(query)]


def test_a_federated_evaluation_is_a_round_of_its_own_with_the_simulations_metrics(tmp_path):
    server = 'selection = "sampled"\nover_selection = 1.0\npopulation = 3\nfederated_every = 1'
    with Federation(tmp_path, clients=3, rounds=2, server=server) as federation:
        for k in range(3):
            federation.join(k)
        federation.until(lambda: federation.status()["state"] == "finished")
        for device in federation.devices:
            device.end()
            assert device.died is None
            assert [device.count(what) for what in ("trained", "evaluating")] == [2, 2]
        task = build_task(federation.experiment, federation.data)
        told = {
            row["round"]: row
            for row in federation.service.evaluations(federation.run)
            if row["kind"] == "federated"
        }
        assert set(told) == {1, 2}
        for number, row in told.items():
            expected = federated_evaluation(task, federation.weights(number))["accuracy"]
            assert row["num_devices"] == 3
            assert row["metrics"]["accuracy"] == pytest.approx(expected.weighted_mean, abs=1e-9)
        assert federation.status()["version"] == 2  # an evaluation makes no model


def test_a_device_without_test_examples_says_so(tmp_path):
    federation = Federation(tmp_path, clients=3)
    one = one_client(federation.data, 0)
    none = Examples(one.test.inputs[:0], one.test.targets[:0])
    empty = replace(one, test=none, test_offsets=np.array([0, 0]))
    plan = plan_of(federation.experiment, federation.data)
    spec = spec_of(build_task(federation.experiment, federation.data).model())
    weights = np.zeros(spec.dim, np.float32)
    with pytest.raises(DataError, match="must have test examples to evaluate on, got none"):
        TorchTrainer(lambda _: empty, 1).evaluate(plan, spec, weights, check=lambda: None)


def test_sigterm_in_training_ends_at_once_and_frees_the_slot(tmp_path):
    server = "goal = 1\nreport_seconds = 600.0"
    with Federation(tmp_path, clients=3, local_epochs=ENDLESS, server=server) as federation:
        device = Process(federation, federation.server.address, invited=True)
        device.until("training round 1")
        code, seconds = device.end(signal.SIGTERM)
        assert code == 143
        assert seconds < 120  # of hours that the training would have taken
        assert device.lines[-1].startswith("stopped")
        assert given_back(federation) == [("failed", "stopped")]
        assert not (tmp_path / "device/outbox/report.json").exists()


def test_sigterm_after_training_wastes_nothing(tmp_path):
    federation = Federation(tmp_path, clients=3, rounds=1, server="goal = 1", plaintext=True)
    lost = threading.Event()

    def lose(seen):
        is_report = seen.path == "/v1/report"
        if is_report:
            lost.set()
        return is_report

    with federation:
        with FaultProxy(federation.port, lose=lose) as proxy:
            device = Process(federation, proxy.address, invited=True)
            device.until("trained round 1")
            assert lost.wait(60)  # it tries to send, in vain
            assert device.end(signal.SIGTERM)[0] == 143, device.lines
        federation.until(lambda: federation.status()["version"] == 1)  # which nobody told it
        assert (tmp_path / "device/outbox/report.json").exists()
        device = Process(federation, federation.server.address)
        assert device.end() == (0, pytest.approx(30, abs=30))
        assert device.lines[0] == "accepted round 1"
        assert not any("training" in line for line in device.lines)
        assert federation.status()["version"] == 1


def test_a_stop_is_a_stop_though_cleaning_up_after_it_fails(tmp_path):
    federation = Federation(tmp_path, clients=3, rounds=1, server="goal = 1", plaintext=True)

    def show(event):
        if event.what == "training":
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                raise RuntimeError("a library tidies up")

    def take_part(show):
        return run_until_stopped(
            federation.server.address,
            federation.invite(),
            tmp_path / secrets.token_hex(4),
            TorchTrainer(lambda _: one_client(federation.data, 0), 1),
            name=None,
            show=show,
        )

    with federation:
        assert not take_part(show)
        with pytest.raises(ZeroDivisionError):  # and what is no stop is none
            take_part(lambda event: 1 / 0)


def test_a_device_that_is_unplugged_stops_training_and_says_why(tmp_path):
    class Quick(HastyClock):
        """Its seconds are long, so that it looks at its condition often."""

        def __init__(self):
            super().__init__()
            inner = self.monotonic
            self.monotonic = lambda: 1000.0 * inner()

    server = "goal = 1\nneeds_charging = true\nreport_seconds = 600.0"
    power(tmp_path, BAT0=BATTERY | {"status": "Charging"})
    sensor = LinuxSensor(root=tmp_path, network_manager=None)
    with Federation(tmp_path, clients=3, local_epochs=ENDLESS, server=server) as federation:
        device = federation.join(0, sensor=sensor, clock=Quick())
        federation.until(lambda: device.count("training"))
        power(tmp_path, BAT0=BATTERY | {"status": "Discharging"})
        federation.until(lambda: device.count("failed"))
        [failed] = [event for event in device.events if event.what == "failed"]
        assert failed.detail == "the device must be charging while it trains, got charging=False."
        federation.until(lambda: given_back(federation) == [("failed", "ineligible")])
        device.stop()
        assert device.count("trained") == 0


def test_a_download_that_is_cut_goes_on_where_it_was(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    inputs = np.random.default_rng(0).normal(size=(5, 8_000)).astype(np.float32)
    np.savez(own / "only.npz", inputs=inputs, targets=np.array([0, 1, 0, 1, 0]))
    cuts = Counter()

    def cut(seen):
        """Break the model off three times, after 1 MB each."""
        if not seen.path.startswith("/v1/models/") or cuts[seen.path] == 3:
            return None
        cuts[seen.path] += 1
        return 1_000_000

    federation = Federation(
        tmp_path, model="2nn", clients=1, rounds=1, own=own, server="goal = 1", plaintext=True
    )
    with federation, FaultProxy(federation.port, cut_answer=cut) as proxy:
        device = federation.join(0, address=proxy.address)
        federation.until(lambda: federation.status()["state"] == "finished")
        device.end()
        assert device.died is None
        length = federation.weights(0).nbytes
        [path] = [path for path in proxy.answered if path.startswith("/v1/models/")]
        assert cuts == {path: 3}
        assert length > 6_000_000
        again = proxy.answered[path] - length  # heads, and the piece that was read at the cut
        assert 0 <= again < 4 * 1000 + 3 * 65_536
        assert np.abs(federation.weights() - federation.weights(0)).max() > 0


def test_a_device_sends_no_more_in_a_day_than_it_may(tmp_path):
    class Patient(HastyClock):
        """Hours pass at once; the device's day is then no more the server's."""

        def __init__(self):
            super().__init__()
            self._ahead_ms, inner = 0, self.now_ms
            self.now_ms = lambda: inner() + self._ahead_ms

        def wait(self, seconds):
            super().wait(seconds)
            if seconds > 600:  # until tomorrow
                self._ahead_ms += round(seconds * 1000) + 1

    limit = 5000  # a day: one update of 2600 bytes and what belongs to it, not two
    server = "goal = 1\nselection_seconds = 0.3\nreport_seconds = 0.3\nattempts = 1000"
    with Federation(tmp_path, clients=3, rounds=3, server=server) as federation:
        device = federation.join(0, clock=Patient(), limit_bytes=limit)
        federation.until(lambda: federation.status()["state"] == "finished")
        device.end()
        assert device.died is None
        assert any("Wait for tomorrow" in event.detail for event in device.events)
    days = sorted((device.folder / "sent").iterdir())
    assert len(days) >= 3
    for day in days:
        sent = [json.loads(line)["bytes"] for line in day.read_text().splitlines()]
        assert sum(sent) <= limit
        assert sum(size == 2600 for size in sent) <= 1
