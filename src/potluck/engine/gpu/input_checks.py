"""Clients whose data do not fit a model: a label beyond its classes, a symbol beyond its table.

On a CPU that is an error with a name; on a GPU it ends the process. So they are found beforehand,
and trained on the CPU, which names the error.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from potluck.data.federated import FederatedData
from potluck.engine.module.randomness import borrowed_randomness
from potluck.engine.module.variables import Variables
from potluck.engine.runtime import ModelWithLoss


def misfits(with_loss: ModelWithLoss, data: FederatedData) -> frozenset[int]:
    """The clients with such data, by number."""
    wrong = np.zeros(data.train.num_examples, bool)
    inputs, targets = data.train
    tables = [m.num_embeddings for m in with_loss.module.modules() if isinstance(m, nn.Embedding)]
    if tables and np.issubdtype(inputs.dtype, np.integer):
        wrong |= _outside(inputs, min(tables))
    if np.issubdtype(targets.dtype, np.integer):
        fitting = np.flatnonzero(~wrong)[:2]
        if len(fitting) == 0:
            return frozenset(range(data.num_clients))
        held = Variables.of(with_loss.module, with_loss.loss).held()
        with borrowed_randomness(), held, torch.no_grad():
            outputs = with_loss.module(torch.from_numpy(inputs[fitting]))
        if outputs.ndim == targets.ndim + 1:
            classes = outputs.shape[-1] if targets.ndim > 1 else outputs.shape[1]
            wrong |= _outside(targets, int(classes))
    rows = np.flatnonzero(wrong)
    return frozenset((np.searchsorted(data.offsets, rows, side="right") - 1).tolist())


def _outside(numbers: NDArray[np.int64], limit: int) -> NDArray[np.bool_]:
    """Returns the examples with a number below 0, or not below the limit."""
    flat = numbers.reshape(len(numbers), -1)
    return (flat.min(axis=1, initial=0) < 0) | (flat.max(axis=1, initial=0) >= limit)
