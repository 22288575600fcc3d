"""Every block of README.md that can be run here is run, from its own text, in its order."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ELSEWHERE = ("pip", "make", "git")  # they install, which tests do not
MNIST = ("data get mnist", "experiments/mnist-")  # downloads, or hours


class Block(NamedTuple):
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.language}: {self.text.splitlines()[0]}"


BLOCKS = [Block(*match.groups()) for match in FENCE.finditer(README)]


def blocks(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def run(command: list[str], folder: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # tests share the cores
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that stands for the root of a clone; commands follow each other in it."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "experiments").symlink_to(ROOT / "experiments")
    return folder


def test_every_block_is_of_a_kind_that_is_run_or_is_printed_output():
    assert {block.language for block in BLOCKS} <= {"python", "bash", "console", "text"}
    assert blocks("python")
    assert blocks("bash", "console")


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.name)
def test_python(block, tmp_path):
    printed = run([sys.executable, "-W", "error", "-c", block.text], tmp_path)
    following = BLOCKS[BLOCKS.index(block) + 1]
    assert following.language == "text", "show what the program prints"
    number = re.compile(r"\d\.\d+")
    assert number.sub("#", printed) == number.sub("#", following.text)
    for got, shown in zip(number.findall(printed), number.findall(following.text), strict=True):
        assert float(got) == pytest.approx(float(shown), abs=0.03)  # machines round differently


@pytest.mark.parametrize("block", blocks("bash", "console"), ids=lambda block: block.name)
def test_commands(block, clone):
    ran = 0
    for line in block.text.splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if not words or words[0] in ELSEWHERE or any(part in line for part in MNIST):
            continue
        assert words[0] == "potluck", f"this test does not know {words[0]}"
        run([*entry_point(), *words[1:]], clone)
        ran += 1
    if ran == 0:
        pytest.skip("installs, or needs MNIST")


def test_the_program_is_at_most_twelve_lines():
    for block in blocks("python"):
        assert len([line for line in block.text.splitlines() if line.strip()]) <= 12


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_links_lead_somewhere(target):
    if target == "docs/img/demo.png" and not (ROOT / "docs" / "img").exists():
        pytest.skip("made by `make demo`")
    assert (ROOT / target).exists()


def entry_point() -> list[str]:
    """The `potluck` of this interpreter."""
    script = Path(sys.executable).with_name("potluck")
    return [str(script)] if script.exists() else [sys.executable, "-m", "potluck"]
