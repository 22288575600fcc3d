"""The house: who may import whom, and how large its rooms are, read from the source."""

import ast
import graphlib
from collections import Counter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "potluck"
FILES = sorted(SOURCE.rglob("*.py"))

# A room is a folder. It may import itself, and what stands here: the house has no way up.
BELOW = {
    "core": "",
    "algorithms": "core",
    "protocol": "core",
    "data.tables": "core",
    "data": "core data.tables",
    "models": "core data data.tables",
    "engine.native": "models engine engine.module",
    "engine.module": "core data",
    "engine": "core data data.tables models engine.module engine.native",
    "engine.vmap": "core data models engine engine.module engine.native",
    "engine.gpu": "core data models engine engine.module engine.vmap",
    "config": "core algorithms data models engine",
    "simulation.virtual_time": "core config",
    "simulation.executors": "core algorithms data models engine engine.module engine.vmap"
    " engine.native engine.gpu",
    "simulation": "core algorithms config engine engine.module simulation.executors"
    " simulation.virtual_time",
    "simulation.runs": "core algorithms data engine engine.native config simulation"
    " simulation.executors simulation.virtual_time",
    "reproduction": "core algorithms data models engine config simulation simulation.runs"
    " simulation.executors",
    "device": "core algorithms protocol data data.tables models engine config",
    "server.storage": "core protocol config",
    "server.rounds": "core algorithms protocol config server.storage",
    "server.http": "core protocol config server server.rounds server.storage",
    "server.admin": "core protocol server server.http server.rounds server.storage",
    "server.dashboard": "core server.http server.rounds server.storage",
    "server": "core algorithms protocol config engine server.storage server.rounds"
    " server.http server.admin server.dashboard",
    "demo": "core data config simulation.runs device server server.admin server.http"
    " server.storage",
    "cli": "core data data.tables models engine config simulation simulation.runs"
    " reproduction device server server.admin server.http server.storage demo",
    "": "cli",
}


MIGRATIONS = {"server.storage.migrations", "server.storage.migrations.versions"}


def is_package(path: Path) -> bool:
    return path.name == "__init__.py"


def room_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).parts[:-1]
    return ".".join(parts[:2])


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """The modules of ours that a file imports, in whatever place."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            home = (node.module or "").removeprefix("potluck").removeprefix(".")
            if (node.module or "").split(".")[0] != "potluck":
                continue
            for alias in node.names:
                inner = f"{home}.{alias.name}".removeprefix(".")
                found.add(inner if inner in MODULES else home)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("potluck."):
                    found.add(alias.name.removeprefix("potluck."))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path) or "potluck")
def test_imports_point_down(path):
    home = room_of(path)
    if home == "" and is_package(path):
        return  # it names what others export, and imports it when it is asked for
    allowed = {home, *BELOW[home].split()}
    if is_package(path):  # it names what its folders export
        allowed |= {room for room in BELOW if room.startswith(f"{home}.")}
    for name in imports_of(path):
        assert room_of(MODULES[name]) in allowed, f"{module_of(path)} imports {name}"


def test_no_file_imports_itself_by_way_of_others():
    graph = {name: imports_of(path) for name, path in MODULES.items() if not is_package(path)}
    graphlib.TopologicalSorter(
        {name: {n for n in found if n in graph} - {name} for name, found in graph.items()}
    ).prepare()


def test_every_folder_is_in_the_table():
    assert {room_of(path) for path in FILES} - MIGRATIONS == set(BELOW)


def test_rooms_are_small():
    """At most 15 children of the root, 18 of any other folder, and nothing loose at the root."""
    folders = {path.parent for path in FILES}
    for folder in folders:
        inside = [p for p in folder.iterdir() if p.is_file() or any(p.rglob("*.py"))]
        inside = [p for p in inside if p.name not in ("__pycache__", "py.typed")]
        assert len(inside) <= (15 if folder == SOURCE else 18), folder.relative_to(SOURCE)
    assert {path.name for path in SOURCE.glob("*.py")} == {"__init__.py", "__main__.py"}


LONG = {  # functions of more than 60 lines, without their docstrings
    "cli.main.train": "its options are its signature",
    "cli.join.join": "its options are its signature",
    "cli.serve.serve": "its options are its signature",
    "cli.reproduce.reproduce": "its options are its signature",
    "device.enrol.join": "its arguments are what an owner may decide",
    "server.storage.migrations.versions.0001_first.upgrade": "the tables of a database, one by one",
    "simulation.rounds._rounds": "the loop of federated averaging, from the top to the bottom",
}


def test_files_and_functions_are_short():
    """At most 400 lines a file and 60 a function, but for the reasons above."""
    long: set[str] = set()
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 400, module_of(path)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                begin = node.body[bool(ast.get_docstring(node)) :]
                doc = begin[0].lineno - node.body[0].lineno if begin else 0
                if (node.end_lineno or 0) - node.lineno + 1 - doc > 60:
                    long.add(f"{module_of(path)}.{node.name}")
    assert long == set(LONG)


def test_no_two_modules_have_one_name():
    """But the commands: `cli/data.py` is the command of that name."""
    names = [path.stem for path in FILES if not is_package(path) and room_of(path) != "cli"]
    assert [name for name, number in Counter(names).items() if number > 1] == []


def test_no_two_classes_have_one_name():
    names = [
        node.name
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert [name for name, number in Counter(names).items() if number > 1] == []


UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "yaml"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path) or "potluck")
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
