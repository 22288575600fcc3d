"""Local training in PyTorch: the runtime that the simulator and devices with PyTorch share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from potluck.core import PLAIN_SGD, ClientOptimizer, Correction, Spec, Trained, Vector
from potluck.data.federated import Examples, lengths, trimmed
from potluck.data.trees import called, mapped
from potluck.engine.buffers import check_unaveraged, unaveraged
from potluck.engine.corrected_step import Descent, fresh_state
from potluck.engine.first_batch import checked_loss, in_words, outputs_of
from potluck.engine.fused_sgd import SMALLEST, InPlaceLayers
from potluck.engine.gradients import Foreign, gradients_of
from potluck.engine.local_run import LocalRun
from potluck.engine.module.pristine import Pristine
from potluck.engine.module.randomness import seed_generators
from potluck.engine.module.variables import Variables
from potluck.engine.native.max_pool import use_compiled
from potluck.engine.precision import Precision, autocast, check_precision, floated
from potluck.engine.task import Task, averaged_tensors, bind, in_training, spec_of
from potluck.models.losses import counts_nothing, may_count_nothing

_NO_CORRECTION = Correction()


class TorchRuntime:
    """One module, its weights in one vector, and local steps that change them in place.

    It serves one client after another: `train` makes all steps of a run. They can be made one by
    one, too: `take` gives it the examples, then come `begin`, some steps, and `end`.

    Args:
        precision: "float32" or "bf16", for processors with bfloat16 products.
        one_thread: whether PyTorch's kernels run on one thread in every step; then LSTMs are
            compiled where they can be.
        fused_from: how many weights a layer has at least that is fused with its step
            (`potluck.engine.fused_sgd`); None fuses none, which is plain autograd: the oracle.
    """

    def __init__(
        self,
        task: Task,
        precision: Precision = "float32",
        *,
        one_thread: bool = False,
        fused_from: int | None = SMALLEST,
    ) -> None:
        check_precision(precision, torch.device("cpu"))
        self._precision: Precision = precision
        self.module, self._loss, _ = task.parts()
        use_compiled(in_training(self.module))
        self.spec: Spec = spec_of(self.module)
        self._vector = torch.zeros(self.spec.dim, dtype=torch.float32)
        bind(self.module, self._vector)
        self._weights: Vector = self._vector.numpy()
        self._views: dict[str, Tensor] = self.spec.unflatten(self._vector)
        self._pristine = Pristine(self.module, dict(averaged_tensors(self.module)), self._loss)
        self._variables = Variables.of(self.module, self._loss)
        self._changed: str | None = None
        self._foreign = Foreign(self.module)
        self._unaveraged = unaveraged(self.module)
        self._is_checked = False
        self._may_skip = may_count_nothing(self._loss, task.data.train.targets)
        self._train = task.data.train
        self._padding = task.data.padding
        self._losses: list[Tensor] = []
        self._trained = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self._layers: InPlaceLayers | None = None
        if fused_from is not None:
            layers = InPlaceLayers(self.module, precision, compiled=one_thread, smallest=fused_from)
            self._layers = layers if layers.layers else None
        self._pristine.adopt()
        self.module.zero_grad(set_to_none=True)  # what an earlier training may have left

    def train(self, run: LocalRun, before_step: Callable[[], None] | None = None) -> Trained:
        """Makes all steps of a run; its weights are a view, until the next `begin`.

        Args:
            before_step: is called before each step, and ends the training by what it raises.
        """
        self.take(self._train)
        self.begin(run.start, run.rows, run.seed, run.correction, run.optimizer)
        for batch, lr in run.steps:
            if before_step is not None:
                before_step()
            self.step(batch, lr)
        weights, loss = self.end()
        return Trained(weights, loss, len(run.steps))

    def take(self, examples: Examples) -> None:
        """Takes the examples to use from the next `begin` on."""
        self._examples = examples

    def begin(
        self,
        received: Vector,
        order: NDArray[np.int64],
        seed: int,
        correction: Correction = _NO_CORRECTION,
        optimizer: ClientOptimizer = PLAIN_SGD,
    ) -> None:
        """Loads the received weights and puts the examples in order, so that batches are slices."""
        self._load(order)
        self._losses.clear()
        self._pristine.restore()
        self._variables.put_back()  # where a client failed
        self._variables.keep()
        self._weights[...] = received
        self._descent = self._corrected(correction, optimizer)
        seed_generators(seed)

    def step(self, batch: slice, lr: float) -> None:
        """One step down ∇ℓ(w; batch), in place; no step for a batch in which nothing counts.

        A layer takes a bare step of plain SGD by itself where it can. Every other step is
        `Descent.take`, of whole gradients.

        Raises:
            TaskError: model or loss does not keep its contract, or cannot be used on this batch.
        """
        if self._may_skip and counts_nothing(self._loss, self._targets[batch]):
            return
        layers, fuses = self._layers, self._descent.is_bare
        with nullcontext() if layers is None or fuses else layers.plain():
            loss = self._forward(batch)
            self._foreign.look(loss)
            with layers.step(lr, loss) if layers is not None and fuses else nullcontext():
                gradients = gradients_of(loss, self._trained)
        self._descent.take(self._trained, gradients, lr)
        self._losses.append(loss.detach())

    def end(self) -> tuple[Vector, float]:
        """The local weights (a view, until the next `begin`) and the mean loss; NaN if nothing
        counted.

        Raises:
            TypeError: the model wrote a number that is not averaged.
        """
        self._changed = self._variables.put_back()
        self._pristine.read(self._views)
        check_unaveraged(self.module, self._unaveraged)
        if not self._losses:
            return self._weights, float("nan")
        return self._weights, float(torch.stack(self._losses).mean())

    def changed(self) -> str | None:
        """Returns the name of what the model wrote since `begin` beside its weights, statistics and
        counters, or into them in another way than in place; see `Pristine.changed`."""
        return self._changed or self._pristine.changed()

    def _load(self, order: NDArray[np.int64]) -> None:
        inputs = mapped(lambda array: array.take(order, axis=0), self._examples.inputs)
        self._lengths = None if self._padding is None else lengths(inputs, self._padding)
        self._inputs = mapped(lambda array: torch.from_numpy(array), inputs)
        self._targets = torch.from_numpy(self._examples.targets.take(order, axis=0))

    def _forward(self, batch: slice) -> Tensor:
        inputs, targets = mapped(lambda part: part[batch], self._inputs), self._targets[batch]
        if self._lengths is not None:
            inputs, targets = trimmed(inputs, targets, max(int(self._lengths[batch].max()), 1))
        if self._precision == "float32":
            outputs = outputs_of(self.module, inputs, targets)
        else:
            with autocast(self._precision, targets.device):
                outputs = outputs_of(self.module, inputs, targets)
            outputs = floated(outputs)
        with in_words("the loss", None, outputs, targets):
            if self._is_checked:
                return self._loss(outputs, targets)
            loss = checked_loss(self._loss, outputs, targets, trains=True)
            self._is_checked = True
            return loss

    def _corrected(self, correction: Correction, optimizer: ClientOptimizer) -> Descent:
        """The steps from the present weights on."""
        clip, proximal, drift = correction
        received = {} if proximal == 0.0 else self._trained_of(self._vector.clone())
        drifts = {} if drift is None else self._trained_of(torch.tensor(drift))
        state = fresh_state(optimizer, self._trained)
        return Descent(optimizer, clip, proximal, received, drifts, state, many=False)

    def _trained_of(self, vector: Tensor) -> dict[str, Tensor]:
        views = self.spec.unflatten(vector)
        return {name: views[name] for name in self._trained}


class ModelWithLoss(nn.Module):
    """A module and the loss of its outputs as one module, so that `functional_call` gives other
    weights to both: to a loss that reads the module's parameters, too."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.module, self.loss, _ = task.parts()
        use_compiled(in_training(self.module))

    def forward(self, inputs: Any, targets: Tensor) -> Tensor:
        """The loss of one batch."""
        return self.loss(called(self.module, inputs), targets)

    def at(self, tensors: Mapping[str, Tensor], inputs: Any, targets: Tensor) -> Tensor:
        """The same as a pure function of the module's tensors by name, but for what the model
        writes into them."""
        named = {f"module.{name}": tensor for name, tensor in tensors.items()}
        return functional_call(self, named, (inputs, targets))


def pure_loss(task: Task) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The task's loss as a pure function of (weights [dim], inputs, targets).

    Unlike a runtime's step it has no state, so it can be differentiated, vectorised over clients
    (`torch.func.vmap`) and exported.
    """
    with_loss = ModelWithLoss(task)
    spec = spec_of(with_loss.module)

    def loss(weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        return with_loss.at(spec.unflatten(weights), inputs, targets)

    return loss
