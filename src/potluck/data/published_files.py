"""The published data files: where they lie, where they come from, and whether they are genuine.

A file is looked for in the folder that `POTLUCK_DATA` names (layout: `mnist/`, `qmnist/`,
`shakespeare/`, `wisdm/`), then in the cache (`POTLUCK_CACHE`, or the user's cache folder), and is
otherwise downloaded from the first host that gives it. Wherever it lies, its md5 is compared with
the published one before anybody reads it.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import tarfile
import tempfile
import zlib
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from potluck.core import ChecksumError, DataError, DownloadError

_TIMEOUT_SECONDS = 30.0  # until a host answers, and between two chunks
_MNIST_HOSTS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "http://yann.lecun.com/exdb/mnist/",
)
_QMNIST_HOSTS = ("https://raw.githubusercontent.com/facebookresearch/qmnist/master/",)
_SHAKESPEARE_HOSTS = ("https://ocw.mit.edu/ans7870/6/6.006/s08/lecturenotes/files/",)
_WISDM_HOSTS = ("https://www.cis.fordham.edu/wisdm/includes/datasets/latest/",)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedFile:
    """One file as it was published.

    `hosts` are the addresses of folders. Where `archive` is given, the hosts give that tar
    archive, and the file is its member of the same name.
    """

    path: str  # folder/name, in POTLUCK_DATA and in the cache
    md5: str
    num_bytes: int
    hosts: tuple[str, ...]
    archive: str | None = None


def _published(
    folder: str,
    hosts: tuple[str, ...],
    files: Iterable[tuple[str, str, int]],  # name, md5, bytes
    archive: str | None = None,
) -> dict[str, PublishedFile]:
    return {
        f"{folder}/{name}": PublishedFile(
            path=f"{folder}/{name}", md5=md5, num_bytes=size, hosts=hosts, archive=archive
        )
        for name, md5, size in files
    }


FILES: Mapping[str, PublishedFile] = {
    **_published(
        "mnist",
        _MNIST_HOSTS,
        [
            ("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873", 9_912_422),
            ("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432", 28_881),
            ("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3", 1_648_877),
            ("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c", 4_542),
        ],
    ),
    **_published(
        "qmnist",
        _QMNIST_HOSTS,
        [
            ("qmnist-train-labels-idx2-int.gz", "0058f8dd561b90ffdd0f734c6a30e5e4", 463_024),
            ("qmnist-test-labels-idx2-int.gz", "5b5b05890a5e13444e108efe57b788aa", 526_800),
        ],
    ),
    **_published(
        "shakespeare",
        _SHAKESPEARE_HOSTS,
        [("t8.shakespeare.txt", "d2028225a89d8b0b3093dddb720da91f", 5_458_199)],
    ),
    **_published(
        "wisdm",
        _WISDM_HOSTS,
        [("WISDM_ar_v1.1_transformed.arff", "fcfb48d764d737bbadf26cb443d7443a", 1_197_772)],
        archive="WISDM_ar_latest.tar.gz",
    ),
}

_ABOUT: Mapping[str, tuple[str, str]] = {  # name: (what, terms)
    "digits": (
        "1,797 handwritten digits of 8x8 pixels",
        "CC BY 4.0 (UCI); part of scikit-learn",
    ),
    "mnist": ("70,000 handwritten digits of 28x28 pixels", "CC BY-SA 3.0"),
    "pythonlib": (
        "source code of the Python that runs, a client for each module",
        "PSF licence; part of Python",
    ),
    "qmnist": ("who wrote each digit of MNIST (labels only)", "BSD"),
    "shakespeare": (
        "the lines of 36 plays, a client for each of 1,144 speaking roles",
        "personal, non-commercial distribution only (Gutenberg etext 100 of 1994)",
    ),
    "wisdm": (
        "5,418 windows of phone accelerometer features of 36 users",
        "research use, cite Kwapisz et al. 2010",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """What `potluck data list` says about one data set. Nothing is downloaded to find it out."""

    name: str
    what: str
    num_files: int  # 0: it comes with Python or an installed library
    num_bytes: int
    present: bool  # every file lies in POTLUCK_DATA or in the cache
    terms: str


def fetch(file: str | PublishedFile) -> Path:
    """The path of a genuine copy of `file`, downloaded if it has to be.

    Args:
        file: a key of `FILES`, such as "mnist/train-labels-idx1-ubyte.gz".

    Raises:
        ChecksumError: the copy in POTLUCK_DATA is not the published file.
        DownloadError: it lies nowhere, and no host gave it.
    """
    wanted = _named(file) if isinstance(file, str) else file
    own = _in_own_folder(wanted)
    if own is not None:
        _check(own, wanted.md5)
        return own
    cached = cache_folder() / wanted.path
    if cached.is_file() and _md5(cached) == wanted.md5:
        return cached
    return _download(wanted, cached)


def fetch_all(name: str) -> list[Path]:
    """Every file of one data set of the catalogue; none where a library brings it along."""
    return [fetch(file) for file in _files_of(name)]


def catalogue() -> list[CatalogueEntry]:
    """Every data set, in the order of the names."""
    entries: list[CatalogueEntry] = []
    for name, (what, terms) in _ABOUT.items():
        files = _files_of(name)
        entries.append(
            CatalogueEntry(
                name=name,
                what=what,
                num_files=len(files),
                num_bytes=sum(file.num_bytes for file in files),
                present=all(_is_present(file) for file in files),
                terms=terms,
            )
        )
    return entries


def checksums(*paths: str) -> dict[str, str]:
    """The published md5 of each of these keys of `FILES`."""
    return {path: _named(path).md5 for path in paths}


def cache_folder() -> Path:
    """Where downloads are kept: POTLUCK_CACHE, or the user's cache folder."""
    named = os.environ.get("POTLUCK_CACHE")
    if named:
        return Path(named)
    return Path(_pooch().os_cache("potluck"))


