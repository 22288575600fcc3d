"""A device by itself: what it keeps through kills, and what it believes of its machine."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
from test_protocol_messages import REPORT

from potluck.core import DataError, PotluckError, RunError
from potluck.core.atomic_files import PRIVATE, write_whole
from potluck.data.federated import reread
from potluck.device import DailyLimitError, Enrolment, Home, LinuxSensor, Record, SystemClock
from potluck.device.clock import Stopped
from potluck.device.connection import Backoff
from potluck.device.lease import NotEligibleError
from potluck.device.outbox import Outbox
from potluck.device.owner_data import one_client, read_own
from potluck.device.sent_log import seconds_to_tomorrow
from potluck.protocol import fingerprint, public_key

NOW = 1_767_225_600_000  # midnight, UTC
DAY = 86_400_000


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path / "device")
    yield home
    home.close()


class NoWaiting:
    """A clock that only notes how long it was to wait."""

    def __init__(self):
        self.waited = []

    def wait(self, seconds):
        self.waited.append(seconds)


def test_a_device_needs_neither_torch_nor_what_a_server_needs():
    code = """
import sys
for name in ("torch", "sqlalchemy", "alembic", "starlette", "uvicorn", "obstore", "psycopg"):
    sys.modules[name] = None  # an import of it fails
import potluck.device
from potluck.device import Home, TorchTrainer
print(TorchTrainer(load=None).runtime().name in ("torch", "none"), Home)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True")


def test_the_key_is_made_once_and_is_its_owners_alone(home):
    key = home.key()
    path = home.folder / "device.key"
    assert home.key() == key
    assert len(fingerprint(public_key(key))) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.folder.stat().st_mode) == 0o700


def test_a_key_that_others_can_read_is_refused(home):
    home.key()
    (home.folder / "device.key").chmod(0o640)
    with pytest.raises(RunError, match=r"must be readable by its owner alone, got mode=640"):
        home.key()


@pytest.mark.parametrize("content", ["", "ab", "z" * 64, "ab" * 33])
def test_a_key_that_is_none_is_refused(home, content):
    write_whole(home.folder / "device.key", content.encode(), PRIVATE)
    with pytest.raises(RunError, match="must hold 64 hex digits"):
        home.key()


def test_one_process_at_a_time_uses_a_folder(home):
    with pytest.raises(RunError, match="serves one process at a time"):
        Home(home.folder)
    home.close()
    home = Home(home.folder)
    home.close()
    home._lock = os.open(home.folder, os.O_RDONLY)  # for the fixture to close


def test_a_sequence_number_is_on_the_disk_before_it_is_used(home):
    assert not home.has_sequence()
    assert [home.next_sequence(1) for _ in range(3)] == [1, 2, 3]
    assert (home.folder / "sequence").read_text() == "3"
    assert home.next_sequence(1) == 4  # as after a restart: it is read anew each time


def test_a_sequence_that_fell_behind_jumps_and_never_goes_back(home):
    assert home.next_sequence(NOW) == NOW
    assert home.next_sequence(5) == NOW + 1


def test_an_enrolment_comes_back_as_it_was_kept(home):
    assert home.enrolment() is None
    enrolment = Enrolment(
        url="https://here:1", device="a" * 32, run="digits", server_key="b" * 64, certificate=None
    )
    home.keep_enrolment(enrolment)
    assert home.enrolment() == enrolment
    write_whole(home.folder / "enrolment.json", b'{"url": 1}', PRIVATE)
    with pytest.raises(RunError, match="must be as it was written"):
        home.enrolment()


def test_the_version_of_manifests_never_falls(home):
    assert home.manifest == (0, 0)
    for version in (3, 7, 5):
        home.accept_manifest(version)
    assert home.manifest == (0, 7)


def test_the_record_holds_messages_but_no_token_and_updates_by_their_digest(tmp_path):
    record = Record(tmp_path / "sent")
    secret = b'{"token":"secret-secret-secret","type":"enrol"}'
    record.add(NOW, "POST", "/v1/enrol", secret, is_message=True)
    record.add(NOW, "PUT", "/v1/uploads/x?offset=0", b"\x01\x02", is_message=False)
    text = (tmp_path / "sent" / "2026-01-01.jsonl").read_text()
    assert "secret" not in text
    assert '"type": "enrol"' in text
    assert f'"bytes": 2, "sha256": "{hashlib.sha256(bytes([1, 2])).hexdigest()}"' in text


