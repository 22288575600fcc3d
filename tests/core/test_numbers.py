"""NumPy's integers are integers, and its floats are floats, in every public function."""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import json
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import potluck
from potluck import FedAvg, FedProx, Poisson, Scaffold, Task, own_data, partitions, rounds
from potluck.algorithms import Adagrad, Adam, Average, Momentum, Nesterov, Yogi, schedules
from potluck.algorithms.local_sgd import LocalTraining
from potluck.config.experiment import check_experiment
from potluck.core import DataError, derive_seed, sample_cohort, stream
from potluck.core.validate import as_count, as_integer, as_real, is_integer, plain
from potluck.data import Dataset, Examples
from potluck.device import Record, TorchTrainer, one_client
from potluck.engine import evaluate, evaluation_batches, federated_evaluation
from potluck.models import CNN, CharLSTM, LogisticRegression, PeepholeCharLSTM, TwoNN, WordLSTM
from potluck.server import RoundSettings
from potluck.simulation import Auto, Loop, Vmap, Workers, make_executor, train
from potluck.simulation.executors.train_loss import WithTrainLoss
from potluck.simulation.virtual_time.profiles import PROFILES, draw_fleet
from potluck.simulation.virtual_time.timeline import RoundRules, VirtualTime

ONES = [1, np.int64(1), np.int32(1), np.uint8(1), np.array(1), torch.tensor(1)]
NO_COUNTS = [2.5, 1.0, True, np.True_, "3", None, np.float32(1.0), np.array([1])]


def dataset() -> Dataset:
    inputs = np.arange(24, dtype=np.float32).reshape(12, 2)
    targets = np.arange(12) % 2
    return Dataset(
        name="small",
        train=Examples(inputs, targets),
        test=Examples(inputs, targets),
        num_classes=2,
        groups=np.array(list("aabbccddeeff")),
    )


DATA = dataset()
FEDERATED = partitions.iid(DATA, 4, seed=0)
TASK = Task(model=lambda: nn.Linear(2, 2), data=FEDERATED)
SERVER = {"num_rounds": 1, "goal": 1, "population": 1, "attempts": 1}
EXPERIMENT: dict[str, Any] = {
    "name": "e",
    "task": {"data": "digits", "model": "logistic"},
    "partition": {"kind": "iid", "clients": 10},
    "algorithm": {"client_lr": 0.1},
    "run": {"rounds": 1},
}


def take(name: str, **others: Any) -> Callable[[Any], Any]:
    """A round or so with one argument given."""
    first = {"num_rounds": 1, "cohort": 2} | others
    return lambda value: list(rounds(FedAvg(client_lr=0.1), TASK, **{**first, name: value}))


def section(name: str, key: str) -> Callable[[Any], Any]:
    return lambda value: check_experiment(
        {**EXPERIMENT, name: {**EXPERIMENT[name], key: value}}, "e"
    )


def opened(executor: Callable[[], Any]) -> None:
    executor().close()


