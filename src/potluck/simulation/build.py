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
    Dataset,
    FederatedData,
    LogisticRegression,
    Task,
    TwoNN,
    cross_entropy,
    datasets,
    mean_squared_error,
    own_data,
    partitions,
)

_MODELS = {"2nn": TwoNN, "cnn": CNN, "logistic": LogisticRegression}
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
    """Load the data set of an experiment and divide it among its clients."""
    task, partition = experiment.task, experiment.partition
    if task.data in ("folder", "table"):
        if partition.kind != "own":
            raise ConfigError(
                f"partition.kind must be 'own' with task.data = {task.data!r}, which comes divided "
                f"already, got partition.kind = {partition.kind!r}."
            )
        assert task.path is not None  # checked when the experiment was read
        if task.data == "folder":
            return own_data.from_folder(task.path, target_column=task.target_column)
        return own_data.from_table(
            task.path, client_column=task.client_column, target_column=task.target_column
        )
    return _partition(experiment, _dataset(experiment))


def build_task(experiment: Experiment, data: FederatedData) -> Task:
    """The task of an experiment over data that `build_data` gave."""
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
        "clip_norm": section.clip_norm,
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


def _dataset(experiment: Experiment) -> Dataset:
    match experiment.task.data:
        case "mnist":
            return datasets.mnist(writers=experiment.partition.kind == "writer")
        case "wisdm":
            return datasets.wisdm()
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
        case "writer" | "user":
            return partitions.by_group(dataset)
        case "own":
            raise ConfigError(
                f"task.data = {experiment.task.data!r} does not come divided. "
                "Use partition.kind = 'iid', 'shards', 'dirichlet' or 'unbalanced'."
            )
