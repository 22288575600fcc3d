"""A target: the score of a metric at which a run has come far enough.

A score that is not a finite number is no result: it reaches no target and is never the best.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

from potluck.core.direction import higher_is_better


def is_result(score: Any) -> TypeGuard[float]:
    """Returns whether a score is a finite number."""
    return isinstance(score, int | float) and abs(score) <= sys.float_info.max


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A metric and the score that it must have: at least, or at most."""

    metric: str
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        given = [bound for bound in (self.at_least, self.at_most) if bound is not None]
        if len(given) != 1 or not is_result(given[0]):
            raise ValueError(
                "a target must have one finite number, at_least or at_most, got "
                f"at_least={self.at_least}, at_most={self.at_most}. Give one of the two."
            )

    @classmethod
    def of(cls, value: float, metric: str) -> Target:
        """Returns a number as the target of a metric, in the direction in which that is better.

        Raises:
            ValueError: the number is no accuracy, and the metric is one.
        """
        if metric.startswith("accuracy") and not 0.0 < value < 1.0:
            raise ValueError(
                f"target must be an accuracy above 0 and below 1, got target={value:g}. "
                "For 97 % write 0.97."
            )
        if higher_is_better(metric):
            return cls(metric=metric, at_least=float(value))
        return cls(metric=metric, at_most=float(value))

    @classmethod
    def read(cls, content: Any, metrics: Collection[str]) -> Target | None:
        """Returns the `run.target` of an experiment, for a run that is evaluated by these
        metrics."""
        if content is None or isinstance(content, Target):
            return content
        if isinstance(content, Mapping):
            return cls(**cast("Mapping[str, Any]", content))
        return cls.of(content, main_metric(metrics))

    @property
    def value(self) -> float:
        """The score itself."""
        bound = self.at_most if self.at_least is None else self.at_least
        assert bound is not None
        return bound

    @property
    def sign(self) -> float:
        """The factor for scores after which more is better."""
        return -1.0 if self.at_least is None else 1.0

    def is_reached(self, score: Any) -> bool:
        """Returns whether a score is a result, and good enough."""
        return is_result(score) and self.sign * score >= self.sign * self.value

    def __str__(self) -> str:
        if self.metric == "accuracy" and self.at_least is not None:
            return f"{self.value:g}"
        return f"{self.metric} {'≤' if self.at_least is None else '≥'} {self.value:g}"


def main_metric(metrics: Collection[str]) -> str:
    """Returns the metric that judges a run by default: accuracy, or loss without it."""
    return "accuracy" if "accuracy" in metrics else "loss"
