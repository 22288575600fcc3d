"""Hyperparameters out of range are refused where an algorithm is made."""

from __future__ import annotations


def check_above(name: str, value: float, low: float, advice: str) -> None:
    """Refuse a value that is not above `low`; NaN is not."""
    if not value > low:
        raise ValueError(f"{name} must be above {low:g}, got {name}={value!r}. {advice}")


def check_at_least(name: str, value: float, low: float, advice: str) -> None:
    """Refuse a value below `low`, or NaN."""
    if not value >= low:
        raise ValueError(f"{name} must be at least {low:g}, got {name}={value!r}. {advice}")


def check_within(name: str, value: float, low: float, high: float, advice: str) -> None:
    """Refuse a value outside [low, high], or NaN."""
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low:g} to {high:g}, got {name}={value!r}. {advice}")


def check_decay(name: str, value: float, advice: str) -> None:
    """Refuse a value outside [0, 1), or NaN."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be at least 0 and below 1, got {name}={value!r}. {advice}")
