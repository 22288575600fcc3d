"""Training on a device: the `client_update` of the simulation, with a check before every step.

A `Trainer` is the interface for other runtimes. It has one device's data, and turns a plan and a
received model into an update, or into sums of metrics. `TorchTrainer` imports PyTorch when it is
first needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from potluck.algorithms import client_update, with_statistics
from potluck.config.algorithm_section import build_algorithm
from potluck.config.plan import Plan, PlannedTask, build_planned_task
from potluck.core import (
    ClientContext,
    ConfigError,
    DataError,
    DivergedError,
    Role,
    Spec,
    TaskError,
    Update,
    Vector,
)
from potluck.core.validate import as_count
from potluck.protocol import Runtime

if TYPE_CHECKING:
    from potluck.data import FederatedData
    from potluck.data.tables.schema import Schema
    from potluck.engine import Task, TorchRuntime

_TRIED = 32  # examples in the trial of a step that takes them all
Sums = Mapping[str, tuple[float, int]]


class Trainer(Protocol):
    """Trains and evaluates on one device's data."""

    def runtime(self) -> Runtime:
        """Returns the runtime's name and version, for the server."""
        ...

    def fit(self, plan: Plan, spec: Spec) -> int | None:
        """Checks beforehand, as far as possible, that this device's data fit the plan.

        Returns:
            The number of examples, where it is known.

        Raises:
            ConfigError, DataError: as `train` would.
        """
        ...

    def train(
        self,
        plan: Plan,
        spec: Spec,
        received: Vector,
        *,
        seed: int,
        round: int,
        client: int,
        check: Callable[[], None],
    ) -> Update:
        """Trains locally. `check` is called before each step; its error ends the training.

        Args:
            spec: of what travels: of `received`, and of the update's Δ.

        Raises:
            ConfigError: the plan asks for what is not here, or does not fit the data.
            DataError: there is nothing to train on.
            DivergedError: loss or weights are no longer finite.
        """
        ...

    def evaluate(
        self, plan: Plan, spec: Spec, weights: Vector, *, check: Callable[[], None]
    ) -> Sums:
        """Returns each metric's sum over the device's own test examples, and their number."""
        ...


