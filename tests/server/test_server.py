"""The rounds of a served run, in every place for its state, with devices that send fingerprints."""

import json
import math
import re

import numpy as np
import pytest
from safetensors.numpy import load
from sqlalchemy import select

from fleet import CONTENT, Clock, Fleet
from messages import begin, check_in, claims, device_of, read_version, report_metrics
from potluck.algorithms import client_update
from potluck.config.algorithm_section import build_algorithm
from potluck.config.build import build_task
from potluck.config.experiment import check_experiment
from potluck.core import ClientContext, RefusedError
from potluck.engine import TorchRuntime, run_of
from potluck.engine.devices import kernel_threads
from potluck.protocol import Eligibility, Finished, Wait
from potluck.server import RoundSettings, Service
from potluck.server.dashboard.render import Renderer
from potluck.server.rounds import audit_check
from potluck.server.rounds.changes import pause, resume
from potluck.server.rounds.check_in import Assigned, wait
from potluck.server.rounds.enrolment import enrol, issue_tokens, revoke
from potluck.server.rounds.leases import extend_lease, fail
from potluck.server.rounds.uploads import append_chunk, find_report, finish_report
from potluck.server.storage.database_tables import evaluations
from potluck.simulation import build_data, rounds


@pytest.fixture
def fleet(places):
    fleet = Fleet(*places())
    yield fleet
    fleet.service.close()


def test_a_round_adds_the_mean_of_its_reports_to_the_model(fleet):
    fleet.round()
    assert fleet.status()["version"] == 1
    assert fleet.weights().tolist() == [0.25] * 4
    fleet.round()
    assert fleet.weights().tolist() == [0.5] * 4
    assert [row["number"] for row in fleet.service.history(fleet.run)] == [1, 2]
    assert audit_check.check(fleet.service) is None


def test_the_order_of_arrival_changes_no_bit(places):
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(6, 50)).astype(np.float32)
    weights = rng.uniform(0.1, 900, size=6)
    digests = set()
    for _ in range(4):
        fleet = Fleet(*places(), count=6, dim=50)
        fleet.service.tick()
        for i in rng.permutation(6):
            work = fleet.assign(fleet.devices[i]).assignment
            fleet.send(fleet.devices[i], work, vectors[i], weight=float(weights[i]))
        fleet.service.tick()
        row = fleet.service.history(fleet.run)[0]
        digests.add((row["model_sha256"], row["accepted_sha256"]))
        fleet.service.close()
    assert len(digests) == 1


def test_a_served_run_is_the_simulated_one(places):
    content = CONTENT | {"partition": {"kind": "iid", "clients": 12}}
    content |= {"run": {"rounds": 4, "cohort": 0.3, "seed": 7}, "name": "same"}
    experiment = check_experiment(content, "test")
    task = build_task(experiment, build_data(experiment))
    algorithm = build_algorithm(experiment)
    simulated = list(rounds(algorithm, task, cohort=0.3, num_rounds=4, seed=7))
    service = Service.open(*places(), build=build_algorithm, clock=Clock())
    settings = RoundSettings.sampled(experiment)
    runtime = TorchRuntime(task)
    run = service.create_run(experiment, task.initial_weights(7), runtime.spec, settings)
    devices = [
        enrol(service, issue_tokens(service, run, actor="test")[0], bytes([i]) * 32).id
        for i in range(12)
    ]
    for number in range(1, 5):
        service.tick()
        trained = []
        for device in devices:
            work = check_in(service, device)
            if isinstance(work, Wait):
                assert work.reason == "not_selected"
                continue
            received = np.frombuffer(b"".join(read_version(service, run, work.version)), "<f4")
            size = int(task.data.sizes[work.client])
            client = ClientContext(work.seed, work.number, work.client, size)
            train = lambda asked, client=client: runtime.train(run_of(task, asked, client))  # noqa: E731
            with kernel_threads(1):  # as `loop` has, for the same bits
                update = client_update(algorithm, received, client, train)
            said = claims(update.delta, weight=update.weight, loss=update.loss)
            upload = begin(service, device, work.assignment, said)
            append_chunk(service, device, upload.upload, 0, update.delta.astype("<f4").tobytes())
            finish_report(service, device, upload.upload)
            trained.append(work.client)
        assert trained == simulated[number].cohort.tolist()
        service.tick()
        weights = np.frombuffer(b"".join(read_version(service, run, number)), "<f4")
        assert np.array_equal(weights, simulated[number].weights)
    service.tick()
    assert isinstance(check_in(service, devices[0]), Finished)
    service.close()


