"""C++ that is compiled for the processor at hand, where there is a compiler.

Only compiled on the spot is it for this processor, and needs no wheel for every platform. That is
done once for a machine, in a second or two, and the library is kept in the cache folder. Where
nothing can be compiled, and with POTLUCK_NATIVE=0, everything goes through PyTorch.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from potluck.data.published_files import cache_folder

COMPILERS = ("c++", "g++", "clang++")  # the first that is there
FLAGS = ("-O3", "-march=native", "-std=gnu++17", "-ffp-contract=fast", "-shared", "-fPIC")
_SECONDS = 60.0  # to compile, at most
_LOG = logging.getLogger("potluck")


def sources(*names: str) -> tuple[Path, ...]:
    """Files beside this one: what is compiled, and the headers that it includes."""
    return tuple(Path(__file__).with_name(name) for name in names)


def library(what: str, sources: tuple[Path, ...]) -> ctypes.CDLL | None:
    """The library of the first of `sources`, compiled if it is not there yet; None, and the reason
    in the log, where it cannot be. `what` are called the things that then are not compiled."""
    if os.environ.get("POTLUCK_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(_made(sources)))
    except (OSError, subprocess.SubprocessError) as error:
        level = logging.WARNING if isinstance(error, PermissionError) else logging.INFO
        _LOG.log(level, "%s are not compiled: %s", what, str(error).splitlines()[0])
        return None


def call(function: Any, *arguments: Any) -> None:
    """Call a compiled function, with the memory of those arguments that are tensors."""
    function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


def compiled_folder() -> Path:
    """Where compiled code is kept, which runs with this user's rights: nobody else may write there.

    Raises:
        OSError: somebody else might have, or it cannot be made.
    """
    folder = cache_folder() / "compiled"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_ours(folder.parent, stat.S_ISVTX)  # whoever may rename there could put another in place
    _check_ours(folder)
    if os.name == "posix" and folder.stat().st_uid == os.getuid():
        folder.chmod(0o700)
    return folder


def warn(what: str) -> None:
    """Say that a library is left out, for it does not do what PyTorch does."""
    _LOG.warning(
        "%s are not compiled: the compiler's work differs from PyTorch's. Set POTLUCK_NATIVE=0 to "
        "leave it out, and report this with your compiler's version.",
        what,
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
    about = "\n".join([*texts, compiler, *FLAGS, _processor()])
    digest = hashlib.blake2b(about.encode(), digest_size=12).hexdigest()
    folder = compiled_folder()
    path = folder / f"{sources[0].stem}-{digest}.so"
    if path.exists():
        _check_ours(path)
    else:
        with tempfile.TemporaryDirectory(dir=folder) as made:
            target = Path(made) / path.name
            subprocess.run(
                [compiler, *FLAGS, "-o", str(target), str(sources[0])],
                check=True,
                capture_output=True,
                timeout=_SECONDS,
            )
            target.replace(path)  # at once: others may be looking for it
    return path


def _check_ours(path: Path, enough: int = 0) -> None:
    """Refuse what another user than root owns, or all users may change, unless a bit of its mode is
    `enough` to keep them from it."""
    if os.name != "posix":
        return
    found = path.stat()
    is_open = found.st_mode & 0o002 and not found.st_mode & enough
    if found.st_uid not in (0, os.getuid()) or is_open:
        raise PermissionError(
            f"{path} must be this user's, and no other's to write to, got uid={found.st_uid} and "
            f"mode={found.st_mode & 0o7777:o}. Remove it, or name another folder in POTLUCK_CACHE"
        )


def _processor() -> str:
    """What tells processors apart that a shared folder may serve."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
