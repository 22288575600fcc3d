"""Fixtures for tests that need published files: they skip where POTLUCK_DATA does not hold them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from potluck.tasks import datasets
from potluck.tasks.data import Dataset
from potluck.tasks.files import FILES


@pytest.fixture(scope="session")
def published() -> Callable[[str], list[Path]]:
    """Give the files of one data set ("mnist"), or skip the test."""

    def paths(name: str) -> list[Path]:
        folder = Path(os.environ.get("POTLUCK_DATA", ""))
        found = [folder / path for path in FILES if path.startswith(f"{name}/")]
        if "POTLUCK_DATA" not in os.environ or not all(path.is_file() for path in found):
            pytest.skip(f"{name} is not in POTLUCK_DATA")
        return found

    return paths


@pytest.fixture(scope="session")
def mnist(published: Callable[[str], list[Path]]) -> Dataset:
    """MNIST with its writers."""
    published("mnist")
    published("qmnist")
    return datasets.mnist(writers=True)


@pytest.fixture(scope="session")
def wisdm(published: Callable[[str], list[Path]]) -> Dataset:
    published("wisdm")
    return datasets.wisdm()


@pytest.fixture(scope="session")
def shakespeare(published: Callable[[str], list[Path]]) -> Dataset:
    """The clean variant."""
    published("shakespeare")
    return datasets.shakespeare()
