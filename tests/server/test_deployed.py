"""Devices and a server on real sockets: a deployed run is the simulated one, whatever gets lost."""

from __future__ import annotations

import json
import math
import random
from collections import Counter

import numpy as np
import pytest

from fault_proxy import FaultProxy
from federation import Device, Federation, HastyClock, UnitTrainer, offers
from potluck.core import sample_cohort
from potluck.device import join
from potluck.device.agent import OFFERS
from potluck.protocol import CODECS
from potluck.server.rounds.uploads import CHUNK_BYTES
from potluck.simulation import build_algorithm, build_task, rounds

SAMPLED = 'selection = "sampled"\nover_selection = 1.0\npopulation = {0}'


def recorded(device):
    """The requests that a device noted; the manifests between them were not sent."""
    files = sorted((device.folder / "sent").glob("*.jsonl"))  # none before the first
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [line for line in lines if "path" in line]


def simulated(federation):
    """The weights after each round of the experiment's simulation."""
    experiment = federation.experiment
    task = build_task(experiment, federation.data)
    run = experiment.run
    made = rounds(
        build_algorithm(experiment),
        task,
        num_rounds=run.rounds,
        cohort=run.cohort,
        seed=run.seed,
        codec=run.codec or "float32",
    )
    return list(made)


def test_a_deployed_run_is_the_simulated_one(tmp_path, places):
    count = 20
    options = {"rounds": 3, "cohort": 0.25, "server": SAMPLED.format(count), "places": places()}
    with Federation(tmp_path, model="2nn", clients=count, **options) as federation:
        for k in range(count):
            federation.join(k)
        federation.until(lambda: federation.status()["state"] == "finished")
        for device in federation.devices:
            device.end()
            assert device.died is None
            assert device.events[-1].what == "finished"
        for number, expected in enumerate(simulated(federation)):
            np.testing.assert_allclose(
                federation.weights(number), expected.weights, rtol=0, atol=1e-6
            )
        for number in range(1, 4):
            cohort = sample_cohort(count, 0.25, seed=7, round=number)
            took_part = [
                k
                for k, device in enumerate(federation.devices)
                if any(e.what == "accepted" and e.round == number for e in device.events)
            ]
            assert took_part == sorted(map(int, cohort))
        assert federation.status()["version"] == 3


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_a_deployed_run_with_short_updates_is_the_simulated_one(tmp_path, codec):
    """Stochastic rounding and error feedback included: clients come back in later rounds."""
    count = 6
    with Federation(
        tmp_path, clients=count, rounds=4, cohort=0.5, server=SAMPLED.format(count), codec=codec
    ) as federation:
        for k in range(count):
            federation.join(k, offers=offers(k))
        federation.until(lambda: federation.status()["state"] == "finished")
        for device in federation.devices:
            device.end()
            assert device.died is None
        expected = simulated(federation)
        for number, round in enumerate(expected):
            np.testing.assert_allclose(federation.weights(number), round.weights, rtol=0, atol=1e-6)
        sent = [line for device in federation.devices for line in recorded(device)]
        bodies = [line["bytes"] for line in sent if line.get("method") == "PUT"]
        inside = [
            line["message"]["length_bytes"] for line in sent if "update" in line.get("message", {})
        ]
        assert bodies
        assert inside
        assert sum(bodies) + sum(inside) == sum(round.uplink_bytes for round in expected)
        taken = Counter(int(k) for round in expected for k in round.cohort)
        assert max(taken.values()) > 1  # or no residual was ever added


