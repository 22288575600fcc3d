"""A served experiment and its devices, each in a thread of this process, on real sockets."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import ClassVar

import numpy as np

from messages import read_version
from potluck.config.experiment import load_experiment
from potluck.core import Update
from potluck.device import SystemClock, TorchTrainer, join, one_client
from potluck.device.agent import OFFERS
from potluck.device.clock import Stopped
from potluck.protocol import CODECS, Runtime
from potluck.server.admin.client import Operator
from potluck.server.open_run import open_server
from potluck.server.process import Listen
from potluck.server.storage.state_folder import StateFolder
from potluck.simulation import build_data

EXPERIMENT = """
name = "small"
[task]
{task}
model = "{model}"
[partition]
{partition}
[algorithm]
client_lr = 0.1
local_epochs = {local_epochs}
[run]
rounds = {rounds}
cohort = {cohort}
seed = 7
codec = "{codec}"
[server]
long_poll_seconds = 5.0
pace_seconds = 0.1
{server}
"""


def offers(k):
    """Every second device uploads what it sends; the others send it inside their reports."""
    return CODECS if k % 2 else OFFERS


class HastyClock:
    """The system's clock, but what is to be waited for is soon over."""

    def __init__(self):
        self._clock = SystemClock()
        self.now_ms, self.monotonic = self._clock.now_ms, self._clock.monotonic
        self.hold, self.stop = self._clock.hold, self._clock.stop

    def wait(self, seconds):
        self._clock.wait(min(seconds, 0.02))


class UnitTrainer:
    """Another runtime: the update is the unit vector of the client's index, with weight 1."""

    def __init__(self, on_train=lambda: None):
        self._on_train = on_train

    def runtime(self):
        return Runtime(name="unit", version="1")

    def fit(self, plan, spec):
        pass

    def train(self, plan, spec, received, *, seed, round, client, check):
        check()
        self._on_train()
        delta = np.zeros(spec.dim, np.float32)
        delta[client] = 1.0
        return Update(delta, 1.0, 0.5, 1)

    def evaluate(self, plan, spec, weights, *, check):
        return {"loss": (float(weights.sum()), 1)}


class Device:
    """A device at work in a thread. `died` is what ended it, unless the run did."""

    def __init__(self, address, invitation, folder, trainer, *, clock=None, **options):
        self.clock, self.events, self.died = clock or HastyClock(), [], None
        self._arguments, self._options = (address, invitation, folder, trainer), options
        self.folder = folder
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        try:
            for event in join(*self._arguments, clock=self.clock, **self._options):
                self.events.append(event)
        except BaseException as error:
            self.died = error

    def end(self, seconds=30.0):
        self._thread.join(seconds)
        assert not self._thread.is_alive(), self.events[-5:]

    def stop(self):
        self.clock.stop()
        self.end()
        assert self.died is None or isinstance(self.died, Stopped), self.died

    def count(self, what):
        return Counter(event.what for event in self.events)[what]


class Federation:
    """A server in a thread until the end of the block; and what it takes to join it."""

    options: ClassVar[dict[str, bool]] = {}  # of `open_server`

    def __init__(
        self,
        folder,
        *,
        model="logistic",
        clients=3,
        rounds=2,
        cohort=1.0,
        server="",
        codec="float32",
        own=None,
        plaintext=False,
        local_epochs=1,
        places=(None, None),
    ):
        self.folder, self.places = folder, places
        self.file = folder / "experiment.toml"
        task, partition = 'data = "digits"', f'kind = "iid"\nclients = {clients}'
        if own is not None:
            task, partition = f'data = "folder"\npath = "{own}"', 'kind = "own"'
        values = {"task": task, "partition": partition, "model": model}
        values["local_epochs"] = local_epochs
        text = EXPERIMENT.format(rounds=rounds, cohort=cohort, server=server, codec=codec, **values)
        self.file.write_text(text)
        self.experiment = load_experiment(self.file)
        self.data = build_data(self.experiment)
        self.listen = Listen(port=0, plaintext=plaintext)
        self.devices = []

    @classmethod
    def of(cls, file):
        """One of an experiment file, whose data are elsewhere."""
        made = cls.__new__(cls)
        made.file, made.folder, made.places = file, file.parent, (None, None)
        made.listen, made.devices = Listen(port=0), []
        return made

    def __enter__(self):
        home = self.folder / "server"
        self.server = open_server(self.file, [], home, self.listen, *self.places, **self.options)
        self._thread = threading.Thread(target=self.server.serve)
        self._thread.start()
        self.operator = Operator(StateFolder(home))
        self.service, self.run = self.server.served.service, self.server.served.id
        return self

    def __exit__(self, *_):
        for device in self.devices:
            device.clock.stop()
        self.server.stop()
        for device in self.devices:
            device.end()
        self._thread.join(20)
        assert not self._thread.is_alive()

    @property
    def port(self):
        return int(self.server.address.rsplit(":", 1)[1])

    def invite(self):
        return self.operator.post("enroll")["invitations"][0]

    def join(self, k, trainer=None, address=None, **options):
        """The k-th device, counted from 0; they must enrol in this order."""
        trainer = trainer or TorchTrainer(lambda _: one_client(self.data, k), 1)
        folder = self.folder / f"device{k}"
        device = Device(address or self.server.address, self.invite(), folder, trainer, **options)
        self.devices.append(device)
        self.until(lambda: (folder / "enrolment.json").exists() or device.died)
        return device

    def again(self, device, clock, trainer=None):
        """The next life of a device that was stopped, on its folder."""
        self.devices.remove(device)
        trainer = trainer or UnitTrainer()
        self.devices.append(Device(self.server.address, None, device.folder, trainer, clock=clock))
        return self.devices[-1]

    def status(self):
        return self.service.status(self.run)

    def until(self, condition, seconds=300.0):
        """Wait for others to get somewhere."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (self.status(), [d.events[-3:] for d in self.devices])
            threading.Event().wait(0.01)

    def weights(self, version=None):
        version = self.status()["version"] if version is None else version
        return np.frombuffer(b"".join(read_version(self.service, self.run, version)), "<f4")
