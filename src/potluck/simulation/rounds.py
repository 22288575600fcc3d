"""The rounds of federated training, as a generator: the loop belongs to the caller."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from potluck.algorithms import Algorithm, with_statistics
from potluck.core import (
    Codec,
    DivergedError,
    Poisson,
    Spec,
    TrainingError,
    Vector,
    check_codec,
    sample_cohort,
    update_bytes,
)
from potluck.core.cohorts import cohort_size
from potluck.core.validate import as_count, as_seed
from potluck.engine import Task
from potluck.engine.buffers import roles
from potluck.engine.module.modes import in_own_modes
from potluck.simulation.compression import compressed
from potluck.simulation.executors.choose import ExecutorName, make_executor
from potluck.simulation.executors.executor import (
    NO_STATES,
    CohortResult,
    Executor,
    Failure,
    RoundWork,
)
from potluck.simulation.handed import Kept, own_states

if TYPE_CHECKING:
    from potluck.simulation.virtual_time.timeline import Timing, VirtualTime

ClientStates: TypeAlias = Mapping[int, Vector]  # by client: what it keeps until its next round


class Round(NamedTuple):
    """The result of one round. Round 0 is the initial model. Its arrays are the caller's."""

    number: int
    weights: Vector  # [dim], the model after this round
    cohort: NDArray[np.int64]  # sorted client numbers
    loss: float  # the cohort's mean training loss
    metrics: dict[str, float] | None  # central evaluation; None if not evaluated in this round
    num_examples: int  # of the cohort
    uplink_bytes: int  # of this round: updates in the codec
    downlink_bytes: int  # models in float32
    seconds: float  # wall time, evaluation included
    failures: tuple[Failure, ...]
    state: Any  # the server state after this round
    client_states: ClientStates = NO_STATES  # of all clients seen so far, if they keep any
    executor: str = ""  # what trained the cohort and why, in words, where that was a choice
    virtual: Timing | None = None  # how the round went on simulated devices, if there are any

    def __repr__(self) -> str:
        parts = [f"{name} {score:.4f}" for name, score in (self.metrics or {}).items()]
        if self.number > 0:
            parts += [f"training loss {self.loss:.4f}", f"{len(self.cohort)} clients"]
            parts += [f"{len(self.failures)} failed"] * bool(self.failures)
            parts.append(f"{self.seconds:.2f} s")
        told = f": {', '.join(parts)}" if parts else ""
        return f"Round {self.number}{told} ({len(self.weights):,} weights)"


def rounds(
    algorithm: Algorithm,
    task: Task,
    *,
    cohort: float | int | Poisson = 0.1,
    num_rounds: int | None = None,
    seed: int = 0,
    codec: Codec = "float32",
    executor: Executor | ExecutorName = "loop",
    evaluate_every: int = 1,
    skip_failures: bool = False,
    resume: tuple[int, Any] | tuple[int, Any, ClientStates] | None = None,
    virtual: VirtualTime | None = None,
) -> Iterator[Round]:
    """Trains, and yields every round as it is done, from round 0, the initial model.

    Args:
        cohort: the fraction C of all clients (0.0 means one), their number, or `Poisson(rate)`.
        num_rounds: stop after this round; without it, until the caller stops.
        seed: of every random stream of the run.
        codec: in which updates travel: "bfloat16", "int8" and "int4" are shorter and lose a little,
            which each client adds to its next update; so it then keeps a state.
        executor: "loop", "workers", "vmap", "ray", "auto", or an executor of the caller's, which
            stays open.
        evaluate_every: evaluate after every so many rounds, and after the last.
        skip_failures: leave clients that fail out of the round instead of stopping there.
        resume: (number, state, client_states) of an earlier round, to go on from the round after
            it; the last may be left out where clients keep nothing.
        virtual: simulated devices; the cohort of a round is then those whose updates arrived in
            time, and a `Round` has that time.

    Raises:
        AbandonedError: too few simulated devices came or reported, attempt after attempt.
        DivergedError: a client's loss or weights are no longer finite; client and round are named.
        TrainingError: local training of a client failed otherwise.
    """
    check_codec(codec)
    population = task.data.num_clients
    if not isinstance(cohort, Poisson):
        cohort_size(population, cohort)
    if num_rounds is not None:
        num_rounds = as_count("num_rounds", num_rounds, 0)
    seed = as_seed(seed)
    evaluate_every = as_count(
        "evaluate_every", evaluate_every, 1, "Use 1 to evaluate after every round."
    )
    if resume is not None and len(resume) not in (2, 3):
        raise ValueError(
            f"resume must be (number, state) or (number, state, client_states), got {len(resume)} "
            "values. Take them from a Round."
        )
    if resume is not None and len(resume) == 2:
        if algorithm.client_vectors > 0 or codec != "float32":
            raise ValueError(
                "resume must be (number, state, client_states) where clients keep a state (of an "
                f"algorithm, or what a codec lost), got {len(resume)} values. Take all three from "
                "the same round."
            )
        resume = (*resume, {})
    return in_own_modes(
        _rounds(
            algorithm,
            task,
            cohort,
            num_rounds,
            seed,
            codec,
            executor,
            evaluate_every,
            skip_failures,
            resume,
            virtual,
        )
    )


