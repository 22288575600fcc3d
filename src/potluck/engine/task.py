"""A task: model, loss, metrics and data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import repeat
from types import FunctionType
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import nn

from potluck.core import Role, Spec, Vector
from potluck.core.validate import as_seed
from potluck.data.federated import FederatedData
from potluck.data.tables.targets import TargetKind
from potluck.engine.module.copies import copy_of
from potluck.engine.module.kinds import averaged_buffers, averaged_tensors
from potluck.engine.module.making import Making
from potluck.engine.module.rebinding import rebound
from potluck.models.losses import Loss
from potluck.models.task_metrics import Metric, check_judges, defaults

_BY_KIND: Any = None  # stands for what follows from the kind of the targets


class Parts(NamedTuple):
    """A module, and the loss and metrics of what it gives."""

    module: nn.Module
    loss: Loss
    metrics: Mapping[str, Metric]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A model, its data, and the loss and metrics that judge it.

    Args:
        model: a callable without arguments that makes the module (a class, a lambda), so that
            initial weights follow from the seed of a run; or a module, whose present weights are
            then the initial ones. It is copied, with all that it holds. Whatever a callable draws,
            from PyTorch, NumPy or `random`, follows from the seed as well.
        data: the examples of all clients.
        loss: (outputs, targets) to the batch's mean loss. By default cross-entropy of classes,
            the mean squared error of a regression, binary cross-entropy of many labels.
        metrics: name to (outputs, targets) to values; see `potluck.models.task_metrics`. By default
            the accuracy, or "mae", "rmse" and "r2" of a regression.
        batches: for sequences (data that have a padding symbol), "by length" puts sequences of
            similar length into one batch, so that little is padded; "random" draws batches as for
            other data.
    """

    model: nn.Module | Callable[[], nn.Module]
    data: FederatedData
    loss: Loss = _BY_KIND
    metrics: Mapping[str, Metric] = _BY_KIND
    batches: Literal["by length", "random"] = "by length"
    _making: Making = field(default_factory=Making, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(cast(Any, self.data), FederatedData):
            raise TypeError(
                f"data must be of clients (FederatedData), got {type(self.data).__name__}. "
                "Divide a data set with potluck.partitions, or take potluck.own_data."
            )
        loss, metrics = defaults(self.kind)
        if self.loss is _BY_KIND:
            object.__setattr__(self, "loss", loss)
        if self.metrics is _BY_KIND:
            object.__setattr__(self, "metrics", metrics)
        check_judges(self.loss, self.metrics)

    @property
    def kind(self) -> TargetKind:
        """The kind of the targets."""
        return self.data.kind

    def __repr__(self) -> str:
        model, loss = (getattr(x, "__name__", type(x).__name__) for x in (self.model, self.loss))
        data = f"{self.data.name!r}, {self.data.num_clients} clients, {self.data.kind}"
        return f"Task(model={model}, data=({data}), loss={loss}, metrics={[*self.metrics]})"

    def module(self, weights: Vector | None = None, *, seed: int | None = None) -> nn.Module:
        """Returns a new module, which belongs to the caller. Global randomness is kept.

        Args:
            weights: those of the module; without them it has those of round 0.
            seed: of the run whose model it is, from which all follows that the factory draws;
                without it, that of the run which this task began last, 0 if there was none.

        Raises:
            ValueError: `weights` came without a seed, and it is not clear from which run they are,
                while the model draws more than its weights.
        """
        if seed is None:
            seed = self.last_seed() if weights is None else self.only_seed()
        module = self._making.module(self.model, as_seed(seed))
        if weights is not None:
            views = spec_of(module).unflatten(torch.tensor(weights))
            with torch.no_grad():
                for name, tensor in averaged_tensors(module):
                    tensor.copy_(views[name])
        return module

    def parts(self, seed: int | None = None) -> Parts:
        """Returns a new module with its loss and metrics, which refer to this module if they hold
        the model."""
        module = self.module(seed=seed)
        pairs = self._making.twins(self.model, module)
        metrics = {name: rebound(metric, pairs) for name, metric in self.metrics.items()}
        loss = rebound(self.loss, pairs)
        if loss is self.loss and hasattr(loss, "__dict__") and not isinstance(loss, FunctionType):
            with suppress(Exception):  # what cannot be copied is shared
                loss = copy_of(loss) if isinstance(loss, nn.Module) else deepcopy(loss)
        return Parts(module, loss, metrics)

    def initial_weights(self, seed: int) -> Vector:
        """The model of round 0, which depends on the seed alone. Global randomness is kept.

        Other threads of Potluck that make or try modules wait meanwhile.

        Raises:
            ValueError: `model` makes another module the second time, from the same seed.
        """
        seed = as_seed(seed)
        self.begin(seed)
        module = self.module()
        weights = spec_of(module).flatten(
            {name: tensor.detach().numpy() for name, tensor in averaged_tensors(module)}
        )
        self._making.check(self.model, module, seed, self.data.train.rows(slice(2)).inputs)
        return weights

    def begin(self, seed: int) -> None:
        """Begins or continues a run with this seed: `module` makes its model from now on."""
        self._making.begin(as_seed(seed))

    def last_seed(self) -> int:
        """The seed of the run that was begun last; 0 before any."""
        return self._making.seed or 0

    def only_seed(self) -> int:
        """Returns the seed of a model of which only the weights are known.

        Raises:
            ValueError: it may be of several runs, or of none that this task began, and the model
                draws more than its weights.
        """
        known = self._making.seeds or {0, 1}
        if len(known) > 1 and self._making.is_drawn(self.model, *sorted(known)[:2]):
            raise ValueError(
                "seed must be given where the model draws more than its weights (a permutation, a "
                "mask), which follows from the seed of the run, got weights of an unknown run. "
                "Pass the seed of the run: seed=0."
            )
        return self.last_seed()

    def is_other(self, seed: int, other: int) -> bool:
        """True if the modules of two seeds differ in more than their weights."""
        return self._making.is_drawn(self.model, seed, other)


class Remade:
    """A value made of a task's model, made again for a run whose seed gives another model, and not
    only other weights.

    Args:
        make: makes it, for the run that the task began last. Called now, too.
    """

    def __init__(self, task: Task, make: Callable[[], None]) -> None:
        self._task, self._make = task, make
        self._seed = task.last_seed()
        make()

    def begin(self, seed: int) -> None:
        """Begins or continues a run with this seed."""
        self._task.begin(seed)
        self.follow()

    def follow(self) -> None:
        """Makes it again if it is not of the run that the task began last."""
        seed = self._task.last_seed()
        if seed == self._seed:
            return
        if self._task.is_other(seed, self._seed):
            self._make()
        self._seed = seed


def in_training(module: nn.Module) -> nn.Module:
    """The module, ready for local training. Parts that were handed over in evaluation mode within a
    module in training mode (a pretrained body) stay as they are."""
    kept = [part for part in module.modules() if not part.training] if module.training else []
    module.train()
    for part in kept:
        part.training = False
    return module


def spec_of(module: nn.Module) -> Spec:
    """The names and shapes inside the vector of a module, and their roles as far as the module
    alone shows them: frozen parameters are constants, and buffers statistics. `roles` of
    `potluck.engine.buffers` finds out more.

    Raises:
        TypeError: a parameter that is not float32.
    """
    parameters, buffers = list(module.named_parameters()), averaged_buffers(module)
    for name, tensor in parameters:
        if tensor.dtype != torch.float32:
            raise TypeError(
                f"every parameter must be float32, got {name} of dtype={tensor.dtype}. "
                "Call .float() on the model."
            )
    roles: list[Role] = [_role(parameter) for _, parameter in parameters]
    return Spec.of(
        [*parameters, *buffers], [*roles, *repeat("statistic", len(buffers))], len(buffers)
    )


def _role(parameter: nn.Parameter) -> Role:
    return "trained" if parameter.requires_grad else "constant"


def bind(module: nn.Module, vector: torch.Tensor) -> None:
    """Makes the module's tensors views of `vector` [dim], which from then on is the model."""
    views = spec_of(module).unflatten(vector)
    for name, tensor in averaged_tensors(module):
        tensor.data = views[name]