def test_every_answer_to_a_submission_may_be_lost_once(tmp_path, places):
    lost = set()

    def lose(seen):
        is_submission = seen.path == "/v1/report" or seen.method == "PUT"
        if not is_submission or (seen.device, seen.path, seen.digest) in lost:
            return False
        lost.add((seen.device, seen.path, seen.digest))
        return True

    server = "over_selection = 1.0\ngoal = 4"
    federation = Federation(
        tmp_path, clients=4, rounds=3, server=server, plaintext=True, places=places()
    )
    with federation:
        with FaultProxy(federation.port, lose=lose) as proxy:
            for k in range(4):
                federation.join(k, UnitTrainer(), proxy.address, offers=offers(k))
            federation.until(lambda: federation.status()["state"] == "finished")
            for device in federation.devices:
                device.end()
                assert (device.died, device.count("accepted")) == (None, 3)
        # A report for each device and round, and a chunk for those that upload.
        assert len(lost) == 4 * 3 + 2 * 3
        moved = federation.weights() - federation.weights(0)
        np.testing.assert_allclose(moved[:4], 3 / 4, atol=1e-6)  # each counted once in each round
        np.testing.assert_allclose(moved[4:], 0, atol=1e-6)


def test_a_report_is_asked_about_until_it_is_answered_also_after_its_deadline(tmp_path):
    """It counted, and the server was away for longer than the round: the device must know."""
    dark = []

    def lose(seen):
        dark.extend([seen.method] if seen.method == "PUT" and not dark else [])
        return dark[-1:] == ["PUT"]

    server = "goal = 1\nreport_seconds = 1.0\nselection_seconds = 1.0"
    federation = Federation(tmp_path, clients=1, rounds=1, server=server, plaintext=True)
    with federation, FaultProxy(federation.port, lose=lose) as proxy:
        device = federation.join(0, UnitTrainer(), proxy.address)
        federation.until(lambda: federation.status()["version"] == 1)
        over = device.clock.now_ms() + 2_500  # its deadline was 2,000 ms after the assignment
        federation.until(lambda: device.clock.now_ms() > over)
        dark.append("light again")
        federation.until(lambda: federation.status()["state"] == "finished")
        device.end()
    told = [event.what for event in device.events if event.what in ("accepted", "refused")]
    # Attempts before it may have been too short for a busy machine.
    assert (device.died, told[-1], device.count("accepted")) == (None, "accepted", 1)


def test_a_cut_upload_sends_at_most_one_chunk_again(tmp_path, places):
    generator = random.Random(5)
    cuts = Counter()

    def cut(seen):
        """Break each chunk off twice, somewhere."""
        if seen.method != "PUT" or cuts[seen.path] == 2:
            return None
        cuts[seen.path] += 1
        return generator.randrange(300_000)  # less than the last chunk has

    own = tmp_path / "own"
    own.mkdir()
    inputs = np.zeros((5, 16_000), np.float32)
    np.savez(own / "only.npz", inputs=inputs, targets=np.array([0, 1, 0, 1, 0]))
    options = {"own": own, "server": "goal = 1", "plaintext": True, "places": places()}
    federation = Federation(tmp_path, model="2nn", clients=1, rounds=1, **options)
    with federation, FaultProxy(federation.port, cut=cut) as proxy:
        device = federation.join(0, UnitTrainer(), proxy.address)
        federation.until(lambda: federation.status()["state"] == "finished")
        device.end()
        assert device.died is None
        length = federation.weights(0).nbytes
        moved = federation.weights() - federation.weights(0)
        assert (moved.argmax(), np.count_nonzero(np.abs(moved) > 0.5)) == (0, 1)
    assert len(cuts) == math.ceil(length / CHUNK_BYTES) == 13
    assert set(cuts.values()) == {2}
    # For each of the 26 cuts no more than the chunk that was cut was sent again.
    offsets = Counter(line["path"] for line in recorded(device) if line.get("method") == "PUT")
    assert set(offsets.values()) == {3}


