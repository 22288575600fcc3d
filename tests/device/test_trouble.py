"""What passes ends no device: it is told once, tried again, and the device goes on."""

from __future__ import annotations

import errno
import logging
import socket

import pytest
from test_device_life import Process

from disk_faults import build_bad_disk
from federation import Device, Federation, HastyClock, UnitTrainer
from intermediary import Intermediary
from potluck.core import RefusedError, RunError
from potluck.device import Home
from potluck.device.trouble import Backoff, Trouble
from potluck.protocol import STATUS, Error, encode_message
from potluck.server.storage.state_folder import StateFolder

SERVER = (
    "goal = 1\npopulation = 1\nselection_seconds = 5.0\nreport_seconds = 5.0\nattempts = 100000"
)
ENDLESS = {"clients": 1, "rounds": 100_000, "cohort": 1, "server": SERVER}
PAGE = b"<html><body>Sign in to the guests' network</body></html>"
ANSWERS = [
    *((status, PAGE) for status in (200, 302, 401, 502)),
    (200, b""),
    (200, b'{"type":"wait"}'),
    *((status, encode_message(Error(code=code, message=code))) for code, status in STATUS.items()),
    (403, encode_message(Error(code="token", message="as after a restore"))),
]


class Waits(HastyClock):
    """Counts how long it was to wait."""

    def __init__(self):
        super().__init__()
        self.waited = []

    def wait(self, seconds):
        self.waited.append(seconds)
        super().wait(seconds)


def accepted(federation):
    return federation.status()["version"]


def goes_on(federation, device):
    """Until two more rounds: one of them began afterwards."""
    version = accepted(federation)
    federation.until(lambda: accepted(federation) >= version + 2 or device.died)
    assert device.died is None, device.died


def warnings_of(caplog):
    return [line.getMessage() for line in caplog.records if line.levelno >= logging.WARNING]


def test_no_answer_whatever_it_is_ends_a_device(tmp_path, caplog):
    faults, told = [], []

    def change(answer):
        if not faults:
            return answer.content
        if answer.path.endswith("enrol"):  # as after a restore
            return ANSWERS[-1]
        told.append(faults[0])
        return faults[0]

    federation, home = Federation(tmp_path, **ENDLESS), StateFolder(tmp_path / "server")
    with federation, Intermediary(federation.port, home, change) as between:
        device = federation.join(0, UnitTrainer(), between.address)
        goes_on(federation, device)
        for fault in ANSWERS:
            told.clear()
            caplog.clear()
            faults.append(fault)
            federation.until(lambda: len(told) > 2 or device.died)
            faults.clear()
            goes_on(federation, device)
            kinds = [line for line in warnings_of(caplog) if "pauses" in line]
            assert len(kinds) == len(set(kinds)), kinds
        device.stop()


def test_a_server_on_another_folder_for_a_while_ends_no_device(tmp_path, caplog):
    folders = [tmp_path / name for name in ("right", "wrong")]
    for folder in folders:
        folder.mkdir()
    right, wrong = (Federation(folder, **ENDLESS) for folder in folders)
    with right:
        device = right.join(0, UnitTrainer())
        goes_on(right, device)
        right.devices.clear()  # it outlives this server
        port = right.port
    right.listen = wrong.listen = type(right.listen)(port=port)
    with wrong:
        wrong.until(lambda: any("certificate" in line for line in warnings_of(caplog)))
    with right:
        goes_on(right, device)
        device.stop()
    assert sum("certificate must have" in line for line in warnings_of(caplog)) == 1


def test_a_device_that_was_revoked_ends_and_says_so(tmp_path):
    with Federation(tmp_path, **ENDLESS) as federation:
        device = federation.join(0, UnitTrainer())
        goes_on(federation, device)
        [known] = federation.service.devices(federation.run)
        federation.operator.post("revoke", device=known["id"])
        device.end()
        assert isinstance(device.died, RefusedError)
        assert (device.died.code, "was revoked" in str(device.died)) == ("revoked", True)


def test_a_disk_that_is_full_for_a_while_ends_no_device(tmp_path):
    library = build_bad_disk(tmp_path)
    if library is None:
        pytest.skip("no compiler for the library")
    flag, home = tmp_path / "flag", tmp_path / "device"
    environment = {"LD_PRELOAD": str(library), "POTLUCK_BAD_DISK": str(flag)}
    with Federation(tmp_path, **ENDLESS) as federation:
        address = federation.server.address
        flag.write_text(f"{errno.ENOSPC} {home}")  # from the start on
        device = Process(federation, address, invited=True, environment=environment)
        device.until("No space left")
        device.lines.clear()
        flag.unlink()
        device.until("accepted round 2")
        flag.write_text(f"{errno.ENOSPC} {home}")
        device.until("No space left")
        flag.unlink()
        version = accepted(federation)
        device.until(f"accepted round {version + 2}")
        device.end(15)


def test_a_folder_that_a_person_must_mend_ends_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="must be its own"):
        Home(tmp_path / "file" / "home")


def test_without_a_network_a_device_waits_longer_each_time_and_says_it_once(tmp_path, caplog):
    with Federation(tmp_path, **ENDLESS) as federation:
        invitation = federation.invite()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for host in ("127.0.0.1", "no-such-host.invalid"):
        caplog.clear()
        clock = Waits()
        device = Device(
            f"https://{host}:{port}", invitation, tmp_path / host, UnitTrainer(), clock=clock
        )
        federation.until(lambda clock=clock: max(clock.waited, default=0) > 100)
        device.stop()
        assert sum("gives no answer" in line for line in warnings_of(caplog)) == 1


def test_what_is_told_is_told_once_for_each_change(caplog):
    trouble = Trouble(Backoff(HastyClock(), lambda low, high: low))
    first, second = OSError("full: 3 bytes"), RefusedError("unknown", "who?\x1b[2J")
    for error in (first, first, OSError("full: 4 bytes"), second, second, first):
        trouble.wait(error)
    trouble.over()
    trouble.wait(first)
    told = [line.rsplit(": ", 1)[1] for line in warnings_of(caplog)]
    assert told == ["3 bytes", "who?\\x1b[2J", "3 bytes", "3 bytes"]
