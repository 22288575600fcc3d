"""The one string that lets a device in."""

from __future__ import annotations

import base64

import pytest

from potluck.core import ProtocolError
from potluck.protocol import Invitation, encode_invitation, parse_invitation

INVITATION = Invitation(token="t" * 22, run="digits", server_key="ab" * 32, certificate="cd" * 32)
GOLDEN = (
    "eyJjZXJ0aWZpY2F0ZSI6ImNkY2RjZGNkY2RjZGNkY2RjZGNkY2RjZGNkY2RjZGNkY2RjZGNkY2RjZGNkY2RjZGNkY2Rj"
)


def string(json: str) -> str:
    return base64.urlsafe_b64encode(json.encode()).decode().rstrip("=")


def test_the_string_is_the_base64url_of_canonical_json():
    text = encode_invitation(INVITATION)
    assert text.startswith(GOLDEN)
    assert text == string(
        f'{{"certificate":"{"cd" * 32}","run":"digits","server_key":"{"ab" * 32}",'
        f'"token":"{"t" * 22}","v":1}}'
    )


@pytest.mark.parametrize("certificate", [None, "cd" * 32])
def test_what_is_written_is_read(certificate):
    invitation = INVITATION.model_copy(update={"certificate": certificate})
    assert parse_invitation(f"  {encode_invitation(invitation)}\n") == invitation


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "no spaces inside",
        "é",
        "A" * 1025,
        encode_invitation(INVITATION)[:-1],
        encode_invitation(INVITATION)[1:],
        string("{}"),
        string("[" * 500),
        string('{"v":2}'),
        base64.urlsafe_b64encode(b"\xff\xfe").decode().rstrip("="),
        string('{"certificate":null,"run":"a b","server_key":"","token":"","v":1}'),
    ],
)
def test_anything_else_is_malformed(text):
    with pytest.raises(ProtocolError) as caught:
        parse_invitation(text)
    assert caught.value.code == "malformed"
