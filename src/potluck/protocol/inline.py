"""Small vectors inside messages: a model in its assignment, an update in its report.

A request of its own costs more than a few thousand bytes. A device that supports this offers
`inline` among what it accepts. Then an assignment may bring its model, and the device may send its
update in the report. Both are canonical base64 (RFC 4648, section 4).
"""

from __future__ import annotations

import base64
import binascii

from potluck.core import ProtocolError
from potluck.protocol.strict_json import refuse

INLINE = "inline"
"""The name of this form in `accepts`, beside the codecs."""
INLINE_BYTES = 32_768
"""The length of the longest vector that may be inside a message."""
MAX_INLINE = 4 * -(-INLINE_BYTES // 3)
"""The number of characters of its base64."""


def encode_inline(vector: bytes) -> str:
    """Returns a vector's bytes as they stand in a message."""
    return base64.b64encode(vector).decode()


def decode_inline(text: str, length_bytes: int) -> bytes:
    """Returns the bytes of a vector inside a message, which are as many as were announced.

    Raises:
        ProtocolError: "malformed", "wrong_length".
    """
    try:
        vector = base64.b64decode(text, validate=True)
    except binascii.Error:
        vector = b""
    if encode_inline(vector) != text:
        refuse("a vector inside a message must be canonical base64, got another text")
    if len(vector) != length_bytes:
        raise ProtocolError(
            "wrong_length",
            f"the vector inside must have the {length_bytes} bytes that were announced, "
            f"got {len(vector)}. Encode the whole vector.",
        )
    return vector