# By "function.parameter": what takes the value there. None means no limit where it is optional.
TAKES: dict[str, Callable[[Any], Any]] = {
    "FedAvg.local_epochs": lambda n: FedAvg(client_lr=0.1, local_epochs=n),
    "FedAvg.batch_size": lambda n: FedAvg(client_lr=0.1, batch_size=n),
    "FedProx.local_epochs": lambda n: FedProx(client_lr=0.1, mu=0.1, local_epochs=n),
    "FedProx.batch_size": lambda n: FedProx(client_lr=0.1, mu=0.1, batch_size=n),
    "Scaffold.local_epochs": lambda n: Scaffold(client_lr=0.1, local_epochs=n),
    "Scaffold.batch_size": lambda n: Scaffold(client_lr=0.1, batch_size=n),
    "schedules.Step.every": lambda n: schedules.Step(n, 0.5),
    "schedules.Linear.rounds": schedules.Linear,
    "schedules.Cosine.rounds": schedules.Cosine,
    "schedules.Warmup.rounds": schedules.Warmup,
    "derive_seed.seed": lambda n: derive_seed(n, "cohort"),
    "stream.seed": lambda n: stream(n, "cohort"),
    "sample_cohort.population": lambda n: sample_cohort(n, 1, seed=0, round=1),
    "sample_cohort.seed": lambda n: sample_cohort(3, 1, seed=n, round=1),
    "rounds.num_rounds": take("num_rounds"),
    "rounds.seed": take("seed"),
    "rounds.evaluate_every": take("evaluate_every"),
    "train.seed": lambda n: next(train(check_experiment(EXPERIMENT, "e"), "/dev/null/x", seed=n)),
    "partitions.iid.clients": lambda n: partitions.iid(DATA, n, seed=0),
    "partitions.iid.seed": lambda n: partitions.iid(DATA, 2, seed=n),
    "partitions.shards.clients": lambda n: partitions.shards(DATA, n, seed=0),
    "partitions.shards.shards_per_client": lambda n: partitions.shards(DATA, 2, n, seed=0),
    "partitions.shards.seed": lambda n: partitions.shards(DATA, 2, seed=n),
    "partitions.dirichlet.clients": lambda n: partitions.dirichlet(DATA, n, 1.0, seed=0),
    "partitions.dirichlet.seed": lambda n: partitions.dirichlet(DATA, 2, 1.0, seed=n),
    "partitions.dirichlet.min_examples": lambda n: partitions.dirichlet(
        DATA, 2, 1.0, seed=0, min_examples=n
    ),
    "partitions.unbalanced.clients": lambda n: partitions.unbalanced(DATA, n, 1.0, seed=0),
    "partitions.unbalanced.seed": lambda n: partitions.unbalanced(DATA, 2, 1.0, seed=n),
    "partitions.by_group.min_examples": lambda n: partitions.by_group(DATA, min_examples=n),
    "own_data.from_clients.num_classes": lambda n: own_data.from_clients(
        {"a": (np.zeros((4, 2)), np.zeros(4, int))}, num_classes=n
    ),
    "own_data.from_clients.seed": lambda n: own_data.from_clients(
        {"a": (np.zeros((4, 2)), np.zeros(4, int))}, num_classes=2, seed=n
    ),
    "Task.module.seed": lambda n: TASK.module(seed=n),
    "Task.begin.seed": TASK.begin,
    "evaluate.seed": lambda n: evaluate(TASK, TASK.initial_weights(0), seed=n),
    "federated_evaluation.seed": lambda n: federated_evaluation(
        TASK, TASK.initial_weights(0), seed=n
    ),
    "FederatedData.client.index": FEDERATED.client,
    "Task.initial_weights.seed": TASK.initial_weights,
    "LogisticRegression.num_classes": lambda n: LogisticRegression((2,), n),
    "TwoNN.num_classes": lambda n: TwoNN((2,), n),
    "CNN.num_classes": lambda n: CNN((1, 8, 8), n),
    "CharLSTM.symbols": lambda n: CharLSTM(n, 2, 2),
    "CharLSTM.embedding": lambda n: CharLSTM(2, n, 2),
    "CharLSTM.hidden": lambda n: CharLSTM(2, 2, n),
    "PeepholeCharLSTM.symbols": lambda n: PeepholeCharLSTM(n, 2, 2),
    "PeepholeCharLSTM.embedding": lambda n: PeepholeCharLSTM(2, n, 2),
    "PeepholeCharLSTM.hidden": lambda n: PeepholeCharLSTM(2, 2, n),
    "WordLSTM.words": lambda n: WordLSTM(n, 2, 2),
    "WordLSTM.embedding": lambda n: WordLSTM(2, n, 2),
    "WordLSTM.hidden": lambda n: WordLSTM(2, 2, n),
    "evaluation_batches.size": lambda n: evaluation_batches(TASK, size=n),
    "Loop.num_threads": lambda n: opened(lambda: Loop(TASK, n)),
    "Vmap.num_threads": lambda n: opened(lambda: Vmap(TASK, num_threads=n)),
    "Vmap.chunk": lambda n: opened(lambda: Vmap(TASK, chunk=n)),
    "Workers.num_workers": lambda n: opened(lambda: Workers(TASK, n)),
    "Workers.chunk": lambda n: opened(lambda: Workers(TASK, 1, chunk=n)),
    "Auto.num_workers": lambda n: opened(lambda: Auto(TASK, n, device="cpu")),
    "make_executor.num_workers": lambda n: opened(lambda: make_executor("vmap", TASK, n)),
    "one_client.client": lambda n: one_client(FEDERATED, n),
    "TorchTrainer.num_threads": lambda n: TorchTrainer(lambda _: FEDERATED, n),
    "draw_fleet.population": lambda n: draw_fleet(PROFILES["phones"], n, seed=0),
    "VirtualTime.passes": lambda n: VirtualTime(
        fleet=draw_fleet(PROFILES["phones"], 2, seed=0), passes=n
    ),
    "RoundRules.attempts": lambda n: RoundRules(attempts=n),
    "WithTrainLoss.num_examples": lambda n: WithTrainLoss(Loop(TASK), TASK, n),
    "partition.clients": section("partition", "clients"),
    "run.rounds": section("run", "rounds"),
    "run.seed": section("run", "seed"),
    "algorithm.batch_size": section("algorithm", "batch_size"),
    **{
        f"RoundSettings.{key}": lambda n, key=key: RoundSettings.model_validate({**SERVER, key: n})
        for key in SERVER
    },
}
OPTIONAL = {  # where None is a value of its own
    *("FedAvg.batch_size", "FedProx.batch_size", "Scaffold.batch_size", "algorithm.batch_size"),
    *("rounds.num_rounds", "train.seed", "own_data.from_clients.num_classes", "Vmap.chunk"),
    *("Workers.num_workers", "Workers.chunk", "Auto.num_workers", "make_executor.num_workers"),
    *("Task.module.seed", "evaluate.seed", "federated_evaluation.seed"),
    *("TorchTrainer.num_threads", "Record.limit_bytes", "run.seed"),
}
INTERNAL = {  # of which a caller gives what Potluck itself counted, or that are tested elsewhere
    *("client_update", "server_update", "client_lr_at", "local_sgd"),
    *("FederatedData", "Cluster", "client_test", "from_folder", "from_table", "read_idx"),
    *("parts", "is_other", "begin"),
}


