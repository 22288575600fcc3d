"""Small vectors inside messages, on a served run with real sockets, databases and devices."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from sqlalchemy import select

import messages
from federation import Federation, UnitTrainer
from fleet import Fleet, fingerprint
from intermediary import Intermediary
from potluck.core import RefusedError
from potluck.protocol import (
    CODECS,
    INLINE,
    INLINE_BYTES,
    Accepted,
    Assignment,
    Error,
    Upload,
    encode_inline,
    encode_message,
)
from potluck.server.rounds import audit_check
from potluck.server.rounds.enrolment import revoke
from potluck.server.rounds.inline_reports import Arrival, accept_batch
from potluck.server.storage.database_tables import assignments, audit, reports
from remote import Caller, Served, read

BOTH = ("float32", INLINE)


def assigned(device: Caller) -> Assignment:
    return device.assigned(BOTH)


def report(device: Caller, given: Assignment, body: bytes, **changes):
    """The answer to a report with its update inside; `update` may be another than `body`."""
    return device.report(given, body, **({"update": encode_inline(body)} | changes))


def unit(given: Assignment, dim: int) -> bytes:
    return fingerprint(given.client, dim).astype("<f4").tobytes()


@pytest.fixture(scope="module")
def served(tmp_path_factory, places):
    folder = tmp_path_factory.mktemp("served")
    with Served(folder, count=50, dim=64, places=places()) as served:
        yield served


def test_rounds_are_made_of_two_requests_a_device(tmp_path, places):
    with Served(tmp_path, count=3, places=places()) as served:
        devices = [served.device() for _ in range(3)]
        numbers = [device.sequence for device in devices]
        for number in (1, 2):
            served.until(lambda told: told["open"])
            for device in devices:
                given = assigned(device)
                content = base64.b64decode(given.model)
                manifest = json.loads(given.manifest)
                assert hashlib.sha256(content).hexdigest() == manifest["sha256"]
                assert np.frombuffer(content, "<f4").tolist() == served.weights()
                assert isinstance(report(device, given, unit(given, 4)), Accepted)
            served.until(lambda told, number=number: told["round"] == number)
        assert [device.sequence - n for device, n in zip(devices, numbers, strict=True)] == [4] * 3
        assert served.weights() == pytest.approx([2 / 3] * 3 + [0.0], abs=1e-6)


def test_real_devices_check_in_and_report_and_ask_nothing_else(tmp_path):
    asked = []

    def note(answer):  # in a thread for each connection
        if b'"type":"wait"' not in answer.content:
            asked.append(answer.path)
        return answer.content

    server = "goal = 3\npopulation = 3\nover_selection = 1.0"
    with (
        Federation(tmp_path, clients=3, rounds=4, server=server) as federation,
        Intermediary(federation.port, federation.operator._home, note) as between,
    ):
        for k in range(3):
            federation.join(k, UnitTrainer(), between.address)
        federation.until(lambda: federation.status()["state"] == "finished")
        for device in federation.devices:
            device.end()
            assert device.died is None
    # A look at the plan, an enrolment, four rounds, and the check-in that is told of the end.
    assert Counter(asked) == {
        "/v1/preview": 3,
        "/v1/enrol": 3,
        "/v1/check-in": 15,
        "/v1/report": 12,
    }


def test_the_old_way_and_the_new_make_the_same_model(tmp_path, places):
    found = []
    for way in ("inside", "uploaded", "mixed"):
        with Served(tmp_path / way, count=4, dim=5, places=places()) as served:
            devices = [served.device() for _ in range(4)]
            served.until(lambda told: told["open"])
            for k, device in enumerate(devices):
                if way == "inside" or (way == "mixed" and k % 2):
                    given = assigned(device)
                    body = (unit_of(k) / 3).astype("<f4").tobytes()
                    assert isinstance(report(device, given, body), Accepted)
                else:
                    given = device.assigned()
                    assert given.model is None
                    body = (unit_of(k) / 3).astype("<f4").tobytes()
                    upload = device.report(given, body)
                    assert isinstance(device.put(upload.upload, 0, body), Accepted)
            served.until(lambda told: told["round"] == 1)
            [row] = served.run.service.history(served.run.id)
            found.append((row["model_sha256"], row["accepted_sha256"]))
    assert found[0] == found[1] == found[2]


def unit_of(k: int) -> np.ndarray:
    return fingerprint(k, 5)


def test_a_model_that_is_not_small_is_not_inside(tmp_path):
    with Served(tmp_path, count=1, dim=INLINE_BYTES // 4 + 1) as served:
        device = served.device()
        served.until(lambda told: told["open"])
        assert assigned(device).model is None


def test_the_same_again_is_answered_alike_and_another_conflicts(tmp_path, places):
    with Served(tmp_path, count=2, places=places()) as served:
        first, second = served.device(), served.device()
        served.until(lambda told: told["open"])
        given, other = assigned(first), assigned(second)
        body = unit(given, 4)
        accepted = report(first, given, body)
        assert report(first, given, body) == accepted
        assert isinstance(first.report(given, body), Accepted)  # announced, the old way
        changed = np.full(4, 2.0, "<f4").tobytes()
        assert report(first, given, changed).code == "conflict"
        assert isinstance(report(second, other, unit(other, 4)), Accepted)
        served.until(lambda told: told["round"] == 1)
        later = report(first, given, body)
        assert (later.round, later.sha256) == (accepted.round, accepted.sha256)
        assert report(first, given, changed).code == "conflict"
        assert served.weights() == [0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("body", "changes", "code", "is_final"),
    [
        (np.full(64, np.nan, "<f4").tobytes(), {}, "not_finite", True),
        (np.full(64, 1e6, "<f4").tobytes(), {}, "bounds", True),
        (bytes(252), {}, "wrong_length", False),
        (bytes(256), {"update": encode_inline(bytes(252))}, "wrong_length", False),
        (bytes(256), {"update": encode_inline(bytes(260))}, "wrong_length", False),
        (bytes(256), {"sha256": "00" * 32}, "digest", False),
        (bytes(256), {"update": encode_inline(b"\1" + bytes(255))}, "digest", False),
        (bytes(256), {"update": "AA=A"}, "malformed", False),
        (bytes(256), {"codec": "int8"}, "malformed", False),
        (bytes(256), {"round": 9}, "malformed", False),
        (bytes(256), {"assignment": "0" * 32}, "not_found", False),
    ],
)
def test_a_bad_one_is_refused_by_itself(served, body, changes, code, is_final):
    device = served.device()
    served.until(lambda told: told["open"])
    given = assigned(device)
    message = encode_message(device.report_of(given, body, update=encode_inline(body), num_steps=1))
    message = json.dumps(json.loads(message) | changes).encode()
    answer = read(device.send("POST", "/v1/report", message))
    assert isinstance(answer, Error), answer
    assert answer.code == code
    with served.run.service.database.read() as db:
        mine = select(assignments.c.state).where(assignments.c.id == given.assignment)
        assert db.scalar(mine) == ("failed" if is_final else "active")
        named = (audit.c.actor == f"device {device.id}") & (audit.c.action == "bad update")
        bad = select(audit.c.detail).where(named)
        assert len(db.scalars(bad).all()) == is_final
        assert db.scalar(select(reports.c.device).where(reports.c.device == device.id)) is None
    if is_final:
        good = unit(given, 64)
        assert report(device, given, good).code == "late"
    else:
        assert isinstance(report(device, given, unit(given, 64)), Accepted)
    assert audit_check.check(served.run.service) is None


def test_a_report_that_is_replayed_is_refused_whatever_it_holds(served):
    device = served.device()
    served.until(lambda told: told["open"])
    given = assigned(device)
    body = unit(given, 64)
    message = encode_message(device.report_of(given, body, update=encode_inline(body)))
    signed = device.signed("POST", "/v1/report", message)
    assert isinstance(read(device.send("POST", "/v1/report", message, headers=signed)), Accepted)
    again = read(device.send("POST", "/v1/report", message, headers=signed))
    assert again.code == "replayed"
    torn = b"{" * 100
    signed = device.signed("POST", "/v1/report", torn)
    assert read(device.send("POST", "/v1/report", torn, headers=signed)).code == "malformed"
    assert read(device.send("POST", "/v1/report", torn, headers=signed)).code == "replayed"


def test_of_many_at_once_as_many_count_as_the_round_has_room_for(tmp_path, places):
    with Served(
        tmp_path, count=3, goal=3, over_selection=4.0, population=12, places=places()
    ) as served:
        devices = [served.device() for _ in range(12)]
        served.until(lambda told: told["open"])
        works = [assigned(device) for device in devices]
        with ThreadPoolExecutor(12) as pool:
            bodies = [fingerprint(k % 4, 4).astype("<f4").tobytes() for k in range(12)]
            answers = list(pool.map(report, devices, works, bodies))
        kinds = Counter(getattr(answer, "code", "accepted") for answer in answers)
        assert kinds == {"accepted": 3, "late": 9}
        served.until(lambda told: told["round"] == 1)
        [row] = served.run.service.history(served.run.id)
        assert row["accepted"] == 3
        late = next(k for k, answer in enumerate(answers) if isinstance(answer, Error))
        assert report(devices[late], works[late], bodies[late]).code == "late"


def test_a_device_that_was_thrown_out_is_unknown_at_once(tmp_path, places):
    with Served(tmp_path, count=1, places=places()) as served:
        device = served.device()
        served.until(lambda told: told["open"])
        given = assigned(device)
        revoke(served.run.service, device.id, actor="test")
        assert report(device, given, unit(given, 4)).code == "unknown"
        assert device.check_in(BOTH).code == "unknown"


def arrival(fleet: Fleet, device: str, assignment, vector=None, **changes) -> Arrival:
    vector = fleet.vector(device) if vector is None else vector
    return messages.arrival(fleet.service, device, assignment.assignment, vector, **changes)


def test_one_batch_holds_the_good_the_bad_and_the_same_twice(places):
    fleet = Fleet(*places(), count=6, goal=3, over_selection=2.0)
    fleet.service.tick()
    works = {device: fleet.assign(device) for device in fleet.devices}
    a, b, c, d, e, f = fleet.devices
    nan = np.full(6, np.nan, np.float32)
    batch = [
        arrival(fleet, a, works[a]),
        arrival(fleet, a, works[a], sequence=9),  # the same once more
        arrival(fleet, b, works[b], nan),
        arrival(fleet, b, works[b], sequence=9),  # its part in the round is over
        arrival(fleet, c, works[a]),  # another's assignment
        arrival(fleet, d, works[d], sequence=0),
        arrival(fleet, d, works[d]),
        arrival(fleet, e, works[e]),
        arrival(fleet, f, works[f]),  # one more than the goal
    ]
    told = [getattr(one, "code", "taken") for one in accept_batch(fleet.service, batch, "float32")]
    expected = ["taken", "taken", "not_finite", "late", "not_found", "replayed", "taken", "taken"]
    assert told == [*expected, "late"]
    assert fleet.status()["open"]["state"] == "AGGREGATING"
    fleet.service.tick()
    third = np.float32(1 / 3)
    assert fleet.weights().tolist() == [third, 0.0, 0.0, third, third, 0.0]
    assert audit_check.check(fleet.service) is None
    fleet.service.close()


def test_what_came_inside_is_gone_when_its_round_is_over(places):
    fleet = Fleet(*places())
    fleet.service.tick()
    batch = [arrival(fleet, device, fleet.assign(device)) for device in fleet.devices]
    assert all(isinstance(one, Accepted) for one in accept_batch(fleet.service, batch, "float32"))
    fleet.service.tick()
    assert fleet.status()["version"] == 1
    with fleet.service.database.read() as db:
        kept = db.execute(select(reports.c.content, reports.c.key, reports.c.sha256)).all()
    assert len(kept) == 4
    assert all((row.content, row.key) == (None, None) and row.sha256 for row in kept)
    assert fleet.stored() == []  # not even the models are files
    fleet.service.close()


def test_a_row_that_was_damaged_abandons_the_attempt_and_not_the_server(places):
    fleet = Fleet(*places())
    fleet.service.tick()
    batch = [arrival(fleet, device, fleet.assign(device)) for device in fleet.devices]
    accept_batch(fleet.service, batch, "float32")
    with fleet.service.database.write() as db:
        one = reports.c.device == fleet.devices[0]
        db.execute(reports.update().where(one).values(content=bytes([1]) * 16))
    fleet.service.tick()
    assert (fleet.status()["version"], fleet.status()["open"]["attempt"]) == (0, 2)
    fleet.round()
    assert fleet.weights().tolist() == [0.25] * 4
    fleet.service.close()


def test_an_upload_that_was_begun_may_end_inside_a_report(tmp_path, places):
    with Served(tmp_path, count=1, places=places()) as served:
        device = served.device()
        served.until(lambda told: told["open"])
        given = assigned(device)
        body = unit(given, 4)
        upload = device.report(given, body)
        assert isinstance(upload, Upload)
        device.put(upload.upload, 0, body[:5])
        assert isinstance(report(device, given, body), Accepted)
        path = f"/v1/uploads/{upload.upload}"
        assert isinstance(read(device.send("GET", path)), Accepted)
        served.until(lambda told: told["round"] == 1)
        assert served.weights() == [1.0, 0.0, 0.0, 0.0]


def test_a_device_that_does_not_know_of_it_is_given_nothing_it_does_not_know(served):
    device = served.device()
    given = device.assigned(CODECS)
    assert b'"model"' not in encode_message(given)


def test_a_report_of_many_updates_says_unknown_to_none_but_strangers(places):
    fleet = Fleet(*places(), count=2, goal=2)
    fleet.service.tick()
    work = fleet.assign(fleet.devices[0])
    claim, said = mine = arrival(fleet, fleet.devices[0], work)
    stranger = (claim._replace(device="f" * 32), said)
    refused, taken = accept_batch(fleet.service, [stranger, mine], "float32")
    assert isinstance(refused, RefusedError)
    assert refused.code == "unknown"  # revoked, or never enrolled
    assert isinstance(taken, Accepted)
    fleet.service.close()
