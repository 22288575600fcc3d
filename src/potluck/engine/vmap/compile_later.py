"""A function of tensors that is compiled once that saves time.

Compiling takes from one second, when an earlier run has left the result in the cache, to half a
minute. So a function runs as it is until it has taken `AFTER_SECONDS` on arguments of one shape.
Then it is compiled for that shape, and the compiled one is kept if it agrees and is faster. Short
runs never compile. Where there is no C++ compiler, or the function cannot be compiled, it goes on
as it is.

Which of the two runs depends on the clock, and they agree to float tolerance. So results do not
repeat to the bit.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potluck.data.trees import leaves
from potluck.engine.native.compiler import check_ours, compiled_folder

AFTER_SECONDS = 30.0
_LOG = logging.getLogger("potluck")
_ROUNDS = 3  # of timing, of which the fastest counts


class CompiledLater:
    """`function`, compiled for the shapes on which it takes long.

    Args:
        function: pure, from nested dictionaries and lists of tensors to the same.
        after_seconds: how long it runs on arguments of one shape before it is compiled for them.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        after_seconds: float = AFTER_SECONDS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._function, self._after, self._clock = function, after_seconds, clock
        self._spent: dict[tuple[Any, ...], float] = {}
        self._chosen: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        """The function's result."""
        shape = tuple(t.shape for t in leaves(arguments))
        if shape in self._chosen:
            return self._chosen[shape](*arguments)
        started = self._clock()
        result = self._function(*arguments)
        self._spent[shape] = self._spent.get(shape, 0.0) + self._clock() - started
        if self._spent[shape] >= self._after:
            self._chosen[shape] = self._better(arguments, result)
        return result

    @property
    def num_compiled(self) -> int:
        """Shapes for which the compiled function was kept."""
        return sum(chosen is not self._function for chosen in self._chosen.values())

    def _better(self, arguments: tuple[Any, ...], expected: Any) -> Callable[..., Any]:
        try:
            compiled = _compiled(self._function)
            found = compiled(*arguments)
        except Exception as error:
            level = logging.WARNING if isinstance(error, PermissionError) else logging.INFO
            words = (str(error) or type(error).__name__).splitlines()[0]
            _LOG.log(level, "left uncompiled: %s", words)
            return self._function
        pairs = zip(leaves(found), leaves(expected), strict=True)
        if not all(_is_close(one, other) for one, other in pairs):
            return self._function
        times = {
            function: min(self._seconds(function, arguments) for _ in range(_ROUNDS))
            for function in (self._function, compiled)
        }
        return min(times, key=lambda function: times[function])

    def _seconds(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
        started = self._clock()
        function(*arguments)
        return self._clock() - started


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # The compiler unpickles what it finds in its folder. That one outlives the run.
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if named is None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compiled_folder())
    elif Path(named).exists():
        check_ours(Path(named))
    import torch._inductor.config as settings  # slow to import

    settings.compile_threads = 1  # no processes that outlive the call
    compiled = torch.compile(function, fullgraph=True, dynamic=False)

    def quietly(*arguments: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own
            return compiled(*arguments)

    return quietly


def _is_close(one: Tensor, other: Tensor) -> bool:
    scale = float(other.abs().max()) if other.numel() else 0.0
    return bool(torch.allclose(one, other, rtol=1e-4, atol=1e-5 * scale + 1e-12, equal_nan=True))