class TorchTrainer:
    """Training in PyTorch.

    Args:
        load: gives the data of this one client, prepared by the schema that the run's plan brings
            (None: it brings none); called when they are first needed.
        num_threads: of PyTorch's kernels. One by default: several programs on one machine whose
            kernels use all its cores wait for each other, and small models gain nothing by more.
        build: makes the task of a plan, from code of one's own where a plan cannot name the model.
        where: the data are from, for messages.
    """

    def __init__(
        self,
        load: Callable[[Schema | None], FederatedData],
        num_threads: int = 1,
        build: Callable[[PlannedTask, FederatedData], Task] = build_planned_task,
        where: str = "this device's data",
    ) -> None:
        self._where = where
        self._load, self._build = load, build
        self._num_threads = as_count("num_threads", num_threads)
        self._data: FederatedData | None = None
        self._plan: Plan | None = None
        self._task: Task | None = None
        self._model: TorchRuntime | None = None

    def runtime(self) -> Runtime:
        """Returns PyTorch's name and version, without importing it."""
        try:
            version = metadata.version("torch").partition("+")[0]
        except metadata.PackageNotFoundError:
            return Runtime(name="none", version="0")
        return Runtime(name="torch", version=version)

    def fit(self, plan: Plan, spec: Spec) -> int | None:
        """Takes one local step from a model of this device's own, and forgets it; see `Trainer`."""
        task, model, _ = self._prepare(plan, spec)
        examples = task.data.client(0)
        model.take(examples)
        size = plan.algorithm.batch_size
        few = min(examples.num_examples, _TRIED if size == "full" else size)
        try:
            model.begin(task.initial_weights(0), np.arange(few), 0)
            model.step(slice(0, few), plan.algorithm.client_lr)
            model.end()
        except DivergedError:
            pass  # as may be where the run's model is another
        except (ConfigError, DataError, TaskError) as error:
            raise ConfigError(f"{self._where}: {error}") from None
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            told = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"a local step on {self._where} must be possible, got inputs of "
                f"shape={examples.inputs.shape[1:]} and targets of shape="
                f"{examples.targets.shape[1:]}, dtype={examples.targets.dtype}: {told}. Give data "
                "like those of the run."
            ) from error
        return examples.num_examples

    def train(
        self,
        plan: Plan,
        spec: Spec,
        received: Vector,
        *,
        seed: int,
        round: int,
        client: int,
        check: Callable[[], None],
    ) -> Update:
        """Trains locally; see `Trainer`."""
        from potluck.engine import run_of

        task, model, whole = self._prepare(plan, spec)
        algorithm = build_algorithm(plan)
        if algorithm.vectors != 1:
            raise ConfigError(
                f"a device trains algorithms that send one vector, got algorithm.name = "
                f"{plan.algorithm.name!r}. Use another algorithm."
            )
        context = ClientContext(seed, round, client, task.data.client(0).num_examples)
        update = client_update(
            with_statistics(algorithm, whole),
            _unpacked(task, whole, received, seed),
            context,
            lambda request: model.train(run_of(task, request, context, 0), check),
        )
        if not (np.isfinite(update.loss) and np.isfinite(update.delta).all()):
            raise DivergedError(
                f"loss and weights must be finite, got loss={update.loss}. "
                "Lower the client learning rate, or look at this device's data."
            )
        for part in whole.slices("constant"):
            if update.delta[part].any():
                raise ConfigError(
                    f"{whole.name_at(part.start)} must stay what it is, which the run takes for a "
                    "constant, got other values after local training. Begin the run again with a "
                    "model that says so: a buffer that its first steps change."
                )
        return update._replace(delta=whole.pack(update.delta))

    def evaluate(
        self, plan: Plan, spec: Spec, weights: Vector, *, check: Callable[[], None]
    ) -> Sums:
        """Returns sums of metrics; see `Trainer`."""
        from potluck.engine import Evaluator, evaluation_batches
        from potluck.models.task_metrics import is_statistic

        task, _, whole = self._prepare(plan, spec)
        if task.data.client_test(0).num_examples == 0:
            raise DataError("a device must have test examples to evaluate on, got none.")
        evaluator = Evaluator(task)
        evaluator.load(_unpacked(task, whole, weights, seed=0))
        total: dict[str, Any] = {}
        for batch in evaluation_batches(task, task.data.client_test(0)):
            check()
            for name, pair in evaluator.sums(batch).items():
                if len(pair) == 2 and not is_statistic(task.metrics.get(name)):
                    total[name] = total.get(name, 0.0) + pair
        sums = {name: (float(pair[0]), round(float(pair[1]))) for name, pair in total.items()}
        if not np.isfinite([pair[0] for pair in sums.values()]).all():
            raise DivergedError("metrics must be finite, got some that are not.")
        return sums

    def _prepare(self, plan: Plan, spec: Spec) -> tuple[Task, TorchRuntime, Spec]:
        """Returns the task, its runtime, and the spec of the whole model with the run's roles."""
        if self._task is None or self._model is None or _data_of(plan) != _data_of(self._plan):
            import torch

            from potluck.engine import TorchRuntime
            from potluck.engine.task import spec_of

            torch.set_num_threads(self._num_threads)
            if self._data is None or self._plan is None or plan.data != self._plan.data:
                self._data = self._load(_schema_of(plan))
            if self._data.num_clients != 1 or self._data.train.num_examples == 0:
                raise DataError(
                    f"a device must have the examples of one client, got {self._where} with "
                    f"{self._data.train.num_examples} of {self._data.num_clients} clients. "
                    "Give it some."
                )
            try:
                self._task = self._build(plan.task, self._data)
            except (ConfigError, DataError) as error:
                raise type(error)(f"{self._where}: {error}") from None
            if self._build is build_planned_task:  # models of ours can be measured without memory
                with torch.device("meta"):
                    self._whole(spec, spec_of(cast("Any", self._task.model)()))
            self._model = TorchRuntime(self._task)
            self._plan = plan
        return self._task, self._model, self._whole(spec, self._model.spec)

    def _whole(self, run: Spec, own: Spec) -> Spec:
        """Returns the spec of this device's model with the roles of the run's, which must be the
        same."""
        assert self._task is not None
        whole = _with_roles_of(run, own)
        if whole.packed().digest() != run.digest():
            raise ConfigError(_misfit(self._where, self._task.data, own, run))
        return whole


def _with_roles_of(run: Spec, own: Spec) -> Spec:
    """Returns this device's spec, with the run's statistics as statistics."""
    statistics = set(run.names[len(run.names) - run.num_buffers :])
    roles: dict[str, Role] = {
        name: "statistic" if name in statistics else "constant"
        for name, role in zip(own.names, own.roles, strict=True)
        if role != "trained"
    }
    return own.with_roles(roles)


def _unpacked(task: Task, whole: Spec, received: Vector, seed: int) -> Vector:
    """Returns the whole model, with this device's constants around what was received."""
    if whole.is_all_trained:
        return received
    return whole.unpack(received, task.initial_weights(seed))


def _misfit(where: str, data: FederatedData, own: Spec, run: Spec) -> str:
    """Returns how a model for a device's data differs from that of the run."""
    mine, theirs = (dict(zip(spec.names, spec.shapes, strict=True)) for spec in (own, run))
    names = [name for name in theirs if mine.get(name) != theirs[name]] or list(mine)
    name = names[0]
    got = f"inputs of shape {data.train.inputs.shape[1:]}, with which {name} is {mine.get(name)}"
    return (
        f"{where} must fit the model of the run, whose {name} is {theirs.get(name)}, got {got}. "
        "Give inputs of the run's shape."
    )


def _data_of(plan: Plan | None) -> Any:
    return None if plan is None else (plan.task, plan.data)


def _schema_of(plan: Plan) -> Schema | None:
    from potluck.data.tables.schema import Schema

    return None if plan.data is None else Schema.from_json(plan.data)
