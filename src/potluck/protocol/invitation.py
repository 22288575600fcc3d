"""An invitation: all that a device needs beside the server's address, as one string.

    base64url without padding of the canonical JSON of
    {"certificate": SHA-256 of the certificate or null, "run", "server_key", "token", "v": 1}

Guarantee: a device that gets the string over a channel that nobody could alter pins the server's
certificate and the run's key before the first connection. The string is a secret until its token is
used.

Compatibility: `v` counts up with any change; a device refuses an unknown version.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Literal

from potluck.core import ProtocolError
from potluck.protocol.messages import Digest, Key, Message, Name, Token, validate
from potluck.protocol.strict_json import encode_json, parse_json, refuse

_FORM = re.compile(r"[A-Za-z0-9_-]{1,1024}")
_AROUND = " \t\r\n\v\f\xa0\"'`\ufeff\udcff\udcfe\udcef\udcbb\udcbf"  # marks too, also as arguments


class Invitation(Message):
    """One device's way into one run."""

    v: Literal[1] = 1
    token: Token
    run: Name
    server_key: Key
    """The public key of the run's manifests."""
    certificate: Digest | None
    """SHA-256 of the server's certificate (DER). None: the system's authorities vouch for it."""


def encode_invitation(invitation: Invitation) -> str:
    """Returns the string that a person hands on."""
    return base64.urlsafe_b64encode(encode_json(invitation.model_dump())).decode().rstrip("=")


def parse_invitation(text: str) -> Invitation:
    """Returns the invitation in a string, inside blanks, quotes or byte-order marks.

    Raises:
        ProtocolError: "malformed".
    """
    text = text.strip(_AROUND)
    try:
        if _FORM.fullmatch(text) is None:
            refuse("it must be one word of A-Z a-z 0-9 _ -")
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        return validate(Invitation, parse_json(data, len(data)))
    except (ProtocolError, binascii.Error):
        raise ProtocolError(
            "malformed",
            "the invitation must be what `potluck enroll` printed, got another string of "
            f"{len(text)} characters. Copy all of one line, and nothing else.",
        ) from None