def public_integers() -> set[str]:
    """Every "function.parameter" that is an integer, of what `potluck` itself exports."""
    found: set[str] = set()
    for name in potluck.__all__:
        thing = getattr(potluck, name)
        functions = {name: thing}
        if isinstance(thing, ModuleType):
            functions = {
                f"{name}.{key}": value
                for key, value in vars(thing).items()
                if callable(value) and getattr(value, "__module__", "") == thing.__name__
            }
        for key, value in list(functions.items()):
            if inspect.isclass(value):
                functions |= {f"{key}.{k}": v for k, v in vars(value).items() if callable(v)}
        for key, value in functions.items():
            if "._" not in key and callable(value):
                found |= {f"{key}.{parameter}" for parameter in _integers(value)}
    return found


def _integers(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        return []
    return [
        name
        for name, parameter in parameters.items()
        if re.search(r"(^|\| ?|Annotated\[)int\b", str(parameter.annotation))
    ]


def test_no_public_integer_is_forgotten() -> None:
    left = {
        name
        for name in public_integers()
        if not INTERNAL & set(name.split("."))
        and not name.endswith((".train.seed", ".train.round"))
    }
    assert left - set(TAKES) == {"rounds.cohort"}, "add it to TAKES"  # a cohort is tested below


def said(name: str, value: Any) -> str:
    """What is refused with this value there; "" if nothing is."""
    try:
        TAKES[name](value)
    except (ValueError, OSError, potluck.PotluckError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", TAKES)
def test_numpy_integers_are_integers_and_nothing_else_is(name: str) -> None:
    assert {said(name, value) for value in ONES} == {said(name, 1)}
    parameter = name.rsplit(".", 1)[1].replace("index", "client")
    for value in NO_COUNTS:
        if value is None and name in OPTIONAL:
            continue
        with pytest.raises((TypeError, ValueError)) as caught:
            TAKES[name](value)
        assert parameter in str(caught.value)
        assert " got " in str(caught.value) or "input_value=" in str(caught.value)


def test_the_cohort_of_a_numpy_integer_is_that_many_clients() -> None:
    for count in (1, 3):
        for kind in (int, np.int64, np.int32, np.uint8):
            assert len(sample_cohort(10, kind(count), seed=0, round=1)) == count
    for fraction in (0.5, np.float64(0.5), np.float32(0.5), Fraction(1, 2)):
        assert len(sample_cohort(10, fraction, seed=0, round=1)) == 5  # type: ignore[arg-type]
    for wrong in (True, np.True_, "3", None, [3], 1j):
        with pytest.raises(TypeError, match=r"cohort must be a number, got cohort="):
            sample_cohort(10, wrong, seed=0, round=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rate must be a number"):
        Poisson("0.1")  # type: ignore[arg-type]


def test_a_seed_of_numpy_is_the_same_seed() -> None:
    expected = derive_seed(7, "cohort", 3, 2)
    for kind in (np.int64, np.int32, np.uint8):
        assert derive_seed(kind(7), "cohort", 3, 2) == expected
        assert TASK.initial_weights(kind(7)).tolist() == TASK.initial_weights(7).tolist()


OPTIMIZERS = [Average, Momentum, Nesterov, Adagrad, Adam, Yogi]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_numpy_floats_give_the_numbers_that_floats_give(kind: Any) -> None:
    def final(number: Callable[[float], Any]) -> np.ndarray:
        server = kind(server_lr=number(0.5))
        algorithm = FedProx(client_lr=number(0.25), mu=number(0.5), server=server)
        return list(rounds(algorithm, TASK, cohort=number(0.5), num_rounds=2))[-1].weights

    assert final(np.float64).tobytes() == final(float).tobytes()
    assert final(np.float32).tobytes() == final(float).tobytes()
    for wrong in ("0.5", True, None, 1j):
        with pytest.raises(TypeError, match="server_lr must be a number, got server_lr="):
            kind(server_lr=wrong)


def test_what_an_algorithm_keeps_is_json() -> None:
    algorithm = FedAvg(client_lr=0.1, local_epochs=np.int64(2), batch_size=np.uint8(4))
    assert json.dumps([algorithm.local_epochs, algorithm.batch_size]) == "[2, 4]"
    assert isinstance(algorithm, LocalTraining)


def test_a_daily_limit_may_be_a_numpy_integer(tmp_path: Path) -> None:
    Record(tmp_path / "a", np.int64(10))
    for wrong in (2.5, True, "3"):
        with pytest.raises(TypeError, match="limit_bytes must be an integer"):
            Record(tmp_path / "b", wrong)  # type: ignore[arg-type]


def test_an_experiment_of_numpy_numbers_is_the_same_experiment() -> None:
    odd = json.loads(json.dumps(EXPERIMENT))
    odd["run"]["rounds"], odd["partition"]["clients"] = np.int64(1), np.uint8(10)
    odd["algorithm"]["client_lr"], odd["name"] = np.float64(0.1), np.str_("e")
    assert check_experiment(odd, "e") == check_experiment(EXPERIMENT, "e")


KEYS: list[tuple[list[Any], list[str]]] = [
    (list(np.arange(2)), ["0", "1"]),
    ([1, "2"], ["1", "2"]),
    ([np.datetime64("2024-01-01"), datetime.date(2024, 1, 2)], ["2024-01-01", "2024-01-02"]),
    ([("a", np.int64(1)), ("b", 2)], ["('a', 1)", "('b', 2)"]),
    ([np.str_("x"), b"z\xc3\xbcrich"], ["x", "zürich"]),
    ([None, "x"], ["None", "x"]),
    ([1.5, np.float32(2.5)], ["1.5", "2.5"]),
]


@pytest.mark.parametrize(("keys", "names"), KEYS)
def test_names_of_clients_are_text(keys: list[Any], names: list[str]) -> None:
    examples = (np.zeros((4, 2)), np.array([0, 1, 0, 1]))
    data = own_data.from_clients(dict.fromkeys(keys, examples), test=dict.fromkeys(keys, examples))
    assert list(data.clients) == names == json.loads(json.dumps(data.clients))
    assert all(type(name) is str for name in data.clients)
    assert data.test.num_examples == 8


def test_clients_that_would_share_a_name_are_refused() -> None:
    examples = (np.zeros((4, 2)), np.array([0, 1, 0, 1]))
    with pytest.raises(DataError, match=r"got 1 and '1', which are both called '1'"):
        own_data.from_clients({1: examples, "1": examples})
    with pytest.raises(DataError, match="Unicode text, got client='caf"):
        own_data.from_clients({"caf\udce9": examples})
    with pytest.raises(DataError, match="different names"):
        partitions.divide(DATA, [np.arange(3), np.arange(3, 6)], ["a", "a"])


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        (np.array([3, 7]), ("3", "7")),
        (np.array([b"a", b"z\xc3\xbcrich"]), ("a", "zürich")),
        (np.array(["2024-01-01", "2024-01-02"], "datetime64[D]"), ("2024-01-01", "2024-01-02")),
        (np.array([None, "x"], object).astype(str), ("None", "x")),
    ],
)
def test_groups_of_any_type_give_text_as_names(groups: np.ndarray, names: tuple[str, ...]) -> None:
    data = partitions.by_group(dataclasses.replace(DATA, groups=np.repeat(groups, 6)))
    assert data.clients == names


def test_data_made_by_hand_keep_plain_numbers_and_names() -> None:
    data = dataclasses.replace(FEDERATED, num_classes=np.int64(2), clients=tuple(np.arange(4)))
    assert json.dumps([data.num_classes, data.clients]) == '[2, ["0", "1", "2", "3"]]'
    with pytest.raises(TypeError, match="num_classes must be an integer, got num_classes="):
        dataclasses.replace(DATA, num_classes=2.0)


def test_no_client_is_before_the_first() -> None:
    with pytest.raises(ValueError, match="client must be at least 0, got client=-1"):
        FEDERATED.client(-1)


def test_plain_keeps_what_is_plain() -> None:
    content = {"a": [np.int64(1), {"b": np.float64(0.5)}], "c": "x", "d": None, "e": np.True_}
    assert plain(content) == {"a": [1, {"b": 0.5}], "c": "x", "d": None, "e": True}
    assert type(plain(np.float32(0.5))) is float
    assert plain([]) == []


def test_what_is_a_number() -> None:
    assert [is_integer(value) for value in ONES] == [True] * len(ONES)
    assert [is_integer(value) for value in NO_COUNTS] == [False] * len(NO_COUNTS)
    assert as_real("x", np.float16(0.5)) == as_real("x", torch.tensor(0.5)) == 0.5
    assert as_integer("x", -3) == as_integer("x", np.int8(-3)) == -3
    with pytest.raises(ValueError, match=r"^x must be at least 2, got x=1\. Raise it\.$"):
        as_count("x", 1, 2, "Raise it.")
