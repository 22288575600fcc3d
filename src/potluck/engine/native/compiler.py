"""C++ that is compiled for the processor at hand, where there is a compiler.

Code that is compiled here suits this processor, and needs no wheel for every platform. That is done
once for a machine, under a file lock. The library is kept in a folder that no other user may write
to, since it runs with this user's rights. Processes that are forked later use what their parent has
loaded (`potluck.engine.native.kernels`). Where nothing can be compiled, which is said once, and
with POTLUCK_NATIVE=0, everything goes through PyTorch.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

COMPILERS = ("c++", "g++", "clang++")  # the first that is there
FLAGS = ("-O3", "-march=native", "-std=gnu++17", "-ffp-contract=fast", "-shared", "-fPIC")
_SECONDS = 300.0  # to compile, at most; it takes about five
_LOG = logging.getLogger("potluck")


class Library(NamedTuple):
    """The loaded library and the name of its file, which identifies it."""

    name: str
    functions: ctypes.CDLL


def sources(*names: str) -> tuple[Path, ...]:
    """Files beside this one: what is compiled, and the headers that it includes."""
    return tuple(Path(__file__).with_name(name) for name in names)


@cache
def library(what: str, sources: tuple[Path, ...]) -> Library | None:
    """The library of the first of `sources`, compiled if it is not there yet; None, and a warning,
    where it cannot be. `what` are called the things that then are not compiled. Asked for once."""
    if os.environ.get("POTLUCK_NATIVE") == "0":
        return None
    try:
        path = _made(sources)
        return Library(path.stem, ctypes.CDLL(str(path)))
    except (OSError, subprocess.SubprocessError) as error:
        _LOG.warning(
            "%s are not compiled: %s. PyTorch does their work, more slowly, and sums may differ in "
            "their last bits. POTLUCK_NATIVE=0 says that this is meant.",
            what,
            str(error).splitlines()[0].removesuffix("."),
        )
        return None


def call(function: Any, *arguments: Any) -> None:
    """Calls a compiled function, with the memory of those arguments that are tensors."""
    function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


def warn(what: str) -> None:
    """Warns that a library is not used, because it differs from PyTorch."""
    _LOG.warning(
        "%s are not compiled: the compiler's work differs from PyTorch's. Set POTLUCK_NATIVE=0 to "
        "leave it out, and report this with your compiler's version.",
        what,
    )


def compiled_folder() -> Path:
    """Returns the folder of compiled code, which runs with this user's rights: no other user may
    write there.

    Raises:
        OSError: another user might have written there, or it cannot be made.
    """
    named = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(named) if named else Path("~/.cache").expanduser()) / "potluck-kernels"
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.parent.stat()  # a user who may rename there could replace it
    if about.st_uid not in (0, os.getuid()) or about.st_mode & 0o1002 == 0o002:
        raise _not_ours(folder.parent)
    check_ours(folder)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def check_ours(path: Path) -> None:
    """Refuses a file or folder that another user owns or may write to.

    Raises:
        PermissionError: one does.
    """
    about = path.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise _not_ours(path)


def _not_ours(path: Path) -> PermissionError:
    about = path.stat()
    return PermissionError(
        f"{path} must be this user's (uid={os.getuid()}), and no other's to write to, got "
        f"uid={about.st_uid} and mode={stat.S_IMODE(about.st_mode):o}. Remove it, or name another "
        "folder of caches in XDG_CACHE_HOME"
    )


def _made(sources: tuple[Path, ...]) -> Path:
    """The library's file, made if it is not there.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be made.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise OSError("there is no C++ compiler")
    texts = [path.read_text(encoding="utf-8") for path in sources]
    about = "\n".join([*texts, compiler, _version(compiler), *FLAGS, _processor()])
    digest = hashlib.blake2b(about.encode(), digest_size=12).hexdigest()
    folder = compiled_folder()
    path = folder / f"{sources[0].stem}-{digest}.so"
    if not path.exists():
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process compiles, and the others wait for it
            if not path.exists():
                _compile(compiler, sources[0], path)
    check_ours(path)
    return path


def _compile(compiler: str, source: Path, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as made:
        target = Path(made) / path.name
        words = [compiler, *FLAGS, "-o", str(target), str(source)]
        subprocess.run(words, check=True, capture_output=True, timeout=_SECONDS)
        target.chmod(0o700)
        target.replace(path)


def _version(compiler: str) -> str:
    words = [compiler, "--version"]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60.0).stdout


def _processor() -> str:
    """Identifies the processor, since a folder may be shared by several."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
