"""Devices by name, and the operations that differ between a GPU and a CPU.

PyTorch calls the processor that computes a device; in an experiment it is `run.device`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def device_of(name: str) -> torch.device:
    """The device of a name: "cpu", "cuda", "cuda:1", or "auto", a GPU if there is one.

    Raises:
        ValueError: no such name, or no such GPU here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind != "cuda" or not (number.isdecimal() or name == "cuda"):
        raise ValueError(
            "device must be 'cpu', 'cuda', 'cuda:<number>' or 'auto', got "
            f"device={name!r}. 'auto' takes a GPU if there is one."
        )
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found == 0:
        why = "PyTorch sees none" if torch.version.cuda else "this is PyTorch's build for CPUs"
        raise ValueError(
            f"a CUDA GPU must be at hand for device={name!r}, got none: {why}. Install a driver "
            "and a CUDA build of PyTorch, or use device='auto'."
        )
    if int(number or 0) >= found:
        raise ValueError(
            f"device must be below 'cuda:{found}' on this machine, got device={name!r}. "
            "Name one that is there."
        )
    return torch.device("cuda", int(number or 0))


def devices_of(name: str, processes: int) -> list[torch.device]:
    """A device for each of so many processes: "cuda" and "auto" take all GPUs in turn.

    Raises:
        ValueError: as `device_of`.
    """
    first = device_of(name)
    if first.type == "cpu" or ":" in name:
        return [first] * processes
    found = torch.cuda.device_count()
    return [torch.device("cuda", i % found) for i in range(processes)]


def sent(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy of an array on a device. To a GPU it goes through pinned memory, so that the caller
    does not wait."""
    tensor = torch.tensor(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def stream_of(device: torch.device) -> Any:
    """A new stream of a GPU; None elsewhere."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def on_stream(stream: Any) -> Any:
    """The context in which work is launched on a stream."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def synchronise(device: torch.device) -> None:
    """Waits until a device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_bytes(device: torch.device) -> int:
    """Returns the free memory of a GPU, or half of the memory of a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


@contextmanager
def unpacked_rnns() -> Generator[None]:
    """Silences the warning that weights in one vector are not packed for cuDNN, which packs them
    anew at every call."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="RNN module weights are not part of")
        yield


def give_back(device: torch.device) -> None:
    """Returns the freed memory that PyTorch keeps to the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def kernel_threads(num_threads: int) -> Generator[None]:
    """Sets the number of threads of PyTorch's kernels inside a `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
