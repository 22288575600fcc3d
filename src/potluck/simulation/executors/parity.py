"""The parity check: a few steps in the plain loop and in a faster program must agree.

A model may draw from a stream of its own, keep Python state, or mix the examples of a batch. So a
program is used for a model only after this check.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import get_args

import numpy as np

from potluck.core import Role, Spec, Trained, Vector
from potluck.engine import TorchRuntime
from potluck.engine.local_run import LocalRun
from potluck.engine.module.randomness import other_states

TRIED_STEPS = 3
TOLERANCE = 1e-3  # of the movement of the weights in so few steps, and of the loss


class DisagreesError(Exception):
    """A program does not give the numbers of the plain loop."""


def shortened(run: LocalRun, num_steps: int = TRIED_STEPS) -> LocalRun:
    """The first steps of a run."""
    return run._replace(steps=run.steps[:num_steps])


def tried(plain: TorchRuntime, run: LocalRun) -> Trained:
    """Runs the first steps of a run in the plain runtime, for comparison.

    Raises:
        DisagreesError: the model keeps state of its own. Each client in the loop has one, and
            clients side by side share one.
    """
    local = plain.train(shortened(run))
    name = plain.changed()
    if name is not None:
        raise DisagreesError(
            f"while it trains, it writes {name!r}, and not by writing into a buffer in place"
        )
    return local._replace(weights=local.weights.copy())


@contextmanager
def undrawn() -> Generator[None]:
    """Checks that clients that train side by side in this block draw from no common stream.

    Raises:
        DisagreesError: the model draws from a stream of which there is one for all of them.
    """
    before = other_states()
    yield
    if other_states() != before:
        raise DisagreesError(
            "the model draws from numpy.random or random, which give one stream to all clients "
            "that train side by side"
        )


def compare(
    spec: Spec, start: Vector, found: Trained, expected: Trained, tolerance: float = TOLERANCE
) -> bool:
    """Compares two results. Returns False, without a verdict, where the plain loop's is not finite.

    Parameters are compared together, and each buffer by itself: a counter is large and a mean is
    small. What neither moved is equal, also where it is infinite.

    Args:
        tolerance: of the movement of the weights; and of the loss, of which it is 0.05 at most.

    Raises:
        DisagreesError: the two differ.
    """
    if not np.isfinite(expected.loss):
        return False
    groups = [slice(0, spec.num_parameters)]
    groups += [part for part in spec.slices(*get_args(Role)) if part.start >= spec.num_parameters]
    for part in groups:
        if not _agree(start[part], found.weights[part], expected.weights[part], tolerance):
            return False
    if not abs(found.loss - expected.loss) <= min(tolerance, 0.05) * max(abs(expected.loss), 1.0):
        raise DisagreesError(
            f"its loss differs from the plain loop's {expected.loss:g}, got loss={found.loss:g}"
        )
    return True


def _agree(start: Vector, found: Vector, expected: Vector, tolerance: float) -> bool:
    """Compares some of the entries, as `compare` does."""
    bits = [vector.view(np.int32) for vector in (start, found, expected)]
    moving = (bits[0] != bits[1]) | (bits[0] != bits[2])
    start, found, expected = start[moving], found[moving], expected[moving]
    if not (np.isfinite(expected).all() and np.isfinite(start).all()):
        return False
    moved = float(np.abs(expected - start).max(initial=0.0))
    apart = float(np.abs(found - expected).max(initial=0.0))
    allowed = tolerance * moved + 1e-6 * float(np.abs(start).max(initial=1.0))
    if not apart <= allowed:  # also what is not a number
        raise DisagreesError(
            f"after {TRIED_STEPS} steps its weights differ from the plain loop's by {apart:.2g}, "
            f"got a movement of {moved:.2g}"
        )
    return True
