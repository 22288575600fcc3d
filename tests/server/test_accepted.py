"""What was accepted is not changed or removed, however requests, revocations and the end of the
round interleave.

Each request runs in a thread of its own, at a server of its own, and stops before each step of its
blob store. A schedule says whose step is next.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from sqlalchemy import select

from fleet import Fleet, fingerprint
from messages import begin, claims
from potluck.core import RefusedError
from potluck.protocol import Accepted
from potluck.server.rounds.check_in import wait
from potluck.server.rounds.commit import sweep
from potluck.server.rounds.enrolment import revoke
from potluck.server.rounds.state_machine import abandon_round
from potluck.server.rounds.uploads import CHUNK_BYTES, append_chunk, find_report, finish_report
from potluck.server.storage.database_tables import reports, rounds, runs
from remote import Served, read

DIM, CUT = 12, 16  # floats of an update, bytes of a chunk
STEPS = ("put", "read", "size", "delete", "append", "part_size", "seal", "drop", "_list")


class Schedule:
    """Lets one thread at a time go on to its next step."""

    def __init__(self, dice: random.Random) -> None:
        self._dice, self._here = dice, threading.local()
        self._parked: dict[str, threading.Semaphore] = {}
        self._stopped = threading.Semaphore(0)
        self.trace: list[str] = []

    def step(self, what: str) -> None:
        """Stop until it is this thread's turn; other threads go on as they like."""
        name = getattr(self._here, "name", None)
        if name is not None:
            turn = self._parked[name] = threading.Semaphore(0)
            self.trace.append(f"{name} {what}")
            self._stopped.release()
            turn.acquire()

    def run(self, acts) -> dict[str, object]:
        """What each act gave, or the exception that it raised."""
        results: dict[str, object] = {}

        def play(name, act) -> None:
            self._here.name = name
            self.step("begin")
            try:
                results[name] = act()
            except Exception as error:
                results[name] = error
            finally:
                self._stopped.release()

        threads = [threading.Thread(target=play, args=item) for item in acts.items()]
        for thread in threads:
            thread.start()
        for _ in threads:
            self._stopped.acquire()
        while self._parked:
            self._parked.pop(self._dice.choice(sorted(self._parked))).release()
            self._stopped.acquire()
        for thread in threads:
            thread.join()
        return results


def stepped(store, schedule):
    """The same store, which stops before each of its methods."""

    def stopping(name):
        method = getattr(type(store), name)

        @functools.wraps(method)
        def stop(self, *arguments):
            schedule().step(name)
            return method(self, *arguments)

        return stop

    found = {name: stopping(name) for name in STEPS if hasattr(store, name)}
    store.__class__ = type("Stepped", (type(store),), found)


