"""Signed manifests: golden bytes, and what a device refuses, each with its own code."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.core import ProtocolError, Spec
from potluck.protocol import (
    FAILURE_REASONS,
    Manifest,
    ManifestSpec,
    public_key,
    sign_manifest,
    verify_manifest,
)
from potluck.protocol.keys import sign_bytes

PRIVATE = bytes(range(32, 64))
PUBLIC = bytes.fromhex("29acbae141bccaf0b22e1a94d34d0bc7361e526d0bfe12c89794bc9322966dd7")
CREATED, EXPIRES = 1767225600000, 1767229200000
SPEC = Spec(("layer.weight", "layer.bias"), ((2, 3), (3,)))
MODEL = ((np.arange(9, dtype="<f4") - 4) / 4).astype("<f4").tobytes()

GOLDEN = (
    b'{"created_ms":1767225600000,"expires_ms":1767229200000,"length_bytes":36,"plan":{"algorithm"'
    b':{"batch_size":10,"client_lr":0.1,"local_epochs":1,"name":"fedavg"},"task":{"model":'
    b'"logistic"}},"previous":6,"round":3,"run":"digits","sha256":"84c2de92f07b1dc86bf5ee20243c4344'
    b'13a69b9ef7ed65cb5aa4b7cfae6e495b","spec":{"digest":"fb264e7dcf5886dfe9ce075a645c78de",'
    b'"names":["layer.weight","layer.bias"],"shapes":[[2,3],[3]]},"version":7}'
)
GOLDEN_SIGNATURE = bytes.fromhex(
    "ae6c999b991d0ffafe79e9148422faa56e4026c2c40397d164c46ae2219413bb"
    "59a86f3ec8166707ce36a4b34f128bd51974310d127cb789c302adecd63f6909"
)


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "version": 7,
        "previous": 6,
        "run": "digits",
        "round": 3,
        "spec": ManifestSpec.of(SPEC),
        "length_bytes": len(MODEL),
        "sha256": hashlib.sha256(MODEL).hexdigest(),
        "plan": {
            "algorithm": {
                "name": "fedavg",
                "client_lr": 0.1,
                "local_epochs": 1,
                "batch_size": 10,
            },
            "task": {"model": "logistic"},
        },
        "created_ms": CREATED,
        "expires_ms": EXPIRES,
    }
    return Manifest(**{**fields, **changes})


def verify(
    data: bytes,
    signature: bytes,
    key: bytes = PUBLIC,
    *,
    run: str = "digits",
    now_ms: int = CREATED,
    last: int = 6,
) -> Manifest:
    return verify_manifest(data, signature, key, run=run, now_ms=now_ms, last_seen_version=last)


def code_of(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(ProtocolError) as caught:
        verify(*args, **kwargs)
    assert caught.value.code in FAILURE_REASONS
    return caught.value.code


def signed(data: bytes) -> tuple[bytes, bytes]:
    """Any bytes, signed as if they were a manifest."""
    return data, sign_bytes(PRIVATE, b"potluck-manifest-v1\n" + data)


def test_golden_bytes() -> None:
    assert public_key(PRIVATE) == PUBLIC
    assert sign_manifest(PRIVATE, manifest()) == (GOLDEN, GOLDEN_SIGNATURE)
    assert verify(GOLDEN, GOLDEN_SIGNATURE) == manifest()
    assert verify(GOLDEN, GOLDEN_SIGNATURE).spec.spec() == SPEC


def test_the_digest_of_the_spec_by_hand() -> None:
    text = b"(('layer.weight', 'layer.bias'), ((2, 3), (3,)))"
    assert hashlib.blake2b(text, digest_size=16).hexdigest() == manifest().spec.digest


def test_every_flipped_bit_is_refused() -> None:
    for at in range(len(GOLDEN)):
        flipped = bytearray(GOLDEN)
        flipped[at] ^= 1 << at % 8
        assert code_of(bytes(flipped), GOLDEN_SIGNATURE) == "manifest_signature"
    for bit in range(512):
        signature = bytearray(GOLDEN_SIGNATURE)
        signature[bit // 8] ^= 1 << bit % 8
        assert code_of(GOLDEN, bytes(signature)) == "manifest_signature"


def test_another_key_or_purpose_or_length_is_refused() -> None:
    assert code_of(GOLDEN, GOLDEN_SIGNATURE, public_key(bytes(32))) == "manifest_signature"
    assert code_of(GOLDEN, sign_bytes(PRIVATE, GOLDEN)) == "manifest_signature"
    assert code_of(GOLDEN + b" ", GOLDEN_SIGNATURE) == "manifest_signature"
    assert code_of(GOLDEN, b"") == "manifest_signature"


def test_an_expired_manifest_is_refused() -> None:
    assert verify(GOLDEN, GOLDEN_SIGNATURE, now_ms=EXPIRES - 1)
    assert code_of(GOLDEN, GOLDEN_SIGNATURE, now_ms=EXPIRES) == "manifest_expired"


def test_a_rollback_is_refused_and_the_same_version_is_not() -> None:
    assert verify(GOLDEN, GOLDEN_SIGNATURE, last=0)
    assert verify(GOLDEN, GOLDEN_SIGNATURE, last=7)
    assert code_of(GOLDEN, GOLDEN_SIGNATURE, last=8) == "manifest_rollback"


def test_a_manifest_of_another_run_is_refused() -> None:
    assert code_of(GOLDEN, GOLDEN_SIGNATURE, run="digits2") == "manifest_foreign"


CONTENT: dict[str, Any] = json.loads(GOLDEN)


def with_digest(*names: str) -> dict[str, Any]:
    """The spec under other names, with the digest that belongs to them."""
    digest = Spec(names, SPEC.shapes).digest()
    return {"names": list(names), "shapes": CONTENT["spec"]["shapes"], "digest": digest}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"\x80\x04.",
        GOLDEN + b"{}",
        GOLDEN.replace(b'"version":7', b'"version":7,"version":8'),
        GOLDEN.replace(b"0.1", b"NaN"),
        GOLDEN.replace(b'"version":7', b'"version":7.0'),
        GOLDEN.replace(b'{"algorithm"', b'{"x":' + b"[" * 50 + b"]" * 50 + b',"algorithm"'),
        *(
            json.dumps({**CONTENT, **changes}).encode()
            for changes in (
                {"surplus": 1},
                {"version": 0},
                {"previous": 7},
                {"length_bytes": 35},
                {"sha256": "0"},
                {"plan": []},
                {"expires_ms": CREATED},
                {"spec": {**CONTENT["spec"], "digest": "0" * 32}},
                {"spec": {**CONTENT["spec"], "names": ["layer.bias", "layer.weight"]}},
                {"spec": {**CONTENT["spec"], "names": ["a'", "b"]}},
                {"spec": with_digest("a", "a")},
                {"spec": with_digest("a")},
                {"spec": {**CONTENT["spec"], "shapes": [[2, -3], [3]]}},
                {"spec": {**CONTENT["spec"], "shapes": [[2, 3.0], [3]]}},
                {"spec": {**CONTENT["spec"], "shapes": [[2, 3], 3]}},
                {"spec": {**CONTENT["spec"], "shapes": [[1] * 9, [3]]}},
            )
        ),
    ],
)
def test_signed_nonsense_is_malformed_and_nothing_else(data: bytes) -> None:
    assert code_of(*signed(data)) == "manifest_malformed"


@pytest.mark.parametrize(
    "changes", [{"previous": 7}, {"length_bytes": 35}, {"expires_ms": CREATED}]
)
def test_a_manifest_that_no_device_would_accept_is_not_signed(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        sign_manifest(PRIVATE, manifest(**changes))


def test_a_plan_that_is_not_json_is_not_signed() -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        sign_manifest(PRIVATE, manifest(plan={"client_lr": float("nan")}))
    with pytest.raises(ValueError, match="between ±"):
        sign_manifest(PRIVATE, manifest(plan={"seed": 2**60}))


shapes = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4)


@given(shapes, st.dictionaries(st.text(max_size=5), st.floats(-1, 1) | st.text(max_size=5)))
def test_any_manifest_survives(shapes: list[tuple[int, ...]], plan: dict[str, Any]) -> None:
    spec = Spec(tuple(f"t{i}" for i in range(len(shapes))), tuple(shapes))
    if spec.dim:
        made = manifest(spec=ManifestSpec.of(spec), length_bytes=spec.num_bytes, plan=plan)
        data, signature = sign_manifest(PRIVATE, made)
        assert verify(data, signature) == made
