"""Every block of README.md and of the pages that it begins is run, from its own text, in order."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
READ = [(ROOT / page).read_text() for page in ("README.md", "docs/experiments.md")]
DEVICES = (ROOT / "docs/real-devices.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ELSEWHERE = ("pip", "make", "git")  # they install, which tests do not
MNIST = ("data get mnist", "experiments/mnist-", "--cells 'mnist-")  # downloads, or hours


class Block(NamedTuple):
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.language}: {self.text.splitlines()[0]}"


PAGES_OF_BLOCKS = [[Block(*match.groups()) for match in FENCE.finditer(page)] for page in READ]
BLOCKS = [block for page in PAGES_OF_BLOCKS for block in page]
SERVED = [Block(*match.groups()) for match in FENCE.finditer(DEVICES)]


def blocks(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


@pytest.fixture(scope="module")
def clones(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A folder for each page, as the root of a clone; commands follow each other in it."""
    folders = [tmp_path_factory.mktemp("clone") for _ in READ]
    for folder in folders:
        (folder / "experiments").symlink_to(ROOT / "experiments")
    return folders


def test_every_block_is_of_a_kind_that_is_run_or_is_printed_output():
    assert {block.language for block in BLOCKS} <= {"python", "bash", "console", "text", "sh"}
    assert blocks("python")
    assert blocks("bash", "console")


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.name)
def test_python(block, tmp_path):
    printed = subprocess.run(
        [sys.executable, "-W", "error", "-c", block.text],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # tests share the cores
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    following = BLOCKS[BLOCKS.index(block) + 1]
    assert following.language == "text", "show what the program prints"
    number = re.compile(r"\d\.\d+")
    assert number.sub("#", printed) == number.sub("#", following.text)
    for got, shown in zip(number.findall(printed), number.findall(following.text), strict=True):
        assert float(got) == pytest.approx(float(shown), abs=0.03)  # machines round differently


@pytest.mark.parametrize(
    ("page", "block"),
    [
        pytest.param(number, block, id=f"{number}: {block.name}")
        for number, page in enumerate(PAGES_OF_BLOCKS)
        for block in page
        if block.language in ("bash", "console")
    ],
)
def test_commands(page, block, clones, monkeypatch):
    monkeypatch.chdir(clones[page])
    ran = 0
    for line in block.text.splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if not words or words[0] in ELSEWHERE or any(part in line for part in MNIST):
            continue
        (script,) = entry_points(group="console_scripts", name=words[0])
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as left:
            script.load()()
        assert left.value.code == 0, line
        ran += 1
    if ran == 0:
        pytest.skip("installs, or needs MNIST")


def test_the_readme_is_short_and_begins_with_a_command():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert any(line.startswith("```bash") for line in lines[:20])


def test_the_program_is_at_most_twelve_lines():
    for block in blocks("python"):
        assert len([line for line in block.text.splitlines() if line.strip()]) <= 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_real_devices_are_served_as_the_page_says(tmp_path):
    """The four blocks of a server and its devices, as one script; the README has some of them."""
    shown = {line for block in blocks("sh") for line in block.text.splitlines()}
    assert shown <= {line for block in SERVED for line in block.text.splitlines()}
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    for name, started in (("python", ""), ("potluck", "-m potluck")):
        (tmp_path / name).write_text(f'#!/bin/sh\nexec {sys.executable} {started} "$@"\n')
        (tmp_path / name).chmod(0o700)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    make, serve, join, take = (block.text for block in SERVED)
    make = make.partition("\n")[2]  # without pip
    serve = serve.replace("&\n", "&\nserver=$!\n")
    join = join.replace("&\n", '&\ndevices+=" $!"\n')
    script = (
        f"{make}{serve}{join}for d in $devices; do wait $d; done\n{take}kill $server; wait $server"
    )
    done = subprocess.run(
        ["bash", "-euc", script.replace("8443", str(port))],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished round 3") == 3
    assert "rounds committed" in done.stdout
    assert "<All keys matched successfully>" in done.stdout