class Kitchen:
    """Servers of one run, and rounds of two devices: one is disturbed, the other reports."""

    def __init__(self, places) -> None:
        self.fleet = Fleet(*places(), count=1, dim=DIM, goal=2, minimum=0.5, attempts=1000)
        self.servers = [self.fleet.service, *(self.fleet.open() for _ in range(3))]
        self.schedule = Schedule(random.Random(0))
        for server in self.servers[1:]:
            stepped(server.blobs, lambda: self.schedule)
        self.count = 1

    def close(self) -> None:
        for server in self.servers[1:]:
            server.close()
        self.fleet.service.close()

    def rows(self):
        with self.fleet.service.database.read() as db:
            return db.execute(select(reports, rounds.c.swept).join(rounds)).all()

    def play(self, seed: int) -> None:
        """One round, in which three of `acts` happen at once, in an order that is drawn."""
        dice, fleet = random.Random(seed), self.fleet
        fleet.service.tick()
        device = fleet.enrol(self.count)
        self.count += 1
        good, other = (np.full(DIM, value, "<f4") for value in (1.0, 2.0))
        is_damaged = dice.random() < 0.3
        sent = (other if is_damaged else good).tobytes()
        service = fleet.service
        work = fleet.assign(device)
        partner = fleet.assign(fleet.devices[0])
        upload = begin(service, device, work.assignment, claims(good)).upload
        for start in range(0, len(sent) - CUT, CUT):
            append_chunk(service, device, upload, start, sent[start : start + CUT])

        def complete(server):
            start = len(sent) - CUT
            append_chunk(server, device, upload, start, sent[start:])
            return finish_report(server, device, upload)

        def again(server):
            found = begin(server, device, work.assignment, claims(good))
            if not isinstance(found, Accepted):
                body = good.tobytes()
                for start in range(found.offset, len(body), CUT):
                    found = append_chunk(server, device, upload, start, body[start : start + CUT])
                found = finish_report(server, device, upload)
            return found

        def end(server):
            with server.database.write() as db:
                run = db.execute(select(runs).with_for_update()).one()
                here = select(rounds).where(rounds.c.id == work.round).with_for_update()
                abandon_round(db, run, db.execute(here).one(), "the test", server.time.now())

        def sweep_it(server):
            end(server)
            free = copy.copy(server)
            free.check = lambda db: None
            sweep(free)

        acts = [
            lambda s: wait(s, device, "noted").retry_after_seconds,
            complete,
            again,
            lambda s: begin(s, device, work.assignment, claims(other)),
            lambda s: revoke(s, device, actor="test"),
            lambda s: find_report(s, device, upload),
            end,
            sweep_it,
        ]
        chosen = [complete, acts[seed % 8], acts[seed // 8 % 8]]
        self.schedule = Schedule(dice)
        told = {
            f"{i}": functools.partial(act, server)
            for i, (act, server) in enumerate(zip(chosen, self.servers[1:], strict=True))
        }
        results = self.schedule.run(told)
        self.check(seed, device, work, results, is_over=not {end, sweep_it}.isdisjoint(chosen))
        if fleet.status()["open"] is not None:
            fleet.send(fleet.devices[0], partner.assignment, good)
        while (fleet.status()["open"] or {}).get("id") == work.round:
            fleet.clock.pass_(fleet.settings.report_seconds)
            fleet.service.tick()
        fleet.service.tick()
        left = [key for key in fleet.stored() if key.startswith(("reports", "parts"))]
        assert not left, (seed, left, self.schedule.trace)

    def check(self, seed, device, work, results, *, is_over) -> None:
        told = (seed, results, self.schedule.trace)
        rows = [row for row in self.rows() if (row.device, row.round) == (device, work.round)]
        for result in results.values():
            assert not isinstance(result, Exception) or isinstance(result, RefusedError), told
            if isinstance(result, Accepted):
                assert [row.sha256 for row in rows] == [result.sha256], told
        if not is_over:  # what was accepted is there, whole
            for row in rows:
                body = b"".join(self.fleet.service.blobs.read(row.key))
                assert hashlib.sha256(body).hexdigest() == row.sha256, told


@pytest.fixture(scope="module")
def kitchen(places):
    made = Kitchen(places)
    yield made
    made.close()


def test_no_order_of_requests_changes_what_was_accepted(kitchen):
    for other in range(8):  # beside two requests that complete the same upload, and one
        kitchen.play(8 * other + 1)
        kitchen.play(64 + 8 * other)


@pytest.mark.soak
@pytest.mark.parametrize("first", range(0, 2048, 64))
def test_no_order_of_many_changes_what_was_accepted(kitchen, first):
    for seed in range(first, first + 64):
        kitchen.play(seed)


def test_overlapping_last_chunks_are_answered_and_count_once(places, tmp_path):
    dim = 300_000  # two chunks
    with Served(tmp_path, dim=dim, count=2, places=places()) as served:
        devices = [served.device() for _ in range(2)]
        given = devices[0].assigned()
        body = fingerprint(given.client, dim).tobytes()
        upload = devices[0].report(given, body).upload
        devices[0].put(upload, 0, body[:CHUNK_BYTES])
        path = f"/v1/uploads/{upload}?offset={CHUNK_BYTES}"
        last = body[CHUNK_BYTES:]

        def put(headers):  # a request that is overtaken by a later one is refused as a replay
            return devices[0].send("PUT", path, last, headers=headers)

        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(put, [devices[0].signed("PUT", path, last) for _ in range(6)]))
        assert {answer.status_code for answer in answers} <= {200, 401, 429}
        assert any(isinstance(read(answer), Accepted) for answer in answers)
        devices[1].take_part(dim)
        served.until(lambda status: status["version"] == 1)
        assert served.weights()[:3] == [0.5, 0.5, 0.0]