def test_an_open_round_over_selects_and_closes_at_the_goal(places):
    fleet = Fleet(*places(), count=10, goal=5, over_selection=1.3)
    fleet.service.tick()
    works = [check_in(fleet.service, device) for device in fleet.devices]
    assert [isinstance(work, Assigned) for work in works] == [True] * 7 + [False] * 3
    assert works[7].reason == "full"
    assert works[7].retry_after_seconds >= 0.1
    fleet.service.tick()
    assert fleet.status()["open"]["state"] == "TRAINING"
    goals, told = [], []
    fleet.service.on_goal = lambda: goals.append(1)
    for device, work in zip(fleet.devices[:5], works[:5], strict=True):
        fleet.send(device, work.assignment)
        told.append(len(goals))
    assert told == [0] * 4 + [1]
    with pytest.raises(RefusedError, match="all the reports it needs") as late:
        fleet.send(fleet.devices[5], works[5].assignment)
    assert late.value.code == "late"
    fleet.service.tick()
    with pytest.raises(RefusedError) as late:
        begin(fleet.service, fleet.devices[6], works[6].assignment, claims(np.ones(10)))
    assert late.value.code == "late"
    assert fleet.weights()[:6].tolist() == [np.float32(0.2)] * 5 + [0.0]
    fleet.service.close()


def test_the_minimum_commits_at_the_deadline_and_one_less_abandons(places):
    fleet = Fleet(*places(), count=5)
    for device in fleet.devices[:4]:
        fleet.service.tick()
        fleet.take_part(device)
    fleet.clock.pass_(121)
    fleet.service.tick()
    assert fleet.status()["open"]["state"] == "TRAINING"
    fleet.clock.pass_(599)
    fleet.service.tick()
    assert fleet.status()["version"] == 0
    fleet.clock.pass_(1)
    fleet.service.tick()
    assert fleet.status()["version"] == 1
    assert fleet.status()["open"]["number"] == 2
    first = [fleet.assign(device) for device in fleet.devices[:4]]
    for device, work in zip(fleet.devices[:3], first, strict=False):
        fleet.send(device, work.assignment)
    fleet.clock.pass_(121)
    fleet.service.tick()
    fleet.clock.pass_(600)
    fleet.service.tick()
    status = fleet.status()
    assert (status["version"], status["open"]["number"], status["open"]["attempt"]) == (1, 2, 2)
    assert status["open"]["id"] != first[0].round
    for device, work in zip(fleet.devices, first, strict=False):
        if device != fleet.devices[3]:  # it reported, and may hear so again
            answer = fleet.send(device, work.assignment)
            assert (answer.round, answer.attempt) == (first[0].number, first[0].attempt)
            continue
        with pytest.raises(RefusedError) as late:
            fleet.send(device, work.assignment)
        assert late.value.code == "late"
    fleet.service.close()


def test_three_abandoned_attempts_pause_the_run_and_say_why(places):
    fleet = Fleet(*places(), count=4)
    for attempt in (1, 2, 3):
        fleet.service.tick()
        assert fleet.status()["open"]["attempt"] == attempt
        fleet.assign(fleet.devices[0])
        fleet.clock.pass_(121)
        fleet.service.tick()
    status = fleet.status()
    assert (status["state"], status["version"], status["open"]) == ("paused", 0, None)
    assert "1 devices of at least 4" in status["reason"]
    assert check_in(fleet.service, fleet.devices[0]).reason == "paused"
    resume(fleet.service, fleet.run, actor="test")
    fleet.service.tick()
    assert fleet.status()["open"]["attempt"] == 4
    fleet.round()
    assert fleet.weights().tolist() == [0.25] * 4
    fleet.service.close()


