"""One local step of many clients at once, written out for plain stacks of linear layers.

For a module that is a chain of flattening, linear layers and ReLU, judged by cross-entropy, the
gradient has a closed form over the matrix of clients. With batches [clients, batch, in]:

    h_0 = x,   z_l = h_{l-1} W_lᵀ + b_l,   h_l = max(z_l, 0)
    ∂ℓ/∂z_L = (softmax(z_L) − onehot(y)) · weight     weight = 1 / batch, 0 where it is filled
    ∂ℓ/∂z_l = (∂ℓ/∂z_{l+1} W_{l+1}) · [z_l > 0]
    W_l ← W_l − lr (∂ℓ/∂z_l)ᵀ h_{l-1},   b_l ← b_l − lr Σ ∂ℓ/∂z_l

In plain SGD the gradient of a layer is never written: its product of two thin matrices is added to
W in place. Nor is it for its norm: ‖Gᵀ H‖² = Σ (G Gᵀ) ∘ (H Hᵀ), two products of batch × batch.

Short batches are filled up to the longest of their group; what is filled has weight 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn import functional

from potluck.data.trees import is_one
from potluck.engine.corrected_step import Descent, Rate
from potluck.engine.module.plain import are_hooked, is_plain, is_quiet
from potluck.engine.module.variables import Variables
from potluck.engine.task import Task
from potluck.models.losses import cross_entropy


class Layer(NamedTuple):
    """A linear layer of a stack."""

    weight: str  # the name of its parameter
    bias: str | None
    relu: bool  # whether one follows


def layers_of(module: nn.Module, task: Task) -> list[Layer] | None:
    """The layers of a module that is a plain stack under cross-entropy; None if it is none."""
    if task.loss not in (cross_entropy, functional.cross_entropy):
        return None
    data = task.data.train
    if not is_one(data.inputs):
        return None
    if task.data.padding is not None or data.targets.ndim != 1 or data.inputs.dtype != np.float32:
        return None
    if data.targets.dtype != np.int64 or data.targets.min(initial=0) < 0:  # < 0 may be left out
        return None
    chain = _chain(module)
    if chain is None or (data.inputs.ndim != 2 and chain[0] is not _FLATTEN):
        return None
    names = {id(p): name for name, p in module.named_parameters()}
    layers: list[Layer] = []
    for step in chain:
        if isinstance(step, nn.Linear):
            bias = None if step.bias is None else names[id(step.bias)]  # type: ignore[reportUnnecessaryComparison]
            layers.append(Layer(names[id(step.weight)], bias, relu=False))
        elif step is _RELU:
            if not layers:
                return None
            layers[-1] = layers[-1]._replace(relu=True)
        elif layers and data.inputs.ndim != 2:
            return None  # flattened after a layer that saw several axes
    used = [name for layer in layers for name in (layer.weight, layer.bias) if name is not None]
    plain = len(used) == len(set(used)) and sorted(used) == sorted(names.values())
    trained = all(p.requires_grad for p in module.parameters())
    last = bool(layers) and not layers[-1].relu
    return layers if plain and trained and last and not list(module.buffers()) else None


class Stack:
    """The step of one stack."""

    by_size = True

    def __init__(self, task: Task, layers: Sequence[Layer]) -> None:
        examples = task.data.train
        self._inputs = examples.inputs.reshape(examples.num_examples, -1)
        self._targets = examples.targets
        self._layers = layers
        self._room = torch.empty(0)

    def begin(self, seeds: Sequence[int]) -> None:
        """Does nothing: a stack draws and counts nothing."""

    def key(self, client: int, rows: NDArray[np.int64]) -> Hashable:
        """Returns the bit length of the batch size: less than half of a stacked batch is then
        filled."""
        return len(rows).bit_length()

    def step(
        self,
        weights: Mapping[str, Tensor],
        clients: Sequence[int],
        batches: Sequence[NDArray[np.int64]],
        lr: float,
        descent: Descent,
    ) -> Tensor:
        """One local step of every client, in place; returns their losses [clients]."""
        return self.take(weights, *self._stacked(batches), lr, descent)

    def take(
        self,
        weights: Mapping[str, Tensor],
        inputs: Tensor,
        targets: Tensor,
        shares: Tensor,
        lr: Rate,
        descent: Descent,
    ) -> Tensor:
        """The same on these examples.

        Args:
            inputs: [clients, batch, in].
            targets: [1, clients · batch].
            shares: of the examples in the loss, [clients, batch or 1].
        """
        hidden, logits = self._forward(weights, inputs)
        losses, error = _cross_entropy(logits, targets, shares)
        errors = self._backward(weights, hidden, error)
        if not descent.is_plain:
            descent.take(weights, self._gradients(hidden, errors), lr)
            return losses
        descent.pull(weights, lr)
        factor: Rate = 1.0
        if descent.gradient_clip is not None:
            factor = descent.clip_factor(self._squares(hidden, errors))
        if isinstance(lr, Tensor):
            factor, lr = lr * factor, 1.0
        if isinstance(factor, Tensor):
            errors = [error * factor.view(-1, 1, 1) for error in errors]
        for layer, below, error in zip(self._layers, hidden, errors, strict=True):
            weights[layer.weight].baddbmm_(error.transpose(1, 2), below, alpha=-lr)
            if layer.bias is not None:
                weights[layer.bias].add_(error.sum(1), alpha=-lr)
        return losses

    def _gradients(self, hidden: Sequence[Tensor], errors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns the gradients by name, written out."""
        gradients: dict[str, Tensor] = {}
        for layer, below, error in zip(self._layers, hidden, errors, strict=True):
            gradients[layer.weight] = torch.bmm(error.transpose(1, 2), below)
            if layer.bias is not None:
                gradients[layer.bias] = error.sum(1)
        return gradients

    def _stacked(self, batches: Sequence[NDArray[np.int64]]) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs [clients, batch, in], targets [1, clients · batch], weights [clients, batch or 1]
        of the examples in the loss."""
        longest = max(part.shape[1] for part in batches)
        if all(part.shape[1] == longest for part in batches):
            rows = batches[0] if len(batches) == 1 else np.concatenate(batches)
            shares = torch.full((len(rows), 1), 1.0 / longest)
        else:
            parts = [_filled(part, longest) for part in batches]
            rows = np.concatenate([rows for rows, _ in parts])
            shares = torch.cat([shares for _, shares in parts])
        width = self._inputs.shape[1]
        if len(self._room) < rows.size * width:
            self._room = torch.empty(rows.size * width)
        inputs = self._room[: rows.size * width].view(rows.size, width)
        np.take(self._inputs, rows.ravel(), axis=0, out=inputs.numpy(), mode="clip")
        targets = torch.from_numpy(self._targets[rows])
        return inputs.view(*rows.shape, width), targets.view(1, -1), shares

    def _forward(
        self, weights: Mapping[str, Tensor], inputs: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Returns the inputs of each layer, and the logits."""
        seen = [inputs]
        for layer in self._layers:
            weight = weights[layer.weight].transpose(1, 2)
            if layer.bias is None:
                out = torch.bmm(seen[-1], weight)
            else:
                out = torch.baddbmm(weights[layer.bias].unsqueeze(1), seen[-1], weight)
            seen.append(out.relu_() if layer.relu else out)
        return seen[:-1], seen[-1]

    def _backward(
        self, weights: Mapping[str, Tensor], hidden: Sequence[Tensor], error: Tensor
    ) -> list[Tensor]:
        """∂ℓ/∂z of every layer, from that of the last."""
        errors = [error]
        for i in range(len(self._layers) - 1, 0, -1):
            error = torch.bmm(errors[0], weights[self._layers[i].weight])
            if self._layers[i - 1].relu:
                error = torch.ops.aten.threshold_backward(error, hidden[i], 0.0)
            errors.insert(0, error)
        return errors

    def _squares(self, hidden: Sequence[Tensor], errors: Sequence[Tensor]) -> Tensor:
        """The squared norms of the gradients, [clients]."""
        total = errors[0].new_zeros(len(errors[0]))
        for layer, below, error in zip(self._layers, hidden, errors, strict=True):
            grams = torch.bmm(error, error.transpose(1, 2)), torch.bmm(below, below.transpose(1, 2))
            total += (grams[0] * grams[1]).sum((1, 2))
            if layer.bias is not None:
                total += error.sum(1).square().sum(1)
        return total


