"""Text files in the encodings that editors write: read as what they are, or refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.config.experiment import load_experiment
from potluck.core import ConfigError, ProtocolError
from potluck.core.text_files import encoding_of, read_text
from potluck.protocol.invitation import Invitation, encode_invitation, parse_invitation
from potluck.simulation.virtual_time.trace import COLUMNS, read_trace

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
EXPERIMENT = """name = "e"
[task]
data = "digits"
model = "logistic"
[partition]
kind = "iid"
clients = 10
[algorithm]
client_lr = 0.1  # zürich
[run]
rounds = 1
"""
TRACE = ",".join(COLUMNS) + "\nzürich,850,1e6,1e6,0.01,0,0,24\n"


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\r\ufeff\0"), max_size=30))
def test_every_text_is_read_as_it_was_written(tmp_path_factory, text: str) -> None:
    path = tmp_path_factory.mktemp("text") / "t.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes(text.encode(encoding))
        assert read_text(path) == text


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_experiments_and_traces_are_read(tmp_path: Path, encoding: str, end: str) -> None:
    (tmp_path / "e.toml").write_bytes(EXPERIMENT.replace("\n", end).encode(encoding))
    assert load_experiment(tmp_path / "e.toml").partition.kind == "iid"
    (tmp_path / "t.csv").write_bytes(TRACE.replace("\n", end).encode(encoding))
    assert read_trace(tmp_path / "t.csv", 1).examples_per_second.tolist() == [850.0]


REFUSED = [
    ("x = 1\ny = 'zürich'\n".encode("latin-1"), r"t\.toml must be text in UTF-8, got byte=0xfc in"),
    ("x = 1\ny = '€'\n".encode("cp1252"), r"byte=0x80 in line 2\. It may be Windows-1252"),
    (b"PK\x03\x04rest", "got an Excel workbook or another zip file"),
    (b"\x1f\x8b\x08", "got a gzip file. Unpack it"),
    (b"a\0\0\0b", "got a binary one"),
    ("abc".encode("utf-16")[:-1], "UTF-16, got half a character in line 1"),
    ("\nü".encode()[:-1], "UTF-8, got byte=0xc3 in line 2"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED)
def test_what_is_no_text_is_refused_with_its_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "t.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_experiment(tmp_path / "t.toml")
    with pytest.raises(ConfigError, match=message):
        read_trace(tmp_path / "t.toml", 1)


def test_the_line_is_right_far_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"0123456789\n" * 200_000 + b"\xfc")
    with pytest.raises(ValueError, match="in line 200001"):
        encoding_of(tmp_path / "t.txt")


def test_an_invitation_may_come_out_of_a_file() -> None:
    invitation = Invitation(token="A" * 43, run="digits", server_key="ab" * 32, certificate=None)
    word = encode_invitation(invitation)
    for text in (f"\ufeff{word}\r\n", f'"{word}"', f"\udcef\udcbb\udcbf{word}", f" '{word}'\n"):
        assert parse_invitation(text) == invitation
    with pytest.raises(ProtocolError, match="Copy all of one line"):
        parse_invitation(f"{word}\n{word}")
