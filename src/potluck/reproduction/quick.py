"""Miniatures of the paper's tables and figures, in a minute or two and without a download.

The same commands and the same lines, over scikit-learn's digits instead of MNIST (100 clients that
have 14 or 15 examples each) and over the standard library's modules instead of Shakespeare's roles.
They show that the machinery works and which way an effect goes; the paper's numbers do not apply.
"""

from __future__ import annotations

from potluck.reproduction.paper import Cell, cell

SEEDS = (1, 2)
_FILE = "digits-quickstart"  # what every miniature is made of
_TARGET = 0.9
_ROUNDS = 150
_RATES = {("2NN", True): 0.3, ("2NN", False): 0.5, ("CNN", True): 0.2, ("CNN", False): 0.4}

_TABLE2 = (
    ("cnn", ("iid", "two-shard"), ((1, None), (1, 10), (5, 10))),
    ("lstm", ("module",), ((1, None), (1, 10))),
)
_MANY_EPOCHS = {
    "figure3": ("lstm", ("module",), ((1, 10), (5, 10))),
    "figure8": ("cnn", ("iid", "two-shard"), ((1, 10), (5, 10), (20, 10))),
}
_LANGUAGE = (  # two modules a round of nearly 200, and a narrow model
    "task.data=pythonlib",
    "task.model=char-lstm",
    "task.hidden=16",
    "partition.kind=module",
    "algorithm.client_lr=4.0",
    "run.cohort=0.01",
    "run.rounds=20",
    "run.target=0.32",
    "run.evaluate_every=2",
)


def cells(what: str) -> list[Cell]:
    """The miniature of a table, or of a figure that is drawn from runs."""
    match what:
        case "table1":
            fractions = (0.0, 0.1, 0.5)
            return [
                _cell("2nn", division, 1, batch, fraction)
                for division in ("iid", "two-shard")
                for batch in (None, 10)
                for fraction in fractions
            ]
        case "table4":
            return _grid("2nn", ("iid", "two-shard"), ((1, None), (1, 10), (10, 10)))
        case "figure3" | "figure8":
            return [_with_train_loss(made) for made in _grid(*_MANY_EPOCHS[what])]
        case "beyond":
            plain = _cell("cnn", "two-shard", 5, 10, 0.1)
            name = f"{plain.name}-nesterov"
            changes = (*plain.overrides, f"name={name}", "algorithm.server.name=nesterov")
            return [plain, plain._replace(name=name, overrides=changes, optimizer="Nesterov 0.9")]
        case _:
            return [made for part in _TABLE2 for made in _grid(*part)]


def _grid(
    model: str, divisions: tuple[str, ...], settings: tuple[tuple[int, int | None], ...]
) -> list[Cell]:
    return [
        _cell(model, division, epochs, batch, 0.01 if model == "lstm" else 0.1)
        for division in divisions
        for epochs, batch in settings
    ]


def _cell(model: str, division: str, epochs: int, batch: int | None, fraction: float) -> Cell:
    made = cell("quick", model, division, epochs, batch, fraction, None, file=_FILE)
    common = (
        f"name={made.name}",
        f"algorithm.local_epochs={epochs}",
        f"algorithm.batch_size={batch or 'full'}",
        "run.executor=loop",
    )
    if model == "lstm":
        return made._replace(target=0.32, overrides=(*common, *_LANGUAGE))
    changes = (
        f"task.model={model}",
        f"partition.kind={'iid' if division == 'iid' else 'shards'}",
        f"algorithm.client_lr={_RATES[made.model, batch is not None]}",
        f"run.rounds={_ROUNDS}",
        f"run.cohort={fraction:.1f}",
        f"run.target={_TARGET}",
    )
    return made._replace(target=_TARGET, overrides=(*common, *changes))


def _with_train_loss(made: Cell) -> Cell:
    name = f"{made.name}-train-loss"
    rounds = 4 if made.model == "LSTM" else 10
    changes = (f"run.rounds={rounds}", "run.stop_at_target=false", "run.evaluate_train=500")
    return made._replace(name=name, overrides=(*made.overrides, f"name={name}", *changes))
