"""Hyperparameters out of range are refused where an algorithm is made."""

from __future__ import annotations

from potluck.core.validate import as_real


def check_above(name: str, value: float, low: float, advice: str) -> None:
    """Refuse a value that is not above `low`; NaN is not."""
    if not as_real(name, value, advice) > low:
        raise ValueError(f"{name} must be above {low:g}, got {name}={value!r}. {advice}")


def check_at_least(name: str, value: float, low: float, advice: str) -> None:
    """Refuse a value below `low`, or NaN."""
    if not as_real(name, value, advice) >= low:
        raise ValueError(f"{name} must be at least {low:g}, got {name}={value!r}. {advice}")


def check_within(name: str, value: float, low: float, high: float, advice: str) -> None:
    """Refuse a value outside [low, high], or NaN."""
    if not low <= as_real(name, value, advice) <= high:
        raise ValueError(f"{name} must be from {low:g} to {high:g}, got {name}={value!r}. {advice}")


def check_decay(name: str, value: float, advice: str) -> None:
    """Refuse a value outside [0, 1), or NaN."""
    if not 0.0 <= as_real(name, value, advice) < 1.0:
        raise ValueError(f"{name} must be at least 0 and below 1, got {name}={value!r}. {advice}")
