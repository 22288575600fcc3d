"""A plan: algorithm, settings and task as JSON inside a signed manifest.

    {"task": {"model": "2nn", "num_classes": 10}, "algorithm": {"client_lr": 0.1, …}, "needs": []}

A plan names models, losses and algorithms that the device has; it holds no code. The number of
classes and the padding are those of the whole run, since one device may not have seen them all.

Compatibility: strict, as an experiment is. A device that does not know a key or a name answers
`unsupported`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, JsonValue, ValidationError

from potluck.config.algorithm_section import CLIENTS, AlgorithmTable
from potluck.config.experiment import Experiment, ModelSection
from potluck.config.model_task import build_task
from potluck.config.section import Section
from potluck.core import ConfigError, DataError
from potluck.core.plain_json import to_json

if TYPE_CHECKING:
    from potluck.data import FederatedData
    from potluck.engine import Task

_MAX_SCHEMA_BYTES = 200_000

Need = Literal["charging", "idle", "unmetered"]


class PlannedTask(ModelSection):
    """The part of [task] that is not about where the data are."""

    hidden: int | None = Field(default=None, ge=1, le=10**5)
    num_classes: int = Field(ge=0, le=10**6)
    """0 for a regression."""
    padding: int | None = None
    kind: Literal["multilabel"] | None = None
    """Of the targets; None: what the two above say (text, a regression or classes)."""


class Plan(Section):
    """Task, algorithm, and the condition in which a device must stay while it trains."""

    task: PlannedTask
    algorithm: AlgorithmTable
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
    algorithm = experiment.algorithm
    if getattr(algorithm, "client_optimizer", None) == CLIENTS["sgd"](name="sgd"):
        # Plain steps are the default, and a key that older devices do not know.
        algorithm = algorithm.model_copy(update={"client_optimizer": None})
    return Plan(task=task, algorithm=algorithm, needs=needs, data=schema)


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
    """Checks the JSON of a plan and returns it.

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
    """Returns the names of a device's metrics of a plan's task, which are means over its
    examples."""
    if task.padding is not None:
        return frozenset(("loss", "accuracy", "accuracy_after_first"))
    return frozenset(("loss", "accuracy" if task.num_classes else "mae"))


def build_planned_task(task: PlannedTask, data: FederatedData) -> Task:
    """The task of a plan over data, which may be one device's. Imports PyTorch.

    The run defines the kind of targets. A device whose quantities happen to be whole numbers, or
    whose examples lack some classes, cannot find it.

    Raises:
        ConfigError: data that do not fit the plan.
    """
    from potluck.data.federated import reread

    if data.padding is not None:
        return build_task(task, replace(data, num_classes=task.num_classes))
    kind = task.kind or ("classes" if task.num_classes else "regression")
    try:
        return build_task(task, reread(data, kind, task.num_classes or None))
    except DataError as error:
        raise ConfigError(f"the data do not fit the run: {error}") from None
