"""`potluck` on a machine whose wall clock is wrong by what a file says, from one call to the next.

python skewed.py FILE serve …      FILE holds seconds, and may be rewritten at any moment
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

_right = time.time_ns


def main() -> None:
    file = Path(sys.argv.pop(1))
    time.time_ns = lambda: _right() + int(float(file.read_text()) * 1e9)
    from potluck.cli.main import main

    main()


if __name__ == "__main__":
    main()
