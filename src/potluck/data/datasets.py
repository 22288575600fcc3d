"""The data sets that Potluck knows: MNIST (by writer too), digits and WISDM, and, from modules of
their own, the texts Shakespeare and pythonlib.

Each function returns the training and test examples as they were published, not yet divided;
`potluck.data.partitions` divides them. Files are found or downloaded, and their checksums
compared, by `potluck.data.published_files`; what lies inside is checked here.
"""

from __future__ import annotations

import gzip
import importlib
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from potluck.core import DataError
from potluck.data.federated import Array, Dataset, Examples
from potluck.data.published_files import checksums, fetch
from potluck.data.pythonlib import pythonlib as pythonlib
from potluck.data.shakespeare import shakespeare as shakespeare
from potluck.data.tables.hold_out import num_test

WISDM_CLASSES = ("Downstairs", "Jogging", "Sitting", "Standing", "Upstairs", "Walking")

_MNIST_TRAIN = ("mnist/train-images-idx3-ubyte.gz", "mnist/train-labels-idx1-ubyte.gz")
_MNIST_TEST = ("mnist/t10k-images-idx3-ubyte.gz", "mnist/t10k-labels-idx1-ubyte.gz")
_MNIST_WRITERS = (
    "qmnist/qmnist-train-labels-idx2-int.gz",
    "qmnist/qmnist-test-labels-idx2-int.gz",
)
_WISDM = "wisdm/WISDM_ar_v1.1_transformed.arff"
_WISDM_FEATURES = 43
_WISDM_TEST_FRACTION = 0.2
_IDX_TYPES: Mapping[int, np.dtype[Any]] = {0x08: np.dtype(np.uint8), 0x0C: np.dtype(">i4")}
_DOWNLOAD_AGAIN = "Remove it, so that it is downloaded anew."


def mnist(*, writers: bool = False) -> Dataset:
    """MNIST: 60,000 training and 10,000 test images of handwritten digits, ten classes.

    Inputs are float32 [n, 1, 28, 28], scaled to [0, 1] and not normalised further.

    Args:
        writers: name the NIST writer of each image in `groups` and `test_groups`. QMNIST found
            them out, and its label files are needed too; its first 10,000 test rows are MNIST's
            test set. None of the 539 training writers is among the 297 test writers.

    Raises:
        DataError: a file that cannot be had, is not the published one, or is malformed.
    """
    train, test = (
        read_digits(fetch(images), fetch(labels)) for images, labels in (_MNIST_TRAIN, _MNIST_TEST)
    )
    used = (*_MNIST_TRAIN, *_MNIST_TEST)
    groups = test_groups = None
    if writers:
        groups, test_groups = (
            read_writers(fetch(path), examples.targets)
            for path, examples in zip(_MNIST_WRITERS, (train, test), strict=True)
        )
        used += _MNIST_WRITERS
    return Dataset(
        name="mnist",
        train=train,
        test=test,
        num_classes=10,
        groups=groups,
        test_groups=test_groups,
        checksums=checksums(*used),
    )


def digits(*, test_fraction: float = 0.2) -> Dataset:
    """scikit-learn's digits: 1,797 images of handwritten digits, ten classes, no download.

    Inputs are float32 [n, 1, 8, 8], scaled to [0, 1]. The split is stratified and needs no seed:
    of each class, in the published order, every fifth image is a test image (for another
    `test_fraction` f: image j wherever ⌊(j + 1)·f⌋ > ⌊j·f⌋).
    """
    if not 0.0 < test_fraction < 1.0:
        raise ValueError(
            f"test_fraction must be above 0 and below 1, got test_fraction={test_fraction!r}. "
            "0.2 keeps a fifth of the images for the test."
        )
    sklearn_datasets: Any = importlib.import_module("sklearn.datasets")  # slow; it has no types
    bunch = sklearn_datasets.load_digits()
    images = cast(NDArray[np.float64], bunch.images)  # [n, 8, 8], 0 to 16
    inputs = (images / 16.0).astype(np.float32)[:, None]
    targets = cast(NDArray[Any], bunch.target).astype(np.int64)
    is_test = np.zeros(len(targets), np.bool_)
    for label in range(10):
        rows = np.flatnonzero(targets == label)
        steps = np.floor(np.arange(len(rows) + 1) * test_fraction + 1e-9)
        is_test[rows] = np.diff(steps) > 0
    return Dataset(
        name="digits",
        train=Examples(inputs[~is_test], targets[~is_test]),
        test=Examples(inputs[is_test], targets[is_test]),
        num_classes=10,
    )


