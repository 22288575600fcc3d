"""Runs a program and watches its whole tree of processes: time, CPU seconds, peak memory.

Memory is the sum over the tree of the proportional set size, in which a page that n processes share
counts 1/n for each, so that what forked workers or mapped files share counts once. It is looked at
twice a second. CPU seconds are what the kernel counted for the program and the children it waited
for, or what was last seen of each process of the tree, whichever is more. What the machine spent
beside it is told too: a run that was not alone shows it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

_EVERY_SECONDS = 0.5
_SUBREAPER = 36  # of prctl: orphans below this process become its children, and stay in the tree


class Watched(NamedTuple):
    started: float  # on time.monotonic()
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    other_cpu_seconds: float  # that the machine spent on something else
    waited_seconds: float  # of all threads, for a core that somebody had
    returncode: int | None  # None: it was ended after `limit` seconds


def watch(command: Sequence[str], *, env: Mapping[str, str], log: Path, limit: float) -> Watched:
    """Run a program to its end, or to the limit, and leave none of its processes behind."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    before, machine_before = _children_cpu(), _machine_cpu()
    seen: dict[int, float] = {}
    waits: dict[int, float] = {}
    peak = 0
    started = time.monotonic()
    with log.open("wb") as output:
        program = subprocess.Popen(
            command, env=dict(env), stdout=output, stderr=subprocess.STDOUT, cwd=log.parent
        )
        code: int | None = None
        while time.monotonic() - started < limit:
            try:
                code = program.wait(_EVERY_SECONDS)
                break
            except subprocess.TimeoutExpired:
                peak = max(peak, _look(seen, waits))
        ended = time.monotonic()
        _end_all(seen, waits)
        program.wait()
    cpu = max(_children_cpu() - before, sum(seen.values()))
    other = max(_machine_cpu() - machine_before - cpu, 0.0)
    return Watched(started, ended - started, cpu, peak, other, sum(waits.values()), code)


def _look(seen: dict[int, float], waits: dict[int, float]) -> int:
    """The tree's memory now; notes the CPU seconds of each process, and how long threads waited."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
            seen[process.pid] = times.user + times.system
            total += _proportional(process.pid)
            for thread in Path(f"/proc/{process.pid}/task").iterdir():
                waits[int(thread.name)] = int((thread / "schedstat").read_text().split()[1]) / 1e9
        except (psutil.Error, OSError):  # it has just ended
            continue
    return total


def _proportional(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return 1024 * int(line.split()[1])
    return 0


def _end_all(seen: dict[int, float], waits: dict[int, float]) -> None:
    """End what the program left behind."""
    _look(seen, waits)
    while left := psutil.Process().children(recursive=True):
        for process in left:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=5)


def _children_cpu() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _machine_cpu() -> float:
    """Seconds that all cores together were not idle."""
    fields = list(map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]))
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
