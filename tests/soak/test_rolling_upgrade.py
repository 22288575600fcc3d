"""Two servers of one database, of which the older one is replaced while devices are at work."""

import shutil
import subprocess
from pathlib import Path

import pytest

from earlier_versions import tree_of
from serve_process import ServerProcess, experiment
from server_kills import drain
from swarm import Swarm, until

BEFORE = "375012c"
"""Schema 0003, and the requests that devices sign today."""


def is_here(commit):
    words = ["git", "cat-file", "-e", f"{commit}^{{commit}}"]
    return subprocess.run(words, cwd=Path(__file__).parent, capture_output=True).returncode == 0


@pytest.mark.soak
@pytest.mark.skipif(not is_here(BEFORE), reason="the repository's history is not here")
def test_an_older_server_goes_on_beside_a_newer_one_that_upgraded_its_database(
    postgresql, s3, tmp_path
):
    url, blobs = postgresql(), s3()
    text = experiment(clients=4, minimum=0.5, selection_seconds=5.0, report_seconds=8.0)
    places = ("--database", url, "--blobs", blobs)
    swarm = Swarm(tmp_path / "devices")

    def grows(server, by=2):
        version = server.status()["version"]
        until(lambda: server.status()["version"] >= version + by)

    with tree_of(BEFORE) as tree:
        old = ServerProcess(
            tmp_path / "a", text, options=places, environment={"PYTHONPATH": str(tree / "src")}
        )
        assert old.serves()
        servers = [old]
        try:
            for _ in range(2):
                swarm.join(old.address, old.invite())
            home = tmp_path / "b" / "home"
            left_out = shutil.ignore_patterns("*.sock", "lock", "*.db*", "blobs")
            shutil.copytree(old.home.folder, home, ignore=left_out)
            new = ServerProcess(tmp_path / "b", text, options=places)
            assert new.serves()
            servers.append(new)
            assert (home / "potluck-0003.db").exists()
            for server in (new, old):  # a token of the one is good at the other
                swarm.join(new.address, server.invite())
            grows(new, 3)
            assert old.status()["is_leader"]
            assert old.end() == 0
            for device in swarm.devices[:2]:
                swarm.again(device, new.address)
            grows(new, 3)
            assert new.status()["is_leader"]
            assert new.operator.get("audit")["broken"] is None
            drain(new, swarm)
        finally:
            swarm.stop()
            codes = [server.end() for server in servers]
    assert codes == [0, 0]
    assert not new.faults()
    assert not swarm.given_up()
