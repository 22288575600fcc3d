"""The published data files: their places, their hosts and their checksums.

A file is looked for in the folder that `POTLUCK_DATA` names (layout: `mnist/`, `qmnist/`,
`shakespeare/`, `wisdm/`). The cache is next (`POTLUCK_CACHE`, or the user's cache folder).
Otherwise it is downloaded from the first host that gives it. Wherever it lies, its md5 is compared
with the published one before it is read.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import tarfile
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from potluck.core import ChecksumError, DataError, DownloadError

_TIMEOUT_SECONDS = 30.0  # until a host answers, and between two chunks
_HOSTS: Mapping[str, tuple[str, ...]] = {  # by folder: addresses of folders, in this order
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "http://yann.lecun.com/exdb/mnist/",
    ),
    "qmnist": ("https://raw.githubusercontent.com/facebookresearch/qmnist/master/",),
    "shakespeare": ("https://ocw.mit.edu/ans7870/6/6.006/s08/lecturenotes/files/",),
    "wisdm": ("https://www.cis.fordham.edu/wisdm/includes/datasets/latest/",),
}
_ARCHIVES = {"wisdm": "WISDM_ar_latest.tar.gz"}
_FILES = (  # folder/name, md5, bytes
    ("mnist/train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873", 9_912_422),
    ("mnist/train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432", 28_881),
    ("mnist/t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3", 1_648_877),
    ("mnist/t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c", 4_542),
    ("qmnist/qmnist-train-labels-idx2-int.gz", "0058f8dd561b90ffdd0f734c6a30e5e4", 463_024),
    ("qmnist/qmnist-test-labels-idx2-int.gz", "5b5b05890a5e13444e108efe57b788aa", 526_800),
    ("shakespeare/t8.shakespeare.txt", "d2028225a89d8b0b3093dddb720da91f", 5_458_199),
    ("wisdm/WISDM_ar_v1.1_transformed.arff", "fcfb48d764d737bbadf26cb443d7443a", 1_197_772),
)
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
class PublishedFile:
    """One file as it was published.

    Where `archive` is given, the hosts give that tar archive, and the file is its member of the
    same name.
    """

    path: str  # folder/name, in POTLUCK_DATA and in the cache
    md5: str
    num_bytes: int
    hosts: tuple[str, ...]
    archive: str | None = None


FILES: Mapping[str, PublishedFile] = {
    path: PublishedFile(
        path=path, md5=md5, num_bytes=size, hosts=_HOSTS[folder], archive=_ARCHIVES.get(folder)
    )
    for path, md5, size in _FILES
    for folder in [path.partition("/")[0]]
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """The entry of one data set in `potluck data list`, found without a download."""

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
    if isinstance(file, str):
        if file not in FILES:
            raise ValueError(f"file must be one of {', '.join(FILES)}, got file={file!r}.")
        file = FILES[file]
    own = _in_own_folder(file)
    if own is not None:
        _check(own, file.md5)
        return own
    cached = cache_folder() / file.path
    if not cached.is_file() or _md5(cached) != file.md5:
        _download(file, cached)
    return cached


def fetch_all(name: str) -> list[Path]:
    """Every file of one data set of the catalogue; none where a library brings it along."""
    if name not in _ABOUT:
        raise ValueError(
            f"the data set must be one of {', '.join(_ABOUT)}, got name={name!r}. "
            "`potluck data list` describes them."
        )
    return [fetch(file) for file in _files_of(name)]


def catalogue() -> list[CatalogueEntry]:
    """Every data set, in the order of the names."""
    return [
        CatalogueEntry(
            name=name,
            what=what,
            num_files=len(_files_of(name)),
            num_bytes=sum(file.num_bytes for file in _files_of(name)),
            present=all(map(_is_present, _files_of(name))),
            terms=terms,
        )
        for name, (what, terms) in _ABOUT.items()
    ]


def checksums(*paths: str) -> dict[str, str]:
    """The published md5 of each of these keys of `FILES`."""
    return {path: FILES[path].md5 for path in paths}


def cache_folder() -> Path:
    """Returns the folder of downloads: POTLUCK_CACHE, or the user's cache folder."""
    return Path(os.environ.get("POTLUCK_CACHE") or _pooch().os_cache("potluck"))


def _files_of(name: str) -> list[PublishedFile]:
    return [file for path, file in FILES.items() if path.startswith(f"{name}/")]


def _in_own_folder(file: PublishedFile) -> Path | None:
    named = os.environ.get("POTLUCK_DATA")
    if not named:
        return None
    if not Path(named).is_dir():
        raise DataError(
            f"POTLUCK_DATA must name a folder, got POTLUCK_DATA={named!r}. "
            "Create it, or unset the variable to download into the cache."
        )
    path = Path(named) / file.path
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


def _download(file: PublishedFile, target: Path) -> None:
    """Asks the hosts in turn and keeps the first genuine copy."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(
            f"the cache must be a folder that can be written, got {error.strerror or error} for "
            f"{target.parent}. Name another one with POTLUCK_CACHE."
        ) from error
    failures: list[str] = []
    for host in file.hosts:
        # Hosts fail in many ways (name, refusal, status, timeout, a false page); each is a reason
        # to ask the next, and all of them are named at the end.
        try:
            return _download_from(host, file, target)
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
        # The archive has no published checksum; what is kept of it has one. pooch.Untar would
        # take out all members, and, before Python 3.12, also such as lie outside the folder.
        archive, member = Path(folder) / file.archive, Path(folder) / target.name
        _retrieve(host + file.archive, archive, None)
        try:
            with tarfile.open(archive) as tar:
                found = [m for m in tar if m.isfile() and PurePosixPath(m.name).name == member.name]
                source = tar.extractfile(found[0]) if found else None
                if source is None:
                    raise DataError(f"{archive.name} holds no {member.name}")
                # One byte too many is enough to see that it is another file.
                member.write_bytes(source.read(file.num_bytes + 1))
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise DataError(f"{archive.name} is not a whole tar archive") from error
        _check(member, file.md5)
        member.replace(target)


def _retrieve(url: str, target: Path, known_hash: str | None) -> None:
    pooch = _pooch()
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("ERROR")
    try:
        downloader = pooch.HTTPDownloader(timeout=_TIMEOUT_SECONDS)
        pooch.retrieve(url, known_hash, target.name, target.parent, downloader=downloader)
    finally:
        logger.setLevel(level)


def _pooch() -> Any:
    return importlib.import_module("pooch")  # slow, and seldom needed; it has no types


def _reason(error: Exception) -> str:
    """Returns the reason in a few words, without the address, which is named already."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code}"
    if isinstance(error, DataError) and not isinstance(error, ChecksumError):
        return str(error)
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return "a file with another checksum"  # pooch raises a plain ValueError
