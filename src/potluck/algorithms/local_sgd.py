"""Local training by gradient steps: what the client halves of all algorithms here share.

    split the n examples of the client into batches of size B
    for each local epoch 1 … E, for each batch b:
        w' = w' − η_t g(w'; b)

g is the gradient of the loss, or what a `Correction` makes of it. η_t is `client_lr` times the
factor of round t (`client_schedule`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, NamedTuple, TypeVar

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray

from potluck.algorithms.contract import Runtime
from potluck.algorithms.schedules import Constant, Schedule
from potluck.core import Correction, Vector, derive_seed, stream
from potluck.core.validate import check_ranges

W = TypeVar("W")  # vectors, tensors, batches of either


class Trained(NamedTuple):
    """Where local training ended."""

    weights: Vector  # [dim], valid until the runtime's next `begin`
    loss: float  # the mean over the local steps
    num_steps: int


_ALL_AT_ONCE = "Use None for all of a client's examples in one step."
_AS_THEY_ARE = "Use None to leave gradients alone."


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTraining:
    """The hyperparameters of local training; an algorithm adds its two halves.

    Args:
        client_lr: η > 0, the learning rate of a local step.
        local_epochs: E ≥ 1, passes over a client's examples in one round.
        batch_size: B ≥ 1, examples in a local step; None takes all of a client's at once (∞).
        client_schedule: the factor on `client_lr` in each round; see `potluck.schedules`.
        gradient_clip: > 0, the largest L2 norm of the loss gradient of a local step, which is
            scaled down to it; None leaves gradients as they are.
    """

    client_lr: Annotated[float, Interval(gt=0), "Start with 0.1."]
    local_epochs: Annotated[int, Interval(ge=1), "Use 1 for a single pass."] = 1
    batch_size: Annotated[int, Interval(ge=1), _ALL_AT_ONCE] | None = 10
    client_schedule: Schedule = field(default_factory=Constant)
    gradient_clip: Annotated[float, Interval(gt=0), _AS_THEY_ARE] | None = None

    def __post_init__(self) -> None:
        check_ranges(self)

    def client_lr_at(self, round: int) -> float:
        """η in a round (from 1)."""
        return float(self.client_lr * self.client_schedule(round))

    def batches(self, num_examples: int) -> list[slice]:
        """The batches of one local epoch, as rows of the shuffled examples; the last may be
        short."""
        return list(_batches(num_examples, self.batch_size or num_examples))

    def order(
        self, num_examples: int, lengths: NDArray[np.int64] | None, random: np.random.Generator
    ) -> NDArray[np.int64]:
        """The order in which `batches` takes a client's examples: random, or, where examples have
        lengths [examples], such that those of a batch are of similar length and the batches come
        in random order."""
        order = random.permutation(num_examples)
        if lengths is None or self.batch_size is None or num_examples <= self.batch_size:
            return order
        order = order[np.argsort(lengths[order], kind="stable")]
        whole, rest = divmod(num_examples, self.batch_size)
        # The short batch comes last, and may be of any length.
        start = int(random.integers(whole + 1)) * self.batch_size
        last = order[start : start + rest]
        others = np.delete(order, np.s_[start : start + rest]).reshape(whole, self.batch_size)
        return np.concatenate([others[random.permutation(whole)].ravel(), last])

    def train(
        self,
        runtime: Runtime,
        weights: Vector,
        num_examples: int,
        *,
        seed: int,
        round: int,
        client: int,
        proximal: float = 0.0,
        drift: Vector | None = None,
    ) -> Trained:
        """All local steps of one client in one round, from `weights` on."""
        batches = self.batches(num_examples)
        found = runtime.recall()
        if found is None:
            lr = self.client_lr_at(round)
            random = stream(seed, "batches", round, client)
            order = self.order(num_examples, runtime.lengths(), random)
            correction = Correction(self.gradient_clip, proximal, drift)
            runtime.begin(weights, order, derive_seed(seed, "model", round, client), correction)
            for _ in range(self.local_epochs):
                for batch in batches:
                    runtime.step(batch, lr)
            found = runtime.end()
        return Trained(*found, self.local_epochs * len(batches))

    @staticmethod
    def local_step(weights: W, gradient: W, lr: float) -> W:
        """The pure local step, w − η g(w; b), which a runtime may do in place."""
        return weights - lr * gradient  # type: ignore[operator]


@lru_cache(maxsize=4096)  # clients of one size, round after round
def _batches(num_examples: int, size: int) -> tuple[slice, ...]:
    return tuple(slice(i, min(i + size, num_examples)) for i in range(0, num_examples, size))
