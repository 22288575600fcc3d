"""README.md, made from the results that the full-size tests left here: r*.json, x*.json and others.

python benchmarks/server/reliability.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from potluck.core.plain_json import to_json

FOLDER = Path(__file__).parent
HEAD = """# What the server was put through

Made by `python benchmarks/server/reliability.py` from the results of `make soak` (one row:
`make soak PYTEST_ARGS="-k r8"`), whose tests are in `tests/soak`. What it bears is in
[scale.md](scale.md), what deployed runs learn in [deployed.md](deployed.md). The machine did other
work at the same time, over which R1 and R3 had priority: the times are upper bounds.

| | what must show | passed | seconds | seed | date | commit | machine |
|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    text = HEAD
    results = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"), key=_order)]
    results = [result for result in results if isinstance(result, dict) and "must_show" in result]
    for result in results:
        found = result["found"]
        passed = "yes" if result["passed"] else "**no**"
        cells = (
            f"[{result['test']}]({result['test'].lower()}.json)", result["must_show"], passed,
            found.get("seconds", ""), _seeds(found), result["date"],
            f"`{result['commit']}`", result["machine"],
        )  # fmt: skip
        text += f"| {' | '.join(map(str, cells))} |\n"
    for result in results:
        text += f"\n**{result['test']}** found: {_told(result['found'])}.\n"
    (FOLDER / "README.md").write_text(text, encoding="utf-8")


def _order(path: Path) -> tuple[str, int]:
    """r9 before r12."""
    match = re.fullmatch(r"([a-z]+)(\d+)", path.stem)
    return (match[1], int(match[2])) if match else (path.stem, 0)


def _seeds(found: dict[str, Any]) -> str:
    """Its seed, or those of its parts."""
    places = [found, *(part for part in found.values() if isinstance(part, dict))]
    return ", ".join(str(place["seed"]) for place in places if place.get("seed") is not None)


def _told(found: dict[str, Any]) -> str:
    """What was counted, as words; long lists are in the file alone."""
    parts = []
    for name, value in found.items():
        if name in ("seed", "seconds", "passed") or (isinstance(value, list) and len(value) > 4):
            continue
        shown = f"({_told(value)})" if isinstance(value, dict) else to_json(value)
        parts.append(f"{name.replace('_', ' ')} {shown}")
    return ", ".join(parts)


if __name__ == "__main__":
    main()
