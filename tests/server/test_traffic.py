"""Everything that devices write on the wire, before encryption: nothing of their training data."""

from __future__ import annotations

import base64
import re

import numpy as np
import pytest

import canary
from federation import Federation, UnitTrainer
from intermediary import Intermediary
from potluck.core import Update
from potluck.device.agent import OFFERS
from potluck.protocol import CODECS

COUNT, FEATURES, EXAMPLES = 3, 64, 25


def made_up(folder):
    """A file for each client: inputs without a pattern, labels too, and a telling name."""
    random = np.random.default_rng(2026)
    folder.mkdir()
    data = []
    for k in range(COUNT):
        inputs = (random.integers(1, 256, (EXAMPLES, FEATURES)) / 255).astype(np.float32)
        targets = random.integers(0, 10, EXAMPLES)
        targets[:10] = random.permutation(10)
        np.savez(folder / f"canary-ward-{k}.npz", inputs=inputs, targets=targets)
        data.append((inputs, targets))
    return data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return made_up(tmp_path_factory.mktemp("data") / "own")


def captured(folder, *, rounds=3, trainer=None, codec="float32", offers=OFFERS):
    """What all devices wrote in a whole run, updates inside reports also as bytes; and their
    data."""
    data = made_up(folder / "own")
    server = f"goal = {COUNT}\npopulation = {COUNT}\nover_selection = 1.0"
    federation = Federation(
        folder, clients=COUNT, rounds=rounds, own=folder / "own", server=server, codec=codec
    )
    with federation, Intermediary(federation.port, federation.operator._home) as between:
        for k in range(COUNT):
            own = trainer(data[k][0]) if trainer else None
            federation.join(k, own, between.address, offers=offers)
        federation.until(lambda: federation.status()["state"] == "finished", 120)
        for device in federation.devices:
            device.end()
            assert device.died is None
            assert device.count("accepted") >= rounds
    written = bytes(between.written)
    return written + b"".join(map(base64.b64decode, UPDATE.findall(written))), data


UPDATE = re.compile(rb'"update":"([A-Za-z0-9+/=]+)"')


def leaks(capture, data):
    names = {name for inputs, targets in data for name in canary.found(capture, inputs, targets)}
    return names | ({"name"} if b"canary" in capture or b"ward" in capture else set())


@pytest.mark.parametrize(
    ("codec", "offers"),
    [
        pytest.param("float32", OFFERS, id="inside"),
        pytest.param("int8", CODECS, id="uploaded-int8"),
        pytest.param("int8", OFFERS, id="inside-int8", marks=pytest.mark.soak),
        pytest.param("float32", CODECS, id="uploaded", marks=pytest.mark.soak),
    ],
)
def test_nothing_of_the_training_data_is_on_the_wire(tmp_path, codec, offers):
    capture, data = captured(tmp_path, codec=codec, offers=offers)
    sent = capture.count(b"PUT /v1/uploads/") if offers is CODECS else len(UPDATE.findall(capture))
    assert sent >= 3 * COUNT  # it did send its updates
    assert leaks(capture, data) == set()


class LeakyTrainer(UnitTrainer):
    """A device whose update is its own data."""

    def __init__(self, inputs) -> None:
        super().__init__()
        self._inputs = inputs

    def fit(self, plan, spec):
        pass

    def train(self, plan, spec, received, *, seed, round, client, check):
        delta = np.zeros(spec.dim, np.float32)
        row = self._inputs[round]
        delta[5 : 5 + row.size] = row
        return Update(delta, 1.0, 0.5, 1)


def test_a_device_that_sends_its_data_is_found_out(tmp_path):
    capture, data = captured(tmp_path, rounds=1, trainer=LeakyTrainer)
    assert "rows <f4" in leaks(capture, data)


ALL = [
    (name, text, window)
    for plain in canary.encodings(
        np.random.default_rng(1).integers(1, 256, (20, 8)).astype(np.float32) / np.float32(255),
        np.random.default_rng(2).integers(0, 10, 80),
    )
    for name, text, window in canary.wrapped(*plain)
]


def test_every_encoding_is_found_where_it_is_and_none_where_it_is_not():
    inputs = np.random.default_rng(1).integers(1, 256, (20, 8)).astype(np.float32) / np.float32(255)
    targets = np.random.default_rng(2).integers(0, 10, 80)
    noise = np.random.default_rng(3).bytes(20_000)
    assert canary.found(noise, inputs, targets) == set()
    for start in range(0, len(ALL), 40):
        some = ALL[start : start + 40]
        capture = noise
        for _, text, window in some:
            capture += text[3 : 3 + window + 4] + noise[:50]  # a little of it is enough
        missed = {name for name, _, _ in some} - canary.found(capture, inputs, targets)
        assert missed == set()


@pytest.mark.parametrize("packer", canary.PACKERS)
def test_data_are_found_inside_what_is_compressed(data, packer):
    inputs, targets = data[0]
    packed = canary.PACKERS[packer](inputs.tobytes())
    capture = np.random.default_rng(3).bytes(5000) + packed + bytes(100)
    assert "rows <f4" in canary.found(capture, inputs, targets)
