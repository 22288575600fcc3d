"""The owner's policy for a device: a TOML file, checked as strictly as a plan.

A plan that asks for more is refused before anything is downloaded, whoever signed it. A key that is
left out sets no limit, except on the time of one assignment.
"""

from __future__ import annotations

import math
import secrets
import time
from pathlib import Path
from typing import Annotated, TypeAlias

import numpy as np
from pydantic import Field

from potluck.config.plan import Plan
from potluck.config.section import Section, read_toml, validated
from potluck.core import ConfigError, Update
from potluck.protocol import Manifest

MEMORY_COPIES = 4
"""Vectors of a model's length that local training holds: received, weights, gradient, update."""
_Count: TypeAlias = Annotated[int, Field(ge=1, le=2**53 - 1)]
_Hour: TypeAlias = Annotated[int, Field(ge=0, le=24)]


class DeclinedError(ConfigError):
    """The owner of a device, or their policy, does not agree to what a run is to do."""


class Policy(Section):
    """The keys of the file; all of them are optional."""

    min_batch_size: _Count | None = None
    """Examples in a local step; the last, shorter batch of an epoch is not checked."""
    min_steps: _Count | None = None
    """Local steps of a round."""
    max_epochs: _Count | None = None
    """Local epochs of a round."""
    max_seconds: Annotated[int, Field(ge=1, le=604_800)] = 86_400
    """Download and local training of a round; after that the assignment is given back."""
    max_rounds: _Count | None = None
    """Rounds of the whole run, by the plan."""
    max_rounds_a_day: _Count | None = None
    """Assignments, evaluations among them, whatever became of them; a day is one of UTC."""
    hours: Annotated[list[_Hour], Field(min_length=2, max_length=2)] | None = None
    """[from, to] of the day by this machine's clock; [22, 6] is the night."""
    max_memory_bytes: Annotated[int, Field(ge=2**29, le=2**53 - 1)] | None = None
    """Memory of the process; the system enforces it (Linux)."""
    max_model_bytes: _Count | None = None
    """Bytes of one download."""
    max_sent_bytes_a_day: _Count | None = None
    """As --daily-limit."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """The largest L2 norm of an update, which is scaled down to it."""
    noise_multiplier: Annotated[float, Field(gt=0)] | None = None
    """Gaussian noise on every number of an update, of a standard deviation of so many clip_norm."""
    keep_updates: bool = False
    """Keep every update in sent/updates, as it is sent."""

    def check_model(self, manifest: Manifest) -> None:
        """Refuses a model that is too large, or a run that is too long.

        Raises:
            DeclinedError: with the key.
        """
        size = manifest.length_bytes
        algorithm = manifest.plan.get("algorithm")
        has_state = isinstance(algorithm, dict) and "client_optimizer" in algorithm
        copies = MEMORY_COPIES + 2 * has_state  # at most two more
        self._hold(max_model_bytes=size, max_memory_bytes=copies * size)
        self._hold(max_rounds=manifest.rounds or math.inf)  # which the server does not say

    def check_work(self, plan: Plan, num_examples: int | None) -> None:
        """Refuses local training that is too much, or so little that it shows single examples.

        Raises:
            DeclinedError: with the key.
        """
        size = plan.algorithm.batch_size
        batch = min(num_examples or math.inf, math.inf if size == "full" else size)
        self._hold(max_epochs=plan.algorithm.local_epochs, min_batch_size=batch)
        self._hold(min_steps=num_steps(plan, num_examples))

    def _hold(self, **asked: float | None) -> None:
        """Refuses a value beyond the key of its name."""
        for key, value in asked.items():
            limit = getattr(self, key)
            if limit is None or value is None:
                continue
            if value > limit if key.startswith("max") else value < limit:
                raise DeclinedError(
                    f"the run must keep to this device's policy, {key} = {limit}, got {value}. "
                    "Do not take part, or change the policy."
                )

    def seconds_to_hours(self, now_ms: int) -> float:
        """Returns the seconds until the permitted hours of the day begin; 0: they have begun."""
        if self.hours is None:
            return 0.0
        local = time.localtime(now_ms / 1000)
        now = local.tm_hour * 3600 + local.tm_min * 60 + local.tm_sec
        start, end = (hour * 3600 for hour in self.hours)
        inside = start <= now < end if start < end else now >= start or now < end
        return 0.0 if inside else float((start - now) % 86_400)

    def bound(self, update: Update) -> Update:
        """Returns the update as it may leave: clipped, with noise.

        Guarantee: with both, one update is differentially private for the whole of the device's
        data: the Gaussian mechanism with a sensitivity of 2 clip_norm. Updates of several rounds
        compose. The noise comes from the system's randomness, which is unknown to any server.

        Raises:
            DeclinedError: it has fewer local steps than the policy asks for.
        """
        self._hold(min_steps=update.num_steps)
        if self.clip_norm is None:
            return update
        norm = float(np.linalg.norm(update.delta.astype(np.float64)))
        delta = update.delta * np.float32(min(1.0, self.clip_norm / max(norm, 1e-300)))
        if self.noise_multiplier is not None:
            noise = np.random.default_rng(secrets.randbits(256)).standard_normal(delta.size)
            delta += (self.noise_multiplier * self.clip_norm * noise).astype(np.float32)
        return update._replace(delta=delta)


def load_policy(path: Path | str) -> Policy:
    """Reads a policy file.

    Raises:
        ConfigError: it cannot be read, or a key or a value in it is wrong.
    """
    example = "docs/what-leaves.md has an example."
    content = read_toml(Path(path), "a policy", example, example)
    policy = validated(Policy, content, str(path))
    if policy.hours is not None and policy.hours[0] == policy.hours[1]:
        raise ConfigError(
            f"{path}: hours must be two hours that differ, got hours = {policy.hours}. "
            "Leave it out for the whole day."
        )
    if policy.noise_multiplier is not None and policy.clip_norm is None:
        raise ConfigError(
            f"{path}: noise_multiplier must go with clip_norm, got none: the noise is a multiple "
            "of it. Give clip_norm."
        )
    return policy


def num_steps(plan: Plan, num_examples: int | None) -> int | None:
    """Returns the local steps of a round, where the number of examples is known."""
    size = plan.algorithm.batch_size
    if size == "full":
        return plan.algorithm.local_epochs
    return None if num_examples is None else plan.algorithm.local_epochs * -(-num_examples // size)
