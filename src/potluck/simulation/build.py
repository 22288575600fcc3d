"""From a checked experiment to the objects that it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

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
from potluck.core import ConfigError
from potluck.experiment import Experiment, ScheduleSection, ServerSection
from potluck.tasks import (
    CNN,
    CharacterAccuracy,
    CharLSTM,
    Dataset,
    FederatedData,
    LogisticRegression,
    Loss,
    PeepholeCharLSTM,
    PerCharacter,
    PerStep,
    Task,
    TwoNN,
    cross_entropy,
    datasets,
    mean_squared_error,
    own_data,
    partitions,
)

_MODELS = {"2nn": TwoNN, "cnn": CNN, "logistic": LogisticRegression}
_LANGUAGE_MODELS = {"char-lstm": CharLSTM, "char-lstm-peephole": PeepholeCharLSTM}
_LABELLED = ("iid", "shards", "dirichlet", "unbalanced")
_KINDS = {  # the partitions that fit each data set
    "digits": _LABELLED,
    "mnist": (*_LABELLED, "writer"),
    "wisdm": (*_LABELLED, "user"),
    "shakespeare": ("iid", "unbalanced", "role"),
    "pythonlib": ("iid", "unbalanced", "module"),
    "folder": ("own",),  # these two come divided
    "table": ("own",),
}
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


def build_data(experiment: Experiment) -> FederatedData:
    """Load the data set of an experiment and divide it among its clients.

    Raises:
        ConfigError: a partition or a key that does not fit the data set.
        DataError: data that cannot be had, or are malformed.
    """
    _check_fit(experiment)
    task = experiment.task
    if task.data in ("folder", "table"):
        assert task.path is not None  # checked when the experiment was read
        if task.data == "folder":
            return own_data.from_folder(task.path, target_column=task.target_column)
        return own_data.from_table(
            task.path, client_column=task.client_column, target_column=task.target_column
        )
    return _partition(experiment, _dataset(experiment))


def build_task(experiment: Experiment, data: FederatedData) -> Task:
    """The task of an experiment over data that `build_data` gave."""
    if data.padding is not None or experiment.task.model in _LANGUAGE_MODELS:
        return _language_task(experiment, data)
    shape = data.train.inputs.shape[1:]
    if experiment.task.model == "cnn" and len(shape) != 3:
        raise ConfigError(
            "task.model = 'cnn' needs images [channels, height, width], "
            f"got inputs of shape={shape}. Use '2nn' or 'logistic'."
        )
    model = _MODELS[experiment.task.model]
    if data.num_classes == 0:
        return Task(model=partial(model, shape, 1), data=data, loss=mean_squared_error, metrics={})
    return Task(model=partial(model, shape, data.num_classes), data=data, loss=cross_entropy)


def build_algorithm(experiment: Experiment) -> FedAvg | FedProx | Scaffold:
    """The algorithm of an experiment."""
    section = experiment.algorithm
    shared: dict[str, Any] = {
        "client_lr": section.client_lr,
        "local_epochs": section.local_epochs,
        "batch_size": None if section.batch_size == "full" else section.batch_size,
        "gradient_clip": section.gradient_clip,
        "client_schedule": _schedule(section.client_schedule),
        "server": _server(section.server),
        "server_schedule": _schedule(section.server_schedule),
    }
    match section.name:
        case "fedavg" | "fedsgd":
            return FedAvg(**shared)
        case "fedprox":
            return FedProx(mu=section.mu, **shared)
        case "scaffold":
            return Scaffold(**shared)


def _server(section: ServerSection) -> ServerOptimizer:
    return _SERVERS[section.name](**section.model_dump(exclude={"name"}))


def _schedule(section: ScheduleSection | None) -> Schedule:
    if section is None:
        return schedules.Constant()
    if section.name == "warmup":
        return schedules.Warmup(section.rounds, then=_schedule(section.then))
    return _SCHEDULES[section.name](**section.model_dump(exclude={"name"}))


def _language_task(experiment: Experiment, data: FederatedData) -> Task:
    section = experiment.task
    if data.padding is None or section.model not in _LANGUAGE_MODELS:
        raise ConfigError(
            f"task.model must be one of {', '.join(map(repr, _LANGUAGE_MODELS))} with text and "
            f"another one with other data, got task.model = {section.model!r} with "
            f"task.data = {section.data!r}. Change one of the two."
        )
    model = partial(_LANGUAGE_MODELS[section.model], data.num_classes, hidden=section.hidden or 256)
    loss: Loss = PerCharacter(padding=data.padding)
    if section.loss == "per-step":
        loss = PerStep(padding=data.padding, steps=data.train.targets.shape[1])
    return Task(
        model=model,
        data=data,
        loss=loss,
        metrics={"accuracy": CharacterAccuracy(padding=data.padding)},
        batches="random" if section.batches == "random" else "by length",
    )


def _check_fit(experiment: Experiment) -> None:
    task, kind = experiment.task, experiment.partition.kind
    if kind not in _KINDS[task.data]:
        *first, last = map(repr, _KINDS[task.data])
        kinds = f"{', '.join(first)} or {last}" if first else last
        raise ConfigError(
            f"partition.kind must be {kinds} with task.data = {task.data!r}, "
            f"got partition.kind = {kind!r}. Change one of the two."
        )
    if task.variant is not None and task.data != "shakespeare":
        raise ConfigError(
            "task.variant must be left out unless task.data = 'shakespeare', got "
            f"task.variant = {task.variant!r} with task.data = {task.data!r}. Remove it."
        )
    for name in ("hidden", "loss", "batches"):
        if getattr(task, name) is not None and task.model not in _LANGUAGE_MODELS:
            raise ConfigError(
                f"task.{name} must be left out unless task.model is a language model, got "
                f"task.{name} = {getattr(task, name)!r} with task.model = {task.model!r}. "
                "Remove it."
            )


def _dataset(experiment: Experiment) -> Dataset:
    match experiment.task.data:
        case "mnist":
            return datasets.mnist(writers=experiment.partition.kind == "writer")
        case "wisdm":
            return datasets.wisdm()
        case "shakespeare":
            return datasets.shakespeare(variant=experiment.task.variant or "clean")
        case "pythonlib":
            return datasets.pythonlib()
        case _:
            return datasets.digits()


def _partition(experiment: Experiment, dataset: Dataset) -> FederatedData:
    section = experiment.partition
    clients, seed = section.clients, section.seed
    match section.kind:
        case "iid":
            return partitions.iid(dataset, clients=clients, seed=seed)
        case "shards":
            return partitions.shards(
                dataset, clients=clients, shards_per_client=section.shards_per_client, seed=seed
            )
        case "dirichlet":
            return partitions.dirichlet(dataset, clients=clients, alpha=section.alpha, seed=seed)
        case "unbalanced":
            return partitions.unbalanced(dataset, clients=clients, sigma=section.sigma, seed=seed)
        case _:  # the natural owners; `_check_fit` has seen to it that there are some
            return partitions.by_group(dataset)
