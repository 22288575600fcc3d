"""What is public: every name in every `__all__`, and what `import potluck` costs."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from importlib import import_module

import pytest

import potluck

PACKAGES = ["potluck"] + [
    f"potluck.{module.name}"
    for module in pkgutil.iter_modules(potluck.__path__)
    if module.ispkg and module.name not in ("cli", "config", "demo")  # which export no names
]


def order(name: str) -> tuple[int, str]:
    """Constants, then classes, then the rest, each in the order of the alphabet."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_the_packages_are_found():
    assert {"potluck.core", "potluck.algorithms", "potluck.engine"} < set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_sorted_and_resolves(package):
    module = import_module(package)
    assert module.__all__ == sorted(set(module.__all__), key=order)
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_the_names_of_potluck_are_those_of_its_packages():
    homes = [import_module(package) for package in PACKAGES[1:]]
    for name in potluck.__all__:
        found = [home for home in homes if name in home.__all__]
        assert len(found) == 1, name
        assert getattr(potluck, name) is getattr(found[0], name)
    assert set(dir(potluck)) == set(potluck.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'FedBanana'"):
        potluck.FedBanana  # noqa: B018


def test_import_potluck_takes_at_most_half_a_second_and_leaves_torch_out():
    code = (
        "import time; start = time.perf_counter(); import potluck; import sys; "
        "print(time.perf_counter() - start, 'torch' in sys.modules)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    seconds, torch = zip(*(run.stdout.split() for run in runs), strict=True)
    assert min(map(float, seconds)) <= 0.5
    assert set(torch) == {"False"}
