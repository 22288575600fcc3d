"""What commands load: one that only asks or explains loads nothing that trains or serves."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "pandas", "sqlalchemy", "alembic", "httpx", "uvicorn", "matplotlib", "sklearn",
         "potluck.config.experiment", "safetensors", "cryptography", "scipy", "ray")  # fmt: skip
PROGRAM = """
import sys
from potluck.cli.main import app
try:
    app(sys.argv[1:], prog_name="potluck")
except SystemExit as left:
    code = left.code
loaded = sorted(name for name in {heavy} if name in sys.modules)
print("code", code, "loaded", *loaded)
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["join", "--help"], 0),
        (["train", "--help"], 0),
        (["serve", "--help"], 0),
        (["--version"], 0),
        (["init"], 0),
        (["enroll"], 1),  # there is no server: all that it loads is loaded
        (["status"], 1),
        (["dashboard"], 1),
        (["devices"], 1),
        (["pause"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_command_that_only_asks_loads_nothing_heavy(tmp_path, words, code):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(heavy=HEAVY), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1].split() == ["code", str(code), "loaded"]


def test_nothing_of_the_server_is_loaded_by_its_package_alone():
    code = "import sys, potluck.server; print('sqlalchemy' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
