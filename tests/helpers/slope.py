"""The smallest task: one weight, whose steps can be done by hand."""

import numpy as np
import torch
from torch import nn

from potluck import Task
from potluck.data import Examples, FederatedData
from potluck.models import mean_squared_error


class Slope(nn.Module):
    """y = w x, from w = 1."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        return self.w * inputs


def slope_task(*clients):
    """One client for each list of (x, y)."""
    rows = [row for client in clients for row in client]
    examples = Examples(
        np.array([x for x, _ in rows], np.float32), np.array([y for _, y in rows], np.float32)
    )
    data = FederatedData(
        name="by hand",
        train=examples,
        test=examples,
        offsets=np.cumsum([0, *map(len, clients)]),
        clients=tuple(str(k) for k in range(len(clients))),
        num_classes=0,
    )
    return Task(model=Slope, data=data, loss=mean_squared_error, metrics={})
