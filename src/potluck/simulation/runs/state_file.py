"""A model as a file for plain PyTorch: safetensors with the names of the module's own tensors.

    model.load_state_dict(safetensors.torch.load_file("final.safetensors"))     # strict

The file holds what the module's `state_dict` holds: parameters, statistics, constants and integer
buffers, each in its own type.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import save

from potluck.core import Vector
from potluck.engine.task import Task

_AFTER = "state_dict_after_round"  # one entry: of several the order would not be fixed


def model_file(task: Task, weights: Vector, *, seed: int, round: int) -> bytes:
    """The content of such a file for a model of a task.

    Args:
        weights: [dim].
        seed: of the run.
        round: after which these are the weights; in the file's metadata.
    """
    module = task.module(weights, seed=seed)
    tensors = {
        # Each with memory of its own: a tied weight is there under both names.
        name: value.detach().cpu().contiguous().clone()
        for name, value in module.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
    return save(tensors, {_AFTER: str(round)})


def is_model_file(metadata: Mapping[str, str]) -> bool:
    """True if a file with this metadata is one of `model_file`."""
    return _AFTER in metadata