def _named(path: str) -> PublishedFile:
    if path not in FILES:
        raise ValueError(f"file must be one of {', '.join(FILES)}, got file={path!r}.")
    return FILES[path]


def _files_of(name: str) -> list[PublishedFile]:
    if name not in _ABOUT:
        raise ValueError(
            f"the data set must be one of {', '.join(_ABOUT)}, got name={name!r}. "
            "`potluck data list` describes them."
        )
    return [file for file in FILES.values() if file.path.startswith(f"{name}/")]


def _in_own_folder(file: PublishedFile) -> Path | None:
    named = os.environ.get("POTLUCK_DATA")
    if not named:
        return None
    folder = Path(named)
    if not folder.is_dir():
        raise DataError(
            f"POTLUCK_DATA must name a folder, got POTLUCK_DATA={named!r}. "
            "Create it, or unset the variable to download into the cache."
        )
    path = folder / file.path
    return path if path.is_file() else None


def _is_present(file: PublishedFile) -> bool:
    path = _in_own_folder(file) or cache_folder() / file.path
    return path.is_file() and path.stat().st_size == file.num_bytes


def _md5(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(
                stream, lambda: hashlib.md5(usedforsecurity=False)
            ).hexdigest()
    except OSError as error:
        raise DataError(
            f"the file must be readable, got {error.strerror or error} from {path}. "
            "Mend its permissions, or remove it."
        ) from error


def _check(path: Path, md5: str) -> None:
    got = _md5(path)
    if got != md5:
        raise ChecksumError(
            f"{path} must be the published file with md5={md5}, got md5={got}. "
            "Remove it, so that it is downloaded anew, or put the original in its place."
        )


def _download(file: PublishedFile, target: Path) -> Path:
    """Ask the hosts in turn; keep the first genuine copy."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(
            f"the cache must be a folder that can be written, got {error.strerror or error} for "
            f"{target.parent}. Name another one with POTLUCK_CACHE."
        ) from error
    failures: list[str] = []
    for host in file.hosts:
        try:
            _download_from(host, file, target)
            return target
        # Hosts fail in many ways (name, refusal, status, timeout, a false page); each is a reason
        # to ask the next, and all of them are named at the end.
        except (OSError, ValueError) as error:
            failures.append(f"{host} ({_reason(error)})")
    raise DownloadError(
        f"at least one host must give {file.path}, got none: {'; '.join(failures)}. "
        "Try again with a network, or name with POTLUCK_DATA a folder in which the file lies as "
        f"{file.path} (the layout is mnist/, qmnist/, shakespeare/, wisdm/)."
    )


def _download_from(host: str, file: PublishedFile, target: Path) -> None:
    if file.archive is None:
        _retrieve(host + target.name, target, f"md5:{file.md5}")
        return
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        # The archive has no published checksum; what is kept of it has one.
        archive = Path(folder) / file.archive
        _retrieve(host + file.archive, archive, None)
        member = Path(folder) / target.name
        _extract(archive, member, file.num_bytes)
        _check(member, file.md5)
        member.replace(target)


def _retrieve(url: str, target: Path, known_hash: str | None) -> None:
    pooch = _pooch()
    with _quiet(pooch.get_logger()):
        pooch.retrieve(
            url,
            known_hash=known_hash,
            fname=target.name,
            path=target.parent,
            downloader=pooch.HTTPDownloader(timeout=_TIMEOUT_SECONDS),
        )


def _pooch() -> Any:
    return importlib.import_module("pooch")  # slow, and seldom needed; it has no types


@contextmanager
def _quiet(logger: logging.Logger) -> Generator[None]:
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _extract(archive: Path, target: Path, num_bytes: int) -> None:
    """Write the one regular member called `target.name`, and nothing else, to `target`."""
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and PurePosixPath(member.name).name == target.name:
                    source = tar.extractfile(member)
                    # One byte too many is enough to see that it is another file.
                    target.write_bytes(source.read(num_bytes + 1) if source else b"")
                    return
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{archive.name} is not a whole tar archive") from error
    raise DataError(f"{archive.name} holds no {target.name}")


def _reason(error: Exception) -> str:
    """What went wrong, in a few words and without the address, which is named already."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code}"
    if isinstance(error, DataError) and not isinstance(error, ChecksumError):
        return str(error)
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return "a file with another checksum"  # pooch raises a plain ValueError
