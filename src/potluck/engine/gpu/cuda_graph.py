"""A step that is launched as one: captured in a CUDA graph when it has been made a few times.

A step of a small model is dozens of kernels of a few microseconds, and launching them from Python
takes longer than they do. A graph launches them at once. It replays the same kernels on the same
memory, so a step reads its changing inputs from tensors that stay where they are. Before its
capture the step has run on the same stream, so that nothing is set up while it is captured.

Where a step cannot be captured, it goes on as it is, and a line of the log "potluck" says why.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch

_LOG = logging.getLogger("potluck")
_WARM_UPS = 3  # times that a step is made before it is captured


class Captured:
    """A function without arguments or result, that changes tensors in place.

    Args:
        stream: on which it runs; None where there are none, on a CPU. It then runs as it is.
        pool: memory that is shared with the graphs that never run at the same time.
    """

    def __init__(self, function: Callable[[], None], stream: Any, pool: Any) -> None:
        self._function, self._stream, self._pool = function, stream, pool
        self._graph: Any = None
        self._failed: Any = None  # is kept as long as the graphs of its stream
        self._runs = 0
        self.refused: str | None = None
        """Why it cannot be captured; None if it can, or was not tried."""

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    def __call__(self, *, may_capture: bool = True) -> None:
        """Runs the function, or replays it."""
        self._runs += 1
        known = self._graph is not None or self._stream is None or self.refused is not None
        if not known and may_capture and self._runs > _WARM_UPS:
            self._capture()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._function()

    def _capture(self) -> None:
        """Captures the function without running it."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                self._function()
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of a capture that failed fails as well
            self.refused = (str(cause) or type(cause).__name__).splitlines()[0]
            self._failed = graph
            _LOG.warning("steps are not captured in CUDA graphs: %s", self.refused)
            torch.cuda.synchronize()
            self._heal_generator()
        else:
            self._graph = graph

    def _heal_generator(self) -> None:
        """Gives the GPU's generator a state outside of any capture, at the same place in its
        stream. A failed capture leaves it inside one, and the next draw would fail."""
        generators: Any = torch.cuda.default_generators
        generator = generators[self._stream.device.index]
        fresh: Any = torch.Generator(self._stream.device)
        fresh.manual_seed(generator.initial_seed())
        with contextlib.suppress(RuntimeError):  # its place is no longer known
            fresh.set_offset(generator.get_offset())
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
