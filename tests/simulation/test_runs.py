"""Run directories: killed at any moment, full disks, other experiments."""

import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from potluck.config.algorithm_section import build_algorithm
from potluck.config.build import build_task
from potluck.config.experiment import check_experiment
from potluck.core import DivergedError, RunError
from potluck.simulation import build_data, read_run, read_weights, rounds, train

CONTENT = {
    "name": "small",
    "task": {"data": "digits", "model": "2nn"},
    "partition": {"kind": "shards", "clients": 20},
    "algorithm": {"client_lr": 0.1, "local_epochs": 1},
    "run": {"rounds": 12, "cohort": 0.2, "executor": "loop"},
}


def experiment(**changes):
    content = json.loads(json.dumps(CONTENT))
    for key, value in changes.items():
        section, _, name = key.partition("__")
        content[section][name] = value
    return check_experiment(content, "test")


def files(directory):
    return {n: (Path(directory) / n).read_bytes() for n in ("rounds.jsonl", "final.safetensors")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "undisturbed"
    list(train(experiment(), directory))
    return directory


def test_a_run_directory_holds_what_the_rounds_gave(undisturbed):
    setup = experiment()
    data = build_data(setup)
    direct = list(
        rounds(build_algorithm(setup), build_task(setup, data), cohort=0.2, num_rounds=12)
    )
    record = read_run(undisturbed)
    assert record.is_finished
    assert [line["round"] for line in record.rounds] == list(range(13))
    assert [line["metrics"] for line in record.rounds] == [r.metrics for r in direct]
    assert [line["uplink_bytes"] for line in record.rounds] == [r.uplink_bytes for r in direct]
    assert np.array_equal(read_weights(undisturbed), direct[-1].weights)
    assert len(record.seconds) == 13
    assert record.manifest["num_clients"] == 20
    assert "seconds" not in (undisturbed / "rounds.jsonl").read_text()


def test_a_run_that_goes_on_with_other_compiled_code_says_so(undisturbed, tmp_path, caplog):
    directory = shutil.copytree(undisturbed, tmp_path / "run")
    list(train(experiment(run__rounds=13), directory))
    assert not caplog.messages
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["kernels"] == "none"  # of a 2NN
    path.write_text(json.dumps(manifest | {"kernels": "lstm-1a"}))
    list(train(experiment(run__rounds=14), directory))
    (said,) = caplog.messages
    assert "(lstm-1a)" in said
    assert "(none)" in said
    del manifest["kernels"]  # of an earlier version
    path.write_text(json.dumps(manifest))
    list(train(experiment(run__rounds=15), directory))
    assert len(caplog.messages) == 1


def test_a_tree_without_its_history_may_be_told_its_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("POTLUCK_COMMIT", "0123456789ab")
    list(train(experiment(), tmp_path / "run"))
    assert read_run(tmp_path / "run").manifest["commit"] == "0123456789ab"


def test_a_finished_run_is_not_run_again(undisturbed):
    before = files(undisturbed)
    assert list(train(experiment(), undisturbed)) == []
    assert files(undisturbed) == before


def test_more_rounds_continue_a_finished_run(undisturbed, tmp_path):
    list(train(experiment(run__rounds=5), tmp_path / "run"))
    more = list(train(experiment(), tmp_path / "run"))
    assert [round.number for round in more] == list(range(6, 13))
    assert files(tmp_path / "run") == files(undisturbed)


def test_a_caller_that_stops_leaves_a_run_that_continues(undisturbed, tmp_path):
    for round in train(experiment(), tmp_path / "run"):
        if round.number == 4:
            break
    assert not (tmp_path / "run" / "final.safetensors").exists()
    rest = list(train(experiment(), tmp_path / "run"))
    assert [r.number for r in rest] == list(range(5, 13))
    assert files(tmp_path / "run") == files(undisturbed)


def test_workers_write_the_same_bytes(undisturbed, tmp_path):
    list(train(experiment(run__executor="workers", run__workers=2), tmp_path / "run"))
    assert files(tmp_path / "run") == files(undisturbed)


PROGRAM = """
import json, sys
from potluck.config.experiment import check_experiment
from potluck.simulation.runs import train as runs
runs._CHECKPOINT_SECONDS = 0.0
for round in runs.train(check_experiment(json.loads(sys.argv[1]), "test"), sys.argv[2]):
    pass
"""


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.soak)])
@pytest.mark.parametrize("executor", ["loop", "workers"])
def test_kill_9_at_random_times_changes_nothing(tmp_path, executor, kills):
    content = json.loads(json.dumps(CONTENT))
    content["run"] |= {"rounds": 100, "executor": "loop"}
    list(train(check_experiment(content, "test"), tmp_path / "undisturbed"))
    content["run"]["executor"] = executor
    unfinished = kill_at_random_times(content, tmp_path / "run", kills)
    assert unfinished >= 0.75 * kills, "the kills came too late to test anything"
    assert files(tmp_path / "run") == files(tmp_path / "undisturbed")


@pytest.mark.parametrize("executor", [pytest.param("loop", marks=pytest.mark.soak), "workers"])
def test_kill_9_loses_no_state_of_a_client(tmp_path, executor):
    content = json.loads(json.dumps(CONTENT))
    content["algorithm"] |= {"name": "scaffold", "server": {"name": "momentum"}}
    list(train(check_experiment(content, "test"), tmp_path / "undisturbed"))
    content["run"]["executor"] = executor
    unfinished = kill_at_random_times(content, tmp_path / "run", kills=4)
    assert unfinished >= 1, "the kills came too late to test anything"
    assert files(tmp_path / "run") == files(tmp_path / "undisturbed")


