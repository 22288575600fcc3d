"""For the tests of what is compiled: a task of small images, a few steps of it, and a compiler that
makes a mistake."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import nn

from potluck import Task
from potluck.core import Correction, Vector
from potluck.data import Examples, FederatedData
from potluck.engine import TorchRuntime
from potluck.engine.precision import Precision


def images_of(num: int, height: int, width: int) -> FederatedData:
    """Random images of two clients, half for each."""
    random = np.random.default_rng(0)
    inputs = random.standard_normal((num, 1, height, width)).astype(np.float32)
    examples = Examples(inputs, random.integers(0, 10, num))
    return FederatedData(
        name="images",
        train=examples,
        test=Examples(examples.inputs[:5], examples.targets[:5]),
        offsets=np.array([0, num // 2, num]),
        clients=("a", "b"),
        num_classes=10,
    )


def stepped(
    model: Callable[[], nn.Module],
    precision: Precision,
    one_thread: bool,
    correction: Correction | None = None,
) -> tuple[TorchRuntime, Vector, float]:
    """The runtime, and how far four steps lead, as it goes there."""
    task = Task(model=model, data=images_of(46, 16, 24))
    runtime, start = TorchRuntime(task, precision, one_thread=one_thread), task.initial_weights(1)
    runtime.take(task.data.client(0))
    runtime.begin(start, np.arange(23), 0, *([] if correction is None else [correction]))
    for batch in (slice(0, 10), slice(10, 20), slice(20, 23), slice(0, 23)):
        runtime.step(batch, 0.1)
    weights, loss = runtime.end()
    return runtime, weights - start, loss


def miscompiled(
    sources: tuple[Path, ...], folder: Path, right: str, wrong: str
) -> tuple[Path, ...]:
    """Copies of some sources in a folder, the first with `wrong` where it has `right`."""
    text = sources[0].read_text(encoding="utf-8")
    assert text.count(right) == 1
    copies = tuple(Path(shutil.copy(path, folder)) for path in sources)
    copies[0].write_text(text.replace(right, wrong), encoding="utf-8")
    return copies
