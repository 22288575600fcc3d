"""Shakespeare by role: the published counts, and each clause of the rule by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from potluck.core import ChecksumError, DataError
from potluck.data import datasets
from potluck.data.federated import Array, Dataset, Examples
from potluck.data.lines import PADDING, START, STEPS
from potluck.data.partitions import by_group, iid
from potluck.data.shakespeare import Variant, read_roles
from rows_of_bytes import decode

HAMLET = "THE TRAGEDY OF HAMLET, PRINCE OF DENMARK / Ham"
ERRORS = "THE COMEDY OF ERRORS / {}"


def characters(examples: Examples) -> int:
    return int((examples.targets != PADDING).sum())


def lines_of(data: Dataset, role: str) -> list[bytes]:
    """All lines of a role, those for the test last."""
    assert data.groups is not None
    assert data.test_groups is not None
    train, test = (
        decode(examples.targets[groups == role])
        for examples, groups in ((data.train, data.groups), (data.test, data.test_groups))
    )
    return (train + test).splitlines()


# The published file


def test_the_clean_variant_has_the_counts_of_the_rule(shakespeare: Dataset) -> None:
    assert shakespeare.groups is not None
    assert len(np.unique(shakespeare.groups)) == 1_144
    assert np.array_equal(np.unique(shakespeare.groups), np.unique(shakespeare.test_groups))
    assert characters(shakespeare.train) == 3_566_303
    assert characters(shakespeare.test) == 870_494
    assert shakespeare.num_classes == 258
    assert shakespeare.train.inputs.shape == shakespeare.train.targets.shape == (85_128, STEPS)
    assert shakespeare.train.inputs.dtype == shakespeare.train.targets.dtype == np.int16
    assert list(shakespeare.checksums) == ["shakespeare/t8.shakespeare.txt"]


def test_the_papers_variant_has_the_counts_of_the_rule(
    published: Callable[[str], list[Path]],
) -> None:
    published("shakespeare")
    data = datasets.shakespeare(variant="paper")
    assert data.groups is not None
    assert len(np.unique(data.groups)) == 1_146
    assert characters(data.train) == 3_570_710
    assert characters(data.test) == 871_694


@pytest.mark.parametrize(
    ("role", "clean", "paper"),
    [
        (HAMLET, 1_559, 1_559),
        ("THE TRAGEDY OF ROMEO AND JULIET / Rom", 629, 629),
        ("THE TRAGEDY OF MACBETH / LADY MACBETH", 262, 262),
        ("THE TRAGEDY OF KING LEAR / Fool", 216, 216),
        ("ALLS WELL THAT ENDS WELL / COUNTESS", 275, 275),
        (ERRORS.format("DROMIO OF SYRACUSE"), 254, 259),
        (ERRORS.format("ANTIPHOLUS OF SYRACUSE"), 271, 294),
        (ERRORS.format("LUCE"), 8, 9),
        (ERRORS.format("WITH PERMISSION"), 0, 21),
    ],
)
def test_roles_have_their_lines(
    role: str, clean: int, paper: int, published: Callable[[str], list[Path]]
) -> None:
    (path,) = published("shakespeare")
    assert len(read_roles(path, "clean").get(role, [])) == clean
    assert len(read_roles(path, "paper").get(role, [])) == paper


def test_hamlet_speaks_first_and_last(shakespeare: Dataset) -> None:
    lines = lines_of(shakespeare, HAMLET)
    assert lines[0] == b"[aside] A little more than kin, and less than kind!"
    assert lines[-1].startswith(b"Which have solicited- the rest is silence.")
    assert (np.asarray(shakespeare.test_groups) == HAMLET).sum() == 1_559 // 5


def test_rows_are_in_the_order_of_first_appearance(shakespeare: Dataset) -> None:
    assert shakespeare.groups is not None
    changes = np.flatnonzero(shakespeare.groups[1:] != shakespeare.groups[:-1])
    assert len(changes) == 1_143
    names = shakespeare.groups[[0, *(changes[:2] + 1)]].tolist()
    assert names == [f"ALLS WELL THAT ENDS WELL / {r}" for r in ("COUNTESS", "BERTRAM", "LAFEU")]


def test_one_line_of_81_bytes_fills_two_rows(shakespeare: Dataset) -> None:
    assert shakespeare.test_groups is not None
    assert (shakespeare.train.inputs[:, 0] == START).all()
    (row,) = np.flatnonzero(shakespeare.test.inputs[:, 0] != START)
    assert set(shakespeare.test_groups[row - 1 : row + 1]) == {"AS YOU LIKE IT / ORLANDO"}
    assert decode(shakespeare.test.targets[row - 1 : row + 1]) == (
        b"whither wilt?' ROSALIND. Nay, you might keep that check for it, till you met your\n"
    )


def test_natural_and_iid_clients_have_the_same_lines(shakespeare: Dataset) -> None:
    natural, even = by_group(shakespeare), iid(shakespeare, 1_144, seed=3)

    def rows(array: Array) -> Counter[bytes]:
        return Counter(row.tobytes() for row in array)

    for ours, theirs in ((natural.train, even.train), (natural.test, even.test)):
        joined = [np.concatenate(examples, axis=1) for examples in (ours, theirs)]
        assert rows(joined[0]) == rows(joined[1])
    assert set(even.sizes) == {74, 75}


def test_every_role_keeps_its_own_test_lines(shakespeare: Dataset) -> None:
    data = by_group(shakespeare)
    assert data.test_offsets is not None
    assert np.diff(data.test_offsets).min() >= 1
    hamlet = data.clients.index(HAMLET)
    own = decode(data.client(hamlet).targets) + decode(data.client_test(hamlet).targets)
    assert own.splitlines() == lines_of(shakespeare, HAMLET)


# The rule, clause by clause

TEXT = """\
1609

