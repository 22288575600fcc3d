"""A plain federated averaging loop in PyTorch, as one would write it by hand.

It is what the engine is measured against: textbook models, `torch.optim.SGD`, state dictionaries.
It is given the engine's cohorts and shuffles, so that both must end with the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

PADDING = 257


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


class CharLSTM(nn.Module):
    """The character model; logits [batch, symbols, steps], as cross-entropy wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(258, 8)
        self.lstm = nn.LSTM(8, 256, num_layers=2, batch_first=True)
        self.output = nn.Linear(256, 258)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.output(self.lstm(self.embedding(inputs))[0]).transpose(1, 2)


def trim(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """A batch of padded lines without the steps that all of them pad."""
    width = int((inputs != PADDING).sum(1).max())
    return inputs[:, :width], targets[:, :width]


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
    is_text: bool = False,
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
                x, y = inputs[i : i + batch_size], targets[i : i + batch_size]
                if is_text:
                    x, y = trim(x, y)
                optimizer.zero_grad()
                functional.cross_entropy(model(x), y, ignore_index=PADDING).backward()
                optimizer.step()
        for name, value in model.state_dict().items():
            mean[name] += len(inputs) * value
        total += len(inputs)
    return {name: value / total for name, value in mean.items()}
