"""An experiment: everything that decides the numbers of a run, in one checked TOML file.

`potluck init` writes a commented example.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from potluck.config.algorithm_section import AlgorithmTable
from potluck.config.round_settings import RoundRules, ServeSection
from potluck.config.section import Section, override, read_toml, validated
from potluck.core import Codec, ConfigError

_Positive: TypeAlias = Annotated[float, Field(gt=0)]

LANGUAGE_MODELS = ("char-lstm", "char-lstm-peephole")


class ModelSection(Section):
    """A model of ours and its loss and batches: the part of [task] that is sent to devices."""

    model: Literal["2nn", "cnn", "logistic", "char-lstm", "char-lstm-peephole"]
    hidden: Annotated[int, Field(ge=1)] | None = None
    """For the LSTMs: the width of a layer; None is the paper's 256."""
    loss: Literal["per-character", "per-step"] | None = None
    """For text: what the loss is averaged over, the real characters (the default) or all steps."""
    batches: Literal["by-length", "random"] | None = None
    """For text: None is by-length."""


class TaskSection(ModelSection):
    """[task]: the data set and the model."""

    data: Literal[
        "mnist",
        "digits",
        "wisdm",
        "shakespeare",
        "pythonlib",
        "folder",
        "table",
        "text",
        "devices",
    ]
    variant: Literal["clean", "paper"] | None = None
    """For data = "shakespeare"; None is clean."""
    kind: Literal["classes", "regression", "multilabel"] | None = None
    """For data = "folder" and "table": the kind of the targets; None takes the proposal of the
    values."""
    path: str | None = None
    """For data = "folder", "table" and "text": where they are, relative to the experiment file. For
    data = "devices", which are on devices alone: the JSON of their schema."""
    client_column: str = "client"
    """For data = "table", and "text" in a table."""
    text_column: str | None = None
    """For data = "text" in a table; None is text."""
    symbols: Literal["bytes", "characters"] | None = None
    """For data = "text"; None is bytes."""
    steps: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """For data = "text": symbols in a row; None is 80."""
    target_column: str | Annotated[list[str], Field(min_length=1)] = "target"
    """For data = "table" and "folder", as all keys below; several are labels or quantities."""
    missing: Literal["refuse", "mean", "median"] | float | None = None
    """The value in place of a missing feature; None refuses it."""
    scale: Literal["none", "standard", "minmax", "pixels"] | None = None
    """The scaling of features, over all clients; pixels are divided by 255."""
    categories: Literal["refuse", "one-hot", "codes"] | None = None
    """The coding of columns of text; None refuses them."""
    split: Annotated[str, Field(pattern=r"^(shuffled|last|(time|group):.+)$")] | None = None
    """Which examples are held out for the test; None is shuffled, of each class its share."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of a client's examples; None is 0.2."""


class PartitionSection(Section):
    """[partition]: the division of one data set among clients."""

    kind: Literal[
        "iid", "shards", "dirichlet", "unbalanced", "writer", "user", "role", "module", "own"
    ]
    clients: Annotated[int, Field(ge=1)] = 100
    shards_per_client: Annotated[int, Field(ge=1)] = 2
    alpha: Annotated[float, Field(gt=0)] = 0.5
    sigma: Annotated[float, Field(gt=0)] = 1.0
    seed: Annotated[int, Field(ge=0)] = 0


class TargetSection(Section):
    """[run.target]: a metric, and the score at which a run may stop."""

    metric: Annotated[str, Field(min_length=1)]
    at_least: float | None = None
    at_most: float | None = None


class RunSection(Section):
    """[run]: rounds, cohorts and their executor."""

    rounds: Annotated[int, Field(ge=1)]
    cohort: Annotated[int, Field(ge=1)] | Annotated[float, Field(ge=0, le=1)] = 0.1
    seed: Annotated[int, Field(ge=0)] = 0
    codec: Codec | None = None
    """In which updates travel, simulated or real; None is float32."""
    target: _Positive | TargetSection | None = None
    """A number is an accuracy to reach from below, or, without accuracies, a loss from above."""
    stop_at_target: bool = True
    evaluate_every: Annotated[int, Field(ge=1)] = 1
    evaluate_train: Annotated[int, Field(ge=1)] | None = None
    """Training examples on which the averaged model's loss is taken too: `train_loss`."""
    executor: Literal["auto", "loop", "workers", "vmap", "ray"] = "workers"
    workers: Annotated[int, Field(ge=1)] | None = None
    device: str | None = None
    """For executor = "vmap" and "auto": "cpu", "cuda", "cuda:1" or "auto", a GPU if there is one.
    None is "cpu" for the first and "auto" for the second. For "ray": "cpu" or "cuda"."""
    precision: Literal["float32", "tf32", "bf16"] | None = None
    """Of products in local training; None is float32."""
    ray_address: str | None = None
    """For executor = "ray": "auto" or "ray://host:10001"; None starts a cluster on this machine."""
    ray_local: Literal["auto", "loop", "vmap"] = "auto"
    """The way a worker of Ray trains its clients: one after another, side by side, or the
    faster."""
    ray_gpus: Annotated[float, Field(gt=0)] = 1.0
    """Of each worker of Ray, with device = "cuda"."""
    skip_failures: bool = False


