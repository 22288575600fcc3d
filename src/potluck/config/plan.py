"""A plan: what is done with a model, as JSON inside a signed manifest; and the objects it names.

    {"task": {"model": "2nn", "num_classes": 10}, "algorithm": {"client_lr": 0.1, …}, "needs": []}

A plan names models, losses and algorithms that the device has; it holds no code. The number of
classes and the padding are those of the whole run, since one device may not have seen them all.

Compatibility: strict, as an experiment is. A device that does not know a key or a name says
`unsupported`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from potluck.algorithms import (
    Adagrad,
    Adam,
    Average,
    FedAvg,
    FedProx,
    Momentum,
    Nesterov,
    Scaffold,
    Schedule,
    ServerOptimizer,
    Yogi,
    schedules,
)
from potluck.config.experiment import AlgorithmSection, Experiment, ScheduleSection
from potluck.core import ConfigError, DataError
from potluck.core.plain_json import to_json

if TYPE_CHECKING:
    from potluck.data import FederatedData
    from potluck.engine import Task

_MAX_SCHEMA_BYTES = 200_000
LANGUAGE_MODELS = ("char-lstm", "char-lstm-peephole")

# The keys of a section are the arguments of what it names.
_SERVERS: Mapping[str, Callable[..., ServerOptimizer]] = {
    "average": Average,
    "momentum": Momentum,
    "nesterov": Nesterov,
    "adagrad": Adagrad,
    "adam": Adam,
    "yogi": Yogi,
}
_SCHEDULES: Mapping[str, Callable[..., Schedule]] = {
    "constant": schedules.Constant,
    "exponential": schedules.Exponential,
    "step": schedules.Step,
    "linear": schedules.Linear,
    "cosine": schedules.Cosine,
}

Need = Literal["charging", "idle", "unmetered"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class PlannedTask(_Strict):
    """The part of [task] that is not about where the data are."""

    model: Literal["2nn", "cnn", "logistic", "char-lstm", "char-lstm-peephole"]
    hidden: int | None = Field(default=None, ge=1, le=10**5)
    loss: Literal["per-character", "per-step"] | None = None
    batches: Literal["by-length", "random"] | None = None
    num_classes: int = Field(ge=0, le=10**6)
    """0 for a regression."""
    padding: int | None = None
    kind: Literal["multilabel"] | None = None
    """Of the targets; None: what the two above say (text, a regression or classes)."""


class Plan(_Strict):
    """Task, algorithm, and the condition in which a device must stay while it trains."""

    task: PlannedTask
    algorithm: AlgorithmSection
    needs: tuple[Need, ...] = Field(default=(), strict=False)
    data: dict[str, JsonValue] | None = None
    """The schema of the run's own data (`potluck.data.tables.schema`), which a device applies to
    its own file; None: the examples of a device are arrays that fit the model as they are."""


def plan_of(experiment: Experiment, data: FederatedData, needs: tuple[Need, ...] = ()) -> Plan:
    """The plan of an experiment whose data, of all clients, are these."""
    section = experiment.task
    task = PlannedTask(
        model=section.model,
        hidden=section.hidden,
        loss=section.loss,
        batches=section.batches,
        num_classes=data.num_classes,
        padding=data.padding,
        kind="multilabel" if data.kind == "multilabel" else None,
    )
    schema = None if data.schema is None else data.schema.to_json()
    _check_size(schema)
    return Plan(task=task, algorithm=experiment.algorithm, needs=needs, data=schema)


def _check_size(schema: dict[str, Any] | None) -> None:
    size = len(to_json(schema))
    if size > _MAX_SCHEMA_BYTES:
        raise ConfigError(
            f"the schema of the data must be at most {_MAX_SCHEMA_BYTES} bytes of JSON, to travel "
            f"in a plan, got {size}. Use fewer columns, categories or classes."
        )


def write_plan(plan: Plan) -> dict[str, Any]:
    """The JSON of a plan, without the keys that have no value."""
    return plan.model_dump(mode="json", exclude_none=True)


def read_plan(content: Any) -> Plan:
    """Check the JSON of a plan.

    Raises:
        ConfigError: a key or a name that this version does not know.
    """
    try:
        return Plan.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the plan"
        raise ConfigError(
            f"the plan asks for what this version does not have: {place}: {first['msg']}. "
            "Install the server's version of Potluck."
        ) from None


def metrics_of(task: PlannedTask) -> frozenset[str]:
    """The names of what a device measures of a plan's task: the means over its examples."""
    if task.padding is not None:
        return frozenset(("loss", "accuracy", "accuracy_after_first"))
    return frozenset(("loss", "accuracy" if task.num_classes else "mae"))