def test_kill_9_loses_nothing_of_what_a_codec_owes(tmp_path):
    content = json.loads(json.dumps(CONTENT))
    content["run"]["codec"] = "int4"
    list(train(check_experiment(content, "test"), tmp_path / "undisturbed"))
    content["run"]["executor"] = "workers"
    unfinished = kill_at_random_times(content, tmp_path / "run", kills=4)
    assert unfinished >= 1, "the kills came too late to test anything"
    assert files(tmp_path / "run") == files(tmp_path / "undisturbed")


def kill_at_random_times(content, run, kills):
    """Start a run again and again, kill it each time, then let it finish; how many of the kills
    came before its end."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(content), str(run)]
    seed = random.SystemRandom().randrange(10_000)
    print(f"seed of the kills: {seed}")
    dice = random.Random(seed)
    log = run / "rounds.jsonl"
    unfinished = 0
    for _ in range(kills):
        # Let it get a round or two further, then kill it within what about two rounds take.
        lines = log.read_bytes().count(b"\n") if log.exists() else 0
        process = subprocess.Popen(command)
        goal = lines + dice.choice([1, 1, 1, 2])
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_bytes().count(b"\n") >= goal:
                break
            time.sleep(0.001)
        time.sleep(dice.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        unfinished += not (run / "final.safetensors").exists()
    subprocess.run(command, check=True)
    return unfinished


def test_a_torn_last_line_is_made_again(undisturbed, tmp_path):
    run = tmp_path / "run"
    for round in train(experiment(), run):
        if round.number == 6:
            break
    with (run / "rounds.jsonl").open("a") as file:
        file.write('{"round": 7, "loss": 0.')
    list(train(experiment(), run))
    assert files(run) == files(undisturbed)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"algorithm__client_lr": 0.2}, "algorithm.client_lr was 0.1 there and is 0.2 here"),
        ({"partition__seed": 5}, "partition.seed was 0"),
        ({"run__cohort": 0.5}, "run.cohort was 0.2"),
    ],
)
def test_a_directory_of_another_experiment_is_refused_and_kept(undisturbed, changes, difference):
    before = files(undisturbed)
    with pytest.raises(RunError, match=re.escape(difference)):
        list(train(experiment(**changes), undisturbed))
    with pytest.raises(RunError, match="seed was 0 there and is 1 here"):
        list(train(experiment(), undisturbed, seed=1))
    assert files(undisturbed) == before


def test_a_run_has_one_writer(tmp_path):
    first = train(experiment(), tmp_path / "run")
    next(first)
    with pytest.raises(RunError, match="in use"):
        next(train(experiment(), tmp_path / "run"))
    first.close()
    assert next(train(experiment(), tmp_path / "run")).number == 1


def test_early_stop_at_the_target(tmp_path):
    results = list(train(experiment(run__target=0.3, run__rounds=200), tmp_path / "run"))
    reached = [r.metrics["accuracy"] >= 0.3 for r in results]
    assert reached[-1]
    assert not any(reached[:-1])
    assert read_run(tmp_path / "run").is_finished
    assert list(train(experiment(run__target=0.3, run__rounds=200), tmp_path / "run")) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_named_and_loses_nothing(undisturbed, small_disk):
    run = small_disk / "run"
    for round in train(experiment(), run):
        if round.number == 3:
            break
    checkpoint = (run / "checkpoint.safetensors").read_bytes()
    room = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "filler").write_bytes(b"x" * (room - len(checkpoint) // 2))
    with pytest.raises(RunError, match="no space left"):
        list(train(experiment(), run))
    assert (run / "checkpoint.safetensors").read_bytes() == checkpoint
    assert not list(run.glob("*.partial"))
    (small_disk / "filler").unlink()
    list(train(experiment(), run))
    assert files(run) == files(undisturbed)


def test_a_disk_too_full_for_a_line_of_the_log_is_named(undisturbed, tmp_path):
    run = tmp_path / "run"
    for round in train(experiment(), run):
        if round.number == 3:
            break
    timings = (run / "timings.jsonl").rename(run / "kept")
    (run / "timings.jsonl").symlink_to("/dev/full")  # a device that is always full
    with pytest.raises(RunError, match="no space left"):
        list(train(experiment(), run))
    timings.rename(run / "timings.jsonl")
    list(train(experiment(), run))
    assert files(run) == files(undisturbed)


def test_an_unwritable_run_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="must be writable"):
        list(train(experiment(), tmp_path / "file" / "run"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_run_directory_is_named(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(RunError, match="must be writable"):
        list(train(experiment(), tmp_path / "run"))


def test_a_loss_that_turns_nan_stops_at_the_last_good_round(tmp_path):
    run = tmp_path / "run"
    setup = experiment(algorithm__client_lr=1e4, partition__kind="iid")
    with pytest.raises(DivergedError, match=r"client '\d+' \(number \d+\), round \d+: .*must be"):
        list(train(setup, run))
    record = read_run(run)
    assert not record.is_finished
    weights = read_weights(run)
    assert np.isfinite(weights).all()
    last = record.rounds[-1]["round"]
    good = list(
        rounds(
            build_algorithm(setup),
            build_task(setup, build_data(setup)),
            cohort=0.2,
            num_rounds=last,
        )
    )
    assert np.array_equal(weights, good[-1].weights)


def test_what_is_no_run_directory_is_named(tmp_path):
    with pytest.raises(RunError, match=r"must hold manifest\.json"):
        read_run(tmp_path)


def test_a_corrupt_checkpoint_is_named(tmp_path):
    run = tmp_path / "run"
    next(train(experiment(), run))
    (run / "checkpoint.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(RunError, match="must be a safetensors file"):
        list(train(experiment(), run))
