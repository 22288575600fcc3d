"""scale.md, made from the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_HEAD = """# What the server bears

Made by `python benchmarks/server/run.py --table` from `results-scale.json`, which
`python benchmarks/server/run.py --scale full` writes. The rows are described in [run.py](run.py).

"""


def write_table(folder: Path) -> None:
    """Write scale.md beside the results."""
    rows = json.loads((folder / "results-scale.json").read_text())
    (folder / "scale.md").write_text(_HEAD + _section(rows))


def _section(rows: list[dict[str, Any]]) -> str:
    bars = [row for row in rows if row["met"] is not None]
    text = "| | what | bar | measured | met | commit |\n|---|---|---|---|---|---|\n"
    for row in bars:
        met = "yes" if row["met"] else "**no**"
        cells = (row["row"], row["what"], row["bar"], row["measured"], met, f"`{row['commit']}`")
        text += f"| {' | '.join(cells)} |\n"
    text += _costs([row for row in rows if row["row"] == "cost"])
    seen = {(row["machine"], row["date"], row["seed"], row["note"]) for row in rows}
    for machine, date, seed, note in sorted(seen):
        text += f"\n{machine}; {date}; seed {seed}.{' ' + note if note else ''}\n"
    return text


def _costs(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    text = (
        "\nWhat one round costs the server; the last column is what a device sends and receives "
        "beside\nthe two vectors, inside TLS:\n\n"
        "| devices | model | CPU | round | peak memory | other bytes a device |\n"
        "|---|---|---|---|---|---|\n"
    )
    for row in rows:
        told = row["details"]
        if not told:
            text += f"| {row['what']} | {row['measured']} | | | | |\n"
            continue
        other = told["other_bytes"] / told["devices"]
        text += (
            f"| {told['devices']} | {told['model_mb']} MB | {told['cpu_seconds']:.2f} s "
            f"| {told['round_seconds']:.2f} s | {told['memory_mb']:.0f} MB | {other:,.0f} |\n"
        )
    return text
