"""The standard library as a corpus: by hand, and what is installed here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor, nn
from torch.nn import functional

from potluck import FedAvg, Task, federated_evaluation, rounds
from potluck.core import DataError
from potluck.data import datasets
from potluck.data.lines import PADDING, START, SYMBOLS
from potluck.data.partitions import by_group
from potluck.data.pythonlib import read_modules
from rows_of_bytes import decode


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_modules_and_packages_by_hand(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        {
            "one.py": b"import two  \r\n\n\t\nif x:\n\ty = 'caf\xc3\xa9'\t\n",
            "two/__init__.py": b"a\n",
            "two/z.py": b"d",
            "two/sub/b.py": b"b\nc\n",
            "two/test/test_z.py": b"no\n",
            "two/sub/tests/test_b.py": b"no\n",
            "two/notes.txt": b"no\n",
            "short.py": b"1\n2\n",
            "folder/not_a_package.py": b"1\n2\n3\n",
            "other.py": b"1\n2\n3\n",
        },
    )
    names = ["one", "short", "two", "folder", "absent"]
    assert read_modules(folder, names, 100) == {
        "one": [b"import two", b"if x:", b"\ty = 'caf\xc3\xa9'"],
        "two": [b"a", b"b", b"c", b"d"],
    }
    assert read_modules(folder, names, 3)["two"] == [b"a", b"b", b"c"]


def test_a_python_without_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must be installed in source, got no module in folder="):
        read_modules(tmp_path, ["json"], 100)


def test_the_installed_library_has_a_client_for_each_module() -> None:
    data = datasets.pythonlib()
    assert (data.num_classes, data.padding) == (SYMBOLS, PADDING)
    names, lines = np.unique(np.asarray(data.groups), return_counts=True)
    assert {"argparse", "asyncio", "json", "this"} <= set(names)
    assert set(names) <= sys.stdlib_module_names
    assert not {"test", "idlelib", "tkinter"} & set(names)
    assert 150 <= len(names) <= 250
    assert lines.min() >= 2
    assert lines.max() < 600  # 400, and the lines that go on in a second row
    assert (data.train.inputs[:, 0] == START).sum() <= 400 * len(names)
    assert np.array_equal(names, np.unique(np.asarray(data.test_groups)))
    assert 1_000_000 < (data.train.targets != PADDING).sum() < 5_000_000


def test_a_module_holds_its_own_source() -> None:
    data = by_group(datasets.pythonlib(max_lines_per_client=100_000))
    client = data.clients.index("json")
    text = decode(data.client(client).targets) + decode(data.client_test(client).targets)
    folder = Path(json.__file__).parent
    source = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    assert text.splitlines() == [line.rstrip() for line in source.splitlines() if line.strip()]


def test_the_digest_names_the_contents_and_nothing_else() -> None:
    small, again, other = (datasets.pythonlib(max_lines_per_client=n) for n in (20, 20, 21))
    assert small.checksums == again.checksums
    assert np.array_equal(small.train.inputs, again.train.inputs)
    assert list(small.checksums) == ["pythonlib"]
    assert small.checksums != other.checksums


class Bigram(nn.Module):
    """The next byte from this one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(SYMBOLS, SYMBOLS)

    def forward(self, inputs: Tensor) -> Tensor:  # [batch, steps] to [batch, symbols, steps]
        return self.table(inputs.long()).transpose(1, 2)


def bigram_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets.long(), ignore_index=PADDING)


def right_characters(outputs: Tensor, targets: Tensor) -> Tensor:
    right = (outputs.argmax(dim=1) == targets).float()
    return right.masked_fill(targets == PADDING, float("nan"))


def test_a_model_of_ones_own_learns_it() -> None:
    data = by_group(datasets.pythonlib(max_lines_per_client=20))
    task = Task(model=Bigram, data=data, loss=bigram_loss, metrics={"accuracy": right_characters})
    first, *_, last = rounds(FedAvg(client_lr=50.0, local_epochs=2), task, cohort=0.2, num_rounds=3)
    assert first.metrics is not None
    assert last.metrics is not None
    assert first.metrics["accuracy"] < 0.05
    assert last.metrics["accuracy"] > 0.2
    own = federated_evaluation(task, last.weights)["accuracy"]
    assert len(own.per_client) == data.num_clients
    assert own.weighted_mean == pytest.approx(last.metrics["accuracy"])


def test_too_few_lines_are_refused() -> None:
    with pytest.raises(ValueError, match="must be at least 3, got max_lines_per_client=2"):
        datasets.pythonlib(max_lines_per_client=2)
