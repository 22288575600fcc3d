"""What the server bears: the rows S1 to S6 and X7, and what a round costs.

    python benchmarks/server/run.py --scale full                 everything, about 40 minutes
    python benchmarks/server/run.py --scale small --parts s4,x7  minutes, to see that it works
    python benchmarks/server/run.py --table                      the table anew, from the results

`potluck serve` runs in a process of its own, over TLS on loopback; devices are processes of
`load.py`, which sign and speak the protocol but train nothing. Where a row says so the server is
held to the first core, and the devices to the others. Results of full size go to
results-scale.json, each row with its own date and commit; scale.md is made from it. A row that was
measured again takes the place of the old one. What a small size gave is printed alone: its times
are those of whatever else runs.

Full sizes need about 25 GB of disk in --work and this long on two quiet cores, by part: s1 and s2
10 minutes, s3 6, s4 1, s5 3, s6 1, x7 7, costs 20.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scene import Scene
from table import write_table

from potluck.core.plain_json import to_json
from potluck.simulation.runs.run_manifest import commit, machine

HERE = Path(__file__).parent
SEED = 1
MB = 10**6
_DISK_BYTES = 25 * 10**9


class Bench:
    """Where a run works, and how large it is."""

    def __init__(self, work: Path, is_full: bool) -> None:
        self.work, self.is_full = work, is_full

    def pick(self, full: Any, small: Any) -> Any:
        return full if self.is_full else small

    def scene(self, **settings: Any) -> Scene:
        return Scene(self.work / "scene", keys=self.work, **settings)


def s1(bench: Bench) -> list[dict[str, Any]]:
    """S1 and S2: everybody is sampled; the server has one core."""
    devices, size = bench.pick((1000, 10 * MB), (100, 2 * MB))
    many = _transfer(bench, devices, size)
    few = _transfer(bench, devices // 5, size)
    bar = 240 * devices * size / (1000 * 10 * MB)
    growth = many["memory_mb"] / few["memory_mb"] - 1
    name = f"{devices} devices × {size / MB:g} MB, one core, TLS"
    return [
        _row("S1", name, f"≤ {bar:g} s", f"{many['seconds']:.1f} s",
             many["seconds"] <= bar, many),
        _row("S2", f"memory in S1, and with {devices // 5} devices", "≤ 400 MB, within 25 %",
             f"{many['memory_mb']:.0f} MB, {100 * growth:+.0f} %",
             many["memory_mb"] <= 400 and abs(growth) <= 0.25, {"many": many, "few": few}),
    ]  # fmt: skip


def _transfer(bench: Bench, devices: int, size: int) -> dict[str, Any]:
    """One round of `devices`: its time, and what the server used."""
    with bench.scene(model_bytes=size, devices=devices, rounds=1, core=0) as scene:
        scene.enrol()
        idle, cpu, start = scene.memory_bytes("VmRSS"), scene.cpu_seconds(), time.time()
        seen = scene.load("rounds", longest_wait=1.0)
        seconds = time.time() - start
        moved = sum(seen["vector_bytes"])
        return {
            "devices": devices,
            "seconds": round(seconds, 2),
            "round_seconds": scene.round_seconds(),
            "mb_per_second": round(moved / MB / seconds, 1),
            "cpu_seconds": round(scene.cpu_seconds() - cpu, 2),
            "memory_mb": round(scene.memory_bytes() / MB, 1),
            "idle_memory_mb": round(idle / MB, 1),
            "evaluation_mb": round(scene.children_bytes() / MB, 1),  # in a process of its own
        }


def s3(bench: Bench) -> list[dict[str, Any]]:
    """Check-ins at a fixed rate, all connections open; then a restart under long polls."""
    devices, rate, times = bench.pick((10_000, 1050, 5), (500, 100, 2))
    with bench.scene(model_bytes=MB, devices=devices, population=devices + 1, long_poll=0) as scene:
        scene.enrol(processes=2)
        processes = bench.pick(4, 2)
        start = time.time() + bench.pick(40, 8)  # every device signs its requests beforehand
        ramp, period = bench.pick(25.0, 4.0), devices / rate
        polled = scene.begin(
            "poll", processes=processes, start=start, ramp=ramp, period=period, rounds=times
        )
        time.sleep(start + ramp - time.time())
        cpu = scene.cpu_seconds()
        seen = polled()
        cpu = scene.cpu_seconds() - cpu
        waits = sorted(seen["seconds"])
        p99 = waits[int(0.99 * (len(waits) - 1))] if waits else float("inf")
        span = max(seen["done"]) - min(seen["done"]) if waits else float("inf")
        got = len(waits) / span
        told = {
            "devices": devices,
            "asked_per_second": rate,
            "answered_per_second": round(got, 1),
            "p50_ms": round(1000 * statistics.median(waits), 1) if waits else None,
            "p99_ms": round(1000 * p99, 1),
            "refused": Counter(seen["bad"]),
            "cpu_ms_per_check_in": round(1000 * cpu / (devices * times), 3),
            "memory_mb": round(scene.memory_bytes() / MB, 1),
        }
        target = bench.pick(1000, 95)
        polled = _row("S3", f"{devices} devices polling", f"≥ {target}/s, p99 ≤ 250 ms",
                      f"{got:.0f}/s, p99 {1000 * p99:.0f} ms",
                      got >= target and p99 <= 0.25, told)  # fmt: skip
        scene.stop()
        scene.configure(long_poll=bench.pick(30.0, 8.0))
        scene.start()
        return [polled, _restart(bench, scene)]


def _restart(bench: Bench, scene: Scene) -> dict[str, Any]:
    """Kill the server under long polls, and see how those come back that waited."""
    devices = scene.devices
    ramp = devices / bench.pick(500, 250)
    until = time.time() + ramp + 180
    back = scene.begin("come_back", processes=bench.pick(4, 2), ramp=ramp, until=until)
    time.sleep(ramp + bench.pick(8, 2))  # all of them wait, and none so long that it is answered
    scene.kill()
    scene.start()
    up = time.time()
    seen = back()
    arrivals = [at - up for at in seen["arrived"] if at >= up]
    # The last few of thousands have long pauses behind them: the mean is over the time in which
    # 95 of 100 devices come, and not over the emptier time until the last.
    back_after = sorted(at - up for at in seen["returned"])
    end = back_after[int(0.95 * (len(back_after) - 1))] if back_after else 0.0
    bins = Counter(int(at) for at in arrivals if at <= end)
    mean = sum(bins.values()) / max(end, 1.0)
    peak = max(bins.values(), default=0)
    told = {
        "returned": len(seen["returned"]),
        "devices": devices,
        "seconds_until_95_percent_are_back": round(end, 1),
        "seconds_until_all_are_back": round(back_after[-1], 1) if back_after else None,
        "peak_per_second": peak,
        "mean_per_second": round(mean, 1),
        "arrivals_by_second": [bins[i] for i in range(int(end) + 1)],
        "restart_seconds": round(scene.started_seconds, 2),
    }
    ratio = peak / mean if mean else float("inf")
    are_back = told["returned"] >= 0.99 * devices
    return _row("S3", f"{devices} long polls cut by a restart", "peak ≤ 3 × mean arrivals",
                f"{ratio:.1f} ×", ratio <= 3 and are_back, told)  # fmt: skip


def s4(bench: Bench) -> list[dict[str, Any]]:
    """Rounds in which nobody trains a model of 650 floats: what is left is ours."""
    rounds = bench.pick(50, 20)
    with bench.scene(model_bytes=2600, devices=20, rounds=rounds, pace=0.1) as scene:
        scene.enrol()
        cpu = scene.cpu_seconds()
        scene.load("rounds", longest_wait=0.0)
        cpu = (scene.cpu_seconds() - cpu) / rounds
        seconds = scene.round_seconds()[2:]
    middle = statistics.median(seconds)
    told = {
        "rounds": len(seconds),
        "median_ms": round(1000 * middle, 1),
        "fastest_ms": round(1000 * min(seconds), 1),
        "slowest_ms": round(1000 * max(seconds), 1),
        "cpu_ms": round(1000 * cpu, 1),
    }
    return [_row("S4", "a round of 20 devices without training", "≤ 50 ms",
                 f"{1000 * middle:.0f} ms", middle <= 0.05, told)]  # fmt: skip


def s5(bench: Bench) -> list[dict[str, Any]]:
    """The same rounds without and with many sockets that are held open, or opened again: more than
    the server has descriptors."""
    devices, sockets, rounds = bench.pick((100, 2000, 8), (20, 300, 6))
    values = {"devices": devices, "rounds": 2 * rounds, "descriptors": bench.pick(1024, 256)}
    with bench.scene(model_bytes=MB, pace=0.1, **values) as scene:
        scene.enrol()
        # The run's first half is undisturbed; sockets open when it has got so far.
        rest = scene.begin("rounds", longest_wait=0.0)
        while scene.status()["round"] < rounds:
            time.sleep(0.1)
        before = len(scene.round_seconds())
        slow = scene.begin(
            "slow", count=1, sockets=sockets, processes=1, end=time.time() + bench.pick(60, 20)
        )
        rest()
        held = slow()
        seconds = scene.round_seconds()
    quiet, disturbed = seconds[1:before], seconds[before + 1 :]
    ratio = statistics.median(disturbed) / statistics.median(quiet)
    told = {
        "sockets": sockets,
        "opened": sum(held["opened"]),
        "closed_by_the_server": sum(held["closed"]),
        "quiet_seconds": quiet,
        "disturbed_seconds": disturbed,
    }
    what = (
        f"{sockets} slow or idle sockets, a round of {devices}, `ulimit -n {values['descriptors']}`"
    )
    return [_row("S5", what, "≤ 1.2 ×",
                 f"{ratio:.2f} ×", ratio <= 1.2, told)]  # fmt: skip


def s6(bench: Bench) -> list[dict[str, Any]]:
    """An upload that is cut at random offsets."""
    size, cuts = bench.pick((100 * MB, 20), (12 * MB, 6))
    with bench.scene(model_bytes=size, devices=1) as scene:
        scene.enrol()
        seen = scene.load("cut", cuts=cuts, seed=SEED)
        state = scene.status()["round"]
    again = seen["again"]
    worst = max(again, default=0)
    told = {
        "cuts": cuts,
        "sent_bytes": seen["sent"][0],
        "size_bytes": seen["size"][0],
        "worst_again_bytes": worst,
        "mean_again_bytes": round(sum(again) / cuts),
    }
    is_right = worst <= 4 * 2**20 and seen["type"] == ["accepted"] and state <= 1
    return [_row("S6", f"an upload of {size / MB:g} MB, cut {cuts} times", "≤ 4 MiB again a cut",
                 f"{worst / 2**20:.2f} MiB", is_right, told)]  # fmt: skip


def x7(bench: Bench) -> list[dict[str, Any]]:
    """Ten times as many devices as any number at which the server's peak is looked for: more and
    more of them, each asking again as soon as it is answered."""
    widths, seconds = bench.pick(((25, 50, 100, 200, 400), 20), ((100,), 6))
    devices = 10 * widths[-1]
    with bench.scene(
        model_bytes=MB, devices=devices, population=devices + 1, long_poll=0, core=0
    ) as scene:
        scene.enrol()
        tried = {width: _flood(scene, width, seconds) for width in widths}
        width = max(tried, key=lambda width: tried[width]["answered_per_second"])
        # The best of several is partly luck: what counts is measured again, in turns.
        turns = bench.pick(3, 1)
        pairs = [
            (_flood(scene, width, seconds), _flood(scene, devices, seconds)) for _ in range(turns)
        ]
        memory = scene.memory_bytes() / MB
        is_alive = scene.is_alive
    peak, overload = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    answered = [sum(one["answered_per_second"] for one in turn) for turn in (peak, overload)]
    part = answered[1] / answered[0]
    told = {
        "by_devices": tried,
        "peak_again": peak,
        "overload": overload,
        "memory_mb": round(memory, 1),
    }
    is_right = part >= 0.8 and is_alive and memory <= 1000
    is_right = is_right and all(set(one["refused"]) <= {"429", "503"} for one in overload)
    is_right = is_right and not any(one["without_retry_after"] for one in overload)
    return [_row("X7", f"{devices} devices where {width} are the peak",
                 "goodput ≥ 80 %, 429/503 with Retry-After, ≤ 1 GB",
                 f"{100 * part:.0f} %, {memory:.0f} MB", is_right, told)]  # fmt: skip


def _flood(scene: Scene, devices: int, seconds: float) -> dict[str, Any]:
    """Check-ins of so many devices that ask again at once; the time in which they connect does not
    count."""
    start = time.time() + 4
    begin = start + 4 + devices / 250
    end = begin + seconds
    seen = scene.load("flood", count=devices, processes=2, start=start, end=end, pause=0.0)
    good = [at for at in seen["good"] if begin <= at < end]
    return {
        "devices": devices,
        "answered_per_second": round(len(good) / seconds, 1),
        "refused": Counter(seen["bad"]),
        "without_retry_after": sum(seen["unexplained"]),
    }


def costs(bench: Bench) -> list[dict[str, Any]]:
    """What one round costs the server, by devices and size of the model."""
    grid = bench.pick(
        [(n, size) for size in (0.8, 10, 100) for n in (10, 100, 1000)],
        [(n, size) for size in (0.8, 4) for n in (10, 40)],
    )
    rows: list[dict[str, Any]] = []
    for devices, megabytes in grid:
        size, rounds = round(megabytes * MB), 2
        name = f"{devices} devices × {megabytes} MB"
        if devices * size > _DISK_BYTES:
            rows.append(_row("cost", name, "", f"left out: {devices * size / 1e9:g} GB of uploads",
                             None, {}))  # fmt: skip
            continue
        with bench.scene(model_bytes=size, devices=devices, rounds=rounds, pace=0.1) as scene:
            scene.enrol()
            cpu = scene.cpu_seconds()
            seen = scene.load("rounds", longest_wait=0.0)
            told = {
                "devices": devices,
                "model_mb": megabytes,
                "cpu_seconds": round((scene.cpu_seconds() - cpu) / rounds, 3),
                "round_seconds": statistics.mean(scene.round_seconds()),
                "other_bytes": round((sum(seen["bytes"]) - sum(seen["vector_bytes"])) / rounds),
                "memory_mb": round(scene.memory_bytes() / MB, 1),
            }
        rows.append(_row("cost", name, "", f"{told['cpu_seconds']:g} s of CPU", None, told))
    return rows


def _row(
    name: str, what: str, bar: str, measured: str, met: bool | None, details: dict[str, Any]
) -> dict[str, Any]:
    row = {"row": name, "what": what, "bar": bar, "measured": measured, "met": met}
    print(f"{name:5} {what}: {measured} ({bar or 'no bar'}){'' if met is None else f' → {met}'}")
    sys.stdout.flush()
    return row | {"details": details}


PARTS: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
    "s1": s1, "s3": s3, "s4": s4, "s5": s5, "s6": s6, "x7": x7, "costs": costs,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", choices=("small", "full"), default="small")
    parser.add_argument("--parts", default=",".join(PARTS), help="s1 (with s2), s3, …")
    parser.add_argument("--work", type=Path, default=Path("benchmarks-work"))
    parser.add_argument("--note", default="", help="of the machine's state: kept with each row")
    parser.add_argument("--table", action="store_true", help="write scale.md alone")
    options = parser.parse_args()
    if not options.table:
        bench = Bench(options.work.resolve(), options.scale == "full")
        for part in dict.fromkeys(options.parts.replace("s2", "s1").split(",")):
            begin = time.time()
            rows = PARTS[part](bench)
            about = {
                "part": part,
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "commit": commit(),
                "machine": machine(),
                "seed": SEED,
                "note": options.note,
                "part_seconds": round(time.time() - begin, 1),
            }
            if bench.is_full:
                _keep(HERE / "results-scale.json", part, [row | about for row in rows])
    write_table(HERE)


def _keep(path: Path, part: str, rows: list[dict[str, Any]]) -> None:
    """Put the rows of a part in the place of its old ones."""
    old = json.loads(path.read_text()) if path.exists() else []
    kept = [row for row in old if row["part"] != part] + rows
    order = list(PARTS)
    kept.sort(key=lambda row: order.index(row["part"]))
    path.write_text(to_json(kept, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
