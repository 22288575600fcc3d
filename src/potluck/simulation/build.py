"""From a checked experiment to the objects that it names."""

from __future__ import annotations

from functools import partial

from potluck.algorithms import Average, FedAvg
from potluck.core import ConfigError
from potluck.experiment import Experiment
from potluck.tasks import (
    CNN,
    CharacterAccuracy,
    CharLSTM,
    Dataset,
    FederatedData,
    LogisticRegression,
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


def build_algorithm(experiment: Experiment) -> FedAvg:
    """The algorithm of an experiment."""
    section = experiment.algorithm
    server = Average(server_lr=section.server.server_lr)
    if section.name == "fedsgd":
        if section.local_epochs != 1 or section.batch_size not in ("full", 10):
            raise ConfigError(
                "algorithm.name = 'fedsgd' means local_epochs = 1 and batch_size = 'full', got "
                f"local_epochs = {section.local_epochs}, batch_size = {section.batch_size!r}. "
                "Leave both out, or use 'fedavg'."
            )
        epochs, batch_size = 1, None
    else:
        epochs = section.local_epochs
        batch_size = None if section.batch_size == "full" else section.batch_size
    return FedAvg(
        client_lr=section.client_lr,
        local_epochs=epochs,
        batch_size=batch_size,
        client_lr_decay=section.client_lr_decay,
        server=server,
    )


def _language_task(experiment: Experiment, data: FederatedData) -> Task:
    section = experiment.task
    if data.padding is None or section.model not in _LANGUAGE_MODELS:
        raise ConfigError(
            f"task.model must be one of {', '.join(map(repr, _LANGUAGE_MODELS))} with text and "
            f"another one with other data, got task.model = {section.model!r} with "
            f"task.data = {section.data!r}. Change one of the two."
        )
    model = partial(_LANGUAGE_MODELS[section.model], data.num_classes, hidden=section.hidden or 256)
    loss = PerStep if section.loss == "per-step" else PerCharacter
    return Task(
        model=model,
        data=data,
        loss=loss(padding=data.padding),
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