def _rounds(
    algorithm: Algorithm,
    task: Task,
    cohort: float | int | Poisson,
    num_rounds: int | None,
    seed: int,
    codec: Codec,
    executor: Executor | ExecutorName,
    evaluate_every: int,
    skip_failures: bool,
    resume: tuple[int, Any, ClientStates] | None,
    virtual: VirtualTime | None,
) -> Generator[Round]:
    started = time.perf_counter()
    own = isinstance(executor, str)
    task.begin(seed)
    spec = roles(task)
    algorithm = with_statistics(compressed(algorithm, codec, spec), spec)
    runner = make_executor(executor, task) if isinstance(executor, str) else executor
    begin: Callable[[int], None] | None = getattr(runner, "begin", None)
    if begin is not None:  # its task may be another object than ours
        begin(seed)
    try:
        if resume is None:
            number, state = 0, algorithm.server_init(task.initial_weights(seed))
            kept: ClientStates = {}
            metrics = runner.evaluate(state.weights)
            nobody = np.empty(0, np.int64)
            first = _round(
                _traffic(algorithm, codec, spec), 0, state, kept, nobody, None, metrics, started
            )
            yield handed_out(first)
        else:
            number = as_count("resume[0]", resume[0], 0)
            state, kept = copy.deepcopy(resume[1]), own_states(resume[2])
            _check_length(state.weights, spec.dim)
        timings: Iterator[Timing] | None = None
        if virtual is not None:
            from potluck.simulation.virtual_time.timeline import timeline

            traffic = _traffic(algorithm, codec, spec)
            timings = timeline(
                virtual,
                sizes=task.data.sizes,
                cohort=cohort,
                downlink_bytes=traffic.down,
                uplink_bytes=traffic.up,
                seed=seed,
            )
            timings = islice(timings, number, None)
        while num_rounds is None or number < num_rounds:
            started = time.perf_counter()
            number += 1
            timing = None if timings is None else next(timings)
            if timing is None:
                clients = sample_cohort(task.data.num_clients, cohort, seed=seed, round=number)
            else:
                clients = timing.accepted
            received = algorithm.broadcast(state)
            result = runner.train(RoundWork(algorithm, received, clients, seed, number, kept))
            if result.failures and not skip_failures:
                raise _failed(result.failures, number)
            num_updates = len(clients) - len(result.failures)
            if num_updates > 0:
                before = state.weights
                state = algorithm.server_update(
                    state,
                    result.aggregate,
                    round=number,
                    participation=num_updates / task.data.num_clients,
                )
                spec = _with_moved(spec, before, state.weights)
            if result.states:
                kept = {**kept, **result.states}  # earlier rounds keep what they had
            due = number % evaluate_every == 0 or number == num_rounds
            metrics = runner.evaluate(state.weights) if due else None
            traffic = _traffic(algorithm, codec, spec)
            done = _round(traffic, number, state, kept, clients, result, metrics, started)
            yield handed_out(done if timing is None else _timed(done, timing, traffic))
    finally:
        if own:
            runner.close()


def _check_length(weights: Vector, dim: int) -> None:
    if weights.shape != (dim,):
        raise ValueError(
            f"resume must have the weights of the task's model, of length {dim}, got a state with "
            f"weights of shape={weights.shape}. Take the state of a Round with this model."
        )


def handed_out(round: Round) -> Round:
    """Returns the round with copied arrays: changes in place do not reach the run."""
    states = round.client_states
    return round._replace(
        weights=round.weights.copy(),
        cohort=round.cohort.copy(),
        metrics=copy.deepcopy(round.metrics),
        state=copy.deepcopy(round.state),
        client_states=Kept(states.own if isinstance(states, Kept) else states),
    )


class _Traffic(NamedTuple):
    """Bytes of a model on its way to a client, and of an update on its way back."""

    down: int
    up: int


def _traffic(algorithm: Algorithm, codec: Codec, spec: Spec) -> _Traffic:
    vectors = algorithm.vectors
    return _Traffic(update_bytes("float32", spec, vectors), update_bytes(codec, spec, vectors))


def _with_moved(spec: Spec, before: Vector, after: Vector) -> Spec:
    """Returns the spec with constants that training changed made statistics, which travel."""
    constants = spec.slices("constant")
    moved = [p for p in constants if before[p].tobytes() != after[p].tobytes()]
    return spec.with_roles({spec.name_at(part.start): "statistic" for part in moved})


def _round(
    traffic: _Traffic,
    number: int,
    state: Any,
    client_states: ClientStates,
    cohort: NDArray[np.int64],
    result: CohortResult | None,
    metrics: dict[str, float] | None,
    started: float,
) -> Round:
    failures = () if result is None else result.failures
    return Round(
        number=number,
        weights=state.weights,
        cohort=cohort,
        loss=float("nan") if result is None else result.loss,
        metrics=metrics,
        num_examples=0 if result is None else result.num_examples,
        uplink_bytes=traffic.up * (len(cohort) - len(failures)),
        downlink_bytes=traffic.down * len(cohort),
        seconds=time.perf_counter() - started,
        failures=failures,
        state=state,
        client_states=client_states,
        executor="" if result is None else result.executor,
    )


def _timed(round: Round, timing: Timing, traffic: _Traffic) -> Round:
    """Returns a round with its virtual time, and with the bytes of devices whose work was lost
    too."""
    received = timing.updates_received - len(round.failures)
    return round._replace(
        uplink_bytes=traffic.up * received,
        downlink_bytes=traffic.down * timing.models_sent,
        virtual=timing,
    )


def _failed(failures: tuple[Failure, ...], round: int) -> TrainingError:
    first = failures[0]
    more = f" ({len(failures) - 1} more clients of this round failed too.)" * (len(failures) > 1)
    kind = DivergedError if first.diverged else TrainingError
    return kind(
        f"client {first.name!r} (number {first.client}), round {round}: {first.reason}{more}"
    )
