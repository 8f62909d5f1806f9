"""The CPU kernels without XLA: inside their buffers, without races, right on any processor."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from specjax.kernels import native

_SOURCE = Path(__file__).parent / "kernels_test.cc"
_COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), "")
_IS_X86 = platform.machine() in ("x86_64", "AMD64")
_FLAGS = ("-g1", "-std=c++20", "-pthread", "-w", "-Wno-psabi", "-fno-sanitize-recover=all")
_ADDRESS = ("-fsanitize=address,undefined", native._NATIVE)
# Leaks are looked for by tracing the process, which containers forbid.
_OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}

pytestmark = pytest.mark.skipif(not _COMPILER, reason="no C++ compiler here")


def _build(tmp_path: Path, *flags: str, compiler: str = _COMPILER) -> str:
    """The path of the program; skips where this compiler has no such sanitizer."""
    program = str(tmp_path / "kernels_test")
    nothing = tmp_path / "nothing.cc"
    nothing.write_text("int main() {}")
    if subprocess.run([compiler, *_FLAGS, *flags, nothing, "-o", program]).returncode:
        pytest.skip(f"{compiler} cannot build with {' '.join(flags)}")
    built = subprocess.run(
        [compiler, *_FLAGS, *flags, _SOURCE, "-o", program], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return program


def _run(program: str, *arguments: int) -> subprocess.CompletedProcess:
    command = [program, *map(str, arguments)]
    environment = {**os.environ, **_OPTIONS}

    def call(*before: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*before, *command], env=environment, capture_output=True, text=True, timeout=300
        )

    result = call()
    if "unexpected memory mapping" in result.stderr:  # too random addresses for the sanitizer
        if shutil.which("setarch") is None or call("setarch", "-R", "true").returncode:
            pytest.skip("the thread sanitizer needs addresses that are not random")
        result = call("setarch", "-R")
    return result


def _check(program: str, rounds: int) -> None:
    """On one thread, then three callers at once with helpers."""
    for threads, callers in ((1, 1), (4, 3)):
        result = _run(program, threads, callers, rounds)
        assert result.returncode == 0, result.stdout + result.stderr


def test_no_access_beyond_a_buffer(tmp_path: Path) -> None:
    """Unoptimised: it compiles in half the time, and no read is left out."""
    _check(_build(tmp_path, "-O0", *_ADDRESS), 10)


@pytest.mark.slow
def test_no_race(tmp_path: Path) -> None:
    _check(_build(tmp_path, "-O1", "-fsanitize=thread", native._NATIVE), 8)


@pytest.mark.slow
def test_no_access_beyond_a_buffer_in_optimised_code(tmp_path: Path) -> None:
    _check(_build(tmp_path, "-O1", *_ADDRESS), 200)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(native._NATIVE,), ("-march=x86-64",), ("-mavx2", "-mfma")])
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_every_kind_of_processor(tmp_path: Path, compiler: str, flags: tuple[str, ...]) -> None:
    """What the kernels promise does not rest on one compiler or on wide registers."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    if flags != (native._NATIVE,) and not (_IS_X86 and "avx2" in native._processor()):
        pytest.skip("flags of another processor")
    _check(_build(tmp_path, "-O3", *flags, compiler=compiler), 200)