def test_the_daily_limit_holds_through_restarts_and_ends_with_the_day(tmp_path):
    body = b"x" * 40
    record = Record(tmp_path, limit_bytes=100)
    record.add(NOW, "PUT", "/", body, is_message=False)
    record = Record(tmp_path, limit_bytes=100)
    record.add(NOW + DAY - 1, "PUT", "/", body, is_message=False)
    with pytest.raises(DailyLimitError, match="got 80 sent and 40 to send"):
        record.add(NOW + DAY - 1, "PUT", "/", body, is_message=False)
    record.add(NOW + DAY, "PUT", "/", body, is_message=False)
    assert record.sent(NOW + DAY) == 40
    assert seconds_to_tomorrow(NOW + DAY - 1500) == 1.5


def test_half_a_line_at_the_end_of_the_record_does_not_stop_a_device(tmp_path):
    (tmp_path / "2026-01-01.jsonl").write_text('{"bytes": 7}\n{"byt')
    assert Record(tmp_path).sent(NOW) == 7


def test_the_wait_between_tries_grows_to_five_minutes_and_obeys_the_server():
    clock, asked = NoWaiting(), []

    def longest(low, high):
        asked.append((low, high))
        return high

    backoff = Backoff(clock, longest)
    for _ in range(10):
        backoff.wait()
    assert asked == [(0.0, high) for high in (2, 4, 8, 16, 32, 64, 128, 256, 300, 300)]
    assert clock.waited == [high for _, high in asked]
    backoff.reset()
    backoff.wait(at_least=12.0)
    assert clock.waited[-1] == 12.0


def test_an_update_that_is_owed_survives_and_its_residual_counts_once_accepted(tmp_path):
    outbox = Outbox(tmp_path / "outbox")
    assert outbox.owed() is None
    residual = np.array([0.5, -0.25], np.float32)
    outbox.put(REPORT, b"\x01\x02\x03", residual)
    outbox = Outbox(tmp_path / "outbox")
    owed = outbox.owed()
    assert (owed.report, owed.body.read_bytes()) == (REPORT, b"\x01\x02\x03")
    assert outbox.residual(2) is None
    outbox.accept()
    assert outbox.owed() is None
    np.testing.assert_array_equal(outbox.residual(2), residual)
    assert outbox.residual(3) is None
    outbox.put(REPORT, b"\x04", 2 * residual)
    outbox.drop()
    assert outbox.owed() is None
    np.testing.assert_array_equal(outbox.residual(2), residual)


