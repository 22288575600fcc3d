"""Makes executors by name; each is imported on first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeAlias

from potluck.core.validate import as_count
from potluck.engine import Task, spec_of
from potluck.engine.precision import Precision
from potluck.simulation.executors.executor import Executor

if TYPE_CHECKING:
    from potluck.simulation.executors.ray_cluster import Local

ExecutorName: TypeAlias = Literal["auto", "loop", "workers", "vmap", "ray"]


def make_executor(
    name: str,
    task: Task,
    num_workers: int | None = None,
    *,
    address: str | None = None,
    device: str | None = None,
    precision: Precision = "float32",
    local: Local = "auto",
    gpus: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Executor:
    """Makes an executor by its name; the caller closes it.

    Args:
        num_workers: for "workers" and "ray"; as many as there are cores if None. For "vmap" more
            than one are processes among which its chunks are divided, or its cohort if they share
            the GPUs that `device` names.
        address: for "ray": see `Cluster`.
        device: for "vmap" and "auto": "cpu", "cuda", "cuda:1", or "auto", a GPU if there is one.
            For "vmap" None is "cpu", for "auto" it is "auto". For "ray": "cpu" or "cuda".
        precision: of local training: "float32"; "bf16" with "loop", "workers" and "ray"; and
            with a GPU ("vmap", "ray") either, or "tf32".
        local, gpus, progress: for "ray": see `Cluster`.
    """
    if num_workers is not None:
        num_workers = as_count("num_workers", num_workers)
    if name not in ("vmap", "auto") and device not in (None, "cpu"):
        if name != "ray":
            raise ValueError(
                f"device must be left out with executor={name!r}, got device={device!r}. "
                "Use executor='vmap' or 'auto'."
            )
        if device != "cuda":
            raise ValueError(
                f"device must be 'cpu' or 'cuda' with executor='ray', got device={device!r}. Ray "
                "says which GPUs a worker has."
            )
    if precision != "float32" and name == "auto":
        raise ValueError(
            f"precision must be left out with executor='auto', got precision={precision!r}. "
            "Name the executor."
        )
    if name == "loop":
        from potluck.simulation.executors.loop import Loop

        return Loop(task, precision=precision)
    if name == "workers":
        from potluck.simulation.executors.workers import Workers

        return Workers(task, num_workers, precision=precision)
    if name == "vmap":
        return _vmap(task, num_workers, device or "cpu", precision)
    if name == "ray":
        from potluck.simulation.executors.ray_cluster import Cluster

        return Cluster(
            task,
            num_workers,
            address=address,
            precision=precision,
            local=local,
            device=None if device == "cpu" else device,
            gpus=gpus,
            progress=progress,
        )
    if name == "auto":
        from potluck.simulation.executors.auto import Auto

        return Auto(task, num_workers, device=device or "auto")
    raise ValueError(
        f"executor must be 'auto', 'loop', 'workers', 'vmap' or 'ray', got executor={name!r}."
    )


def _vmap(task: Task, processes: int | None, device: str, precision: Precision) -> Executor:
    from potluck.engine.devices import device_of, devices_of
    from potluck.simulation.executors.vmap_executor import Vmap, chunk_for

    where = device_of(device)
    if where.type == "cpu":
        if precision != "float32":
            raise ValueError(
                f"precision must be 'float32' with executor='vmap' and no GPU, got "
                f"precision={precision!r} with device={device!r}. Leave it out, name a GPU, or "
                "use executor='workers'."
            )
        if processes is None or processes == 1:
            return Vmap(task)
        from potluck.simulation.executors.workers import Workers

        return Workers(task, processes, chunk=chunk_for(spec_of(task.module()).num_bytes))
    if processes is None or processes == 1:
        return Vmap(task, device=where, precision=precision)
    from potluck.simulation.executors.gpu_workers import DeviceWorkers

    return DeviceWorkers(task, devices_of(device, processes), precision)
