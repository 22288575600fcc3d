"""Named points at which tests kill a server, to show that a restart continues its work.

`POTLUCK_FAULT="commit.inside"` kills the process (SIGKILL: no handler, no flush) when it first
reaches that point, `"commit.inside:3"` at the third time. Unset, a point costs one comparison.
"""

from __future__ import annotations

import os
import signal

POINTS = (
    "run.before-model",
    "run.before-row",
    "run.after-row",
    "leader.taken",
    "enrol.inside",
    "enrol.after",
    "open.inside",
    "open.after",
    "check-in.inside",
    "check-in.after",
    "train.inside",
    "train.after",
    "lease.inside",
    "lease.after",
    "upload.inside",
    "upload.after",
    "chunk.before-write",
    "chunk.torn",
    "chunk.before-sync",
    "chunk.after-sync",
    "finish.before-check",
    "finish.after-check",
    "finish.before-row",
    "finish.inside",
    "finish.after",
    "arrive.before-row",
    "arrive.inside",
    "arrive.after",
    "blob.written",
    "blob.synced",
    "blob.renamed",
    "blob.done",
    "close.inside",
    "close.after",
    "aggregate.begin",
    "aggregate.report",
    "aggregate.end",
    "commit.before-model",
    "commit.before-row",
    "commit.inside",
    "commit.after",
    "abandon.inside",
    "abandon.after",
    "sweep.before",
    "sweep.deleted",
    "sweep.after",
)


class _Armed:
    name = ""
    passes = 0


def arm(setting: str | None = None) -> None:
    """Takes the point from `setting`, or from the environment; an unknown one is refused."""
    setting = os.environ.get("POTLUCK_FAULT", "") if setting is None else setting
    name, _, passes = setting.partition(":")
    if name and name not in POINTS:
        raise ValueError(
            f"POTLUCK_FAULT must name a fault point, got {setting!r}. Known: {', '.join(POINTS)}."
        )
    _Armed.name, _Armed.passes = name, int(passes or 1)


def reach(name: str) -> None:
    """Passes a point, or kills the process there."""
    if _Armed.name and name == _Armed.name:
        _Armed.passes -= 1
        if _Armed.passes == 0:
            os.kill(os.getpid(), signal.SIGKILL)
