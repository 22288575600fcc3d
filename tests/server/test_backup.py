"""Backup, loss of everything, restore: devices go on, come back, or are told how."""

import shutil
import stat
from contextlib import closing

import pytest
from typer.testing import CliRunner

from federation import Device, Federation, UnitTrainer
from fleet import Fleet
from potluck.cli.main import app
from potluck.core import ConfigError, ProtocolError, RunError, StorageError
from potluck.protocol import Manifest, ManifestSpec, new_key, public_key, sign_manifest
from potluck.protocol.manifest import verify_manifest
from potluck.server.open_run import open_server
from potluck.server.process import Listen
from potluck.server.rounds import audit_check
from potluck.server.rounds.changes import begin_epoch
from potluck.server.storage.backup import back_up, restore
from potluck.server.storage.state_folder import StateFolder
from potluck.server.storage.stored_run import run_of

TEXT = """name = "kept"
[task]
data = "digits"
model = "2nn"
[partition]
kind = "iid"
clients = 2
[algorithm]
client_lr = 0.1
[algorithm.server]
name = "momentum"
[run]
rounds = 100000
cohort = 2
evaluate_every = 100000
[server]
goal = 2
minimum = 0.5
attempts = 100000
population = 2
pace_seconds = 0.1
selection_seconds = 1.0
report_seconds = 5.0
long_poll_seconds = 1.0
"""


def federation(folder, places, **options):
    folder.mkdir(parents=True, exist_ok=True)
    # Small enough for its row; of the optimizer's vector there are blobs.
    (folder / "experiment.toml").write_text(TEXT.replace("2nn", "logistic"))
    served = Federation.of(folder / "experiment.toml")
    served.places = places
    served.options = options
    return served


def flags(places):
    return ["--database", places[0], "--blobs", places[1]]


def run(*words):
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_restored_server_has_its_devices_back(places, tmp_path, caplog):
    old, new, copy = places(), places(), tmp_path / "copy"
    first = federation(tmp_path / "first", old)
    with first as served:
        devices = [served.join(k, UnitTrainer()) for k in range(2)]
        early = served.invite()
        served.until(lambda: served.status()["version"] >= 2)
        told = run("backup", copy, "--home", tmp_path / "first" / "server", *flags(old))
        assert "backed up: the run 'kept' after" in told
        kept = served.status()["version"]
        late = served.invite()
        for k, invitation in ((2, early), (3, late)):
            home = tmp_path / "first" / f"device{k}"
            devices.append(Device(served.server.address, invitation, home, UnitTrainer()))
            served.until(lambda home=home: (home / "enrolment.json").exists())
        served.devices = devices
        served.until(lambda: served.status()["version"] >= kept + 4)
        seen = served.status()["version"]
        port, address = served.port, served.server.address
        served.devices = []  # they outlive their server
    shutil.rmtree(tmp_path / "first" / "server")
    again = federation(tmp_path / "again", new, restored=True)
    again.listen = Listen(port=port)
    told = run("restore", copy, "--home", tmp_path / "again" / "server", *flags(new))
    assert "--restored" in told
    with again as served:
        served.devices = devices
        assert served.status()["version"] < seen
        served.until(lambda: "Ask whoever runs the server for a new invitation" in caplog.text)
        devices[3].stop()  # it had gone on asking
        served.until(lambda: devices[2].count("enrolled") == 2)
        home = devices[3].folder
        devices[3] = Device(address, served.invite(), home, UnitTrainer())
        served.until(lambda: devices[3].count("accepted") >= 1)
        at = served.status()["version"]
        counts = [device.count("accepted") for device in devices]
        served.until(
            lambda: (
                served.status()["version"] > at + 1
                and all(d.count("accepted") > c for d, c in zip(devices[:3], counts, strict=False))
            )
        )
        assert served.status()["devices"] == 4
        assert audit_check.check(served.service) is None
        assert [device.died for device in devices] == [None] * 4
        for device in devices:
            device.stop()
            assert not [event for event in device.events if "the manifest must be" in event.detail]


