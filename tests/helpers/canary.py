"""Looking for a device's training data in bytes that it sent."""

from __future__ import annotations

import base64
import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator

import numpy as np


def encodings(inputs: np.ndarray, targets: np.ndarray) -> Iterator[tuple[str, bytes, int]]:
    """Name, bytes, and the length of a window that is not there by chance.

    Args:
        inputs: float32 [examples, features], multiples of 1/255 in [0, 1], without a pattern.
        targets: int64 [examples].
    """
    for order, x in (("rows", inputs), ("columns", inputs.T)):
        pixels = np.rint(x * 255).astype(np.uint8)
        for kind in ("<f4", ">f4", "<f8", ">f8", "<f2"):
            yield f"{order} {kind}", x.astype(kind).tobytes(), 2 * np.dtype(kind).itemsize + 2
        yield f"{order} bfloat16", _bfloat16(x), 10
        yield f"{order} u1", pixels.tobytes(), 8
        for kind in ("<i2", "<i4", "<i8", ">i4"):
            yield f"{order} {kind}", pixels.astype(kind).tobytes(), 8 * np.dtype(kind).itemsize
        for name, texts in (
            ("decimals", [f"{v:.6g}" for v in x.ravel()]),
            ("floats as JSON", [repr(float(v)) for v in x.ravel()]),
            ("integers", [str(v) for v in pixels.ravel()]),
        ):
            for mark in (",", ", ", " ", "\n"):
                yield f"{order} {name} {mark!r}", mark.join(texts).encode(), 20
    for kind in ("u1", "<i2", "<i4", "<i8", "<f4"):
        yield f"targets {kind}", targets.astype(kind).tobytes(), 16 * np.dtype(kind).itemsize
    for mark in ("", ",", ", "):
        yield f"targets {mark!r}", mark.join(map(str, targets)).encode(), 16 * (1 + len(mark))


def wrapped(name: str, data: bytes, window: int) -> Iterator[tuple[str, bytes, int]]:
    """An encoding as it is, in base64 at each of three places, and in hexadecimal."""
    yield name, data, window
    for start in range(3):
        text = base64.b64encode(data[start:]).rstrip(b"=")
        yield f"{name} base64", text[:-1], 2 * window
        yield f"{name} base64url", text[:-1].replace(b"+", b"-").replace(b"/", b"_"), 2 * window
    yield f"{name} hex", data.hex().encode(), 2 * window
    yield f"{name} HEX", data.hex().upper().encode(), 2 * window


def found(capture: bytes, inputs: np.ndarray, targets: np.ndarray) -> set[str]:
    """The encodings of which a window is somewhere in a capture, or in what is compressed in it."""
    texts = [capture, *unpacked(capture)]
    windows: dict[int, set[bytes]] = {}
    names: set[str] = set()
    for plain in encodings(inputs, targets):
        for name, data, window in wrapped(*plain):
            if window not in windows:
                windows[window] = {
                    text[i : i + window] for text in texts for i in range(len(text) - window + 1)
                }
            step = range(len(data) - window + 1)
            if any(data[i : i + window] in windows[window] for i in step):
                names.add(name)
    return names


def unpacked(capture: bytes) -> list[bytes]:
    """What is compressed somewhere in a capture: gzip, zlib, bzip2, xz."""
    made = []
    for i in range(len(capture) - 4):
        start = capture[i : i + 3]
        kinds = []
        if start[:2] == b"\x1f\x8b":
            kinds.append(zlib.decompressobj(31))
        if start[0] == 0x78 and start[1] in (0x01, 0x5E, 0x9C, 0xDA):
            kinds.append(zlib.decompressobj())
        if start == b"BZh":
            kinds.append(bz2.BZ2Decompressor())
        if start == b"\xfd7z":
            kinds.append(lzma.LZMADecompressor())
        for kind in kinds:
            try:
                made.append(kind.decompress(capture[i:]))
            except (zlib.error, OSError, EOFError, lzma.LZMAError):
                continue
    return [text for text in made if len(text) >= 8]


PACKERS = {"gzip": gzip.compress, "zlib": zlib.compress, "bz2": bz2.compress, "xz": lzma.compress}


def _bfloat16(x: np.ndarray) -> bytes:
    return (x.astype("<f4").copy().view(np.uint32) >> 16).astype("<u2").tobytes()
