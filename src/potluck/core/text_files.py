"""Text files as editors on any system write them: experiments, tables, traces of devices.

UTF-8 and UTF-16 are read, with a byte-order mark or without, and lines may end in LF, CR LF or CR.
Other encodings cannot be told from each other by their bytes, so they are refused with the line at
which the file stops to be UTF-8.
"""

from __future__ import annotations

import codecs
from pathlib import Path

_CHUNK = 1 << 20
_MARKS = (  # UTF-32's first: its little-endian mark begins like UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BINARY = (
    (b"PK\x03\x04", "an Excel workbook or another zip file", "Save it as CSV"),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook", "Save it as CSV"),
    (b"\x1f\x8b", "a gzip file", "Unpack it"),
    (b"PAR1", "a Parquet file", "Call it .parquet"),
)


def read_text(path: Path) -> str:
    """Returns the text of a file without its byte-order mark, with LF at the ends of lines.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not text in UTF-8 or UTF-16; the message names file and line.
    """
    return path.read_text(encoding=encoding_of(path))


def encoding_of(path: Path) -> str:
    """Returns Python's name for the encoding of a text file, after decoding all of it once.

    Raises:
        OSError: it cannot be read.
        ValueError: as `read_text`.
    """
    with path.open("rb") as file:
        head = file.read(4096)
        for start, what, advice in _BINARY:
            if head.startswith(start):
                raise ValueError(f"{path} must be a text file, got {what}. {advice}.")
        encoding = _guessed(head)
        if encoding is None:
            raise ValueError(
                f"{path} must be a text file, got a binary one (with null bytes). Name another."
            )
        file.seek(0)
        decoder = codecs.getincrementaldecoder(encoding)()
        line = 1
        while chunk := file.read(_CHUNK):
            try:
                text = decoder.decode(chunk)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                raise _undecodable(path, encoding, line, error) from None
            line += text.count("\n")
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise _undecodable(path, encoding, line, error) from None
    return encoding


def _guessed(head: bytes) -> str | None:
    """Guesses by the mark; without one, UTF-16 shows by the zero halves of its ASCII characters."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    at_even, at_odd = head[0::2].count(0), head[1::2].count(0)
    if at_even and at_odd:
        return None
    if at_even or at_odd:
        return "utf-16-be" if at_even else "utf-16-le"
    return "utf-8"


def _undecodable(path: Path, encoding: str, line: int, error: UnicodeDecodeError) -> ValueError:
    if encoding.startswith("utf-8"):
        got = f"byte=0x{error.object[error.start]:02x} in line {line}"
        advice = (
            "It may be Windows-1252 or Latin-1. Save it as UTF-8, in Excel as 'CSV UTF-8', or "
            "convert it: iconv -f WINDOWS-1252 -t UTF-8."
        )
        return ValueError(f"{path} must be text in UTF-8, got {got}. {advice}")
    got = f"half a character in line {line}"
    return ValueError(f"{path} must be text in {encoding.upper()}, got {got}. Write it anew.")