def build_planned_task(task: PlannedTask, data: FederatedData) -> Task:
    """The task of a plan over data, which may be one device's. Imports PyTorch.

    Raises:
        ConfigError: data that do not fit the plan.
    """
    from potluck.engine import Task
    from potluck.models import vision

    data = _as_planned(task, data)
    if task.model in LANGUAGE_MODELS:
        return _language_task(task, data)
    _check_shapes(task, data)
    shape, target_shape = data.train.inputs.shape[1:], data.train.targets.shape[1:]
    kinds = {"2nn": vision.TwoNN, "cnn": vision.CNN, "logistic": vision.LogisticRegression}
    model = partial(kinds[task.model], shape, task.num_classes or math.prod(target_shape))
    return Task(model=model, data=data)


def _check_shapes(task: PlannedTask, data: FederatedData) -> None:
    """Whether a model of ours takes these inputs and gives these targets."""
    inputs, targets = data.train.inputs, data.train.targets
    if not hasattr(inputs, "shape"):
        raise ConfigError(
            f"task.model = {task.model!r} takes one array of inputs, got several. Give a model of "
            "your own, in Python."
        )
    shape = inputs.shape[1:]
    at, got = f"task.model = {task.model!r}", f"got inputs of shape={shape}"
    if inputs.dtype.kind != "f":
        raise ConfigError(
            f"{at} needs inputs that are floats, got whole numbers (dtype={inputs.dtype}). Divide "
            'images of 0 to 255 by 255: say task.scale = "pixels".'
        )
    if not shape:
        raise ConfigError(
            f"{at} needs features, [examples, features], {got}. Give inputs[:, None]."
        )
    if task.model == "cnn" and len(shape) != 3:
        gray = ", or give inputs[:, None]" if len(shape) == 2 else ""
        raise ConfigError(
            f"{at} needs images [channels, height, width], {got}. Use '2nn' or 'logistic'{gray}."
        )
    if task.model == "cnn" and min(shape[1:]) < 4:
        raise ConfigError(
            f"{at} needs images [channels, height, width] of at least 4 by 4, {got}. Give channels "
            "first: inputs.transpose(0, 3, 1, 2)."
        )
    if task.num_classes and task.kind is None and targets.ndim != 1:
        raise ConfigError(
            f"{at} gives one class an example, got targets of shape={targets.shape[1:]} for each. "
            "Give targets of the shape [examples], or use a model of your own in Python."
        )


def build_planned_algorithm(section: AlgorithmSection) -> FedAvg | FedProx | Scaffold:
    """The algorithm of an [algorithm] section."""
    shared: dict[str, Any] = {
        "client_lr": section.client_lr,
        "local_epochs": section.local_epochs,
        "batch_size": None if section.batch_size == "full" else section.batch_size,
        "gradient_clip": section.gradient_clip,
        "client_schedule": _schedule(section.client_schedule),
        "server": _SERVERS[section.server.name](**section.server.model_dump(exclude={"name"})),
        "server_schedule": _schedule(section.server_schedule),
    }
    match section.name:
        case "fedavg" | "fedsgd":
            return FedAvg(**shared)
        case "fedprox":
            return FedProx(mu=section.mu, **shared)
        case "scaffold":
            return Scaffold(**shared)


def _schedule(section: ScheduleSection | None) -> Schedule:
    if section is None:
        return schedules.Constant()
    if section.name == "warmup":
        return schedules.Warmup(section.rounds, then=_schedule(section.then))
    return _SCHEDULES[section.name](**section.model_dump(exclude={"name"}))


def _language_task(task: PlannedTask, data: FederatedData) -> Task:
    from potluck.engine import Task
    from potluck.models import (
        CharacterAccuracy,
        CharLSTM,
        Loss,
        PeepholeCharLSTM,
        PerCharacter,
        PerStep,
    )
    from potluck.models.losses import AFTER_FIRST

    if data.padding is None:
        raise ConfigError(
            f"the model {task.model!r} needs text, got data without padding. Give other data."
        )
    model = CharLSTM if task.model == "char-lstm" else PeepholeCharLSTM
    loss: Loss = PerCharacter(padding=data.padding)
    if task.loss == "per-step":
        loss = PerStep(padding=data.padding, steps=data.train.targets.shape[1])
    return Task(
        model=partial(model, task.num_classes, hidden=task.hidden or 256),
        data=data,
        loss=loss,
        metrics={
            "accuracy": CharacterAccuracy(padding=data.padding),
            AFTER_FIRST: CharacterAccuracy(padding=data.padding, skipped=1),
        },
        batches="random" if task.batches == "random" else "by length",
    )


def _as_planned(task: PlannedTask, data: FederatedData) -> FederatedData:
    """Data, which may be one device's, with the run's kind of targets and number of classes.

    What targets are, the run says: a device whose quantities happen to be whole numbers, or whose
    examples have not all classes, cannot know it.
    """
    from potluck.data.federated import reread

    if data.padding is not None:
        return data
    kind = task.kind or ("classes" if task.num_classes else "regression")
    try:
        return reread(data, kind, task.num_classes or None)
    except DataError as error:
        raise ConfigError(f"the data do not fit the run: {error}") from None
