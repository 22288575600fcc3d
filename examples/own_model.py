"""Your own model, loss and metric: any `nn.Module`, any function of (outputs, targets).

A loss returns the mean over the batch. A metric returns one value per example, so that it can be
averaged over any set of them; NaN marks what does not count.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from potluck import FedAvg, Task, datasets, partitions, rounds
from potluck.models import accuracy


class SmallCNN(nn.Module):
    """A convolutional network for 8×8 images, with batch normalization and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.BatchNorm2d(16),  # its running statistics are averaged like weights
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.output = nn.Sequential(nn.Dropout(0.2), nn.Linear(16 * 4 * 4, 10))

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [batch, 1, 8, 8] to logits [batch, 10]."""
        return self.output(self.features(inputs).flatten(1))


def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with label smoothing."""
    return functional.cross_entropy(outputs, targets, label_smoothing=0.1)


def top_two(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the target is among the two largest logits, else 0: [batch]."""
    return (outputs.topk(2).indices == targets[:, None]).any(dim=1).to(torch.float32)


data = partitions.dirichlet(datasets.digits(), clients=20, alpha=1.0, seed=0, min_examples=10)
task = Task(
    model=SmallCNN, data=data, loss=smoothed, metrics={"accuracy": accuracy, "top two": top_two}
)
algorithm = FedAvg(client_lr=0.1, local_epochs=2, batch_size=16)
for round in rounds(algorithm, task, cohort=0.5, num_rounds=12, evaluate_every=4):
    if round.metrics:
        scores = "  ".join(f"{name} {value:.3f}" for name, value in round.metrics.items())
        print(f"round {round.number:2}: {scores}")
