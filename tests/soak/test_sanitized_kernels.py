"""The tests of the kernels, with kernels that check each address and each undefined operation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from potluck.engine.native import compiler

pytestmark = pytest.mark.soak

TESTS = Path(__file__).parents[1]
CHECKS = ("-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover")
PRELUDE = f"""
import sys
from potluck.engine.native import compiler
compiler.FLAGS = (*compiler.FLAGS, *{CHECKS!r})
"""
BEYOND = 'extern "C" int last(int n) { int* x = new int[n]; int y = x[n]; delete[] x; return y; }\n'
OVERFLOW = 'extern "C" int last(int n) { return n + 2147483647; }\n'


def _library(compiler: str, name: str) -> Path:
    """Where a compiler has a library; a bare name if it has none."""
    words = [compiler, f"-print-file-name={name}"]
    return Path(subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip())


@pytest.fixture
def sanitized(tmp_path):
    """Run Python code in a process whose kernels are compiled with checks; its output."""
    found = next(filter(None, map(shutil.which, compiler.COMPILERS)), None)
    if found is None:
        pytest.skip("no C++ compiler")
    # PyTorch throws exceptions, which the sanitizer sees only if their library is there before it.
    loaded = [_library(found, name) for name in ("libasan.so", "libstdc++.so.6")]
    if not all(map(Path.is_absolute, loaded)):
        pytest.skip(f"{found} has no sanitizers")
    environment = os.environ | {
        "LD_PRELOAD": ":".join(str(path.resolve()) for path in loaded),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "XDG_CACHE_HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("POTLUCK_NATIVE", None)

    def run(code: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", PRELUDE + code]
        return subprocess.run(
            words, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=1200
        )

    return run


@pytest.mark.parametrize("file", ["test_native.py", "test_pooling.py"])
def test_no_shape_leaves_its_memory_or_is_undefined(sanitized, tmp_path, file):
    path = str(TESTS / "engine" / file)
    done = sanitized(f"import pytest; sys.exit(pytest.main(['-q', '-s', {path!r}]))")
    print(done.stdout[-3000:], done.stderr[-3000:])
    assert done.returncode == 0
    assert list((tmp_path / "potluck-kernels").glob("*.so"))


@pytest.mark.parametrize(
    ("source", "found"), [(BEYOND, "heap-buffer-overflow"), (OVERFLOW, "overflow")]
)
def test_the_checks_see_what_is_wrong(sanitized, tmp_path, source, found):
    file = tmp_path / "wrong.cpp"
    file.write_text(source)
    code = "from pathlib import Path\n"
    code += f"compiler.library('numbers', (Path({str(file)!r}),)).functions.last(1)"
    done = sanitized(code)
    assert done.returncode != 0
    assert found in done.stderr