def test_a_server_with_another_certificate_gets_no_token(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with Federation(tmp_path / "one") as one, Federation(tmp_path / "two") as two:
        folder = tmp_path / "device"
        device = Device(two.server.address, one.invite(), folder, UnitTrainer())
        one.until(lambda: len(recorded(device)) > 3)  # tries, of which none went out
        device.stop()
        assert two.service.devices(two.run) == []
        fresh = two.invite()
        assert one.join(1, UnitTrainer()).died is None
        assert fresh


@pytest.mark.parametrize("is_inside", [False, True])
def test_what_was_sent_is_on_record(tmp_path, is_inside):
    with Federation(tmp_path, rounds=1, clients=1, server="goal = 1") as federation:
        device = federation.join(0, offers=OFFERS if is_inside else CODECS)
        federation.until(lambda: federation.status()["state"] == "finished")
        device.end()
    lines = recorded(device)
    paths = [line["path"].split("/")[2].split("?")[0] for line in lines]
    assert paths[:3] == ["preview", "enrol", "check-in"]
    [report] = [line["message"] for line in lines if line["path"].endswith("/report")]
    assert report["length_bytes"] == 4 * 650
    if is_inside:
        assert report["update"] == "…"
        assert not {"models", "uploads"} & set(paths)
    else:
        assert {"models", "report", "uploads"} <= set(paths)
        assert [line["bytes"] for line in lines if line.get("method") == "PUT"] == [4 * 650]


def test_a_killed_device_sends_what_it_had_finished_when_it_is_started_again(tmp_path):
    class Killed(BaseException):
        """As far as the server sees, a kill -9: nothing is said, the connection breaks."""

    class KilledClock(HastyClock):
        def wait(self, seconds):
            if (tmp_path / "device0/outbox/report.json").exists():
                raise Killed
            super().wait(seconds)

    trained = []
    with Federation(tmp_path, rounds=1, clients=1, server="goal = 1") as federation:
        trainer = UnitTrainer(lambda: trained.append(1))
        invitation = federation.invite()
        with pytest.raises(Killed):
            for _ in join(
                federation.server.address,
                invitation,
                tmp_path / "device0",
                trainer,
                clock=KilledClock(),
            ):
                pass
        assert federation.status()["version"] == 0
        device = Device(federation.server.address, None, tmp_path / "device0", trainer)
        federation.until(lambda: federation.status()["state"] == "finished")
        device.end()
        assert device.events[0].what == "accepted"
        assert len(trained) == 1
        assert federation.weights()[0] - federation.weights(0)[0] == pytest.approx(1.0)


def test_rounds_close_without_the_devices_that_are_killed(tmp_path, places):
    """Three of ten die in training: their leases expire, the others' reports are enough."""

    class Killed(BaseException):
        pass

    def die():
        raise Killed

    server = "goal = 10\nminimum = 0.7\nover_selection = 1.0\nreport_seconds = 2.0\n" + (
        "selection_seconds = 2.0\nlease_seconds = 1.0\npopulation = 10"
    )
    options = {"rounds": 2, "clients": 10, "server": server, "places": places()}
    with Federation(tmp_path, **options) as federation:
        for k in range(10):
            federation.join(k, UnitTrainer(die) if k in (1, 4, 7) else UnitTrainer())
        federation.until(lambda: federation.status()["state"] == "finished")
        dead = [k for k, device in enumerate(federation.devices) if device.died is not None]
        assert dead == [1, 4, 7]
        moved = federation.weights() - federation.weights(0)
        expected = [0.0 if k in dead else 2 / 7 for k in range(10)]
        np.testing.assert_allclose(moved[:10], expected, atol=1e-6)
        assert [row["accepted"] for row in federation.service.history(federation.run)] == [7, 7]


def test_too_few_reports_abandon_the_round_and_leave_the_model(tmp_path):
    server = "goal = 3\nminimum = 1.0\nover_selection = 1.0\nreport_seconds = 0.5\n" + (
        "selection_seconds = 0.5\npopulation = 2\nattempts = 2"
    )
    with Federation(tmp_path, clients=3, server=server) as federation:
        before = federation.weights(0).copy()
        for k in range(2):
            federation.join(k, UnitTrainer())
        federation.until(lambda: federation.status()["state"] == "paused")
        assert federation.status()["version"] == 0
        np.testing.assert_array_equal(federation.weights(), before)
        assert all(device.died is None for device in federation.devices)
