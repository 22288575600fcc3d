"""Makes a task from the name of a model, in an experiment or in a plan."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from potluck.config.experiment import LANGUAGE_MODELS, ModelSection
from potluck.core import ConfigError

if TYPE_CHECKING:
    from potluck.data import FederatedData
    from potluck.engine import Task


def build_task(section: ModelSection, data: FederatedData) -> Task:
    """The task of a named model over data. Imports PyTorch.

    Raises:
        ConfigError: data that do not fit the model.
    """
    from potluck.engine import Task
    from potluck.models import vision

    if section.model in LANGUAGE_MODELS:
        return _language_task(section, data)
    _check_shapes(section, data)
    shape, target_shape = data.train.inputs.shape[1:], data.train.targets.shape[1:]
    kinds = {"2nn": vision.TwoNN, "cnn": vision.CNN, "logistic": vision.LogisticRegression}
    model = partial(kinds[section.model], shape, data.num_classes or math.prod(target_shape))
    return Task(model=model, data=data)


def _check_shapes(section: ModelSection, data: FederatedData) -> None:
    """Checks that a model of ours takes these inputs and gives these targets."""
    inputs, targets = data.train.inputs, data.train.targets
    if not hasattr(inputs, "shape"):
        raise ConfigError(
            f"task.model = {section.model!r} takes one array of inputs, got several. Give a model "
            "of your own, in Python."
        )
    shape = inputs.shape[1:]
    at, got = f"task.model = {section.model!r}", f"got inputs of shape={shape}"
    if inputs.dtype.kind != "f":
        raise ConfigError(
            f"{at} needs inputs that are floats, got whole numbers (dtype={inputs.dtype}). Divide "
            'images of 0 to 255 by 255: say task.scale = "pixels".'
        )
    if not shape:
        raise ConfigError(
            f"{at} needs features, [examples, features], {got}. Give inputs[:, None]."
        )
    if section.model == "cnn" and len(shape) != 3:
        gray = ", or give inputs[:, None]" if len(shape) == 2 else ""
        raise ConfigError(
            f"{at} needs images [channels, height, width], {got}. Use '2nn' or 'logistic'{gray}."
        )
    if section.model == "cnn" and min(shape[1:]) < 4:
        raise ConfigError(
            f"{at} needs images [channels, height, width] of at least 4 by 4, {got}. Give channels "
            "first: inputs.transpose(0, 3, 1, 2)."
        )
    if data.kind == "classes" and targets.ndim != 1:
        raise ConfigError(
            f"{at} gives one class an example, got targets of shape={targets.shape[1:]} for each. "
            "Give targets of the shape [examples], or use a model of your own in Python."
        )


def _language_task(section: ModelSection, data: FederatedData) -> Task:
    from potluck.engine import Task
    from potluck.models import (
        CharacterAccuracy,
        CharLSTM,
        Loss,
        PeepholeCharLSTM,
        PerCharacter,
        PerStep,
    )
    from potluck.models.task_metrics import AFTER_FIRST

    if data.padding is None:
        raise ConfigError(
            f"the model {section.model!r} needs text, got data without padding. Give other data."
        )
    model = CharLSTM if section.model == "char-lstm" else PeepholeCharLSTM
    loss: Loss = PerCharacter(padding=data.padding)
    if section.loss == "per-step":
        loss = PerStep(padding=data.padding, steps=data.train.targets.shape[1])
    return Task(
        model=partial(model, data.num_classes, hidden=section.hidden or 256),
        data=data,
        loss=loss,
        metrics={
            "accuracy": CharacterAccuracy(padding=data.padding),
            AFTER_FIRST: CharacterAccuracy(padding=data.padding, skipped=1),
        },
        batches="random" if section.batches == "random" else "by length",
    )