class DevicesSection(RoundRules):
    """[devices]: simulated devices, whose rounds take virtual time.

    Its other keys are those of a server's rounds.
    """

    profile: Literal["ideal", "hospitals", "phones", "browsers"] | None = None
    trace: str | None = None
    """Instead of a profile: a CSV file, relative to the experiment file."""
    trace_days: Annotated[int, Field(ge=1, le=366)] = 1
    """After so many the windows of a trace come again."""
    examples_per_second: _Positive | None = None
    """Local training of this model on the middle device; None is the profile's round figure."""
    utc_offsets: list[Annotated[float, Field(ge=-12, le=14)]] = Field(default=[0.0], min_length=1)
    """Hours; the time zones of a profile's devices."""
    start_hour: Annotated[float, Field(ge=0, lt=24)] = 0.0
    """The hour of the day, UTC, at which the run begins."""


class Experiment(Section):
    """A whole experiment file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    task: TaskSection
    partition: PartitionSection
    algorithm: AlgorithmTable
    run: RunSection
    devices: DevicesSection | None = None
    server: Annotated[ServeSection, Field(exclude=True)] = ServeSection()


def load_experiment(path: Path | str, overrides: Sequence[str] = ()) -> Experiment:
    """Reads an experiment file, changes it by `overrides` ("run.rounds=20"), and checks it.

    Raises:
        ConfigError: the file cannot be read, or a key or value in it is wrong.
    """
    path = Path(path)
    advice = "Give an experiment; `potluck init` writes one, and data are named in it (task.path)."
    content = read_toml(path, "an experiment", "Write one with `potluck init`.", advice)
    for change in overrides:
        override(content, change)
    experiment = check_experiment(content, str(path))
    return _with_absolute_paths(experiment, path.parent)


def check_experiment(content: dict[str, Any], origin: str) -> Experiment:
    """Validates the content of an experiment file; `origin` names it in errors."""
    experiment = validated(Experiment, content, origin)
    for wrong in (*_wrong_in_run(experiment.run), *_wrong_in_devices(experiment.devices)):
        raise ConfigError(f"{origin}: {wrong}")
    return experiment


def _wrong_in_run(run: RunSection) -> Iterator[str]:
    """Yields the errors in [run] beyond the schema: a missing bound, names of devices,
    conflicts."""
    target, device, executor = run.target, run.device, run.executor
    if isinstance(target, TargetSection) and (target.at_least is None) == (target.at_most is None):
        yield (
            f"run.target must have at_least or at_most, got at_least = {target.at_least}, at_most "
            f'= {target.at_most}. Give one of the two: {{metric = "loss", at_most = 2.0}}.'
        )
    if device is not None and not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        yield (
            "run.device must be 'cpu', 'cuda', 'cuda:<number>' or 'auto', got run.device = "
            f"{device!r}. 'auto' takes a GPU if there is one."
        )
    if executor == "ray" and device not in (None, "cpu", "cuda"):
        yield (
            "run.device must be 'cpu' or 'cuda' with run.executor = 'ray', got run.device = "
            f"{device!r}. Ray says which GPUs a worker has."
        )
    if device not in (None, "cpu") and executor not in ("vmap", "auto", "ray"):
        yield (
            f"run.device must be left out with run.executor = {executor!r}, got run.device = "
            f"{device!r}. Use run.executor = 'vmap' or 'auto'."
        )
    got = f"got run.precision = {run.precision!r} with run.executor = {executor!r} and run.device"
    on_gpu = executor in ("vmap", "ray") and device not in (None, "cpu")
    if run.precision == "tf32" and not on_gpu:
        yield (
            f"run.precision must not be 'tf32' without a GPU that is named, {got} = {device!r}. "
            "Use run.executor = 'vmap' and run.device = 'cuda'."
        )
    if run.precision == "bf16" and not on_gpu and executor in ("vmap", "auto"):
        yield (
            "run.precision must not be 'bf16' with this executor and no GPU that is named, "
            f"{got} = {device!r}. Use run.executor = 'workers', or run.device = 'cuda' with 'vmap'."
        )


def _wrong_in_devices(devices: DevicesSection | None) -> Iterator[str]:
    """Yields the errors in [devices] beyond the schema: keys that exclude or need each other."""
    if devices is None:
        return
    if (devices.profile is None) == (devices.trace is None):
        got = "both" if devices.trace is not None else "neither"
        yield (
            f"[devices] must have devices.profile or devices.trace, got {got}. Give one of the two."
        )
    source, others = "a trace", ("examples_per_second", "utc_offsets")
    if devices.trace is None:
        source, others = "a profile", ("trace_days",)
    for name in others:
        if name in devices.model_fields_set:
            yield (
                f"devices.{name} must be left out with {source}, got devices.{name} = "
                f"{getattr(devices, name)!r}. Remove it."
            )


def _with_absolute_paths(experiment: Experiment, folder: Path) -> Experiment:
    task = experiment.task
    keys = {"devices": "trace", "server": "test"}
    if task.data in ("folder", "table", "text", "devices"):
        if task.path is None:
            raise ConfigError(
                f"task.path must be given with task.data = {task.data!r}, got none. "
                "Name the folder or the file, or with 'devices' the schema of their data."
            )
        keys["task"] = "path"
    changes: dict[str, Any] = {}
    for name, key in keys.items():
        section = getattr(experiment, name)
        value = getattr(section, key, None)
        if value is not None:
            changes[name] = section.model_copy(update={key: str((folder / value).resolve())})
    return experiment.model_copy(update=changes)