def test_an_update_without_its_report_is_not_owed(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.put(REPORT, b"\x01", np.zeros(1, np.float32))
    (tmp_path / "report.json").write_bytes(b"{")
    assert outbox.owed() is None


def power(root, **supplies):
    for name, files in supplies.items():
        for key, value in files.items():
            path = root / "sys/class/power_supply" / name / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n")


BATTERY = {"type": "Battery", "scope": "System"}
EMPTYING = {"BAT0": BATTERY | {"status": "Discharging"}}
UNKNOWN = {"BAT1": BATTERY | {"status": "Unknown"}}


@pytest.mark.parametrize(
    ("supplies", "charging"),
    [
        (EMPTYING, False),
        ({"BAT0": BATTERY | {"status": "Charging"}}, True),
        ({"BAT0": BATTERY | {"status": "Full"}}, True),
        (
            {"BAT0": BATTERY | {"status": "Charging"}, "BAT1": BATTERY | {"status": "Unknown"}},
            False,
        ),
        ({"AC": {"type": "Mains", "online": 1}} | UNKNOWN, True),
        (
            {"AC": {"type": "Mains", "online": 0}, "BAT0": BATTERY | {"status": "Discharging"}},
            False,
        ),
        ({"mouse": {"type": "Battery", "scope": "Device", "status": "Discharging"}}, True),
    ],
)
def test_charging_is_read_from_the_power_supplies(tmp_path, supplies, charging):
    power(tmp_path, **supplies)
    assert LinuxSensor(root=tmp_path).charging() is charging


def test_what_a_machine_does_not_tell_is_left_out(tmp_path):
    shown = LinuxSensor(root=tmp_path, network_manager=None)()
    assert shown.model_dump(exclude_none=True) == {}


def test_load_and_memory_are_read_from_proc(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 99 kB\nMemAvailable:    2000 kB\n")
    (tmp_path / "proc/loadavg").write_text("0.00 9.0 9.0 1/1 1\n")
    sensor = LinuxSensor(root=tmp_path, network_manager=None)
    assert (sensor.idle(), sensor.free_memory_bytes()) == (True, 2_048_000)
    (tmp_path / "proc/loadavg").write_text("10000.0 9.0 9.0 1/1 1\n")
    assert sensor.idle() is False


@pytest.mark.parametrize(
    ("said", "unmetered"),
    [
        ("100 (connected)\\nno\\n\\n30 (disconnected)\\nyes", True),
        ("100 (connected)\\nyes (guessed)", False),
        ("100 (connected)\\nno (guessed)\\n\\n100 (connected)\\nyes", False),
        ("100 (connected)\\nunknown", None),
        ("", None),
    ],
)
def test_a_metered_network_is_known_from_network_manager(tmp_path, said, unmetered):
    command = tmp_path / "nmcli"
    command.write_text(f"#!/bin/sh\nprintf '{said}\\n'\n")
    command.chmod(0o700)
    assert LinuxSensor(root=tmp_path, network_manager=str(command)).unmetered() is unmetered


def test_a_stop_ends_every_wait_but_not_what_holds():
    clock = SystemClock()
    clock.wait(0)
    with clock.hold():
        clock.interrupt()  # does not raise here
    with pytest.raises(Stopped):
        clock.wait(1000)
    with pytest.raises(Stopped):
        clock.interrupt()


def test_own_data_are_one_client_from_a_file_or_a_folder_with_one(tmp_path):
    x, y = np.arange(20, dtype=np.float32).reshape(10, 2), np.arange(10) % 2
    np.savez(tmp_path / "ward.npz", inputs=x, targets=y)
    for path in (tmp_path, tmp_path / "ward.npz"):
        data = read_own(path)
        assert (data.clients, data.kind, data.train.num_examples) == (("ward",), "regression", 8)
        rows = data.train.inputs[:, 0].astype(int) // 2
        assert reread(data, "classes", 10).train.targets.tolist() == y[rows].tolist()
        rows = np.concatenate([rows, data.client_test(0).inputs[:, 0].astype(int) // 2])
        assert sorted(rows) == list(range(10))
    np.savez(tmp_path / "other.npz", inputs=x, targets=y)
    with pytest.raises(DataError, match=r"must hold one .npz, .csv, .parquet or .txt file, got 2"):
        read_own(tmp_path)


def test_a_table_is_one_client_and_its_labels_must_be_numbers(tmp_path):
    path = tmp_path / "ward.csv"
    path.write_text("a,b,target\n" + "".join(f"{i},{i * 2},{i % 2}\n" for i in range(10)))
    data = read_own(path)
    assert (data.clients, data.train.inputs.shape, data.kind) == (("ward",), (8, 2), "regression")
    path.write_text("a,target\n1,yes\n2,no\n")
    with pytest.raises(DataError, match=r"must be numbers, got text, as 'yes' in .*ward\.csv"):
        read_own(path)


def test_one_client_of_divided_data_keeps_its_examples_and_the_runs_classes():
    from potluck.data import datasets, partitions

    whole = partitions.iid(datasets.digits(), clients=5, seed=0)
    one = one_client(whole, 3)
    assert (one.num_clients, one.num_classes, one.clients) == (1, 10, ("3",))
    np.testing.assert_array_equal(one.client(0).inputs, whole.client(3).inputs)
    with pytest.raises(DataError, match="client must be from 0 to 4, got client=5"):
        one_client(whole, 5)


def test_leaving_the_condition_is_an_error_of_ours():
    assert issubclass(NotEligibleError, PotluckError)