def test_an_expired_lease_frees_the_slot_and_progress_keeps_it(places):
    fleet = Fleet(*places(), count=3, goal=2, lease_seconds=30.0)
    fleet.service.tick()
    silent, busy = (fleet.assign(device) for device in fleet.devices[:2])
    assert check_in(fleet.service, fleet.devices[2]).reason == "full"
    fleet.clock.pass_(20)
    assert extend_lease(fleet.service, fleet.devices[1], busy.assignment).lease_seconds == 30
    fleet.clock.pass_(11)
    fleet.service.tick()
    with pytest.raises(RefusedError, match="lease ran out") as late:
        fleet.send(fleet.devices[0], silent.assignment)
    assert late.value.code == "late"
    fleet.take_part(fleet.devices[2])
    fleet.send(fleet.devices[1], busy.assignment)
    fleet.service.tick()
    assert fleet.weights().tolist() == [0.0, 0.5, 0.5]
    fleet.service.close()


def test_the_same_report_again_is_answered_alike_and_another_conflicts(fleet):
    fleet.service.tick()
    device = fleet.devices[0]
    work = fleet.assign(device)
    first = fleet.send(device, work.assignment)
    assert fleet.send(device, work.assignment) == first
    with pytest.raises(RefusedError) as conflict:
        fleet.send(device, work.assignment, np.ones(4, np.float32))
    assert conflict.value.code == "conflict"
    for other in fleet.devices[1:]:
        fleet.take_part(other)
    fleet.service.tick()
    assert fleet.send(device, work.assignment) == first  # also when the round is over
    assert fleet.weights().tolist() == [0.25] * 4


def test_a_report_that_counts_is_not_taken_back(fleet):
    fleet.service.tick()
    device = fleet.devices[0]
    work = fleet.assign(device)
    first = fleet.send(device, work.assignment)
    for act in (
        lambda: fail(fleet.service, device, work.assignment, "no power"),
        lambda: extend_lease(fleet.service, device, work.assignment),
    ):
        with pytest.raises(RefusedError, match="has reported") as late:
            act()
        assert late.value.code == "late"
    assert fleet.send(device, work.assignment) == first
    assert fleet.status()["open"]["reported"] == 1


def test_a_report_is_answered_alike_by_whichever_lease_of_the_round_it_comes(tmp_path):
    fleet = Fleet(str(tmp_path / "db"), tmp_path / "blobs", count=2, lease_seconds=30.0)
    fleet.service.tick()
    device = fleet.devices[0]
    lost = fleet.assign(device)
    fleet.clock.pass_(31)
    fleet.service.tick()
    work = fleet.assign(device)  # of the same round
    assert (work.round, work.assignment != lost.assignment) == (lost.round, True)
    first = fleet.send(device, work.assignment)
    assert fleet.send(device, lost.assignment) == first  # it counts, so it is not late
    with pytest.raises(RefusedError) as conflict:
        fleet.send(device, lost.assignment, np.ones(2, np.float32))
    assert conflict.value.code == "conflict"
    fleet.service.close()


def test_an_upload_to_a_round_that_is_over_is_late_and_not_unknown(fleet):
    fleet.service.tick()
    device = fleet.devices[0]
    work, body = fleet.assign(device), fleet.vector(device).tobytes()
    upload = begin(fleet.service, device, work.assignment, claims(fleet.vector(device)))
    append_chunk(fleet.service, device, upload.upload, 0, body[:7])
    fleet.clock.pass_(121)
    fleet.service.tick()  # abandoned, and swept
    assert fleet.status()["open"]["attempt"] == 2
    for act in (
        lambda: find_report(fleet.service, device, upload.upload),
        lambda: append_chunk(fleet.service, device, upload.upload, 7, body[7:]),
        lambda: finish_report(fleet.service, device, upload.upload),
    ):
        with pytest.raises(RefusedError) as late:
            act()
        assert late.value.code == "late"


