"""The dashboard without a browser: who gets in, what the pages say, and the stream."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
import threading
import time

import httpx
import pytest

from fleet import Fleet
from potluck.protocol import Error, parse_message
from potluck.server.dashboard.charts import draw, thin
from potluck.server.dashboard.dashboard_app import HEADERS, MAX_STREAMS
from potluck.server.dashboard.events import Snapshot, SnapshotFeed
from potluck.server.dashboard.render import Renderer
from potluck.server.dashboard.sign_in import (
    KEY_SECONDS,
    SESSION_SECONDS,
    Throttle,
    is_session,
    issue_key,
    sign_in,
    sign_out,
)
from potluck.server.http.notifier import Notifier
from potluck.server.rounds.changes import pause
from potluck.server.rounds.enrolment import enrol, issue_tokens
from potluck.server.rounds.leases import fail
from potluck.server.storage.database_tables import sign_ins
from remote import Caller, Served

HOSTILE = "<script>alert(1)</script>\"'&"


@contextlib.contextmanager
def browser(served: Served):
    """A client that keeps cookies and follows nothing."""
    context = ssl.create_default_context(cadata=served.home.certificate.read_text())
    context.check_hostname = False
    with httpx.Client(base_url=served.server.address, verify=context, timeout=20) as client:
        yield client


def key_of(served: Served) -> str:
    return served.operator.post("dashboard")["link"].partition("#")[2]


def enter(client: httpx.Client, key: str, **headers: str) -> httpx.Response:
    return client.post("/dashboard/sign-in", data={"key": key}, headers=headers)


@pytest.fixture
def fleet(places):
    made = Fleet(*places(), count=3, minimum=1.0)
    yield made
    made.service.close()


def test_every_route_is_closed_to_all_but_a_session(tmp_path):
    with Served(tmp_path) as served, browser(served) as client:
        device = served.device()
        other = Caller(served.server.address, served.home.certificate.read_text())
        served.callers.append(other)  # a key that nobody enrolled
        admin = {"Authorization": f"Bearer {served.home.credential()}"}
        forged = {"Cookie": f"{served.server.dashboard.cookie}={'A' * 43}"}
        for path, status in (("/dashboard", 303), ("/dashboard/events", 401)):
            for headers in (
                {},
                device.signed("GET", path),
                other.signed("GET", path),
                admin,
                forged,
                {"Cookie": f"{served.server.dashboard.cookie}={key_of(served)}"},
            ):
                answer = client.get(path, headers=headers)
                assert answer.status_code == status
                assert "fleet" not in answer.text
                if status == 401:
                    assert parse_message(answer.content, Error).code == "unsigned"
                else:
                    assert answer.headers["location"] == "/dashboard/sign-in"
        for method in ("HEAD", "PUT", "DELETE", "PATCH"):
            assert client.request(method, "/dashboard").status_code == 405
        assert client.get("/dashboard/%2e%2e/tables.py").status_code == 404
        assert client.get("/dashboard/dashboard.html").status_code == 404
        assert enter(client, key_of(served)).status_code == 303
        assert client.get("/dashboard").status_code == 200
        # a session opens nothing of the devices'
        assert client.post("/v1/check-in", content=b"{}").status_code == 401
        assert client.post("/dashboard/sign-out").status_code == 303
        assert client.get("/dashboard").status_code == 303


def test_a_key_works_once_and_the_cookie_is_for_the_server_alone(tmp_path):
    with Served(tmp_path) as served, browser(served) as client:
        key = key_of(served)
        answer = enter(client, key)
        cookie = answer.headers["set-cookie"]
        assert cookie.startswith("__Host-potluck-")
        for word in ("HttpOnly", "Secure", "SameSite=strict", "Path=/", f"Max-Age={7 * 86400}"):
            assert word in cookie
        assert "domain" not in cookie.lower()
        client.cookies.clear()
        assert enter(client, key).status_code == 401
        assert enter(client, key_of(served), **{"Sec-Fetch-Site": "cross-site"}).status_code == 401
        big = client.post("/dashboard/sign-in", data={"key": "x" * 2000})
        assert (big.status_code, client.post("/dashboard/sign-in").status_code) == (413, 415)


def test_wrong_keys_are_throttled(tmp_path):
    with Served(tmp_path) as served, browser(served) as client:
        codes = [enter(client, "wrong").status_code for _ in range(6)]
        assert codes == [401] * 5 + [429]
        late = enter(client, "wrong")
        assert (late.status_code, late.headers["retry-after"]) == (429, "60")
        # They may have come from somebody else behind the same proxy.
        assert enter(client, key_of(served)).status_code == 303


def test_every_answer_carries_the_headers(tmp_path):
    with Served(tmp_path) as served, browser(served) as client:
        names = ("", "/sign-in", "/events", "/style.css", "/script.js", "/icon.svg")
        for path in names:
            answer = client.get(f"/dashboard{path}")
            assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        enter(client, key_of(served))
        page = client.get("/dashboard")
        assert {name: page.headers[name] for name in HEADERS} == HEADERS
        assert not re.search(
            r"<script(?! src)|<style| style=| on[a-z]+=|https?://(?!www\.w3)", page.text
        )


def test_many_look_and_stopping_ends_them_soon(tmp_path):
    with Served(tmp_path) as served, browser(served) as client:
        enter(client, key_of(served))
        cookies, started, ended = dict(client.cookies), threading.Barrier(21), []
        context = ssl.create_default_context(cadata=served.home.certificate.read_text())
        context.check_hostname = False

        def look() -> None:
            with (
                httpx.Client(verify=context, cookies=cookies, timeout=20) as one,
                one.stream("GET", f"{served.server.address}/dashboard/events") as answer,
            ):
                assert answer.headers["content-type"].startswith("text/event-stream")
                lines = answer.iter_lines()
                while next(lines) != "event: seen":
                    pass
                started.wait(20)
                for _ in lines:
                    pass
                ended.append(time.monotonic())

        viewers = [threading.Thread(target=look) for _ in range(20)]
        for viewer in viewers:
            viewer.start()
        started.wait(20)
        assert served.server.dashboard.num_streams == 20
        assert served.operator.get("status")["state"] == "running"
        stopped = time.monotonic()
        served.server.stop()
        for viewer in viewers:
            viewer.join(20)
        served.thread.join(20)
        assert len(ended) == 20
        assert time.monotonic() - stopped < 5  # alone on a quiet machine it is under 1


def test_a_stream_ends_with_its_session_and_no_other(tmp_path):
    with Served(tmp_path) as served, browser(served) as stays, browser(served) as leaves:
        for client in (stays, leaves):
            enter(client, key_of(served))
        with (
            stays.stream("GET", "/dashboard/events") as one,
            leaves.stream("GET", "/dashboard/events") as other,
        ):
            one_lines, other_lines = one.iter_lines(), other.iter_lines()
            for lines in (one_lines, other_lines):
                while next(lines) != "event: seen":
                    pass
            assert leaves.post("/dashboard/sign-out").status_code == 303
            for _ in other_lines:  # until it ends
                pass
            served.operator.post("pause")  # a change that is shown to who stayed
            while next(one_lines) != "event: seen":
                pass


def test_only_the_newest_key_works_and_serving_makes_none(tmp_path):
    with Served(tmp_path) as served, browser(served) as client:
        with served.run.service.database.read() as db:
            assert db.execute(sign_ins.select()).all() == []
        older, newest = key_of(served), key_of(served)
        assert enter(client, older).status_code == 401
        assert enter(client, newest).status_code == 303


def test_too_many_streams_are_refused(tmp_path):
    with Served(tmp_path) as served, browser(served) as client:
        enter(client, key_of(served))
        served.server.dashboard.num_streams = MAX_STREAMS
        answer = client.get("/dashboard/events")
        assert parse_message(answer.content, Error).code == "overloaded"
        assert answer.headers["retry-after"]


def test_keys_and_sessions_expire_and_are_stored_as_hashes(fleet):
    db, run = fleet.service.database, fleet.run
    key = issue_key(db, run, 0, actor="test")
    assert sign_in(db, run, key, KEY_SECONDS * 1000) is None
    session = sign_in(db, run, key, KEY_SECONDS * 1000 - 1)
    assert session is not None
    assert sign_in(db, run, key, 1) is None
    begin = KEY_SECONDS * 1000 - 1
    assert is_session(db, run, session, begin + SESSION_SECONDS * 1000 - 1)
    assert not is_session(db, run, session, begin + SESSION_SECONDS * 1000)
    assert not is_session(db, "another", session, begin)
    with db.read() as connection:
        stored = str(connection.execute(sign_ins.select()).all())
    assert key not in stored
    assert session not in stored
    sign_out(db, run, session, begin)
    assert not is_session(db, run, session, begin)
    issue_key(db, run, 0, actor="test")
    issue_key(db, run, KEY_SECONDS * 1000, actor="test")  # forgets the expired one
    with db.read() as connection:
        assert len(connection.execute(sign_ins.select()).all()) == 1


def test_a_throttle_gives_tries_back_with_time():
    now = 0.0
    throttle = Throttle(lambda: now, tries=2, seconds=10.0)
    throttle.wrong("a")
    assert throttle.left("a")
    throttle.wrong("a")
    assert not throttle.left("a")
    assert throttle.left("b")
    now = 10.0
    assert throttle.left("a")


def test_sections_tell_the_rounds_of_the_database(fleet):
    renderer = Renderer(fleet.service, fleet.run)
    assert "No round yet" in renderer.snapshot().sections["rounds"]
    fleet.round()
    fleet.service.tick()
    given = fleet.assign(fleet.devices[0])
    fail(fleet.service, fleet.devices[0], given.assignment, "out_of_memory")
    fleet.assign(fleet.devices[1])
    told = renderer.snapshot().sections
    assert "0 of 3 reports accepted, at least 3 needed" in told["round"]
    assert '<li aria-current="step">Selecting</li>' in told["round"]
    assert "3/3" in told["rounds"]
    assert "<dt>Uplink</dt><dd>36 B" in told["summary"]  # 3 reports of 3 float32
    assert "out of memory" in told["devices"]
    fleet.clock.pass_(121)
    fleet.service.tick()
    told = renderer.snapshot().sections
    assert "the selection deadline passed: 1 devices of at least 3" in told["abandoned"]
    assert "<svg" in told["charts"]
    assert (
        'aria-label="Loss, after round 1: training: 0.5; training, median: 0.5"' in told["charts"]
    )


def test_reports_are_divided_among_device_classes(fleet):
    token = issue_tokens(fleet.service, fleet.run, actor="test")[0]
    enrol(fleet.service, token, b"x" * 32, device_class="phone")
    fleet.round()
    rows = re.findall(
        r"<tr>.*?</tr>", Renderer(fleet.service, fleet.run).snapshot().sections["classes"]
    )
    cells = [re.sub(r"<[^>]+>", " ", row).split() for row in rows]
    assert cells[1][:5] == ["unnamed", "3", "3", "3", "100.0"]
    assert cells[2][:5] == ["phone", "1", "1", "0", "0.0"]


def test_nothing_hostile_becomes_html(fleet):
    token = issue_tokens(fleet.service, fleet.run, actor="test")[0]
    device = enrol(fleet.service, token, b"x" * 32, name=HOSTILE, device_class=HOSTILE).id
    fleet.service.tick()
    given = fleet.assign(device)
    fail(fleet.service, device, given.assignment, HOSTILE)
    fleet.service.evaluate(fleet.run, lambda _: {HOSTILE: 0.5})
    pause(fleet.service, fleet.run, HOSTILE, actor="test")
    renderer = Renderer(fleet.service, fleet.run)
    page = renderer.page(renderer.snapshot())
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 6
    assert "experiment" in page
    assert "<td>2nn</td>" in page


def test_where_nothing_changed_a_look_is_one_query(fleet):
    from sqlalchemy import event as sqlalchemy_event

    renderer, asked = Renderer(fleet.service, fleet.run), []
    first = renderer.snapshot()
    sqlalchemy_event.listen(
        fleet.service.database.engine,
        "before_cursor_execute",
        lambda *a: asked.append(a[2]) if a[2].startswith("SELECT") else None,
    )
    assert renderer.snapshot() is first
    assert len(asked) == 1
    assert Renderer(fleet.service, fleet.run).snapshot() == first  # as another process would say


def test_viewers_share_looks_and_are_told_only_what_changed():
    looks = []

    def look() -> Snapshot:
        looks.append(time.monotonic())
        return Snapshot(str(len(looks)), {"a": "same", "b": f"<p>\n{len(looks)}</p>"})

    async def view(feed: SnapshotFeed, notifier: Notifier) -> list[list[str]]:
        told = []
        async for event in feed.events(""):
            told.append(event.encode().decode().splitlines()[:-1])
            if len(told) == 6:
                notifier.close()
        return told

    async def scene() -> list[list[list[str]]]:
        notifier = Notifier()
        feed = SnapshotFeed(look, notifier)
        return await asyncio.gather(*(view(feed, notifier) for _ in range(50)))

    told = asyncio.run(scene())
    assert len(looks) <= 3
    assert told[0][:6] == [
        ["retry: 1000"],
        ["event: a", "data: same"],
        ["event: b", "data: <p>", "data: 1</p>"],
        ["id: 1", "event: seen", "data: 1"],
        ["event: b", "data: <p>", "data: 2</p>"],
        ["id: 2", "event: seen", "data: 2"],
    ]


def test_who_has_seen_it_is_told_nothing_again():
    async def scene() -> list[bytes]:
        notifier = Notifier()
        feed = SnapshotFeed(lambda: Snapshot("7", {"a": "x"}), notifier)
        asyncio.get_running_loop().call_later(0.05, notifier.close)
        return [event.encode() async for event in feed.events("7")]

    assert asyncio.run(scene()) == [b"retry: 1000\r\n\r\n"]


def test_a_long_curve_is_thinned_and_an_empty_one_is_not_drawn():
    points = [(i, i / 10_000) for i in range(10_001)]
    kept = thin(points)
    assert (kept[0], kept[-1], len(kept) <= 242) == (points[0], points[-1], True)
    assert len(draw("Loss", {"training": points})) < 12_000
    assert draw("Loss", {"training": []}) == ""
    assert "<svg" in draw("Loss", {"training": [(0, 0.0)]})
    assert "1 kB" in draw("Bytes", {"up": [(1, 1000.0)]}, label=lambda v: f"{v / 1000:g} kB")


def test_a_key_of_one_process_signs_in_at_another_and_both_show_the_same(fleet):
    other = fleet.open()
    key = issue_key(fleet.service.database, fleet.run, 0, actor="test")
    session = sign_in(other.database, fleet.run, key, 1)
    assert session is not None
    assert is_session(fleet.service.database, fleet.run, session, 2)
    fleet.round()
    assert Renderer(other, fleet.run).snapshot() == Renderer(fleet.service, fleet.run).snapshot()
    sign_out(other.database, fleet.run, session, 3)
    assert not is_session(fleet.service.database, fleet.run, session, 4)
    other.close()