@pytest.mark.parametrize(
    ("seen", "given", "is_taken"),
    [
        ((0, 7), (0, 6), False),
        ((0, 7), (0, 7), True),
        ((0, 7), (1, 1), True),
        ((2, 7), (1, 9), False),
        ((2, 7), (2, 6), False),
    ],
)
def test_only_a_higher_epoch_brings_older_versions(seen, given, is_taken, tmp_path):
    from potluck.core import Spec
    from potluck.device.folder import Home as Folder

    spec, key = Spec(("w",), ((2,),)), new_key()
    manifest = Manifest(
        version=given[1], previous=given[1] - 1, run="r", round=1, spec=ManifestSpec.of(spec),
        length_bytes=8, sha256="0" * 64, plan={}, created_ms=1, expires_ms=9, epoch=given[0],
    )  # fmt: skip
    data, signature = sign_manifest(key, manifest)
    assert (b"epoch" in data) == (given[0] > 0)
    folder = Folder(tmp_path / "device")
    folder.accept_manifest(seen[1], seen[0])
    assert folder.manifest == seen
    last = dict(zip(("last_seen_epoch", "last_seen_version"), folder.manifest, strict=True))
    places = (data, signature, public_key(key))
    if is_taken:
        assert verify_manifest(*places, run="r", now_ms=5, **last).epoch == given[0]
        folder.accept_manifest(given[1], given[0])
        assert folder.manifest == given
    else:
        with pytest.raises(ProtocolError, match="epoch"):
            verify_manifest(*places, run="r", now_ms=5, **last)
    folder.close()


def epoch(fleet):
    with fleet.service.database.read() as db:
        return run_of(db, fleet.run).epoch


def test_each_restore_of_one_backup_begins_another_epoch(tmp_path):
    fleet = Fleet(str(tmp_path / "db"), tmp_path / "blobs")
    fleet.service.tick()
    fleet.assign(fleet.devices[0])
    epochs = []
    for _ in range(3):
        begin_epoch(fleet.service, fleet.run, actor="test")
        epochs.append(epoch(fleet))
    assert epochs == [epochs[0], epochs[0] + 1, epochs[0] + 2]
    assert epochs[0] == fleet.clock.wall // 1000  # as after another restore of an older copy
    fleet.service.tick()
    assert (fleet.status()["state"], fleet.status()["open"]["attempt"]) == ("running", 2)
    fleet.service.close()


def served_folder(folder):
    """A server's folder with a run that was begun."""
    folder.mkdir()
    (folder / "experiment.toml").write_text(TEXT)
    open_server(folder / "experiment.toml", [], folder / "server", Listen(port=0)).close()
    return StateFolder(folder / "server")


def test_a_backup_is_a_private_folder_that_can_be_served_and_is_brought_up_to_date(tmp_path):
    home, copy = served_folder(tmp_path / "one"), tmp_path / "copy"
    assert back_up(home, None, None, copy).models == 2
    before = {path: path.stat().st_mtime_ns for path in (copy / "blobs").rglob("*")}
    back_up(home, None, None, copy)
    assert {path: path.stat().st_mtime_ns for path in (copy / "blobs" / "models").rglob("*")} == {
        path: time for path, time in before.items() if path.parent.name == "models"
    }
    for path in (copy, *copy.glob("*.key"), copy / "potluck.db"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
    file = tmp_path / "one" / "experiment.toml"
    open_server(file, [], copy, Listen(port=0), restored=True).close()


def test_what_cannot_be_backed_up_or_restored_is_told_and_nothing_is_overwritten(tmp_path):
    home, copy = served_folder(tmp_path / "one"), tmp_path / "copy"
    with pytest.raises(RunError, match=r"got none in .*--database"):
        back_up(StateFolder(tmp_path / "none"), None, None, copy)
    with pytest.raises(ConfigError, match="a folder of its own"):
        back_up(home, None, None, home.folder)
    back_up(home, None, None, copy)
    with pytest.raises(StorageError, match="must be empty, got rows"):
        restore(copy, home, None, None)
    other = served_folder(tmp_path / "two")
    with pytest.raises(RunError, match="got another server's"):
        back_up(other, None, None, copy)
    with pytest.raises(RunError, match="got none in"):
        restore(tmp_path / "none", home, None, None)
    with closing(home.begin()), pytest.raises(RunError, match="another server is at work"):
        restore(copy, home, None, None)
    file = tmp_path / "one" / "experiment.toml"
    with pytest.raises(ConfigError, match="--restored goes on with a run that was begun"):
        open_server(file, [], tmp_path / "new", Listen(port=0), restored=True)
    (model,) = (path for path in (copy / "blobs" / "models").iterdir())
    model.write_bytes(b"other" + model.read_bytes()[5:])
    with pytest.raises(StorageError, match="got other bytes"):
        restore(copy, StateFolder(tmp_path / "three"), None, None)
    assert restore(copy, StateFolder(tmp_path / "four"), None, home.blobs).models == 2
