"""Imports point down: the table of the packages, read from the source."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "potluck"

MAY_IMPORT = {
    "memory": set(),
    "core": set(),
    "algorithms": {"core"},
    "privacy": {"core"},
    "tasks": {"core"},
    "protocol": {"core"},
    "formats": set(),
    "experiment": {"core", "explain"},
    "explain": {"core"},
    "plan": {"tasks", "algorithms", "core", "experiment"},
    "simulation": {
        "formats",
        "memory",
        "tasks",
        "algorithms",
        "privacy",
        "core",
        "experiment",
        "plan",
    },
    "reproduction": {"simulation", "tasks", "algorithms", "core", "experiment"},
    "server": {
        "memory",
        "tasks",
        "protocol",
        "algorithms",
        "privacy",
        "core",
        "experiment",
        "plan",
    },
    "device": {"tasks", "protocol", "algorithms", "privacy", "core", "experiment", "plan"},
}
TOP = {  # may import everything
    "__init__",
    "__main__",
    "apart",
    "cli",
    "cli_data",
    "cli_reproduce",
    "command",
    "progress",
    "serving",
    "joining",
    "loopback",
    "nursery",
    "output",
    "demo_serve",
    "demo_story",
    "template",
    "terminal",
    "upkeep",
}


def imports_of(path: Path) -> set[str]:
    """The packages of ours that a file imports, in whatever place."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names = [node.module or ""]
            if node.module == "potluck":
                names = [f"potluck.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("potluck.")}
    return found


@pytest.mark.parametrize(
    "path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE))
)
def test_imports_point_down(path):
    place = path.relative_to(SOURCE)
    assert len(place.parts) <= 2 or "migrations" in place.parts, "two levels of folders at most"
    home = place.parts[0].removesuffix(".py")
    if home in TOP:
        return
    assert imports_of(path) <= MAY_IMPORT[home] | {home}


def test_every_package_is_in_the_table():
    packages = {p.stem for p in SOURCE.iterdir() if p.name not in ("py.typed", "__pycache__")}
    assert packages <= set(MAY_IMPORT) | TOP


UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "yaml"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load"}


@pytest.mark.parametrize(
    "path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE))
)
def test_nothing_unpickles_or_evaluates(path):
    """What comes from the network or a disk is never code.

    The one name that may come from pickle is its error, which multiprocessing raises.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & UNSAFE_MODULES
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            module = (node.module or "").split(".")[0]
            assert module not in UNSAFE_MODULES or names == {"PicklingError"}
            assert not {f"{module}.{name}" for name in names} & UNSAFE_CALLS
        elif isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in UNSAFE_CALLS
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert ast.unparse(node.value) == "False"
