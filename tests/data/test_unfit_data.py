"""Devices whose data do not fit a run: refused before their invitation is used up, in words."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from torch.nn import functional

from federation import Device, Federation, UnitTrainer
from potluck.config.plan import build_planned_task
from potluck.core import ConfigError, DataError, PotluckError, RefusedError
from potluck.device import TorchTrainer, one_client


def unfit(data, case):
    """One client's data, with something that the run does not have."""
    train = data.train
    if case == "shape":
        train = train._replace(inputs=train.inputs[:, :, :4])
    elif case == "label":
        train = train._replace(targets=np.where(np.arange(len(train.targets)) == 3, 10, 1))
        return replace(data, train=train, test=train, test_offsets=data.offsets, num_classes=11)
    elif case == "regression":
        train = train._replace(targets=train.targets.astype(np.float32) + 0.5)
        return replace(data, train=train, test=train, test_offsets=data.offsets, kind="regression")
    elif case == "nothing":
        train = train._replace(inputs=train.inputs[:0], targets=train.targets[:0])
        return replace(data, train=train, offsets=np.array([0, 0]))
    return replace(data, train=train)


def test_data_that_do_not_fit_are_refused_before_the_invitation_is_used_up(tmp_path):
    with Federation(tmp_path, rounds=1, clients=2, server="goal = 1") as federation:
        invitation, own = federation.invite(), one_client(federation.data, 0)
        for case in ("shape", "label", "regression", "nothing"):
            trainer = TorchTrainer(lambda _, case=case: unfit(own, case), where="ward-7.npz")
            folder = tmp_path / case
            device = Device(federation.server.address, invitation, folder, trainer)
            device.end()
            assert isinstance(device.died, (ConfigError, DataError)), (case, device.died)
            assert "got" in str(device.died)
            assert "ward-7.npz" in str(device.died)
            assert not (folder / "enrolment.json").exists()
        assert federation.service.devices(federation.run) == []
        fitting = TorchTrainer(lambda _: own)
        device = Device(federation.server.address, invitation, tmp_path / "fits", fitting)
        federation.until(lambda: federation.status()["state"] == "finished")
        device.end()
        assert device.died is None
        late = Device(federation.server.address, invitation, tmp_path / "late", fitting)
        late.end()
        assert isinstance(late.died, RefusedError)
        assert (late.died.code, "potluck enroll" in str(late.died)) == ("token", True)


@pytest.mark.parametrize("selection", ["open", "sampled"])
def test_a_device_that_cannot_train_any_more_ends_and_pauses_nobody(tmp_path, selection):
    def refuse():
        raise ConfigError("the inputs must be of the run's shape, got another")

    server = f'selection = "{selection}"\npopulation = 3\nminimum = 1.0\nattempts = 1'
    with Federation(tmp_path, clients=3, rounds=2, server=server) as federation:
        for k in range(3):
            federation.join(k, UnitTrainer(refuse if k == 1 else lambda: None))
        federation.until(lambda: federation.status()["state"] == "finished")
        for device in federation.devices:
            device.end()
        assert isinstance(federation.devices[1].died, PotluckError)
        assert "run's shape" in str(federation.devices[1].died)
        assert [device.died for device in federation.devices[::2]] == [None, None]
        assert [row["accepted"] for row in federation.service.history(federation.run)] == [2, 2]
        assert federation.status()["left"] == 1


def test_a_model_of_its_own_that_does_not_fit_its_data_is_refused_beforehand(tmp_path):
    """What a contract of the task or PyTorch itself says, with the file that it is said of."""
    with Federation(tmp_path, rounds=1, clients=2, server="goal = 1") as federation:
        own = one_client(federation.data, 0)
        for loss, words in (
            (lambda out, y: functional.mse_loss(out, y), ["ward-7.npz"]),
            (lambda out, y: out @ y, ["ward-7.npz", "got"]),
        ):
            trainer = TorchTrainer(
                lambda _: own,
                build=lambda task, data, loss=loss: replace(
                    build_planned_task(task, data), loss=loss
                ),
                where="ward-7.npz",
            )
            device = Device(
                federation.server.address, federation.invite(), tmp_path / "own", trainer
            )
            device.end()
            assert isinstance(device.died, ConfigError), device.died
            assert all(word in str(device.died) for word in words)
        assert federation.service.devices(federation.run) == []
