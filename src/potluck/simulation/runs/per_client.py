"""The scores of a model for each client: a line a client, kept in the run's directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from potluck.core import higher_is_better, is_result
from potluck.core.atomic_files import write_whole
from potluck.core.plain_json import to_json
from potluck.data import FederatedData
from potluck.engine import FederatedMetric
from potluck.simulation.runs.directory import PER_CLIENT, disk_errors


def by_client(data: FederatedData, metrics: Mapping[str, FederatedMetric]) -> list[dict[str, Any]]:
    """A federated evaluation by client: its name, its numbers of training and judged examples, and
    each metric."""
    return [
        {
            "client": name,
            "train_examples": int(data.sizes[k]),
            "judged_examples": data.client_test(k).num_examples,
            **{metric: float(found.per_client[k]) for metric, found in metrics.items()},
        }
        for k, name in enumerate(data.clients)
    ]


def worst(rows: Sequence[Mapping[str, Any]], metric: str, number: int) -> list[Mapping[str, Any]]:
    """The rows with the worst scores of a metric, the worst first."""
    sign = 1.0 if higher_is_better(metric) else -1.0
    judged = [row for row in rows if is_result(row[metric])]
    return sorted(judged, key=lambda row: sign * row[metric])[:number]


def write_per_client(directory: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes the rows into a run directory and returns the path of the file."""
    path = directory / PER_CLIENT
    with disk_errors(directory):
        write_whole(path, "".join(to_json(row) + "\n" for row in rows).encode())
    return path
