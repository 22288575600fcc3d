"""Mistakes with a user's own data, in files and in Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from commands import train
from watched import Mistakes, potluck

mistakes = Mistakes("own data")

_TABLE = """name = "own"
[task]
data = "table"
path = "DIR/table.csv"
model = "2nn"
[partition]
kind = "own"
[algorithm]
client_lr = 0.1
[run]
rounds = 1
cohort = 1
executor = "loop"
"""
_FOLDER = _TABLE.replace('"table"', '"folder"').replace("table.csv", "clients")
_GOOD = "client,a,b,target\n" + "".join(
    f"{c},{i % 7}.5,{i % 5}.25,{i % 2}\n" for c in "xy" for i in range(10)
)


def _table(folder: Path, content: str | bytes, *words: str) -> None:
    path = folder / "table.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    train(folder, *words, text=_TABLE.replace("DIR", str(folder)))


def _folder(folder: Path, files: dict[str, Any], *words: str) -> None:
    clients = folder / "clients"
    clients.mkdir()
    for name, content in files.items():
        if isinstance(content, dict):
            np.savez(clients / name, **content)
        else:
            (clients / name).write_bytes(
                content if isinstance(content, bytes) else content.encode()
            )
    train(folder, *words, text=_FOLDER.replace("DIR", str(folder)))


for _what, _content in {
    "an empty table": "",
    "a table of a header alone": "client,a,target\n",
    "no client column": _GOOD.replace("client,", "hospital,"),
    "no target column": _GOOD.replace(",target", ",label"),
    "a column twice": _GOOD.replace("a,b", "a,a"),
    "text among numbers": _GOOD.replace("3.5", "high", 1),
    "a hole among numbers": _GOOD.replace("3.5", "", 1),
    "a hole among targets": _GOOD.replace(".25,1\n", ".25,\n", 1),
    "a hole among clients": _GOOD.replace("x,", ",", 1),
    "an infinite number": _GOOD.replace("3.5", "inf", 1),
    "a row that is too long": _GOOD + "x,1.5,2.5,1,9\n",
    "a row that is too short": _GOOD + "x,1.5\n",
    "a quote that does not end": _GOOD + 'x,"1.5,2.5,1\n',
    "negative classes": _GOOD.replace(",0\n", ",-1\n"),
    "prices as classes": _GOOD.replace(",1\n", ",253000\n").replace(",0\n", ",187500\n"),
    "thousands separators": _GOOD.replace("3.5", '"3,500.5"'),
    "dates among features": _GOOD.replace("3.5", "2024-03-05"),
    "a table in Latin-1": _GOOD.replace("a,b", "größe,b").encode("latin-1"),
    "a table that is a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "one client with one example": "client,a,target\nx,1.5,0\n",
}.items():
    mistakes.add(_what, lambda folder, content=_content: _table(folder, content))

mistakes.add("a table that is not there", lambda f: train(f, text=_TABLE.replace("DIR", str(f))))
mistakes.add("a folder that is not there", lambda f: train(f, text=_FOLDER.replace("DIR", str(f))))
mistakes.add("a table to a CNN", lambda folder: _table(folder, _GOOD, "--set", "task.model='cnn'"))
mistakes.add(
    "a table to a language model",
    lambda folder: _table(folder, _GOOD, "--set", "task.model='char-lstm'"),
)
mistakes.add(
    "a client column that is the target",
    lambda folder: _table(folder, _GOOD, "--set", "task.client_column='target'"),
)
mistakes.add(
    "shards of own clients",
    lambda folder: _table(folder, _GOOD, "--set", "partition.kind='shards'"),
)
mistakes.add(
    "own clients that are counted",
    lambda folder: _table(folder, _GOOD, "--set", "partition.clients=7"),
)
mistakes.add(
    "an unknown kind of target",
    lambda folder: _table(folder, _GOOD, "--set", "task.kind='ranking'"),
)
mistakes.add(
    "words as a regression",
    lambda folder: _table(
        folder,
        _GOOD.replace(",1\n", ",ill\n").replace(",0\n", ",well\n"),
        "--set",
        "task.kind='regression'",
    ),
)


def _arrays(inputs: Any, targets: Any) -> dict[str, Any]:
    return {"inputs": inputs, "targets": targets}


_X, _Y = np.zeros((6, 4), np.float32), np.arange(6) % 2
for _name, _files in {
    "an empty folder": {},
    "a folder with a README": {"README.txt": "hello", "a.csv": "a,target\n1.5,0\n"},
    "files of two kinds": {"a.csv": "a,target\n1.5,0\n2.5,1\n", "b.npz": _arrays(_X, _Y)},
    "a file that is cut off": {"a.npz": b"PK\x03\x04" + bytes(50)},
    "arrays of other names": {"a.npz": {"x": _X, "y": _Y}},
    "arrays of unequal lengths": {"a.npz": _arrays(_X, _Y[:3])},
    "arrays of pickled objects": {"a.npz": _arrays(np.array([{}] * 6, object), _Y)},
    "numbers that are not finite": {"a.npz": _arrays(_X * np.nan, _Y)},
    "images of bytes": {"a.npz": _arrays(np.zeros((6, 1, 8, 8), np.uint8), _Y)},
    "inputs without features": {"a.npz": _arrays(_X[:, 0], _Y)},
    "targets in a column": {"a.npz": _arrays(_X, _Y[:, None])},
    "no examples": {"a.npz": _arrays(_X[:0], _Y[:0])},
    "clients of unlike shapes": {"a.npz": _arrays(_X, _Y), "b.npz": _arrays(_X[:, :3], _Y)},
    "columns of other names": {"a.csv": "a,target\n1.5,0\n2.5,1\n", "b.csv": "b,target\n1.5,0\n"},
    "complex numbers": {"a.npz": _arrays(_X * 1j, _Y)},
    "float labels": {"a.npz": _arrays(_X, _Y.astype(np.float32))},
}.items():
    mistakes.add(_name, lambda folder, files=_files: _folder(folder, files))


def _python(make: Callable[[Any, Path], Any]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        from potluck import datasets

        make(datasets, folder)

    return run


def _own(name: str, *arguments: Any, **named: Any) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        from potluck import own_data

        getattr(own_data, name)(*arguments, **named)

    return run


for _what, _make in {
    "no clients in a dictionary": _own("from_clients", {}),
    "a list of clients": _own("from_clients", [(_X, _Y)]),
    "a client that is one array": _own("from_clients", {"a": _X}),
    "a client of three arrays": _own("from_clients", {"a": (_X, _Y, _Y)}),
    "ragged examples": _own("from_clients", {"a": ([[1.0], [1.0, 2.0]], [0, 1])}),
    "text as inputs": _own("from_clients", {"a": (np.array(["x"] * 6), _Y)}),
    "a test of a stranger": _own("from_clients", {"a": (_X, _Y)}, test={"b": (_X, _Y)}),
    "everything held out": _own("from_clients", {"a": (_X, _Y)}, test_fraction=1.0),
    "fewer classes than labels": _own("from_clients", {"a": (_X, _Y)}, num_classes=1),
    "half a class": _own("from_clients", {"a": (_X, _Y)}, num_classes=2.5),
    "a dictionary as a table": _own("from_table", {"a": [1]}, client_column="a"),
    "a table in a spreadsheet": _own("from_table", "data.xlsx", client_column="a"),
    "a folder that is a number": _own("from_folder", 7),
    "a partition among no clients": _python(
        lambda datasets, _: __import__("potluck").partitions.iid(
            datasets.digits(), clients=0, seed=0
        )
    ),
    "too many shards": _python(
        lambda datasets, _: __import__("potluck").partitions.shards(
            datasets.digits(), clients=1000, shards_per_client=10, seed=0
        )
    ),
    "a negative alpha": _python(
        lambda datasets, _: __import__("potluck").partitions.dirichlet(
            datasets.digits(), clients=5, alpha=-1.0, seed=0
        )
    ),
    "groups of data without any": _python(
        lambda datasets, _: __import__("potluck").partitions.by_group(datasets.digits())
    ),
    "a client that there is not": _python(
        lambda datasets, _: (
            __import__("potluck").partitions.iid(datasets.digits(), clients=5, seed=0).client(9)
        )
    ),
}.items():
    mistakes.add(_what, _make)


@mistakes("describe of a table that does not fit")
def _(folder: Path) -> None:
    (folder / "table.csv").write_text(_GOOD.replace("3.5", "high", 1))
    path = folder / "own.toml"
    path.write_text(_TABLE.replace("DIR", str(folder)))
    potluck("data", "describe", path)
