"""The security of the service at its full sizes; each test writes benchmarks/server/x<n>.json."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from record import ROOT, record
from test_access import DEVICES, FAULTS, _faulty, at_work
from test_malformed import assert_unharmed, attacked
from test_traffic import captured, leaks

from potluck.protocol import Enrolled, Error, parse_message
from remote import Served

pytestmark = pytest.mark.soak


def test_x1_10_000_malformed_requests(tmp_path):
    found = attacked(tmp_path, num_generated=4000, num_broken=6500)
    must = "10,000 malformed requests on every route, by schemathesis and raw sockets: 0 × 5xx, "
    must += "no hang > 5 s, memory + ≤ 20 MB, honest rounds undisturbed"
    passed = False
    try:
        assert_unharmed(found)
        assert found["requests"] >= 10_000
        passed = True
    finally:
        record("x1", must, found, passed=passed)


def test_x3_1_000_requests_that_are_not_rightly_signed(tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    dice, refused, passed = random.Random(seed), 0, []
    names = [name for name, row in DEVICES.items() if row.anonymous != "ok"]
    total, replays = 1000, []
    server = Served(tmp_path, count=2000, dim=64)
    with server as served:
        work = None
        for i in range(total):
            if i % 50 == 0:
                if work is not None:
                    work.device.close()
                work = at_work(served)
            name, fault = dice.choice(names), dice.choice(FAULTS)
            method, path, body = work.request(name)
            device, headers, sent, codes = _faulty(
                served, work, fault, method, path, body, name.endswith("enrol")
            )
            if method == "GET" and sent:
                answer = device.http.request(method, path, content=sent, headers=headers)
            else:
                answer = device.send(method, path, sent, headers=headers)
            ok = answer.status_code >= 400 and parse_message(answer.content, Error).code in codes
            refused += ok
            if not ok:
                passed.append((name, fault, answer.status_code))
            if i % 10 == 0:  # once it is right; the same again comes after the restart
                method, path, body = work.request(name)
                headers = work.device.signed(method, path, body)
                first = work.device.send(method, path, body, headers=headers)
                replays.append((name, work.device.key, (method, path, body), headers))
                assert first.status_code != 401, (name, first.text)
                if first.status_code == 200:  # it may have ended its work
                    work.device.close()
                    work = at_work(served)
    with server as served:
        for name, key, request, headers in replays:
            answer = served.caller(key=key).send(*request, headers=headers)
            ok = (
                answer.status_code == 401
                and parse_message(answer.content, Error).code == "replayed"
            )
            refused += ok
            if not ok:
                passed.append((name, "replayed after a restart", answer.status_code))
    found = {"seed": seed, "requests": total + len(replays), "refused": refused}
    found |= {"of_them_replayed_after_a_restart": len(replays), "faults": list(FAULTS)}
    found |= {"routes": names, "not_refused": passed}
    must = "unsigned, expired, future, wrong key, body, path, method and authority swap, replay "
    must += "(also after a restart), other run, revoked: 100 % refused"
    record("x3", must, found, passed=refused == total + len(replays))
    assert passed == []


def test_x5_a_token_used_50_times_at_once_for_40_tokens(tmp_path):
    winners, codes, times = [], set(), []
    with Served(tmp_path) as served, ThreadPoolExecutor(50) as pool:
        for _ in range(40):
            invitation = served.invite()
            callers = [served.caller() for _ in range(50)]
            started = time.monotonic()
            answers = list(pool.map(lambda c, i=invitation: c.enrol(i), callers))
            times.append(time.monotonic() - started)
            winners.append(sum(isinstance(answer, Enrolled) for answer in answers))
            codes |= {answer.code for answer in answers if isinstance(answer, Error)}
            for caller in callers:
                caller.close()
        enrolled = served.run.service.status(served.run.id)["devices"]
    found = {"tokens": 40, "concurrent_uses": 50, "winners_of_each": sorted(set(winners))}
    found |= {"refusals": sorted(codes), "devices_enrolled": enrolled}
    found |= {"slowest_50_seconds": round(max(times), 2)}
    passed = set(winners) == {1} and codes == {"token"} and enrolled == 40
    record("x5", "one enrolment token, 50 concurrent uses: exactly one wins", found, passed=passed)
    assert passed


def test_x10_the_traffic_of_a_whole_run(tmp_path):
    must = "a capture of all that devices wrote: no byte sequence of their training data"
    found: dict = {"devices": 3, "rounds": 10, "runs": {}}
    everything: set[str] = set()
    for codec in ("float32", "bfloat16", "int8", "int4"):
        (tmp_path / codec).mkdir()
        capture, data = captured(tmp_path / codec, rounds=10, codec=codec)
        names = leaks(capture, data)
        everything |= names
        found["runs"][codec] = {"captured_bytes": len(capture), "found_encodings": sorted(names)}
    record("x10", must, found, passed=not everything)
    assert everything == set()


ROWS = {
    "x2": (
        "pickle, torch zip, gzip bomb, 100 k headers, NaN, Inf, wrong dtype or shape, ± 1 byte, "
        "huge ints, depth-10,000 JSON, duplicate keys: all 4xx; no pickle, marshal, eval, "
        "torch.load, allow_pickle in the package",
        ["tests/server/test_hostile_bodies.py", "tests/test_architecture.py"],
    ),
    "x4": (
        "every route × {anonymous, device, other device, admin}, from the applications' own "
        "routes; default deny",
        ["tests/server/test_access.py"],
    ),
    "x6": (
        "flipped bit, rollback, expired or foreign model: the device refuses, reports why, keeps "
        "the old model",
        ["tests/server/test_lies.py", "tests/protocol/test_protocol_manifest.py"],
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_rows_whose_full_size_is_that_of_the_suite(row):
    must, files = ROWS[row]
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1]
    counts = {
        what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|error)", last)
    }
    found = {"files": files, "tests": counts}
    record(row, must, found, passed=done.returncode == 0)
    assert done.returncode == 0, done.stdout[-3000:]