def wisdm() -> Dataset:
    """WISDM 1.1: six activities of 36 people, by the accelerometer of a phone in the pocket.

    5,418 windows of ten seconds. Inputs are float32 [n, 43], targets index `WISDM_CLASSES`, and
    groups are the users. Of each user's windows of one activity the last 20 %, in the published
    order, are that user's test examples. (The last 20 % of all of a user's windows would be mostly
    activities that are not in the rest: users did them in turn.)

    Features are standardised with the mean and the deviation of the training windows. A missing
    value ("?", a peak that was not found: 615 of 232,974) becomes the training mean, which is 0
    after that; so does the one feature that never varies (XAVG).

    Raises:
        DataError: a file that cannot be had, is not the published one, or is malformed.
    """
    windows = read_wisdm(fetch(_WISDM))
    is_test = np.zeros(len(windows.users), np.bool_)
    for user, activity in np.unique(np.stack([windows.users, windows.targets], 1), axis=0):
        rows = np.flatnonzero((windows.users == user) & (windows.targets == activity))
        is_test[rows[len(rows) - num_test(len(rows), _WISDM_TEST_FRACTION) :]] = True
    inputs = _standardised(windows.features, ~is_test)
    return Dataset(
        name="wisdm",
        train=Examples(inputs[~is_test], windows.targets[~is_test]),
        test=Examples(inputs[is_test], windows.targets[is_test]),
        num_classes=len(WISDM_CLASSES),
        groups=windows.users[~is_test],
        test_groups=windows.users[is_test],
        classes=WISDM_CLASSES,
        checksums=checksums(_WISDM),
    )


def read_digits(images: Path, labels: Path) -> Examples:
    """Images and labels of two idx files: float32 [n, 1, rows, columns] in [0, 1], and int64.

    Raises:
        DataError: a malformed file, a label above 9, or not one label for each image.
    """
    pixels = read_idx(images, num_axes=3)
    targets = read_idx(labels, num_axes=1).astype(np.int64)
    if len(pixels) != len(targets):
        raise DataError(
            f"{labels} must hold a label for each of the {len(pixels)} images of {images}, "
            f"got labels={len(targets)}. Take both from the same source."
        )
    wrong = np.flatnonzero(targets > 9)  # they are bytes
    if len(wrong) > 0:
        row = int(wrong[0])
        raise DataError(
            f"labels must be from 0 to 9, got label={int(targets[row])} of example {row} in "
            f"{labels}. {_DOWNLOAD_AGAIN}"
        )
    inputs = pixels.astype(np.float32)
    inputs /= np.float32(255.0)
    return Examples(inputs[:, None], targets)


def read_writers(path: Path, targets: Array) -> NDArray[np.int64]:
    """The NIST writer of each MNIST image: column 2 of a QMNIST label file, whose column 0 must
    be `targets`. Rows beyond the number of targets are not MNIST's.

    Raises:
        DataError: a malformed file, too few rows, or other labels.
    """
    rows = read_idx(path, num_axes=2)
    if rows.shape[1] != 8 or len(rows) < len(targets):
        raise DataError(
            f"{path} must hold at least {len(targets)} rows of 8 numbers, "
            f"got shape={rows.shape}. {_DOWNLOAD_AGAIN}"
        )
    rows = rows[: len(targets)]
    wrong = np.flatnonzero(rows[:, 0] != targets)
    if len(wrong) > 0:
        row = int(wrong[0])
        raise DataError(
            f"{path} must name the same classes as MNIST, got class={int(rows[row, 0])} in row "
            f"{row}, where MNIST has {int(targets[row])}. {_DOWNLOAD_AGAIN}"
        )
    return rows[:, 2].astype(np.int64)


