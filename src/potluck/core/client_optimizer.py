"""Client optimizers: how the gradient of a local step moves a client's weights.

    state ← init(w)                                        # before a client's first step of a round
    w, state ← step(w, g, state, η, t)                     # in its local step t = 1, 2, …

They are those of `torch.optim`, with its names and defaults:

    all but AdamW    g ← g + weight_decay · w
    ClientSGD        w ← w − η g
    ClientMomentum   v ← momentum · v + g,  w ← w − η v
    ClientNesterov   v ← momentum · v + g,  w ← w − η (g + momentum · v)
    ClientAdam       m ← β₁ m + (1 − β₁) g,  s ← β₂ s + (1 − β₂) g²
                     w ← w − η m / (1 − β₁ᵗ) / (√s / √(1 − β₂ᵗ) + eps)
    ClientAdamW      w ← (1 − η · weight_decay) w, then as Adam

η is `client_lr` times its schedule; v, m and s start at 0 in every round of every client. Both
functions are pure, element by element, in tensors of PyTorch, and so they step one client or a
matrix of them alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeAlias, TypeVar

from annotated_types import Interval

from potluck.core.validate import check_ranges

_Momentum: TypeAlias = Annotated[float, Interval(ge=0, lt=1), "Start with 0.9."]
_Beta1: TypeAlias = Annotated[float, Interval(ge=0, lt=1), "Start with 0.9."]
_Beta2: TypeAlias = Annotated[float, Interval(ge=0, lt=1), "Start with 0.999."]
_Epsilon: TypeAlias = Annotated[float, Interval(gt=0), "Start with 1e-8."]
_Decay: TypeAlias = Annotated[float, Interval(ge=0), "Use 0.0 for none."]
T = TypeVar("T")  # a tensor
_Number: TypeAlias = Any  # a float, or a tensor with one for each client, that broadcasts


class ClientOptimizer(Protocol):
    """The interface of a local optimizer. Equal ones compare and hash equal."""

    def init(self, weights: T) -> tuple[T, ...]:
        """Returns the state before the first step, as tensors like the weights."""
        ...

    def step(
        self, weights: T, gradient: T, state: tuple[T, ...], lr: _Number, number: _Number
    ) -> tuple[T, tuple[T, ...]]:
        """Returns the weights and the state after a step; the arguments are left as they are.

        Args:
            lr: η of this step.
            number: t, the steps of this client with this one, in float64 where it is a tensor.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSGD:
    """Stochastic gradient descent; without weight decay the plain one, w ← w − η g.

    Args:
        weight_decay: ≥ 0, times the weights, added to the gradient.
    """

    weight_decay: _Decay = 0.0

    def __post_init__(self) -> None:
        check_ranges(self)

    def init(self, weights: Any) -> tuple[Any, ...]:
        """Returns no state."""
        return ()

    def step(
        self, weights: Any, gradient: Any, state: tuple[Any, ...], lr: _Number, number: _Number
    ) -> tuple[Any, tuple[Any, ...]]:
        """Steps down the gradient."""
        return weights - lr * _decayed(self.weight_decay, weights, gradient), ()


PLAIN_SGD = ClientSGD()


