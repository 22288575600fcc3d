"""For the tests of what is compiled: small images, and a compiler that makes a mistake."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from potluck.data import Examples, FederatedData


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


def miscompiled(
    sources: tuple[Path, ...], folder: Path, right: str, wrong: str
) -> tuple[Path, ...]:
    """Copies of some sources in a folder, the first with `wrong` where it has `right`."""
    text = sources[0].read_text(encoding="utf-8")
    assert text.count(right) == 1
    copies = tuple(Path(shutil.copy(path, folder)) for path in sources)
    copies[0].write_text(text.replace(right, wrong), encoding="utf-8")
    return copies
