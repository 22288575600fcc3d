"""A client in plain PyTorch, as one would write it by hand: what all contenders on PyTorch run.

The models are the textbook's, the optimizer is `torch.optim.SGD`. Sequences are trained as they are
padded, or, where a contender is asked to ("trimmed"), without the steps that the whole batch pads.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
import bare
from work import PADDING


def model(name: str) -> nn.Module:
    """The model of a workload, with its parameters in the order of the workload's weights."""
    if name == "cnn":
        return bare.cnn()
    if name == "lstm":
        return bare.CharLSTM()
    if name == "2nn":
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(784, 200),
            nn.ReLU(),
            nn.Linear(200, 200),
            nn.ReLU(),
            nn.Linear(200, 10),
        )
    widths = {"logistic": (784, 10), "narrow": (64, 10), "empty": (1, 2)}
    return nn.Sequential(nn.Flatten(), nn.Linear(*widths[name]))


def load(module: nn.Module, vector: np.ndarray) -> None:
    """Give a module these weights."""
    nn.utils.vector_to_parameters(torch.from_numpy(np.array(vector)), module.parameters())


def vector(module: nn.Module) -> np.ndarray:
    """The weights of a module."""
    return nn.utils.parameters_to_vector(module.parameters()).detach().numpy()


def loss(module: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The batch's mean loss, over what is not padding."""
    return functional.cross_entropy(module(inputs), targets, ignore_index=PADDING)


def train(
    module: nn.Module,
    inputs: np.ndarray,
    targets: np.ndarray,
    *,
    lr: float,
    batch_size: int,
    trims: bool = False,
) -> int:
    """One epoch over a client's examples in their order; returns the number of steps."""
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    x, y = torch.from_numpy(inputs), torch.from_numpy(targets)
    steps = 0
    for i in range(0, len(x), batch_size):
        batch = x[i : i + batch_size], y[i : i + batch_size]
        if trims:
            batch = bare.trim(*batch)
        optimizer.zero_grad()
        loss(module, *batch).backward()
        optimizer.step()
        steps += 1
    return steps
