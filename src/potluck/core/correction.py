"""What changes the gradient of a local step besides the loss.

    g = min(1, gradient_clip / ‖∇ℓ(w; b)‖) ∇ℓ(w; b)  +  proximal (w − received)  +  drift
    w ← w − lr · g

One mechanism for clipped gradients, for FedProx (`proximal`) and for SCAFFOLD (`drift`). It holds
for all local steps of a client in a round. Only the gradient of the loss is clipped, not what is
added to it.
"""

from __future__ import annotations

from typing import NamedTuple

from potluck.core.update import Vector


class Correction(NamedTuple):
    """See the module's docstring. An averaged buffer has no gradient and is not corrected."""

    gradient_clip: float | None = None  # > 0; None leaves gradients as they are
    proximal: float = 0.0  # ≥ 0
    drift: Vector | None = None  # [dim]; not changed, and not to be changed during the round
