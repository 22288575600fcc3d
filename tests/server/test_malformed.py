"""Malformed requests against a real server, while honest devices train; and docs/openapi.json.

The full number of requests is in tests/soak/test_security_in_full.py.
"""

from __future__ import annotations

import os
import random
import runpy
from pathlib import Path

import pytest

from hostile import HONEST, Attack, Broken, HonestRounds, Process, generated
from potluck.protocol import ROUTES, Upload
from remote import Caller

DOCS = Path(__file__).parents[2] / "docs"


def attacked(folder: Path, num_generated: int, num_broken: int, warm_up: int = 200) -> dict:
    """Attack a server with so many requests. Returns what was found."""
    seed = int(os.environ.get("POTLUCK_SEED", random.SystemRandom().randrange(10**6)))
    print(f"seed of the requests: {seed} (POTLUCK_SEED={seed} makes them again)")
    with Process(folder) as server, HonestRounds(server) as honest:
        honest.wait(1)
        device = server.device()
        upload = _upload_begun(device)
        attack = Attack(server)
        requests = Broken(seed, device, upload.upload, "0" * 64)
        for _, request in zip(range(warm_up), requests, strict=False):
            attack.send(request)
        before, rounds = server.memory_bytes(), server.operator.get("status")["round"]
        for request, operation in generated(num_generated, seed, device):
            attack.send(request, operation)
        for _, request in zip(range(num_broken), requests, strict=False):
            attack.send(request)
        grown = server.memory_bytes() - before
        later = server.operator.get("status")["round"]
        honest.wait(later + 1)
        device.close()
    with server:  # what honest devices sent is there, and nothing else
        first, last = server.weights()
        committed = server.operator.get("status")["round"]
        assert last - first == pytest.approx(committed, abs=0.05)
        assert honest.accepted >= HONEST * committed
    return {
        "seed": seed,
        "requests": sum(attack.statuses.values()),
        "statuses": dict(sorted(attack.statuses.items())),
        "wrong": attack.wrong,
        "slowest_seconds": round(attack.slowest, 3),
        "memory_grown_bytes": grown,
        "rounds_meanwhile": later - rounds,
        "honest_refused": honest.refused,
        "faults_in_the_log": server.faults(),
    }


def _upload_begun(device: Caller) -> Upload:
    """An upload whose body never comes. A round that closed meanwhile is left for the next."""
    for _ in range(20):
        upload = device.report(device.assigned(), bytes(2600), sha256="00" * 32)
        if isinstance(upload, Upload):
            return upload
    raise AssertionError(f"no upload was begun in 20 rounds: {upload}")


def assert_unharmed(found: dict) -> None:
    assert found["wrong"] == []
    assert found["faults_in_the_log"] == []
    assert found["honest_refused"] == []
    assert found["rounds_meanwhile"] >= 1
    assert found["memory_grown_bytes"] <= 20 * 10**6
    assert not [status for status in found["statuses"] if status.startswith("5")]
    refused = sum(n for status, n in found["statuses"].items() if status.startswith("4"))
    assert refused > 0.6 * found["requests"]  # most are malformed in a way that shows


def test_malformed_requests_are_refused_while_honest_rounds_go_on(tmp_path):
    found = attacked(tmp_path, num_generated=100, num_broken=150)
    assert_unharmed(found)
    assert found["requests"] > 200
    assert {"200", "400", "401", "404", "405", "413", "415"} <= set(found["statuses"])


def test_the_description_in_the_documents_is_that_of_the_code():
    made = runpy.run_path(str(DOCS / "openapi.py"))
    text = (DOCS / "openapi.json").read_text(encoding="utf-8")
    assert text == made["text"](), "run `python docs/openapi.py`"
    described = {
        f"{method.upper()} {path}"
        for path, methods in made["description"]()["paths"].items()
        for method in methods
    }
    assert described == {f"{r.method} {r.path.partition('?')[0]}" for r in ROUTES} | {"GET /health"}
