"""Make docs/img/dashboard.png: a real server, five devices, and headless Chromium.

    python docs/dashboard_picture.py [FOLDER]       about a minute; needs Debian's package chromium

Three devices are stopped after round 16, so that rounds are abandoned, and started again. With
FOLDER, it writes pictures of a phone and of the dark there too.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from potluck.cli.serve import open_server
from potluck.config.experiment import load_experiment
from potluck.device import SystemClock, TorchTrainer, join, one_client
from potluck.device.clock import Stopped
from potluck.server.admin.client import Operator
from potluck.server.process import Listen, Server
from potluck.server.storage.state_folder import StateFolder
from potluck.simulation import build_data

IMAGE = Path(__file__).parent / "img" / "dashboard.png"
EXPERIMENT = """
name = "digits-by-ward"
[task]
data = "digits"
model = "2nn"
[partition]
kind = "dirichlet"
alpha = 0.5
clients = 5
[algorithm]
client_lr = 0.1
local_epochs = 1
batch_size = 10
[run]
rounds = 500
cohort = 4
[server]
goal = 4
minimum = 0.75
over_selection = 1.25
population = 5
selection_seconds = 3.0
report_seconds = 4.0
federated_every = 5
attempts = 9
pace_seconds = 0.5
long_poll_seconds = 5.0
"""


class Ward:
    """A device in a thread, that can be stopped in the middle of its work and started again."""

    def __init__(self, k: int, folder: Path, address: str, invitation: str, data: Any) -> None:
        trainer = TorchTrainer(lambda _, k=k: one_client(data, k), 1)
        self._arguments = (address, invitation, folder / f"device-{k}", trainer)
        self._name = f"Ward {k + 1}"
        self.start()

    def start(self) -> None:
        self._clock = SystemClock()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(Stopped):
            for _ in join(*self._arguments, name=self._name, clock=self._clock):
                pass

    def stop(self) -> None:
        self._clock.stop()
        self._thread.join()


def shoot(page: Page, out: Path | None) -> None:
    page.wait_for_selector("#connection.live")
    page.wait_for_selector("#rounds .committed >> nth=7", timeout=120_000)
    page.screenshot(path=IMAGE, clip={"x": 0, "y": 0, "width": 1180, "height": 1180})
    if out is None:
        return
    page.screenshot(path=out / "desktop.png", full_page=True)
    page.emulate_media(color_scheme="dark")
    page.screenshot(path=out / "dark.png", full_page=True)
    page.set_viewport_size({"width": 375, "height": 812})
    page.screenshot(path=out / "phone-dark.png", full_page=True)
    page.emulate_media(color_scheme="light")
    page.screenshot(path=out / "phone.png", full_page=True)


def wait_for_round(number: int, server: Server) -> None:
    while server.served.service.status(server.served.id)["round"] < number:
        time.sleep(0.2)


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "experiment.toml"
        file.write_text(EXPERIMENT)
        server = open_server(file, [], folder / "server", Listen(port=0))
        serving = threading.Thread(target=lambda: asyncio.run(server.run()))
        serving.start()
        wards: list[Ward] = []
        try:
            invite = Operator(StateFolder(folder / "server")).post
            invitations = invite("enroll", count=5)["invitations"]
            data = build_data(load_experiment(file))
            wards = [Ward(k, folder, server.address, i, data) for k, i in enumerate(invitations)]
            wait_for_round(16, server)
            for ward in wards[:3]:
                ward.stop()
            time.sleep(9)  # as long as it takes to abandon two attempts
            for ward in wards[:3]:
                ward.start()
            wait_for_round(22, server)
            with sync_playwright() as driver:
                browser = driver.chromium.launch(
                    executable_path=shutil.which("chromium"),
                    chromium_sandbox=False,
                    args=["--disable-gpu", "--disable-background-networking"],
                )
                size = {"width": 1180, "height": 1180}
                page = browser.new_page(viewport=size, ignore_https_errors=True)
                page.goto(server.dashboard.invite())
                shoot(page, out)
                browser.close()
        finally:
            for ward in wards:
                ward.stop()
            server.stop()
            serving.join()


if __name__ == "__main__":
    main()
