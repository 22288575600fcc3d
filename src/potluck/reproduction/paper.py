"""The paper's numbers, and for each of them the experiment that answers it.

H. B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Agüera y Arcas: Communication-Efficient
Learning of Deep Networks from Decentralized Data. AISTATS 2017 (arXiv:1602.05629v4), tables 1, 2
and 4 and figures 2, 3 and 8. A number is the communication rounds to the target accuracy: 97 % for
the 2NN, 99 % for the CNN, 54 % for the LSTM. The paper names no seeds and no spread, and cells
that stand in two of its tables differ by up to 25 %, once by a factor of 1.9.

A cell's experiment is the file of its name in `experiments/`. Cells that differ from a file in one
value have no file of their own: they name the file, and what is changed.
"""

from __future__ import annotations

from typing import NamedTuple

TITLES = {
    "table1": "Table 1: the fraction C of clients in a round",
    "table2": "Table 2: local epochs E and batch size B",
    "table4": "Table 4: local epochs E and batch size B, 2NN",
    "figure1": "Figure 1: averaging two models, from different and from one initialisation",
    "figure2": "Figure 2: test accuracy against rounds",
    "figure3": "Figure 3: training loss with many local epochs, LSTM",
    "figure8": "Figure 8: training loss with many local epochs, CNN",
    "beyond": "Beyond the paper: the same C, E and B with another server optimizer or schedule",
}

_TABLE1_FRACTIONS = (0.0, 0.1, 0.2, 0.5, 1.0)
_TABLE1 = {  # rounds for each C; None: the paper gives none
    ("2nn", "iid", None): (1455, 1474, 1658, None, None),
    ("2nn", "iid", 10): (316, 87, 77, 75, 70),
    ("2nn", "two-shard", None): (4278, 1796, 1528, None, None),
    ("2nn", "two-shard", 10): (3275, 664, 619, 443, 380),
    ("cnn", "iid", None): (387, 339, 337, 164, 246),
    ("cnn", "iid", 10): (50, 18, 18, 18, 16),
    ("cnn", "two-shard", None): (1181, 1100, 978, 1067, None),
    ("cnn", "two-shard", 10): (956, 206, 200, 261, 97),
}
_TABLE2_CNN = (  # E, B, IID, two-shard
    (1, None, 626, 483),
    (5, None, 179, 1000),
    (1, 50, 65, 600),
    (20, None, 234, 672),
    (1, 10, 34, 350),
    (5, 50, 29, 334),
    (20, 50, 32, 426),
    (5, 10, 20, 229),
    (20, 10, 18, 173),
)
_TABLE2_LSTM = (  # E, B, IID, role
    (1, None, 2488, 3906),
    (1, 50, 1635, 549),
    (5, None, 613, 597),
    (1, 10, 460, 164),
    (5, 50, 401, 152),
    (5, 10, 192, 41),
)
_TABLE4 = (  # E, B, IID, two-shard
    (1, None, 1468, 1817),
    (1, 10, 92, 831),
    (10, 10, 34, 497),
    (20, 10, 32, 738),
)
_BEYOND = (  # a cell, what is other than plain averaging, in words and as changes to its file
    (
        ("shakespeare", "lstm", "role", 5, 10, 0.1, 41),
        "nesterov",
        "Nesterov 0.9, rate 1.0 and down a cosine",
        (
            "algorithm.client_lr=1.0",
            "algorithm.server.name=nesterov",
            "algorithm.server.momentum=0.9",
            "algorithm.client_schedule.name=cosine",
            "algorithm.client_schedule.rounds=25",
            "algorithm.client_schedule.floor=0.1",
        ),
    ),
    (
        ("mnist", "cnn", "two-shard", 5, 10, 0.1, 229),
        "nesterov",
        "Nesterov 0.7, rate 0.1 and down a cosine",
        (
            "algorithm.server.name=nesterov",
            "algorithm.server.momentum=0.7",
            "algorithm.client_schedule.name=cosine",
            "algorithm.client_schedule.rounds=110",
            "algorithm.client_schedule.floor=0.05",
        ),
    ),
)
_EPOCHS = (1, 5, 10, 20, 50, 100, 200, 400)  # figures 3 and 8
_FIGURE_ROUNDS = 100  # of which a large E makes a few only, if --max-hours says so

_MODELS = {"2nn": ("2NN", 0.97), "cnn": ("CNN", 0.99), "lstm": ("LSTM", 0.54)}