@pytest.mark.parametrize(
    ("vector", "changes", "code"),
    [
        ([np.nan, 0, 0, 0], {}, "not_finite"),
        ([np.inf, 0, 0, 0], {}, "not_finite"),
        ([2e4, 0, 0, 0], {}, "bounds"),
        ([9e3, 0, 0, 0], {"weight": 9e5}, "bounds"),
        ([1, 0, 0], {}, "wrong_length"),
        ([1, 0, 0, 0], {"weight": float("nan")}, "bounds"),
        ([1, 0, 0, 0], {"weight": 0.0}, "bounds"),
        ([1, 0, 0, 0], {"weight": 2e6}, "bounds"),
        ([1, 0, 0, 0], {"loss": float("inf")}, "bounds"),
        ([1, 0, 0, 0], {"sha256": "0" * 64}, "digest"),
        ([1, 0, 0, 0], {"codec": "pickle"}, "malformed"),
    ],
)
def test_a_bad_update_is_refused_and_the_round_goes_on(places, vector, changes, code):
    fleet = Fleet(*places(), count=4, goal=3, over_selection=1.4)
    fleet.service.tick()
    bad = fleet.assign(fleet.devices[0])
    with pytest.raises(RefusedError) as refused:
        fleet.send(fleet.devices[0], bad.assignment, np.array(vector, np.float32), **changes)
    assert refused.value.code == code
    for device in fleet.devices[1:]:
        fleet.take_part(device)
    fleet.service.tick()
    assert fleet.weights().tolist() == [0.0] + [np.float32(1 / 3)] * 3
    assert not [key for key in fleet.stored() if key.startswith("parts/")]
    fleet.service.close()


def test_an_upload_goes_on_where_it_was_cut(fleet):
    fleet.service.tick()
    device = fleet.devices[0]
    work = fleet.assign(device)
    body = fleet.vector(device).tobytes()
    said = claims(fleet.vector(device))
    upload = begin(fleet.service, device, work.assignment, said)
    assert append_chunk(fleet.service, device, upload.upload, 0, body[:7]).offset == 7
    assert append_chunk(fleet.service, device, upload.upload, 0, body[:7]).offset == 7
    assert append_chunk(fleet.service, device, upload.upload, 9, body[9:]).offset == 7
    with pytest.raises(RefusedError) as incomplete:
        finish_report(fleet.service, device, upload.upload)
    assert incomplete.value.code == "offset"
    again = begin(fleet.service, device, work.assignment, said)
    assert again == upload.model_copy(update={"offset": 7})
    with pytest.raises(RefusedError) as malformed:
        append_chunk(fleet.service, device, upload.upload, 7, body[7:] + b"x")
    assert malformed.value.code == "malformed"
    with pytest.raises(RefusedError) as unknown:
        append_chunk(fleet.service, fleet.devices[1], upload.upload, 7, body[7:])
    assert unknown.value.code == "not_found"
    append_chunk(fleet.service, device, upload.upload, 7, body[7:])
    finish_report(fleet.service, device, upload.upload)
    assert fleet.status()["open"]["reported"] == 1


def test_jumps_of_the_wall_clock_move_no_deadline(fleet):
    fleet.service.tick()
    works = [fleet.assign(device) for device in fleet.devices]
    for jump in (3600, -7200, 3600):
        fleet.clock.jump(jump)
        fleet.service.tick()
    for device, work in zip(fleet.devices, works, strict=True):
        fleet.send(device, work.assignment)
    fleet.service.tick()
    assert fleet.status()["version"] == 1


@pytest.mark.parametrize("jump", [3600, -3600])
def test_a_jump_between_two_lives_kills_no_round(fleet, jump):
    fleet.service.tick()
    works = [fleet.assign(device) for device in fleet.devices]
    fleet.service.tick()
    fleet.service.database.close()  # as if killed: it does not resign
    fleet.clock.jump(jump)
    fleet.service = fleet.open()
    fleet.clock.pass_(3)
    fleet.service.tick()
    fleet.clock.pass_(3)
    assert fleet.service.tick()
    for device, work in zip(fleet.devices, works, strict=True):
        assert fleet.assign(device) == work._replace(
            lease_seconds=fleet.assign(device).lease_seconds,
            deadline_ms=fleet.assign(device).deadline_ms,
        )
        fleet.send(device, work.assignment)
    fleet.service.tick()
    assert fleet.status()["version"] == 1


