"""What the data sets are, and what becomes of files that are not what they should be."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.core import ChecksumError, DataError
from potluck.data import datasets
from potluck.data.datasets import (
    WISDM_CLASSES,
    num_test,
    read_digits,
    read_idx,
    read_wisdm,
    read_writers,
)
from potluck.data.federated import Dataset


def idx(path: Path, array: np.ndarray, *, code: int = 0x08) -> Path:
    """Write an array of bytes (0x08) or of 32-bit integers (0x0C)."""
    header = struct.pack(">HBB", 0, code, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    body = array.astype(">i4" if code == 0x0C else np.uint8).tobytes()
    path.write_bytes(gzip.compress(header + body))
    return path


# MNIST


def test_mnist_has_the_published_shape_and_pixels(mnist: Dataset) -> None:
    assert mnist.train.inputs.shape == (60_000, 1, 28, 28)
    assert mnist.test.inputs.shape == (10_000, 1, 28, 28)
    assert mnist.train.inputs.dtype == np.float32
    assert mnist.train.targets.dtype == np.int64
    assert mnist.train.inputs.min() == 0.0
    assert mnist.train.inputs.max() == 1.0
    assert mnist.train.inputs.mean(dtype=np.float64) == pytest.approx(0.1306605, abs=1e-6)
    assert mnist.train.targets[:5].tolist() == [5, 0, 4, 1, 9]
    assert np.bincount(mnist.train.targets).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    assert mnist.num_classes == 10
    assert len(mnist.checksums) == 6


def test_mnist_has_539_training_writers_and_297_others_in_the_test(mnist: Dataset) -> None:
    assert mnist.groups is not None
    assert mnist.test_groups is not None
    writers, images = np.unique(mnist.groups, return_counts=True)
    assert len(writers) == 539
    assert (images.min(), np.median(images), images.max()) == (19, 116, 131)
    assert len(mnist.test_groups) == 10_000
    assert len(np.unique(mnist.test_groups)) == 297
    assert not np.isin(mnist.test_groups, writers).any()


def test_plain_mnist_needs_no_qmnist(
    published: Callable[[str], list[Path]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mnist").symlink_to(published("mnist")[0].parent)
    monkeypatch.setenv("POTLUCK_DATA", str(tmp_path))
    data = datasets.mnist()
    assert data.groups is None
    assert data.test_groups is None
    assert len(data.checksums) == 4


def test_a_truncated_mnist_file_is_a_checksum_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = idx(tmp_path / "train-images-idx3-ubyte.gz", np.zeros((2, 28, 28)))
    (tmp_path / "mnist").mkdir()
    path.rename(tmp_path / "mnist" / path.name)
    monkeypatch.setenv("POTLUCK_DATA", str(tmp_path))
    with pytest.raises(ChecksumError, match=r"train-images.*md5=f68b3c2d.*got md5="):
        datasets.mnist()


# idx files


def test_idx_files_of_bytes_and_of_integers_are_read(tmp_path: Path) -> None:
    small = np.arange(24).reshape(2, 3, 4)
    large = np.array([[-1, 2**31 - 1], [0, 70_000]])
    assert read_idx(idx(tmp_path / "a.gz", small), num_axes=3).tolist() == small.tolist()
    path = idx(tmp_path / "b.gz", large, code=0x0C)
    assert read_idx(path, num_axes=2).tolist() == large.tolist()


HEADER = struct.pack(">HBBI", 0, 8, 1, 5)
packed = partial(gzip.compress, mtime=0)  # without the time, which tests would be named by


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip at all", "must be a whole gzip file, got error="),
        (packed(HEADER + b"12345")[:-9], "must be a whole gzip file, got error="),
        (b"", "a header of 8 bytes, got bytes=0"),
        (packed(HEADER[:5]), "a header of 8 bytes, got bytes=5"),
        (packed(b"\0\0\x08\x03" + HEADER[4:]), "0000xx01 .* got magic=00000803"),
        (packed(b"\0\0\x0d\x01" + HEADER[4:]), "got magic=00000d01"),
        (packed(b"\1\0\x08\x01" + HEADER[4:]), "got magic=01000801"),
        (packed(HEADER + b"1234"), r"must hold 5 bytes .*\(5,\), got bytes=4"),
        (packed(HEADER + b"123456"), r"must hold 5 bytes .*\(5,\), got bytes=6"),
    ],
)
def test_a_malformed_idx_file_is_named_with_what_is_wrong(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "labels.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path, num_axes=1)
    assert str(path) in str(caught.value)
    assert "Remove it" in str(caught.value)


def test_a_damaged_gzip_stream_is_a_data_error(tmp_path: Path) -> None:
    path = idx(tmp_path / "images.gz", np.arange(200) % 251)
    damaged = bytearray(path.read_bytes())
    damaged[40] ^= 0xFF
    path.write_bytes(bytes(damaged))
    with pytest.raises(DataError, match=r"images\.gz"):
        read_idx(path, num_axes=1)


def test_pixels_are_scaled_and_labels_checked(tmp_path: Path) -> None:
    images = idx(tmp_path / "images.gz", np.full((3, 2, 2), 51))
    labels = idx(tmp_path / "labels.gz", np.array([0, 9, 4]))
    inputs, targets = read_digits(images, labels)
    assert inputs.shape == (3, 1, 2, 2)
    assert inputs[0, 0, 0, 0] == np.float32(0.2)
    assert targets.tolist() == [0, 9, 4]
    idx(labels, np.array([0, 9, 10]))
    with pytest.raises(DataError, match=r"from 0 to 9, got label=10 of example 2 in .*labels\.gz"):
        read_digits(images, labels)
    idx(labels, np.array([0, 9]))
    with pytest.raises(DataError, match=r"each of the 3 images .* got labels=2"):
        read_digits(images, labels)


def test_writers_are_column_2_of_the_rows_of_mnist(tmp_path: Path) -> None:
    rows = np.arange(24).reshape(3, 8)
    path = idx(tmp_path / "writers.gz", rows, code=0x0C)
    assert read_writers(path, np.array([0, 8])).tolist() == [2, 10]
    with pytest.raises(DataError, match=r"got class=8 in row 1, where MNIST has 7"):
        read_writers(path, np.array([0, 7]))
    with pytest.raises(DataError, match=r"at least 4 rows of 8 numbers, got shape=\(3, 8\)"):
        read_writers(path, np.array([0, 8, 16, 24]))


# digits


def test_digits_are_split_by_class_the_same_way_every_time() -> None:
    data = datasets.digits()
    assert data.train.inputs.shape == (1442, 1, 8, 8)
    assert data.test.inputs.shape == (355, 1, 8, 8)
    assert data.train.inputs.dtype == np.float32
    assert (data.train.inputs.min(), data.train.inputs.max()) == (0.0, 1.0)
    train, test = np.bincount(data.train.targets), np.bincount(data.test.targets)
    assert (test == (train + test) // 5).all()
    again = datasets.digits()
    assert (again.train.inputs == data.train.inputs).all()
    assert (again.test.targets == data.test.targets).all()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_digits_refuse_a_fraction_that_leaves_nothing(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"got test_fraction={fraction}"):
        datasets.digits(test_fraction=fraction)


# WISDM


def test_wisdm_has_5418_windows_of_36_users(wisdm: Dataset) -> None:
    assert wisdm.train.num_examples + wisdm.test.num_examples == 5_418
    assert wisdm.train.inputs.shape == (4_399, 43)
    assert wisdm.train.inputs.dtype == np.float32
    assert wisdm.groups is not None
    assert wisdm.test_groups is not None
    assert np.unique(wisdm.groups).tolist() == list(range(1, 37))
    assert np.unique(wisdm.test_groups).tolist() == list(range(1, 37))
    both = np.concatenate([wisdm.train.targets, wisdm.test.targets])
    assert dict(zip(WISDM_CLASSES, np.bincount(both).tolist(), strict=True)) == {
        "Downstairs": 528,
        "Jogging": 1625,
        "Sitting": 306,
        "Standing": 246,
        "Upstairs": 632,
        "Walking": 2081,
    }


def test_wisdm_keeps_the_last_fifth_of_each_users_activity_for_the_test(wisdm: Dataset) -> None:
    assert wisdm.groups is not None
    assert wisdm.test_groups is not None
    train = np.bincount(wisdm.groups * 6 + wisdm.train.targets, minlength=37 * 6)
    test = np.bincount(wisdm.test_groups * 6 + wisdm.test.targets, minlength=37 * 6)
    both = train + test
    assert (test == np.where(both < 2, 0, np.maximum(both // 5, 1))).all()


def test_wisdm_is_standardised_on_the_training_windows(wisdm: Dataset) -> None:
    assert np.isfinite(wisdm.train.inputs).all()
    assert np.isfinite(wisdm.test.inputs).all()
    assert np.abs(wisdm.train.inputs.mean(axis=0, dtype=np.float64)).max() < 1e-5
    deviations = wisdm.train.inputs.std(axis=0, dtype=np.float64)
    assert deviations[30] == 0.0  # XAVG never varies
    assert 0.96 < np.delete(deviations, 30).min() <= deviations.max() < 1.0 + 1e-5
    assert np.abs(wisdm.test.inputs.mean(axis=0)).max() > 0.1


def arff(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["@relation r", "@data", *lines, ""]))
    return path


def window(*, user: str = "7", first: str = "0.5", label: str = "Sitting") -> str:
    return ",".join(["1", user, first, *["1"] * 42, label])


def test_missing_values_become_the_training_mean(tmp_path: Path) -> None:
    path = arff(tmp_path / "w.arff", *[window(first=f) for f in ("1", "?", "3", "2", "9")])
    windows = read_wisdm(path)
    assert windows.users.tolist() == [7] * 5
    assert windows.targets.tolist() == [WISDM_CLASSES.index("Sitting")] * 5
    assert np.isnan(windows.features[1, 0])
    is_train = np.array([True, True, True, True, False])
    column = datasets._standardised(windows.features, is_train)[:, 0]
    # The known training values 1, 3, 2 have mean 2 and variance 2/3.
    assert column == pytest.approx(np.array([-1, 0, 1, 0, 7]) / (2 / 3) ** 0.5)


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([window(), window() + ",1"], "inhomogeneous"),
        ([window() + ",1"], r"shape \(1, 47\)"),
        ([window(), window(label="Flying")], "tuple.index"),
        ([window(), window(first="inf")], "infinity or NaN"),
        ([window(), window(first="nan")], "infinity or NaN"),
        ([window(), window(first="x")], "'x'"),
        ([window(), window(user="?")], r"'\?'"),
        ([], r"shape \(0,\)"),
    ],
    ids=["longer", "all-longer", "class", "infinite", "nan", "text", "no-user", "empty"],
)
def test_an_arff_file_of_other_lines_is_refused(
    tmp_path: Path, lines: list[str], error: str
) -> None:
    with pytest.raises(DataError, match=rf"w\.arff must hold lines of .* got error=.*{error}"):
        read_wisdm(arff(tmp_path / "w.arff", *lines))


def test_an_arff_file_that_is_not_ascii_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.arff"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"must hold lines of .* got error=.*codec"):
        read_wisdm(path)


# Splits


def test_a_fifth_for_the_test_by_hand() -> None:
    assert [num_test(n, 0.2) for n in (0, 1, 2, 4, 5, 9, 10, 35)] == [0, 0, 1, 1, 1, 1, 2, 7]
    assert [num_test(n, 0.9) for n in (1, 2, 3, 10)] == [0, 1, 2, 9]


@given(st.integers(1, 10_000), st.floats(0.0, 1.0, exclude_min=True, exclude_max=True))
def test_training_always_keeps_an_example(num_examples: int, fraction: float) -> None:
    assert 0 <= num_test(num_examples, fraction) < num_examples
    assert num_test(num_examples, fraction) >= (num_examples >= 2)
