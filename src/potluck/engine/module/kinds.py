"""Checks a task's model: a module of float32 numbers, or a callable that makes one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy  # pyright: ignore[reportUnknownVariableType]


def made_by(model: Callable[[], nn.Module]) -> nn.Module:
    """The module that a factory makes.

    Raises:
        TypeError, ValueError: it makes none, or one that cannot train here; see `check_module`.
    """
    _check_factory(model)
    module: Any = model()
    if not isinstance(module, nn.Module):
        raise TypeError(
            "model must make a torch.nn.Module when it is called, got "
            f"an object of type {type(module).__name__} from {_named(model)}. Return the module."
        )
    check_module(module)
    return module


def check_module(module: nn.Module) -> None:
    """Refuses a module that cannot be trained here.

    Raises:
        TypeError: a parameter is of another type than float32.
        ValueError: a parameter has no numbers yet, or shares its memory with another.
    """
    places: dict[int, str] = {}
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"every parameter must have a shape, got {name} of a lazy layer that has seen no "
                "input. Give the layer its sizes, or call the model once on an example where it "
                "is made."
            )
        if parameter.dtype != torch.float32:
            raise TypeError(
                f"every parameter must be float32, got {name} of dtype={parameter.dtype}. "
                + _other_type(parameter)
            )
        if parameter.device.type != "cpu":
            raise ValueError(
                f"a model must be made on the CPU, got {name} on device={parameter.device}. "
                + (
                    "Make it without device='meta', or call .to_empty(device='cpu') and draw its "
                    "weights."
                    if parameter.is_meta
                    else "Leave its device out: what trains it on a GPU takes it there."
                )
            )
        if parameter.numel() and places.setdefault(parameter.data_ptr(), name) != name:
            raise ValueError(
                "parameters must not share memory, got "
                f"{places[parameter.data_ptr()]} and {name}, which are two over the same numbers. "
                "Tie weights by assigning the same Parameter to both, or .clone() one."
            )
    for name, buffer in module.named_buffers():
        if is_lazy(buffer) or buffer.is_meta:
            raise ValueError(
                f"every buffer must have numbers, got {name} without any. Call the model once on "
                "an example where it is made."
            )


def _check_factory(model: Any) -> None:
    if not callable(model):
        raise TypeError(
            "model must be a torch.nn.Module, or callable and make one, got an object of type "
            f"{type(model).__name__}. Give the module, its class, or a function that makes it."
        )
    try:
        signature = inspect.signature(model)
    except (TypeError, ValueError):  # some of C have none
        return
    needed = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        wanted = ", ".join(f"{name}=…" for name in needed)
        example = f"Model({wanted})" if _is_lambda(model) else f"{_named(model)}({wanted})"
        raise TypeError(
            f"model must make a torch.nn.Module when it is called without arguments, got "
            f"{_named(model)}, which needs {', '.join(needed)}. Give a class by "
            f"lambda: {example}, and a function of inputs as an nn.Module."
        )


def _other_type(parameter: torch.Tensor) -> str:
    if parameter.is_complex():
        return "Hold its real and its imaginary part as two parameters."
    return "Call .float() on the model."


def _is_lambda(model: object) -> bool:
    return getattr(model, "__name__", "") == "<lambda>"


def _named(model: object) -> str:
    if _is_lambda(model):
        return "a lambda"
    return cast(str, getattr(model, "__name__", type(model).__name__))


def averaged_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Returns the tensors of a model's vector: its parameters, then its float32 buffers."""
    tensors: list[tuple[str, Tensor]] = list(module.named_parameters())
    return tensors + averaged_buffers(module)


def averaged_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The float32 buffers of a module, by name."""
    return [(name, b) for name, b in module.named_buffers() if b.dtype == torch.float32]