def test_a_server_whose_clock_jumped_back_starts_where_the_last_life_was(fleet):
    fleet.service.tick()
    before = fleet.service.time.now()
    fleet.service.database.close()
    fleet.clock.jump(-3600)
    fleet.service = fleet.open()
    assert fleet.service.time.now() == before  # already at the first check of a signature


def test_a_device_in_the_wrong_condition_is_not_selected(places):
    fleet = Fleet(*places(), needs_charging=True, needs_memory_bytes=100)
    fleet.service.tick()
    device = fleet.devices[0]
    for attributes in (
        Eligibility(),
        Eligibility(charging=False, free_memory_bytes=100),
        Eligibility(charging=True, free_memory_bytes=99),
    ):
        assert check_in(fleet.service, device, attributes).reason == "ineligible"
    work = check_in(fleet.service, device, Eligibility(charging=True, free_memory_bytes=100))
    assert isinstance(work, Assigned)
    fleet.service.close()


def lasting(fleet, seconds):
    """A round of the first device, of so many seconds."""
    fleet.service.tick()
    work = fleet.assign(fleet.devices[0])
    fleet.clock.pass_(seconds / 2)
    extend_lease(fleet.service, fleet.devices[0], work.assignment)
    fleet.clock.pass_(seconds / 2)
    fleet.send(fleet.devices[0], work.assignment)
    fleet.service.tick()


def test_a_device_is_held_for_as_long_as_rounds_were_measured_to_take(places):
    """Not for the time until the first device comes, nor for the first round, nor for an odd one:
    the median of those from the second on."""
    fleet = Fleet(*places(), count=2, goal=1)
    first, second = fleet.devices

    def held():
        """What a device is told that comes 1 s after the round has begun."""
        fleet.service.tick()
        fleet.clock.pass_(5000)  # nobody comes
        work = fleet.assign(first)
        fleet.clock.pass_(1)
        seconds = check_in(fleet.service, second).retry_after_seconds
        assert wait(fleet.service, first, "noted").retry_after_seconds <= seconds + 10
        fleet.send(first, work.assignment)
        fleet.service.tick()
        return seconds

    assert held() == 0.1  # nothing was measured
    lasting(fleet, 400)
    assert 399 <= held() <= 409  # + U(0, 10)
    for seconds in (300, 2, 2):  # beside 400 and 1
        lasting(fleet, seconds)
    assert 1 <= held() <= 3  # the median is 2, and so is the window
    fleet.service.close()


def test_waiting_devices_come_back_over_the_whole_window(places):
    fleet = Fleet(*places(), count=60, goal=1, pace_seconds=30.0)
    for _ in range(2):
        lasting(fleet, 1000)
    fleet.service.tick()
    fleet.assign(fleet.devices[0])
    fleet.clock.pass_(1000)  # as long as it usually takes: the next round may begin
    waits = [check_in(fleet.service, device).retry_after_seconds for device in fleet.devices[1:]]
    assert 0.1 <= min(waits) < 5
    assert 25 < max(waits) <= 30
    per_window = np.histogram(waits, bins=6, range=(0, 30))[0]
    assert per_window.max() <= 3 * len(waits) / 6
    fleet.service.close()


def test_federated_evaluation_is_a_round_that_changes_no_model(places):
    fleet = Fleet(*places(), count=2, federated_every=1)
    fleet.round()
    works = [fleet.assign(device) for device in fleet.devices]
    assert {(work.kind, work.number, work.version) for work in works} == {("evaluate", 1, 1)}
    with pytest.raises(RefusedError, match="asks for metrics"):
        fleet.send(fleet.devices[0], works[0].assignment)
    sums = [{"accuracy": (3.0, 4.0)}, {"accuracy": (1.0, 12.0)}]
    for device, work, metrics in zip(fleet.devices, works, sums, strict=True):
        report_metrics(fleet.service, device, work.assignment, metrics)
    fleet.service.tick()
    [row] = fleet.service.evaluations(fleet.run)
    assert (row["kind"], row["round"], row["metrics"]) == ("federated", 1, {"accuracy": 0.25})
    assert fleet.status()["version"] == 1
    assert fleet.status()["open"]["number"] == 2
    fleet.service.close()


