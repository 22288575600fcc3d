"""The hyperparameters of local training, which the client halves of all algorithms here share.

See `potluck.core.LocalSGD` for the local steps. Their rate in round t is `client_lr` times the
factor of that round (`client_schedule`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Interval

from potluck.algorithms.schedules import Constant, Schedule
from potluck.core import PLAIN_SGD, ClientOptimizer, Correction, LocalSGD, Vector
from potluck.core.validate import check_ranges

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
        client_optimizer: what a local step makes of the gradient; see
            `potluck.core.client_optimizer`.
    """

    client_lr: Annotated[float, Interval(gt=0), "Start with 0.1."]
    local_epochs: Annotated[int, Interval(ge=1), "Use 1 for a single pass."] = 1
    batch_size: Annotated[int, Interval(ge=1), _ALL_AT_ONCE] | None = 10
    client_schedule: Schedule = field(default_factory=Constant)
    gradient_clip: Annotated[float, Interval(gt=0), _AS_THEY_ARE] | None = None
    client_optimizer: ClientOptimizer = PLAIN_SGD

    def __post_init__(self) -> None:
        check_ranges(self)

    def client_lr_at(self, round: int) -> float:
        """η in a round (from 1)."""
        return float(self.client_lr * self.client_schedule(round))

    def local_sgd(
        self, start: Vector, round: int, *, proximal: float = 0.0, drift: Vector | None = None
    ) -> LocalSGD:
        """Returns the request for all local steps of a client in a round, from some weights on."""
        return LocalSGD(
            start=start,
            lr=self.client_lr_at(round),
            epochs=self.local_epochs,
            batch_size=self.batch_size,
            correction=Correction(self.gradient_clip, proximal, drift),
            optimizer=self.client_optimizer,
        )
