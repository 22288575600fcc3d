"""Devices in threads of a process that has the packages of another version.

python -m old_devices URL FOLDER COUNT     FOLDER/k/invitation lets device k in; what it is told is
                                           appended to FOLDER/k/events
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

from device_process import BriskClock, SlowUnit
from potluck.device import join


def live(url: str, folder: Path, clock: BriskClock) -> None:
    """One device, until it is stopped."""
    invitation = (folder / "invitation").read_text()
    with (folder / "events").open("a") as events:
        for event in join(url, invitation, folder, SlowUnit(0.0), clock=clock):
            attempt = event.detail.split()[-1] if event.what == "accepted" and event.detail else 1
            if event.what == "accepted":
                events.write(f"accepted {event.round} {attempt}\n")
                events.flush()


def main(url: str, folder: str, count: str) -> None:
    clocks = [BriskClock() for _ in range(int(count))]

    def stop(*_: object) -> None:
        for clock in clocks:
            clock.stop()

    signal.signal(signal.SIGTERM, stop)
    threads = []
    for k, clock in enumerate(clocks):
        place = Path(folder) / str(k)
        threads.append(threading.Thread(target=live, args=(url, place, clock)))
        threads[-1].start()
        while not (place / "enrolment.json").exists() and threads[-1].is_alive():
            threading.Event().wait(0.02)  # they enrol in order
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