@dataclass(frozen=True, slots=True, kw_only=True)
class _WithMomentum:
    momentum: _Momentum = 0.9
    weight_decay: _Decay = 0.0

    def __post_init__(self) -> None:
        check_ranges(self)

    def init(self, weights: Any) -> tuple[Any, ...]:
        """Returns v = 0."""
        return (weights.new_zeros(weights.shape),)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientMomentum(_WithMomentum):
    """SGD along the running sum of the gradients.

    Args:
        momentum: in [0, 1), the part of the sum that a step keeps.
        weight_decay: ≥ 0, times the weights, added to the gradient.
    """

    def step(
        self, weights: Any, gradient: Any, state: tuple[Any, ...], lr: _Number, number: _Number
    ) -> tuple[Any, tuple[Any, ...]]:
        """Steps down the running sum."""
        gradient = _decayed(self.weight_decay, weights, gradient)
        velocity = self.momentum * state[0] + gradient
        return weights - lr * velocity, (velocity,)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientNesterov(_WithMomentum):
    """SGD along the running sum as it would be if the next gradient were like this one.

    Args:
        momentum, weight_decay: as for `ClientMomentum`.
    """

    def step(
        self, weights: Any, gradient: Any, state: tuple[Any, ...], lr: _Number, number: _Number
    ) -> tuple[Any, tuple[Any, ...]]:
        """Steps down the running sum, one gradient ahead."""
        gradient = _decayed(self.weight_decay, weights, gradient)
        velocity = self.momentum * state[0] + gradient
        return weights - lr * (gradient + self.momentum * velocity), (velocity,)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Adaptive:
    beta1: _Beta1 = 0.9
    beta2: _Beta2 = 0.999
    eps: _Epsilon = 1e-8

    def __post_init__(self) -> None:
        check_ranges(self)

    def init(self, weights: Any) -> tuple[Any, ...]:
        """Returns m = 0 and s = 0."""
        return weights.new_zeros(weights.shape), weights.new_zeros(weights.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientAdam(_Adaptive):
    """Adam (Kingma, Ba: Adam: A Method for Stochastic Optimization. ICLR 2015, Algorithm 1).

    Args:
        beta1: β₁ in [0, 1), of the mean of the gradients.
        beta2: β₂ in [0, 1), of the mean of their squares.
        eps: > 0, added to the root of the latter.
        weight_decay: ≥ 0, times the weights, added to the gradient.
    """

    weight_decay: _Decay = 0.0

    def step(
        self, weights: Any, gradient: Any, state: tuple[Any, ...], lr: _Number, number: _Number
    ) -> tuple[Any, tuple[Any, ...]]:
        """Steps down the mean gradient, over the root of the mean square."""
        gradient = _decayed(self.weight_decay, weights, gradient)
        return _adaptive(self, weights, gradient, state, lr, number)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientAdamW(_Adaptive):
    """Adam with decoupled weight decay (Loshchilov, Hutter: Decoupled Weight Decay Regularization.
    ICLR 2019, Algorithm 2, with decay times the rate, as in PyTorch).

    Args:
        beta1, beta2, eps: as for `ClientAdam`.
        weight_decay: ≥ 0; times η, the part of the weights that a step takes away.
    """

    weight_decay: _Decay = 0.01

    def step(
        self, weights: Any, gradient: Any, state: tuple[Any, ...], lr: _Number, number: _Number
    ) -> tuple[Any, tuple[Any, ...]]:
        """Decays the weights, then steps as Adam."""
        weights = weights * (1.0 - lr * self.weight_decay)
        return _adaptive(self, weights, gradient, state, lr, number)


def _decayed(weight_decay: float, weights: Any, gradient: Any) -> Any:
    return gradient + weight_decay * weights if weight_decay else gradient


def _adaptive(
    adam: _Adaptive,
    weights: Any,
    gradient: Any,
    state: tuple[Any, ...],
    lr: _Number,
    number: _Number,
) -> tuple[Any, tuple[Any, ...]]:
    """Adam's step without decay."""
    mean, square = state
    mean = mean.lerp(gradient, 1.0 - adam.beta1)
    square = (adam.beta2 * square).addcmul(gradient, gradient, value=1.0 - adam.beta2)
    rate = _like(weights, lr / (1.0 - adam.beta1**number))
    root = _like(weights, (1.0 - adam.beta2**number) ** 0.5)
    return weights - rate * (mean / (square.sqrt() / root + adam.eps)), (mean, square)


def _like(weights: Any, number: _Number) -> _Number:
    """The number, of the type of the weights where it is a tensor."""
    return number.to(weights.dtype) if hasattr(number, "to") else number
