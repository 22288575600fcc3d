"""An experiment: everything that decides the numbers of a run, in one checked TOML file.

The schema is strict: an unknown key, a wrong type or a value out of range is refused with its
name, what was expected and, for an unknown key, the nearest right one. `potluck init` writes a
commented example.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from potluck.core import ConfigError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TaskSection(_Section):
    """[task]: the data set and the model."""

    data: Literal["mnist", "digits", "wisdm", "shakespeare", "pythonlib", "folder", "table"]
    model: Literal["2nn", "cnn", "logistic", "char-lstm", "char-lstm-peephole"]
    variant: Literal["clean", "paper"] | None = None
    """For data = "shakespeare"; None is clean."""
    hidden: Annotated[int, Field(ge=1)] | None = None
    """For the LSTMs: the width of a layer; None is the paper's 256."""
    loss: Literal["per-character", "per-step"] | None = None
    """For text: what the loss is averaged over, the real characters (the default) or all steps."""
    batches: Literal["by-length", "random"] | None = None
    """For text: None is by-length."""
    path: str | None = None
    """For data = "folder" and "table": where they are, relative to the experiment file."""
    client_column: str = "client"
    """For data = "table"."""
    target_column: str = "target"
    """For data = "table" and "folder"."""


class PartitionSection(_Section):
    """[partition]: how one data set becomes many clients."""

    kind: Literal[
        "iid", "shards", "dirichlet", "unbalanced", "writer", "user", "role", "module", "own"
    ]
    clients: Annotated[int, Field(ge=1)] = 100
    shards_per_client: Annotated[int, Field(ge=1)] = 2
    alpha: Annotated[float, Field(gt=0)] = 0.5
    sigma: Annotated[float, Field(gt=0)] = 1.0
    seed: Annotated[int, Field(ge=0)] = 0


class ServerSection(_Section):
    """[algorithm.server]: what the server does with the aggregate."""

    name: Literal["average"] = "average"
    server_lr: Annotated[float, Field(gt=0)] = 1.0


class AlgorithmSection(_Section):
    """[algorithm]: federated averaging, or federated SGD (E = 1, B = ∞)."""

    name: Literal["fedavg", "fedsgd"] = "fedavg"
    client_lr: Annotated[float, Field(gt=0)]
    local_epochs: Annotated[int, Field(ge=1)] = 1
    batch_size: Annotated[int, Field(ge=1)] | Literal["full"] = 10
    client_lr_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    server: ServerSection = ServerSection()


class RunSection(_Section):
    """[run]: rounds, cohorts and how they are executed."""

    rounds: Annotated[int, Field(ge=1)]
    cohort: Annotated[int, Field(ge=1)] | Annotated[float, Field(ge=0, le=1)] = 0.1
    seed: Annotated[int, Field(ge=0)] = 0
    target: Annotated[float, Field(gt=0, lt=1)] | None = None
    stop_at_target: bool = True
    evaluate_every: Annotated[int, Field(ge=1)] = 1
    evaluate_train: Annotated[int, Field(ge=1)] | None = None
    """Training examples on which the averaged model's loss is taken too: `train_loss`."""
    executor: Literal["loop", "workers"] = "workers"
    workers: Annotated[int, Field(ge=1)] | None = None
    skip_failures: bool = False


class Experiment(_Section):
    """A whole experiment file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    task: TaskSection
    partition: PartitionSection
    algorithm: AlgorithmSection
    run: RunSection


def load_experiment(path: Path | str, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file, change it by `overrides` ("run.rounds=20"), and check it.

    Raises:
        ConfigError: the file cannot be read, or a key or value in it is wrong.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"an experiment must be a readable file, got path={str(path)!r} ({error.strerror}). "
            "Write one with `potluck init`."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}.") from None
    for override in overrides:
        _override(content, override)
    experiment = check_experiment(content, str(path))
    return _with_absolute_path(experiment, path.parent)


def check_experiment(content: dict[str, Any], origin: str) -> Experiment:
    """Validate the content of an experiment file; `origin` names it in errors."""
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_explain(error)}") from None


def _with_absolute_path(experiment: Experiment, folder: Path) -> Experiment:
    task = experiment.task
    if task.data not in ("folder", "table"):
        return experiment
    if task.path is None:
        raise ConfigError(
            f"task.path must be given with task.data = {task.data!r}, got none. "
            "Name the folder or the file."
        )
    absolute = str((folder / task.path).resolve())
    return experiment.model_copy(update={"task": task.model_copy(update={"path": absolute})})


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"an override must look like run.rounds=20, got {override!r}. Put = between the two."
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string
    *path, last = key.strip().split(".")
    table: dict[str, Any] = content
    for part in path:
        inner: Any = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{part} must be a table, got override={override!r}.")
        table = cast("dict[str, Any]", inner)
    table[last] = value


def _explain(error: ValidationError) -> str:
    """All that is wrong, one sentence each."""
    seen: dict[str, list[Any]] = {}
    for detail in error.errors():
        # For a union pydantic reports every member that did not match: group them by key.
        path = [str(part) for part in detail["loc"]]
        known = _known_prefix(path)
        seen.setdefault(".".join(known), []).append(detail)
    return " ".join(_sentence(key, details) for key, details in seen.items())


def _known_prefix(path: list[str]) -> list[str]:
    section: Any = Experiment
    for depth, part in enumerate(path):
        fields = getattr(section, "model_fields", None)
        if fields is None:
            return path[:depth]
        section = fields[part].annotation if part in fields else None
    return path


def _sentence(key: str, details: list[Any]) -> str:
    detail = details[0]
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        *path, last = key.split(".")
        section: Any = Experiment
        for part in path:
            section = section.model_fields[part].annotation
        fields = sorted(cast("dict[str, Any]", section.model_fields))
        near = [field for field in fields if last in field.split("_")]
        near += difflib.get_close_matches(last, fields, n=1)
        hint = f"did you mean {'.'.join([*path, near[0]])}?" if near else "remove it."
        return f"unknown key {key}: {hint} Known here: {', '.join(fields)}."
    if kind == "missing":
        return f"{key} is missing: give it a value."
    expected = " or ".join(dict.fromkeys(_expected(d) for d in details))
    return f"{key} must be {expected}, got {key} = {value!r}."


_KINDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "greater_than": lambda c: f"above {c['gt']}",
    "greater_than_equal": lambda c: f"at least {c['ge']}",
    "less_than": lambda c: f"below {c['lt']}",
    "less_than_equal": lambda c: f"at most {c['le']}",
    "literal_error": lambda c: f"one of {c['expected']}".replace(" or ", ", "),
    "string_pattern_mismatch": lambda c: "letters, digits, dots, dashes and underscores",
    "int_type": lambda c: "an integer",
    "float_type": lambda c: "a number",
    "bool_type": lambda c: "true or false",
    "string_type": lambda c: "a string",
    "model_type": lambda c: "a table",
}


def _expected(detail: dict[str, Any]) -> str:
    explain = _KINDS.get(detail["type"])
    return explain(detail.get("ctx", {})) if explain else str(detail["msg"])
