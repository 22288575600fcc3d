"""The upload of an update in chunks; each interruption sends at most one chunk twice."""

from __future__ import annotations

from collections.abc import Callable

from potluck.core import RefusedError
from potluck.device.connection import Connection
from potluck.device.outbox import Owed
from potluck.protocol import CHUNK_BYTES, VERSION, Accepted, Upload

_REPORT = f"/v{VERSION}/report"
_DIGEST_TRIES = 2


def send_update(connection: Connection, owed: Owed, check: Callable[[], None]) -> Accepted:
    """Announces an update and sends the bytes that the server lacks, until its fate is known.

    It goes on after the deadline, as the update may count already.

    Args:
        check: called before each chunk; what it raises ends the upload, which can go on later.

    Raises:
        RefusedError: the server does not take it; late, if it comes after the deadline.
    """
    answer = connection.ask(_REPORT, owed.report, Upload, Accepted)
    digests = 0
    while isinstance(answer, Upload):
        check()
        try:
            answer = _send_chunk(connection, owed, answer)
        except RefusedError as error:
            digests += error.code == "digest"
            if error.code not in ("offset", "digest") or digests > _DIGEST_TRIES:
                raise
            path = f"/v{VERSION}/uploads/{answer.upload}"
            answer = connection.call("GET", path, b"", Upload, Accepted)
    return answer


def _send_chunk(connection: Connection, owed: Owed, upload: Upload) -> Upload | Accepted:
    with owed.body.open("rb") as file:
        file.seek(upload.offset)
        chunk = file.read(min(upload.chunk_bytes, CHUNK_BYTES))
    if not chunk:
        raise RefusedError(
            "wrong_length",
            f"the server asks for bytes from {upload.offset} on, and there are none.",
        )
    path = f"/v{VERSION}/uploads/{upload.upload}?offset={upload.offset}"
    return connection.call("PUT", path, chunk, Upload, Accepted)
