"""Clients that are slow hold nobody up but themselves."""

from __future__ import annotations

import json
import time

import httpx
import numpy as np
import pytest

from potluck.protocol import Accepted, Error, encode_message
from potluck.server.http import bodies, transfers
from potluck.server.http.admission import DEVICE_REQUESTS
from remote import Served, read
from slow_clients import Slow, are_open, rest

DIM = 40_000
"""A chunk of it is longer than what is read before a slot is taken."""


@pytest.fixture(scope="module")
def served(tmp_path_factory, places):
    """A server that waits longer for bodies than any machine takes for a test."""
    folder = tmp_path_factory.mktemp("slow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies, "GRACE_SECONDS", 3600.0)
        patch.setattr(transfers, "LEAST_RATE", 0.0)
        with Served(folder, count=50, dim=DIM, places=places()) as served:
            yield served


def test_anonymous_bodies_that_do_not_come_hold_nobody_up(served):
    strangers = [served.caller() for _ in range(16)]
    with Slow(served) as slow, httpx.Client(verify=False, base_url=served.server.address) as other:
        form = "application/x-www-form-urlencoded"
        held = [slow.message(stranger, "/v1/enrol") for stranger in strangers]
        held += [slow.message(stranger, "/v1/preview") for stranger in strangers]
        held += [slow.message(stranger, "/v1/check-in") for stranger in strangers * 4]
        held += [slow.send("POST", "/dashboard/sign-in", {}, 99, kind=form) for _ in range(80)]
        assert other.get("/health").json() == {"status": "ok"}
        key = served.operator.post("dashboard")["link"].partition("#")[2]
        assert other.post("/dashboard/sign-in", data={"key": key}).status_code == 303
        assert other.get("/dashboard").status_code == 200
        accepted = served.device().take_part(DIM)[2]
        assert isinstance(accepted, Accepted)
        assert are_open(held) == len(held)  # all this was done while they were waited for


def test_slow_requests_of_devices_hold_nobody_up(served):
    devices = [served.device() for _ in range(8)]
    uploads = [device.report(device.assigned(), bytes(4 * DIM)) for device in devices]
    with Slow(served) as slow:
        held = [
            slow.message(device, path)
            for device in devices
            for path in ("/v1/check-in", "/v1/report", "/v1/progress") * (DEVICE_REQUESTS // 3)
        ]
        chunks = [
            slow.chunk(device, upload.upload, 0, 4 * DIM)
            for device, upload in zip(devices, uploads, strict=True)
        ]
        assert isinstance(served.device().take_part(DIM)[2], Accepted)
        assert are_open(held + chunks) == len(held) + len(chunks)


def test_a_device_sends_one_large_body_at_a_time_and_the_newest_counts(served):
    device = served.device()
    body = bytes(4 * DIM)
    upload = device.report(device.assigned(), body)
    with Slow(served) as slow:
        broke_off = [slow.chunk(device, upload.upload, 0, len(body)) for _ in range(3)]
        assert isinstance(device.put(upload.upload, 0, body), Accepted)
        for secure in broke_off:
            answer = rest(secure)  # replayed: it was the last to be noted
            assert b'"code":"overloaded"' in answer or b'"code":"replayed"' in answer


def test_replays_take_nothing_of_what_is_their_devices(served):
    device = served.device()
    body = encode_message(device.check_in_of())
    headers = device.signed("POST", "/v1/check-in", body)
    first = read(device.send("POST", "/v1/check-in", body, headers=headers))
    assert not isinstance(first, Error)
    with Slow(served) as slow:
        part = [slow.send("POST", "/v1/check-in", headers, len(body)) for _ in range(12)]
        whole = [slow.send("POST", "/v1/check-in", headers, len(body), body) for _ in range(12)]
        for _ in range(3):
            assert not isinstance(device.check_in(), Error)
        assert are_open(part) == len(part)
        for secure in whole:
            assert b'"code":"replayed"' in rest(secure)


def test_an_answer_that_is_not_read_ends_with_the_next_one(tmp_path):
    """And a part of a model that is larger than what sockets keep."""
    with Served(tmp_path, count=2, dim=4_000_000) as served:
        device = served.device()
        sha256 = json.loads(device.assigned().manifest)["sha256"]
        with Slow(served) as slow:
            unread = slow.download(device, sha256)
            assert unread.recv(1) == b"H"  # it has begun
            assert len(device.send("GET", f"/v1/models/{sha256}").content) == 16_000_000
            assert len(rest(unread)) < 16_000_000


@pytest.mark.soak
def test_more_devices_than_places_that_stand_still_hold_nobody_up_for_long(tmp_path, places):
    """Each holds a place for a chunk and one for a model, of which no byte moves."""
    dim, chunk = 4_000_000, 1 << 20
    with Served(tmp_path, places=places(), count=100, dim=dim) as served, Slow(served) as slow:
        body = np.ones(dim, "<f4").tobytes()
        honest = served.device()
        given = honest.assigned()
        sha256 = json.loads(given.manifest)["sha256"]
        for _ in range(70):
            device = served.device()
            upload = device.report(device.assigned(), body)
            slow.chunk(device, upload.upload, 0, chunk)
            slow.download(device, sha256)
        started = time.monotonic()
        answer = honest.send("GET", f"/v1/models/{sha256}")
        while answer.status_code == 429:
            answer = honest.send("GET", f"/v1/models/{sha256}")
        assert len(answer.content) == len(body)
        stood = honest.report(given, body)
        while not isinstance(stood, Accepted):
            if isinstance(stood, Error):
                assert stood.code == "overloaded"
                stood = honest.report(given, body)
            else:
                at = stood.offset
                stood = honest.put(stood.upload, at, body[at : at + chunk])
        assert time.monotonic() - started < 90.0