def test_central_evaluation_is_done_once_for_every_version_that_is_due(places):
    fleet = Fleet(*places(), run={"evaluate_every": 2})
    for _ in range(3):
        fleet.round()
    for _ in range(2):
        fleet.service.evaluate(fleet.run, lambda w: {"first": float(w[0])})
    rows = fleet.service.evaluations(fleet.run)
    assert [(row["round"], row["metrics"]["first"]) for row in rows] == [(0, 0.0), (2, 0.5)]
    fleet.service.close()


def test_pause_selects_nobody_and_lets_the_others_finish(fleet):
    fleet.service.tick()
    work = fleet.assign(fleet.devices[0])
    pause(fleet.service, fleet.run, "maintenance", actor="test")
    assert check_in(fleet.service, fleet.devices[1]).reason == "paused"
    fleet.send(fleet.devices[0], work.assignment)
    with pytest.raises(RefusedError, match="must be running, it is paused"):
        pause(fleet.service, fleet.run, "again", actor="test")
    resume(fleet.service, fleet.run, actor="test")
    for device in fleet.devices[1:]:
        fleet.take_part(device)
    fleet.service.tick()
    assert fleet.status()["version"] == 1


def test_a_revoked_device_does_nothing_any_more(fleet):
    fleet.service.tick()
    device = fleet.devices[0]
    work = fleet.assign(device)
    revoke(fleet.service, device, actor="test")
    for call in (
        lambda: check_in(fleet.service, device),
        lambda: fleet.send(device, work.assignment),
        lambda: device_of(fleet.service, device),
    ):
        with pytest.raises(RefusedError) as revoked:
            call()
        assert revoked.value.code == "unknown"


def test_an_export_is_the_model_by_its_names(fleet):
    fleet.round()
    tensors = load(fleet.service.export(fleet.run, actor="test"))
    assert tensors["w"].tolist() == [0.25] * 4
    assert load(fleet.service.export(fleet.run, 0, actor="test"))["w"].tolist() == [0.0] * 4


def test_a_run_is_begun_once_and_another_of_its_name_is_refused(fleet):
    zeros = np.zeros(4, np.float32)
    create = fleet.service.create_run
    assert create(fleet.experiment, zeros, fleet.spec, fleet.settings) == fleet.run
    other = fleet.settings.model_copy(update={"goal": 7})
    with pytest.raises(RefusedError, match=r"begun with server.goal = 4 and not 7\. .*--fresh"):
        create(fleet.experiment, zeros, fleet.spec, other)


def test_a_damaged_update_abandons_the_attempt_and_not_the_server(places):
    fleet = Fleet(*places())
    fleet.service.tick()
    for device in fleet.devices:
        fleet.take_part(device)
    key = next(key for key in fleet.stored() if key.startswith("reports/"))
    fleet.service.blobs.put(key, iter([bytes([1]) * 16]))
    fleet.service.tick()
    assert (fleet.status()["version"], fleet.status()["open"]["attempt"]) == (0, 2)
    fleet.round()
    assert fleet.weights().tolist() == [0.25] * 4
    fleet.service.close()


def test_the_updates_of_a_round_that_is_over_are_gone(places):
    fleet = Fleet(*places(), dim=10_000)
    fleet.round()
    assert {key.partition("/")[0] for key in fleet.stored()} == {"models"}
    fleet.service.close()


def test_an_evaluation_that_gave_no_number_is_stored_as_json_and_is_no_result(places):
    fleet = Fleet(*places())
    try:
        fleet.service.evaluate(fleet.run, lambda w: {"loss": math.nan, "rmse": math.inf, "r2": 0.5})
        with fleet.service.database.read() as db:
            (stored,) = db.execute(select(evaluations.c.metrics)).scalars()
        json.loads(stored, parse_constant=pytest.fail)
        assert [row["metrics"] for row in fleet.service.evaluations(fleet.run)] == [{"r2": 0.5}]
        sections = Renderer(fleet.service, fleet.run).snapshot().sections
        assert not re.search(r"\b(nan|inf)\b", " ".join(sections.values()), re.IGNORECASE)
    finally:
        fleet.service.close()