def _cross_entropy(logits: Tensor, targets: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """The losses [clients] of logits [clients, batch, classes], and their gradient."""
    # Classes first: along a short last axis PyTorch's softmax is many times slower.
    likelihoods = logits.flatten(0, 1).t().contiguous().log_softmax(0)
    likelihood = likelihoods.gather(0, targets)  # [1, clients · batch]
    losses = -(likelihood.view(logits.shape[:2]) * shares).sum(1)
    error = likelihoods.exp_().scatter_(0, targets, likelihood.expm1_())
    return losses, error.t().contiguous().view(logits.shape).mul_(shares.unsqueeze(2))


def _filled(batches: NDArray[np.int64], longest: int) -> tuple[NDArray[np.int64], Tensor]:
    """Batches [clients, batch] and the weights of their examples, both [clients, longest]."""
    clients, size = batches.shape
    rows = np.repeat(batches[:, :1], longest, axis=1)  # any of the client's own
    rows[:, :size] = batches
    shares = torch.zeros(clients, longest)
    shares[:, :size] = 1.0 / size
    return rows, shares


_FLATTEN, _RELU = "flatten", "relu"


def _chain(module: nn.Module) -> list[Any] | None:
    """The steps from input to output of a module that is a chain: linear layers, "flatten" and
    "relu". None if it is anything else, or cannot be followed."""
    if not all(map(is_quiet, module.modules())) or are_hooked(module.parameters()):
        return None
    try:
        with Variables.of(module, None).held():
            graph = fx.symbolic_trace(module).graph
    except Exception:  # whatever a user's own Python does when it is followed
        return None
    nodes = list(graph.nodes)
    steps: list[Any] = []
    if nodes[0].op != "placeholder" or nodes[-1].op != "output":
        return None
    for before, node in pairwise(nodes):
        if list(node.all_input_nodes) != [before] or len(before.users) != 1:
            return None
        if node.op != "output":
            steps.append(_step(module, node))
    return None if not steps or None in steps else steps


def _step(module: nn.Module, node: fx.Node) -> Any:
    """Returns the operation of a node; None if it has no place in a stack."""
    rest = (*node.args[1:], *node.kwargs.items())
    if node.op == "call_module":
        part = module.get_submodule(str(node.target))
        if is_plain(part, nn.Linear):
            return part
        if is_plain(part, nn.Flatten):
            axes = cast("nn.Flatten", part)
            return _FLATTEN if (axes.start_dim, axes.end_dim) == (1, -1) else None
        return _RELU if is_plain(part, nn.ReLU) else None
    if node.target in ("flatten", torch.flatten) and rest in ((1,), (("start_dim", 1),)):
        return _FLATTEN
    relus = ("relu", torch.relu, functional.relu)
    return _RELU if node.target in relus and rest in ((), (("inplace", False),)) else None