def read_idx(path: Path, *, num_axes: int) -> Array:
    """The array in a gzip-compressed idx file of bytes or of big-endian 32-bit integers.

    Raises:
        DataError: not gzip, another magic number, or another size than the header says.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{path} must be a whole gzip file, got error={str(error)!r}. {_DOWNLOAD_AGAIN}"
        ) from error
    size = 4 + 4 * num_axes
    if len(content) < size:
        raise DataError(
            f"{path} must start with a header of {size} bytes, got bytes={len(content)}. "
            f"{_DOWNLOAD_AGAIN}"
        )
    dtype = _IDX_TYPES.get(content[2])
    if content[:2] != b"\0\0" or dtype is None or content[3] != num_axes:
        raise DataError(
            f"{path} must start with the idx magic number 0000xx{num_axes:02x} (xx: 08 or 0c), "
            f"got magic={content[:4].hex()}. {_DOWNLOAD_AGAIN}"
        )
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", num_axes, offset=4))
    if len(content) - size != math.prod(shape) * dtype.itemsize:
        raise DataError(
            f"{path} must hold {math.prod(shape) * dtype.itemsize} bytes for its shape {shape}, "
            f"got bytes={len(content) - size}. {_DOWNLOAD_AGAIN}"
        )
    return np.frombuffer(content, dtype, offset=size).reshape(shape)


class Windows(NamedTuple):
    """The windows of WISDM in the published order, not standardised."""

    features: NDArray[np.float64]  # [windows, 43], NaN where a value is missing
    targets: NDArray[np.int64]  # [windows], an index into WISDM_CLASSES
    users: NDArray[np.int64]  # [windows]


def read_wisdm(path: Path) -> Windows:
    """The windows in WISDM's ARFF file: after `@data`, lines of id, user, 43 features and class.

    `scipy.io.arff` refuses the file, in which an attribute has no type.

    Raises:
        DataError: a file that has other lines than these, or none.
    """
    try:
        rows = path.read_text(encoding="ascii").partition("@data")[2].split()
        fields = np.array([row.split(",") for row in rows], np.str_)
        if not rows or fields.shape[1] != _WISDM_FEATURES + 3:
            raise ValueError(f"lines of shape {fields.shape}")
        users, values = fields[:, 1].astype(np.int64), fields[:, 2:-1]
        features = np.where(values == "?", "nan", values).astype(np.float64)
        if not np.array_equal(np.isfinite(features), values != "?"):
            raise ValueError("infinity or NaN")
        targets = np.array([WISDM_CLASSES.index(name) for name in fields[:, -1]], np.int64)
        return Windows(features, targets, users)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} must hold lines of id, user, {_WISDM_FEATURES} finite numbers or '?', and one "
            f"of {', '.join(WISDM_CLASSES)}, got error={str(error)!r}. {_DOWNLOAD_AGAIN}"
        ) from error


def _standardised(
    features: NDArray[np.float64], is_train: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Zero mean and unit deviation over the training rows; 0 where a value is missing."""
    missing = np.isnan(features)
    known = is_train[:, None] & ~missing
    count = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, features, 0.0).sum(axis=0) / count
    centred = np.where(missing, 0.0, features - mean)
    deviation = np.sqrt((np.where(known, centred, 0.0) ** 2).sum(axis=0) / count)
    deviation[deviation == 0.0] = 1.0
    return (centred / deviation).astype(np.float32)
