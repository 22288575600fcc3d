"""A cluster that is reached from outside, by a ray:// address: a real head node and its server."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed")
pytest.importorskip("grpc", reason="Ray's client is not installed: pip install 'ray[client]'")

SECONDS = 120.0  # for a head node to start on a busy machine

CLIENT = """
import sys
from potluck import Cluster, FedAvg, Task, TwoNN, datasets, partitions, rounds

task = Task(
    model=lambda: TwoNN((1, 8, 8)), data=partitions.iid(datasets.digits(), clients=10, seed=1)
)
algorithm = FedAvg(client_lr=0.1, local_epochs=1)
cluster = Cluster(task, 2, address=sys.argv[1], local="loop")
far = list(rounds(algorithm, task, cohort=0.5, num_rounds=2, executor=cluster))
cluster.close()
near = list(rounds(algorithm, task, cohort=0.5, num_rounds=2, executor="loop"))
assert [r.weights.tobytes() for r in far] == [r.weights.tobytes() for r in near]
print("same bits in round", far[-1].number)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


@pytest.fixture
def cluster(tmp_path):
    """The port of a head node's server for clients, and the environment with its token."""
    port = free_port()
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = os.environ | token | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    # How long the server waits for the process that it starts for a client.
    environment["RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S"] = str(int(SECONDS))
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
    command += ["--port", str(free_port()), "--ray-client-server-port", str(port)]
    command += ["--num-cpus", "2", "--include-dashboard", "false"]
    # Sockets have short names only: pytest's own folder is too deep for Ray.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    command += ["--temp-dir", folder]
    log = tmp_path / "head"
    with log.open("w") as out:
        head = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + SECONDS
        while True:
            if "Ray runtime started" in log.read_text() and answers(port):
                break
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)  # another program's start has no clock of ours
        yield port, environment
    finally:
        head.terminate()  # it ends what it started
        head.wait(SECONDS)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_cluster_reached_by_address_gives_the_bits_of_the_loop(cluster):
    port, environment = cluster
    command = [sys.executable, "-c", CLIENT, f"ray://127.0.0.1:{port}"]
    for patience in (SECONDS, 3 * SECONDS):  # Ray's own client may hang while it connects
        with contextlib.suppress(subprocess.TimeoutExpired):
            client = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=patience
            )
            break
    else:
        pytest.fail(f"Ray's client did not connect in {SECONDS} and in {3 * SECONDS} s")
    assert client.returncode == 0, client.stderr
    assert client.stdout.strip().endswith("same bits in round 2")