class Cell(NamedTuple):
    """One setting, and the rounds that the paper gives for it."""

    name: str  # of the experiment
    model: str
    target: float
    division: str  # "iid", "two-shard", "role"; in miniature "module"
    epochs: int
    batch: int | None  # None is B = ∞
    fraction: float
    paper: int | None
    file: str  # the experiment file, less .toml
    overrides: tuple[str, ...] = ()
    optimizer: str = ""  # in words, where it is another than plain averaging

    @property
    def panel(self) -> str:
        """The panel in which the cell is drawn."""
        division = "IID" if self.division == "iid" else self.division
        return f"{self.model}, {division}"

    @property
    def setting(self) -> str:
        """The setting in which the cells of a panel differ."""
        batch = "∞" if self.batch is None else str(self.batch)
        algorithm = f"E {self.epochs}, B {batch}"
        if self.epochs == 1 and self.batch is None:
            algorithm = "FedSGD"
        return f"{algorithm}, C {self.fraction:g}{self.optimizer and ', '}{self.optimizer}"


def cells(what: str) -> list[Cell]:
    """The cells of a table, or of a figure that is drawn from runs."""
    match what:
        case "table1":
            return _table1()
        case "table2" | "figure2":
            cnn = _by_epochs("mnist", "cnn", "two-shard", _TABLE2_CNN)
            return cnn + _by_epochs("shakespeare", "lstm", "role", _TABLE2_LSTM)
        case "table4":
            return _by_epochs("mnist", "2nn", "two-shard", _TABLE4)
        case "figure3":
            return _many_epochs("shakespeare", "lstm", "role")
        case "figure8":
            return _many_epochs("mnist", "cnn", "two-shard")
        case "beyond":
            return [made for row in _BEYOND for made in _beside_plain(*row)]
        case _:
            raise ValueError(
                f"what must be a table or a figure that is made of runs, got what={what!r}. "
                f"Take one of {', '.join(name for name in TITLES if name != 'figure1')}."
            )


def cell(
    data: str, model: str, division: str, epochs: int, batch: int | None, fraction: float,
    paper: int | None, file: str = "", overrides: tuple[str, ...] = (),
) -> Cell:  # fmt: skip
    """A cell, its name made of its setting."""
    title, target = _MODELS[model]
    setting = f"e{epochs}-b{'inf' if batch is None else batch}"
    if epochs == 1 and batch is None:
        setting = "fedsgd"
    name = f"{data}-{model}-{division}-{setting}-c{float(fraction)!r}"
    return Cell(
        name, title, target, division, epochs, batch, fraction, paper, file or name, overrides
    )


def _table1() -> list[Cell]:
    found: list[Cell] = []
    for (model, division, batch), column in _TABLE1.items():
        epochs = 1 if model == "2nn" else 5
        for fraction, paper in zip(_TABLE1_FRACTIONS, column, strict=True):
            made = cell("mnist", model, division, epochs, batch, fraction, paper)
            if batch is None and fraction != 0.1:  # as the file for C = 0.1, which is there
                file = made.name.replace(f"c{fraction:.1f}", "c0.1")
                rounds = 2 * (paper or max(number or 0 for number in column))
                changes = (f"run.cohort={fraction:.1f}", f"run.rounds={rounds}")
                made = made._replace(file=file, overrides=(f"name={made.name}", *changes))
            found.append(made)
    return found


def _by_epochs(
    data: str, model: str, other: str, rows: tuple[tuple[int, int | None, int, int], ...]
) -> list[Cell]:
    return [
        cell(data, model, division, row[0], row[1], 0.1, row[2 + i])
        for i, division in enumerate(("iid", other))
        for row in rows
    ]


def _beside_plain(
    setting: tuple[str, str, str, int, int | None, float, int],
    suffix: str,
    words: str,
    changes: tuple[str, ...],
) -> list[Cell]:
    """The paper's cell, whose runs are its table's, and the same with another optimizer."""
    plain = cell(*setting)
    name = f"{plain.name}-{suffix}"
    return [
        plain,
        plain._replace(name=name, overrides=(f"name={name}", *changes), optimizer=words),
    ]


def _many_epochs(data: str, model: str, other: str) -> list[Cell]:
    """E up to 400 on the file of E = 5, with the training loss of every averaged model."""
    found: list[Cell] = []
    for division in ("iid", other):
        for epochs in _EPOCHS:
            made = cell(data, model, division, epochs, 10, 0.1, None)
            name = f"{made.name}-train-loss"
            changes = (
                f"name={name}",
                f"algorithm.local_epochs={epochs}",
                f"run.rounds={_FIGURE_ROUNDS}",
                "run.stop_at_target=false",
                "run.evaluate_train=5000",
            )
            file = made.name.replace(f"e{epochs}-", "e5-")
            found.append(made._replace(name=name, file=file, overrides=changes))
    return found
