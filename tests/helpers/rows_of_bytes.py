"""The bytes in rows of symbols, so that what was encoded can be compared with what it was."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from potluck.data.lines import START


def decode(rows: NDArray[np.int16]) -> bytes:
    """Those of some rows, without START and PADDING."""
    symbols = np.asarray(rows).ravel()
    return symbols[symbols < START].astype(np.uint8).tobytes()
