"""Checks the contracts of models, losses and metrics on the first batch, and words their errors.

A loss that is not one number, or outputs of another shape than the targets, often train without an
error: NumPy's rules make [n] against [n, 1] a table of n × n. So the first batch of every runtime
and every evaluator is checked, once.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from potluck.core import PotluckError, TaskError
from potluck.data.trees import called, first, is_one, leaves, mapped, shown
from potluck.engine.module.randomness import borrowed_randomness
from potluck.models.losses import Loss, Weighted, count_of, counts_nothing

_IN_A_FUNCTION = re.compile(r"[\w.]*<locals>\.")  # where a class is defined, in its full name
_SAME = 1e-4  # relative, of two ways to compute the same number


def checked_loss(loss: Loss, outputs: Any, targets: Tensor, *, trains: bool) -> Tensor:
    """The loss of a batch, if loss and outputs keep their contract.

    Args:
        trains: whether it is to be differentiated.

    Raises:
        TaskError: they do not.
    """
    if outputs is None:
        raise TaskError(
            "a model must give what the loss needs, a tensor or several, got None. Let its forward "
            "method return it."
        )
    found = tensors(outputs)
    _check_one_class(loss, outputs, targets)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Using a target size")
        try:
            value: Any = loss(outputs, targets)
        except UserWarning as warning:
            if "target size" not in str(warning):  # where the caller makes errors of warnings
                raise
            raise _broadcasts(outputs, targets) from None
    _check_value(value, outputs, targets, trains=trains)
    if isinstance(outputs, Tensor):
        _check_shapes(loss, outputs, targets, value)
    is_odd = trains and bool(value.isnan()) and not counts_nothing(loss, targets)
    if is_odd and all(bool(part.isfinite().all()) for part in found):
        raise TaskError(
            f"a loss must be a number, got loss={value.item()} of finite outputs "
            f"({shown(outputs)}) and targets ({shown(targets)}). Look for a logarithm or a "
            "division by 0 in it."
        )
    return value


def tensors(outputs: Any) -> list[Tensor]:
    """All tensors that a model gave, in order."""
    return [part for part in leaves(outputs) if isinstance(part, Tensor)]


def outputs_of(module: Any, inputs: Any, targets: Tensor) -> Any:
    """Returns a model's outputs for a batch.

    Raises:
        TaskError: it cannot be given one; the message has shapes and types.
    """
    with in_words("the model", inputs, None, targets):
        return called(module, inputs)


class in_words:
    """Turns an error of `what` ("the model", "the loss", "metric 'x'") in this block into one that
    names its arguments and the remedy.

    Args:
        outputs: of the model; None if there are none yet.

    Raises:
        TaskError: with the error as its cause, unless that is one of ours.
    """

    __slots__ = ("_given",)

    def __init__(self, what: str, inputs: Any, outputs: Any, targets: Tensor) -> None:
        self._given = (what, inputs, outputs, targets)

    def __enter__(self) -> None:
        """Does nothing: only an error costs time."""

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, PotluckError):
            raise _explained(error, *self._given) from error


def _explained(
    error: Exception, what: str, inputs: Any, outputs: Any, targets: Tensor
) -> TaskError:
    reason = " ".join(_IN_A_FUNCTION.sub("", str(error)).split()) or "no message"
    if len(reason) > 300:
        reason = reason[:300] + "…"
    known = {"inputs": inputs, "outputs": outputs, "targets": targets}
    got = ", ".join(f"{name}={shown(value)}" for name, value in known.items() if value is not None)
    return TaskError(
        f"{what} must take a batch of these data, got {got} and "
        f"{type(error).__name__}: {reason.rstrip('.')}. {_hint(error, inputs, outputs, targets)}"
    )


def _hint(error: Exception, inputs: Any, outputs: Any, targets: Tensor) -> str:
    """Returns advice on an error."""
    reason = str(error)
    if isinstance(error, (AttributeError, NameError, KeyError, ImportError)):
        return "That is in code of your own: try it on one such batch."
    if "more than 1 value per channel" in reason:
        return "Batch norm needs two examples: change batch_size, so that no batch has one alone."
    if "bfloat16" in reason.lower():
        return "Leave precision='bf16' out, or give that operation tensors of one type."
    if outputs is None:
        if isinstance(inputs, Mapping) and "argument" in reason:
            names = ", ".join(map(str, cast("Any", inputs)))
            return f"Inputs of a dictionary are given by name: def forward(self, {names})."
        one = first(inputs)
        if is_one(inputs) and not one.is_floating_point() and one.ndim > 2:
            return (
                "Images of whole numbers must be made floats before they are given to Potluck: "
                "divide them by 255."
            )
        if not one.is_floating_point() and ("Long" in reason or "dtype" in reason):
            return "Convert the inputs to float32, or begin the model with an embedding."
        if "index out of range" in reason:
            return "Give the embedding as many rows as there are symbols."
        return "Make the model's first layer fit the inputs, or reshape the inputs."
    if "out of bounds" in reason or "out of range" in reason:
        return (
            f"The largest label here is {int(targets.max())}, so the model must have at least "
            f"{int(targets.max()) + 1} outputs; classes are numbered from 0."
        )
    if isinstance(outputs, Tensor) and outputs.ndim == targets.ndim + 1 and outputs.shape[1] == 1:
        return "Let the model end with .squeeze(1), or give targets [examples, 1]."
    if targets.ndim == 2 and targets.shape[1] == 1:
        return "Give targets of the shape [examples], targets[:, 0]."
    if "Float" in reason and targets.is_floating_point():
        return 'Classes are whole numbers: say kind = "classes"; for quantities leave the loss out.'
    if "Long" in reason and not targets.is_floating_point():
        return "Let the loss take targets.float(), or give targets as floats."
    return "Make outputs and targets fit the loss: reshape the targets, or wrap the loss."


def _check_one_class(loss: Loss, outputs: Any, targets: Tensor) -> None:
    """Refuses cross-entropy over one class, which is 0 for every model."""
    if not isinstance(count_of(loss), Weighted) or not isinstance(outputs, Tensor):
        return
    if outputs.ndim > 1 and outputs.shape[1] == 1 and not targets.is_floating_point():
        raise TaskError(
            "cross-entropy needs an output for each class, got one output per example "
            f"({shown(outputs)}), for which it is always 0. Give the model two outputs, or the "
            "task loss=binary_cross_entropy."
        )


def _check_value(value: Any, outputs: Any, targets: Tensor, *, trains: bool) -> None:
    wanted = "a loss must return one number in a tensor, the mean over the batch"
    if not isinstance(value, Tensor):
        raise TaskError(
            f"{wanted}, got {shown(value)}. Return the tensor itself, without float() or .item(), "
            "and nothing beside it."
        )
    if value.numel() != 1:
        raise TaskError(
            f"{wanted}, got one of shape {list(value.shape)}. Use reduction='mean', or call "
            ".mean() on it."
        )
    if not value.is_floating_point():
        raise TaskError(f"{wanted}, got dtype={value.dtype}. Compute it from the model's outputs.")
    devices = {part.device for part in tensors(outputs)}
    if devices and value.device not in devices:
        raise TaskError(
            f"a loss must be on the device of the outputs, got one on {value.device} of outputs on "
            f"{', '.join(map(str, devices))}. Leave .to() and .cpu() out of it."
        )
    differentiable = any(part.requires_grad for part in tensors(outputs))
    if trains and differentiable and not value.requires_grad:
        raise TaskError(
            "a loss must follow from the model's outputs by operations of PyTorch, got a number "
            "without a gradient. Leave .detach(), .item() and NumPy out of it."
        )


def _check_shapes(loss: Loss, outputs: Tensor, targets: Tensor, value: Tensor) -> None:
    """Refuses a loss that compares every output with every target: where shapes differ by an axis
    of length 1, and the loss is another one once they do not."""
    if outputs.shape == targets.shape or outputs.numel() != targets.numel() or len(targets) < 2:
        return
    if outputs.shape[0] != targets.shape[0] or outputs.squeeze().shape != targets.squeeze().shape:
        return
    for varied in variants(outputs.detach()):
        try:
            with warnings.catch_warnings(), torch.no_grad(), borrowed_randomness():
                warnings.simplefilter("ignore")
                as_given = float(loss(varied, targets))
                aligned = float(loss(varied.reshape(targets.shape), targets))
                other = float(loss(varied, targets.reshape(outputs.shape)))
        except Exception:  # the loss puts them into one shape itself, and takes no other
            return
        if _alike(aligned, other) and not _alike(as_given, aligned):
            raise _broadcasts(outputs, targets)


def _broadcasts(outputs: Any, targets: Tensor) -> TaskError:
    return TaskError(
        "a loss must compare each output with its own target, got "
        f"outputs={shown(outputs)}, targets={shown(targets)}, which compares each with all. Let "
        "the model end with .squeeze(1), or give targets of the outputs' shape."
    )


def variants(outputs: Any) -> list[Any]:
    """Returns the outputs, and variants that differ between examples where the model's may be all
    alike. Each is moved some of its way to 0.3, so that probabilities stay probabilities."""

    def moved(share: float, part: Any) -> Any:
        if not isinstance(part, Tensor) or not part.is_floating_point() or part.numel() == 0:
            return part
        numbers = torch.arange(part.numel(), device=part.device, dtype=torch.float64)
        shares = (numbers * 0.6180339887498949 % 1.0).to(part.dtype).reshape(part.shape)
        return part + share * shares * (0.3 - part)

    return [outputs, *(mapped(partial(moved, share), outputs) for share in (0.1, 0.9))]


def _alike(one: float, other: float) -> bool:
    return abs(one - other) <= _SAME * max(abs(one), abs(other), 1e-6)
