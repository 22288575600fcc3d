"""A plain federated averaging loop in PyTorch, as one would write it by hand.

It is what the engine is measured against: textbook models, `torch.optim.SGD`, state dictionaries.
It is given the engine's cohorts and shuffles, so that both must end with the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3136, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )


def logistic_regression() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def train_round(
    model: nn.Module,
    weights: dict[str, Tensor],
    clients: Sequence[tuple[Tensor, Tensor]],
    cohort: Iterable[int],
    shuffle: Callable[[int, int], Tensor],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
) -> dict[str, Tensor]:
    """One round: train every client of the cohort from `weights`, return the weighted mean."""
    total = 0
    mean = {name: torch.zeros_like(value) for name, value in weights.items()}
    for k in cohort:
        inputs, targets = clients[k]
        order = shuffle(k, len(inputs))
        inputs, targets = inputs[order], targets[order]
        model.load_state_dict(weights)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        for _ in range(epochs):
            for i in range(0, len(inputs), batch_size):
                optimizer.zero_grad()
                outputs = model(inputs[i : i + batch_size])
                functional.cross_entropy(outputs, targets[i : i + batch_size]).backward()
                optimizer.step()
        for name, value in model.state_dict().items():
            mean[name] += len(inputs) * value
        total += len(inputs)
    return {name: value / total for name, value in mean.items()}
