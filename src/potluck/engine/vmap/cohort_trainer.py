"""Local training of many clients as one program: a matrix of models, and one step for all of them.

    weights[k] ← the weights that client k starts from                          # [clients, dim]
    state[k] ← that of its optimizer before the first step
    until every client has made its steps:
        group the clients whose next batches can be stacked; take the largest group
        weights[group], state[group] ← the step on the batches of the group

Clients are independent. One with fewer batches ends earlier, and one whose short batch is next is
stepped after the full batches of the others. A `Gradient` defines which batches it can stack.

There are two of them. `Vectorised` is any model's pure loss under `torch.func.vmap`; it stacks
batches of one shape. `Stack` is written out for plain stacks of linear layers with cross-entropy,
masks shorter batches, and is several times faster.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potluck.core import Spec, Vector
from potluck.engine.corrected_step import Descent, fresh_state
from potluck.engine.local_run import LocalRun
from potluck.engine.task import Task, in_training, spec_of
from potluck.engine.vmap.functional import Vectorised
from potluck.engine.vmap.mlp import Stack, layers_of

Index = slice | Tensor  # of clients among those that are trained together
_CPU = torch.device("cpu")


class Gradient(Protocol):
    """One local step of many clients, in place."""

    by_size: bool
    """True if clients that made the same steps can be stacked whatever their data."""

    def begin(self, seeds: Sequence[int]) -> None:
        """Starts clients with these seeds, none of which has made a step."""
        ...

    def key(self, client: int, rows: NDArray[np.int64]) -> Hashable:
        """Returns the key of a batch; batches with equal keys can be stacked."""
        ...

    def step(
        self,
        weights: Mapping[str, Tensor],
        clients: Sequence[int],
        batches: Sequence[NDArray[np.int64]],
        lr: float,
        descent: Descent,
    ) -> Tensor:
        """One local step of every client, in place; returns their losses [clients].

        Args:
            weights: by name, each [clients, …], those of `clients` only.
            batches: the rows of the packed examples, in arrays [clients, batch] that together
                are those of `clients`.
            descent: the step of these clients.
        """
        ...


class CohortRuntime:
    """Trains clients side by side; every row of its result equals that client's training alone."""

    def __init__(
        self,
        task: Task,
        *,
        plain: bool = False,
        compiles: bool = False,
        device: torch.device = _CPU,
    ) -> None:
        """Prepares the training of a task.

        Args:
            plain: without what is written out for particular models, which is for tests.
            compiles: a step that takes long is compiled, at a moment that depends on the clock.
            device: where steps are made, with `plain` alone; see
                `potluck.engine.gpu.chunk_trainer`.
        """
        module = in_training(task.module())
        self.spec: Spec = spec_of(module)
        layers = None if plain else layers_of(module, task)
        self.is_stack = layers is not None
        self._device = device
        self._gradient: Gradient = (
            Vectorised(task, self.spec, compiles=compiles, device=device)
            if layers is None
            else Stack(task, layers)
        )

    def train(self, runs: Sequence[LocalRun]) -> tuple[Vector, NDArray[np.float32]]:
        """Makes all steps of all runs.

        Args:
            runs: their corrections may differ in the drift only, their optimizers not.

        Returns:
            The local weights [runs, dim] and the mean losses [runs].

        Raises:
            RuntimeError: and others, if the model cannot be vectorised, or one client's data
                cannot be used.
        """
        weights, received, drift = self._begin(runs)
        sums = torch.zeros(len(runs), device=self._device)
        clip, proximal, _ = runs[0].correction
        optimizer = runs[0].optimizer
        trained = {name: weights[name] for name in self.spec.trained}
        state = fresh_state(optimizer, trained, (len(runs),))
        self._gradient.begin([run.seed for run in runs])
        for group in _Groups(self._gradient, runs):
            index = _index(group.clients, self._device)
            mine = _of(weights, index)
            pulls = _of(received, index), _of(drift, index)
            states = [_of(part, index) for part in state]
            descent = Descent(optimizer, clip, proximal, *pulls, states)
            losses = self._gradient.step(mine, group.clients, group.batches, group.lr, descent)
            if isinstance(index, Tensor):  # copies, unlike those of a slice
                for rooms, some in zip((weights, *state), (mine, *states), strict=True):
                    for name, rows in some.items():
                        rooms[name].index_copy_(0, index, rows)
                sums.index_add_(0, index, losses)
            else:
                sums[index] += losses
        result = torch.empty(len(runs), self.spec.dim)
        for name, view in self.spec.unflatten(result).items():
            view.copy_(weights[name])
        counts = np.array([max(len(run.steps), 1) for run in runs], np.float32)
        return result.numpy(), np.divide(sums.cpu().numpy(), counts, dtype=np.float32)

    def _begin(
        self, runs: Sequence[LocalRun]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """The weights to start from, the same once more if they pull, and the drift."""
        first = runs[0].start
        address = first.__array_interface__["data"]
        if all(run.start.__array_interface__["data"] == address for run in runs):
            starts = torch.tensor(first, device=self._device).expand(len(runs), -1)
        else:
            starts = self._there(np.stack([run.start for run in runs]))
        # A tensor a layer, rows next to each other: as fast batched matrix products need it.
        weights = {n: v.clone(memory_format=_ROWS) for n, v in self.spec.unflatten(starts).items()}
        received = self._trained(starts) if runs[0].correction.proximal != 0.0 else {}
        drifts = [run.correction.drift for run in runs if run.correction.drift is not None]
        drift = self._trained(self._there(np.stack(drifts))) if drifts else {}
        return weights, received, drift

    def _there(self, matrix: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(matrix).to(self._device)

    def _trained(self, matrix: Tensor) -> dict[str, Tensor]:
        views = self.spec.unflatten(matrix)
        return {name: views[name] for name in self.spec.trained}


_ROWS = torch.contiguous_format


class _Group(NamedTuple):
    clients: list[int]
    batches: list[NDArray[np.int64]]  # each [clients, batch], together those of `clients`
    lr: float


class _Peers(NamedTuple):
    """Clients with the same steps, which go through them together."""

    clients: list[int]
    rows: NDArray[np.int64]  # [clients, examples]
    steps: Iterator[tuple[slice, float]]


class _Groups:
    """The groups of clients that step together: always the largest that can."""

    def __init__(self, gradient: Gradient, runs: Sequence[LocalRun]) -> None:
        self._gradient = gradient
        self._waiting: dict[tuple[float, Hashable], list[tuple[_Peers, slice]]] = {}
        self._last: list[tuple[_Peers, slice]] = []
        for clients in _with_equal_steps(runs) if gradient.by_size else _each_alone(runs):
            rows = np.stack([runs[client].rows for client in clients])
            self._enqueue(_Peers(clients, rows, iter(runs[clients[0]].steps)))

    def __iter__(self) -> _Groups:
        return self

    def __next__(self) -> _Group:
        for peers, _ in self._last:
            self._enqueue(peers)
        if not self._waiting:
            raise StopIteration
        key = max(self._waiting, key=self._size)
        lr, _ = key
        self._last = sorted(self._waiting.pop(key), key=lambda pair: pair[0].clients[0])
        return _Group(
            [client for peers, _ in self._last for client in peers.clients],
            [peers.rows[:, batch] for peers, batch in self._last],
            lr,
        )

    def _size(self, key: tuple[float, Hashable]) -> int:
        return sum(len(peers.clients) for peers, _ in self._waiting[key])

    def _enqueue(self, peers: _Peers) -> None:
        for batch, lr in peers.steps:
            key = (lr, self._gradient.key(peers.clients[0], peers.rows[0, batch]))
            self._waiting.setdefault(key, []).append((peers, batch))
            return


def _with_equal_steps(runs: Sequence[LocalRun]) -> Iterator[list[int]]:
    """Neighbours with the same batches and rates."""
    clients = [0]
    for client in range(1, len(runs)):
        one, other = runs[clients[0]], runs[client]
        if len(one.rows) != len(other.rows) or one.steps != other.steps:
            yield clients
            clients = []
        clients.append(client)
    yield clients


def _each_alone(runs: Sequence[LocalRun]) -> Iterator[list[int]]:
    return ([client] for client in range(len(runs)))


def _index(clients: Sequence[int], device: torch.device) -> Index:
    """Neighbours as a slice, whose rows need no copy."""
    if list(clients) == list(range(clients[0], clients[0] + len(clients))):
        return slice(clients[0], clients[-1] + 1)
    return torch.tensor(clients, device=device)


def _of(tensors: Mapping[str, Tensor], index: Index) -> dict[str, Tensor]:
    return {name: tensor[index] for name, tensor in tensors.items()}
