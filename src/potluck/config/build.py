"""Builds the objects that a checked experiment names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from potluck.config import model_task
from potluck.config.experiment import LANGUAGE_MODELS, Experiment
from potluck.core import ConfigError
from potluck.data import Dataset, FederatedData, datasets, own_data, partitions
from potluck.engine import Task

_LABELLED = ("iid", "shards", "dirichlet", "unbalanced")
_KINDS = {  # the partitions that fit each data set
    "digits": _LABELLED,
    "mnist": (*_LABELLED, "writer"),
    "wisdm": (*_LABELLED, "user"),
    "shakespeare": ("iid", "unbalanced", "role"),
    "pythonlib": ("iid", "unbalanced", "module"),
    "folder": ("own",),  # these two come divided
    "table": ("own",),
    "devices": ("own",),
    "text": ("own",),
}
_OWN = ("folder", "table")
_DIVIDED = (*_OWN, "text")
_SPLIT = ("split", "test_fraction")
_PREPARED = ("kind", "missing", "scale", "categories", *_SPLIT)
_OF_PARTITIONS = {  # the partitions that each key of [partition] decides something of
    "clients": _LABELLED,
    "shards_per_client": ("shards",),
    "alpha": ("dirichlet",),
    "sigma": ("unbalanced",),
    "seed": (*_LABELLED, "own"),
}
_OF_DATA = {  # the data sets that each key of [task] decides something of
    "variant": ("shakespeare",),
    "path": (*_DIVIDED, "devices"),
    "client_column": ("table", "text"),
    "target_column": _OWN,
    **dict.fromkeys(_PREPARED, _OWN),
    **dict.fromkeys(_SPLIT, _DIVIDED),
    **dict.fromkeys(("text_column", "symbols", "steps"), ("text",)),
}


def build_data(experiment: Experiment) -> FederatedData:
    """Loads the data set of an experiment and divides it among its clients.

    Raises:
        ConfigError: a partition or a key that does not fit the data set.
        DataError: data that cannot be had, or are malformed.
    """
    _check_fit(experiment)
    task = experiment.task
    if task.data == "devices":
        raise ConfigError(
            "task.data = 'devices' is trained on devices alone, with `potluck serve`, got another "
            "command. Give task.data = 'folder', 'table' or 'text' and their path to simulate."
        )
    if task.data in _DIVIDED:
        return _own_data(experiment)
    return _partition(experiment, _dataset(experiment))


def build_central_data(experiment: Experiment) -> FederatedData:
    """The data that a served run begins and is evaluated with: without clients where the devices
    alone have any, and with all of a test file as test examples.

    Raises:
        ConfigError, DataError: as `build_data`; a schema or a test file that cannot be used.
    """
    _check_fit(experiment)
    task, test = experiment.task, experiment.server.test
    if task.data == "devices":
        assert task.path is not None  # checked when the experiment was read
        data = own_data.without_clients(own_data.read_schema(task.path), name=experiment.name)
    else:
        data = build_data(experiment)
    if test is None:
        return data
    if data.schema is None:
        raise ConfigError(
            f"server.test is for own data (task.data = 'folder', 'table' or 'devices'), got "
            f"server.test = {test!r} with task.data = {task.data!r}, which has test examples. "
            "Leave it out."
        )
    return own_data.with_test_file(data, test)


def build_task(experiment: Experiment, data: FederatedData) -> Task:
    """The task of an experiment over data that `build_data` gave."""
    section = experiment.task
    if (data.padding is not None) != (section.model in LANGUAGE_MODELS):
        raise ConfigError(
            f"task.model must be one of {', '.join(map(repr, LANGUAGE_MODELS))} with text and "
            f"another one with other data, got task.model = {section.model!r} with "
            f"task.data = {section.data!r}. Change one of the two."
        )
    return model_task.build_task(section, data)


def _check_fit(experiment: Experiment) -> None:
    task, kind = experiment.task, experiment.partition.kind
    if kind not in _KINDS[task.data]:
        raise ConfigError(
            f"partition.kind must be {_either(_KINDS[task.data])} with task.data = {task.data!r}, "
            f"got partition.kind = {kind!r}. Change one of the two."
        )
    _check_applies("task", task, _OF_DATA, "data", task.data)
    _check_applies("partition", experiment.partition, _OF_PARTITIONS, "kind", kind)
    for name in ("hidden", "loss", "batches"):
        if getattr(task, name) is not None and task.model not in LANGUAGE_MODELS:
            raise ConfigError(
                f"task.{name} must be left out unless task.model is a language model, got "
                f"task.{name} = {getattr(task, name)!r} with task.model = {task.model!r}. "
                "Remove it."
            )


def _check_applies(
    section: str, given: BaseModel, uses: Mapping[str, tuple[str, ...]], by: str, value: str
) -> None:
    """Refuses a key that decides nothing."""
    for name, users in uses.items():
        if name in given.model_fields_set and value not in users and _is_said(given, name):
            raise ConfigError(
                f"{section}.{name} must be left out unless {section}.{by} is {_either(users)}, got "
                f"{section}.{name} = {getattr(given, name)!r} with {section}.{by} = {value!r}. "
                "Remove it."
            )


def _either(values: Sequence[str]) -> str:
    *first, last = map(repr, values)
    return f"{', '.join(first)} or {last}" if first else last


def _is_said(given: BaseModel, name: str) -> bool:
    """True if a key was given a value of its own.

    An experiment that was written out in full, as manifests have it, names all keys of its time.
    """
    fields = type(given).model_fields
    value, written_out = getattr(given, name), len(given.model_fields_set) == len(fields)
    return value is not None and value != fields[name].default and not written_out


def _own_data(experiment: Experiment) -> FederatedData:
    task = experiment.task
    assert task.path is not None  # checked when the experiment was read
    names = (*_SPLIT, "symbols", "steps", "text_column") if task.data == "text" else _PREPARED
    said: dict[str, Any] = {name: getattr(task, name) for name in names}
    said = {name: value for name, value in said.items() if value is not None}
    said["seed"] = experiment.partition.seed
    if task.data == "text":
        return own_data.from_text(task.path, client_column=task.client_column, **said)
    said["target_column"] = task.target_column
    if task.data == "folder":
        return own_data.from_folder(task.path, **said)
    return own_data.from_table(task.path, client_column=task.client_column, **said)


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
        case _:  # the natural owners; `_check_fit` has checked that there are some
            return partitions.by_group(dataset)
