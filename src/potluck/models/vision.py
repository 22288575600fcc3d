"""The models of the paper, with exactly its parameter counts.

With their default arguments they are the paper's: `TwoNN` has 199,210 parameters, `CNN`
1,663,370, and `LogisticRegression` 7,850. Other input shapes and class counts make the same model
for other data. Weights start as PyTorch's layers start.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from potluck.core.validate import as_count

Shape = tuple[int, ...]


class LogisticRegression(nn.Module):
    """One linear layer from all inputs to the classes."""

    def __init__(self, input_shape: Shape = (1, 28, 28), num_classes: int = 10) -> None:
        super().__init__()
        num_classes = as_count("num_classes", num_classes)
        self.linear = nn.Linear(math.prod(input_shape), num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [batch, *input_shape] to logits [batch, num_classes]."""
        return self.linear(inputs.flatten(1))


class TwoNN(nn.Module):
    """The paper's 2NN: two hidden layers of 200 with ReLU."""

    def __init__(self, input_shape: Shape = (1, 28, 28), num_classes: int = 10) -> None:
        super().__init__()
        num_classes = as_count("num_classes", num_classes)
        self.hidden1 = nn.Linear(math.prod(input_shape), 200)
        self.hidden2 = nn.Linear(200, 200)
        self.output = nn.Linear(200, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [batch, *input_shape] to logits [batch, num_classes]."""
        hidden = functional.relu(self.hidden1(inputs.flatten(1)))
        hidden = functional.relu(self.hidden2(hidden))
        return self.output(hidden)


class MaxPoolReLU(nn.Module):
    """2 × 2 max pooling and ReLU, without parameters; an engine may compile it."""

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [batch, channels, height, width] to [batch, channels, height / 2, width / 2]."""
        # The two commute, and pooling first leaves a quarter to do.
        return functional.relu(functional.max_pool2d(maps, 2))


class CNN(nn.Module):
    """The paper's CNN: two 5×5 convolutions (32, 64 channels), each with 2×2 max pooling, then
    512 units with ReLU. SAME padding, without which the count is another.
    """

    def __init__(self, input_shape: Shape = (1, 28, 28), num_classes: int = 10) -> None:
        super().__init__()
        num_classes = as_count("num_classes", num_classes)
        channels, height, width = input_shape
        self.conv1 = nn.Conv2d(channels, 32, kernel_size=5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=5, padding=2)
        self.pool = MaxPoolReLU()
        self.hidden = nn.Linear(64 * (height // 4) * (width // 4), 512)
        self.output = nn.Linear(512, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [batch, channels, height, width] to logits [batch, num_classes]."""
        # Pooling, and a convolution of few channels, are several times faster on a CPU with the
        # channels last.
        maps = self.pool(self.conv1(_channels_last(inputs)))
        maps = self.pool(self.conv2(maps))
        return self.output(functional.relu(self.hidden(maps.flatten(1))))


def _channels_last(images: Tensor) -> Tensor:
    """The same [batch, channels, height, width] with the channels next to each other in memory."""
    batch, channels, height, width = images.shape
    if channels == 1:  # its strides are ambiguous: say which are meant
        return images.reshape(batch, height, width, 1).permute(0, 3, 1, 2)
    return images.contiguous(memory_format=torch.channels_last)