THE SONNETS

by William Shakespeare

  NOBODY. This is a poem,
    where no one speaks,
    whatever it looks like.


THE TRAGEDY OF TWO COOKS

by William Shakespeare


    indented, but nobody has spoken
  COOK. A pinch of salt.\x20\x20
    Stir.
      And stir again.

    After an empty line.
   three blanks are too few
  Enter the SOUP, without a full stop
  Second Cook. Too much!
  COOK2. Digits are no letters.
    So the second cook goes on,
<<THIS ELECTRONIC VERSION IS
  NOTICE. WITH ITS OWN
    RULES>>
    notice or not.
  COOK. Almost the last line.
   THREE. blanks open nothing,
    so this is the cook's,
    and so is this.
COOK. Nor does the margin.
  COOK.And a blank must follow.
  WAITER. Only
    two lines.

1594

THE COMEDY OF ERRORS

by William Shakespeare

ACT I. SCENE 1
A kitchen
ANN. First.
  Second keeps its blanks.
Third, a direction.

ACT II. SCENE 1
A pantry
Enter BEN
BEN. One, two.
Two.
ANN. Fourth.

<Exit
BEN. Three.
"""


def roles_in(text: str, folder: Path, variant: Variant) -> dict[str, list[str]]:
    path = folder / "text.txt"
    path.write_text(text, encoding="latin-1")
    return read_roles(path, variant)


def test_the_clean_rule_by_hand(tmp_path: Path) -> None:
    assert roles_in(TEXT, tmp_path, "clean") == {
        "THE TRAGEDY OF TWO COOKS / COOK": [
            "A pinch of salt.",
            "Stir.",
            "  And stir again.",
            "After an empty line.",
            "Almost the last line.",
            "so this is the cook's,",
            "and so is this.",
        ],
        "THE TRAGEDY OF TWO COOKS / Second Cook": [
            "Too much!",
            "So the second cook goes on,",
            "notice or not.",
        ],
        "THE COMEDY OF ERRORS / ANN": [
            "First.",
            "  Second keeps its blanks.",
            "Third, a direction.",
            "Fourth.",
        ],
        "THE COMEDY OF ERRORS / BEN": ["One, two.", "Two.", "Three."],
    }


def test_the_papers_rule_differs_in_notices_and_empty_lines(tmp_path: Path) -> None:
    clean, paper = (roles_in(TEXT, tmp_path, variant) for variant in ("clean", "paper"))
    # The notice takes over: its RULES and the line after it are lines of NOTICE.
    assert paper.pop("THE TRAGEDY OF TWO COOKS / NOTICE") == [
        "WITH ITS OWN",
        "RULES>>",
        "notice or not.",
    ]
    assert clean.pop("THE TRAGEDY OF TWO COOKS / Second Cook")[:2] == [
        "Too much!",
        "So the second cook goes on,",
    ]  # two lines are left, which are too few
    assert paper.pop("THE COMEDY OF ERRORS / ANN") == [
        *clean.pop("THE COMEDY OF ERRORS / ANN"),
        "<Exit",
    ]
    assert paper == clean


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold plays, each after a line 'by William Shakespeare'"),
        ("  COOK. One.\n    Two.\n    Three.\n", "got no role with 3 lines"),
        ("A PLAY\nby William Shakespeare\n  COOK. One.\n    Two.\n", "got no role with 3 lines"),
        ("Caf\xe9", "must be ASCII text, got byte=233 at 3"),
    ],
)
def test_another_text_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        roles_in(text, tmp_path, "clean")


def test_another_file_is_a_checksum_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "shakespeare").mkdir()
    (tmp_path / "shakespeare" / "t8.shakespeare.txt").write_text(TEXT)
    monkeypatch.setenv("POTLUCK_DATA", str(tmp_path))
    with pytest.raises(ChecksumError, match=r"md5=d2028225.*got md5="):
        datasets.shakespeare()


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="must be 'clean' or 'paper', got variant='dirty'"):
        datasets.shakespeare(variant="dirty")  # type: ignore[arg-type]
