"""`potluck demo serve`: one run to its end; and that nothing is left, however it is ended."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from potluck import datasets
from potluck.cli.demo import defaults, plan_crashes
from potluck.cli.main import app
from potluck.config.experiment import check_experiment
from potluck.core import ConfigError
from potluck.demo.federation import BASE_BYTES, DEVICE_BYTES, LocalFederation, check_room
from potluck.demo.narration import Narration, PlannedCrash
from potluck.models import vision

CONTENT = {
    "name": "x",
    "task": {"data": "digits", "model": "logistic"},
    "partition": {"kind": "iid"},
    "algorithm": {"client_lr": 0.1},
    "run": {"rounds": 3},
}


class Demo:
    """The command as a process of its own, with its temporary folder in `folder`."""

    def __init__(self, folder, *words):
        command = [sys.executable, "-m", "potluck", "demo", "serve", "--out", folder / "out"]
        self.process = subprocess.Popen(
            [*map(str, command), *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(folder)},
            # As a terminal would start it: a shell starts what is in the background without it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def until(self, word):
        """Read until a line with this word; the processes that there are then."""
        while word not in (line := self.process.stdout.readline()):
            assert line, self.process.stderr.read()
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, number, below):
        """End it, and see that the processes below it end too. Returns its exit status."""
        assert len(below) >= 6, "a host, a server, four devices"
        self.process.send_signal(number)
        code = self.process.wait(40)
        _, alive = psutil.wait_procs(below, timeout=40)
        assert alive == []
        for pipe in (self.process.stdout, self.process.stderr):
            pipe.close()
        return code


def test_rounds_go_on_while_a_device_is_killed_and_the_model_is_plain_pytorch(tmp_path):
    kept = tmp_path / "kept"
    words = ["--devices", 4, "--rounds", 3, "--drop-outs", 1, "--keep", kept]
    demo = Demo(tmp_path, *words)
    said, fault = demo.process.communicate(timeout=300)
    assert demo.process.returncode == 0, fault
    assert "4 devices have enrolled" in said
    [crash] = plan_crashes(1, 4, 3)
    assert f"device {crash.device} was killed in round 2" in said
    rows = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| ")]
    table = [row for row in rows if row[0].isdigit()]
    assert [row[:3] for row in table] == [["1", "1", "3"], ["2", "1", "3"], ["3", "1", "3"]]
    assert [row[3] for row in table] == ["0", "1", "0"]
    assert (tmp_path / "out/demo-served.md").read_text().count("\n") == 5
    path = re.search(r"load_file\('(.*)'\)", said)[1]
    model = vision.TwoNN(input_shape=(1, 8, 8))
    model.load_state_dict(load_file(path))
    test = datasets.digits().test
    right = model(torch.from_numpy(test.inputs)).argmax(1).numpy() == test.targets
    assert table[-1][4] == f"{100 * right.mean():.1f} %"
    for device in range(4):  # each had a folder, and so a key, of its own
        assert (kept / f"device-{device}" / "device.key").exists()
    assert len({(kept / f"device-{k}/device.key").read_bytes() for k in range(4)}) == 4


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.soak), signal.SIGKILL]
)
def test_nothing_is_left_when_it_is_ended(tmp_path, number):
    demo = Demo(tmp_path, "--devices", 4, "--rounds", 10_000, "--drop-outs", 0)
    below = demo.until("round   2")
    assert list(tmp_path.glob("potluck-*"))
    assert demo.end(number, below) == (130 if number == signal.SIGINT else -number)
    assert list(tmp_path.glob("potluck-*")) == []


def test_children_end_with_their_host(tmp_path):
    demo = Demo(tmp_path, "--devices", 4, "--rounds", 10_000, "--drop-outs", 0)
    below = demo.until("round   2")
    [host] = [process for process in below if process.ppid() == demo.process.pid]
    host.kill()
    _, alive = psutil.wait_procs(below, timeout=40)
    assert alive == []
    said = demo.process.communicate(timeout=40)[1]
    assert demo.process.returncode == 1
    assert said.startswith("error: the ")  # whichever is noticed first: processes or server
    assert said.count("\n") == 1
    assert list(tmp_path.glob("potluck-*")) == []


def error_of(*words):
    result = CliRunner().invoke(app, ["demo", "serve", *map(str, words)])
    assert result.exit_code == 1, result.output
    return result.output.splitlines()[-1]


def test_what_cannot_work_is_told_in_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "the address must be free and ours" in error_of("--devices", 2, "--port", port)
    (tmp_path / "bad.toml").write_text("name = 1\n")
    assert error_of("--experiment", tmp_path / "bad.toml").startswith("error: ")
    (tmp_path / "own").mkdir()
    np.savez(tmp_path / "own/one.npz", inputs=np.eye(5, dtype=np.float32), targets=np.arange(5) % 2)
    own = 'data = "folder"\nmodel = "logistic"\npath = "own"'
    text = f'name = "own"\n[task]\n{own}\n[partition]\nkind = "own"\n'
    text += "[algorithm]\nclient_lr = 0.1\n[run]\nrounds = 2\n"
    (tmp_path / "bad.toml").write_text(text)
    told = error_of("--experiment", tmp_path / "bad.toml", "--devices", 2)
    assert "a client for every device, got clients=1" in told
    assert "must be a readable file" in error_of("--experiment", tmp_path / "none.toml")
    assert "at most devices=2, got drop_outs=3" in error_of("--devices", 2, "--drop-outs", 3)
    assert "can share a core" in error_of("--devices", 10**6)
    assert "must be a new or empty folder" in error_of("--keep", tmp_path)


def test_a_machine_that_is_too_small_is_told_how_many_devices_it_has_room_for():
    check_room(7, cores=1, free_bytes=BASE_BYTES + 7 * DEVICE_BYTES)
    with pytest.raises(ConfigError, match=r"8 devices need .* Give --devices 7 or fewer"):
        check_room(8, cores=1, free_bytes=BASE_BYTES + 7 * DEVICE_BYTES)
    with pytest.raises(ConfigError, match="Give --devices 0 or fewer"):
        check_room(1, cores=1, free_bytes=1000)


def test_crashes_are_of_different_devices_between_the_first_round_and_the_last():
    for drop_outs, devices, rounds in ((2, 10, 20), (3, 4, 3), (5, 5, 1), (0, 3, 9)):
        crashes = plan_crashes(drop_outs, devices, rounds)
        assert len({crash.device for crash in crashes}) == len(crashes) == drop_outs
        assert all(2 <= crash.round < max(rounds, 3) for crash in crashes)
        assert crashes == plan_crashes(drop_outs, devices, rounds)


def test_what_an_experiment_says_of_its_server_is_left_alone():
    plain = defaults(check_experiment(CONTENT, "test"), 10)
    assert {"server.goal=7", "server.population=10"} <= set(plain)
    given = CONTENT | {"server": {"goal": 3, "lease_seconds": 1.0}}
    said = " ".join(defaults(check_experiment(given, "test"), 10))
    assert "goal" not in said
    assert "lease" not in said


def test_a_drop_out_counts_for_the_round_in_which_the_device_was_at_work():
    narration = Narration([PlannedCrash(1, 2, 3)])

    def event(device, what, round, ms=0):
        return {
            "is": "event",
            "device": device,
            "what": what,
            "round": round,
            "detail": "",
            "ms": ms,
        }

    assert narration.note(event(1, "training", 4, 1000)) is None
    assert narration.note({"is": "ended", "device": 1, "code": -9}) == 1
    narration.note(event(2, "training", 4, 1500))
    narration.note(event(2, "accepted", 4))
    assert narration.note({"is": "ended", "device": 2, "code": -9}) == 2  # it was waiting
    assert narration.note({"is": "ended", "device": 3, "code": 0}) is None
    row = {
        "number": 4,
        "kind": "train",
        "attempt": 2,
        "accepted": 7,
        "uplink_bytes": 1000,
        "committed_ms": 3500,
    }
    judged = {"round": 4, "kind": "central", "metrics": {"accuracy": 0.5}}
    status = {"rounds": [row], "evaluations": [judged], "state": "running", "round": 4}
    assert narration.note_status(status) == [4]
    assert narration.note_status(status) == []
    assert narration.is_judged
    assert narration.rows() == [("4", "2", "7", "1", "50.0 %", "1 kB", "2.50")]


def test_devices_of_a_federation_are_the_clients_of_its_experiment_in_order(tmp_path):
    file = tmp_path / "x.toml"
    file.write_text(
        'name = "x"\n[task]\ndata = "digits"\nmodel = "logistic"\n[partition]\nkind = "iid"\n'
        "clients = 3\n[algorithm]\nclient_lr = 0.1\n[run]\nrounds = 1\ncohort = 1.0\n"
        "[server]\npopulation = 3\ngoal = 3\npace_seconds = 0.1\n"
    )
    with LocalFederation(file, tmp_path / "state") as federation:
        for device in range(3):
            federation.start(device, invited=True)
        codes = {}
        while len(codes) < 3:
            for news in federation.news(0.2):
                if news["is"] == "ended":
                    codes[news["device"]] = news["code"]
        told = federation.operator.get("devices")
    assert codes == {0: 0, 1: 0, 2: 0}
    assert [(row["client"], row["name"]) for row in told] == [(k, f"device {k}") for k in range(3)]
    assert (tmp_path / "state" / "server").exists()  # it was not to be removed
