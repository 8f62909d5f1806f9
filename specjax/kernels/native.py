"""Builds and registers the CPU kernels, once per machine, with the system's C++ compiler.

The library is cached in the user's cache directory under a name made of source, flags, processor
and JAX version. Without a compiler, with `SPECJAX_CPU_KERNELS=0`, or after a failed build, XLA's
own operations are used; the missing compiler and the failure are logged in one line.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax

SOURCES = Path(__file__).parent / "cpu"
FLAGS = ("-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-pthread", "-w")
LINEAR, ATTENTION = "specjax_linear", "specjax_attention"
COMMIT, GUMBEL, BELOW = "specjax_commit", "specjax_gumbel", "specjax_below"
_SYMBOLS = {
    LINEAR: "SpecjaxLinear",
    ATTENTION: "SpecjaxAttention",
    COMMIT: "SpecjaxCommit",
    GUMBEL: "SpecjaxGumbel",
    BELOW: "SpecjaxBelow",
}

_log = logging.getLogger(__name__)


@functools.cache
def available() -> bool:
    """Whether the kernels can be called; builds and registers them at the first question."""
    if os.environ.get("SPECJAX_CPU_KERNELS", "1") == "0":
        return False
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        _log.warning("No C++ compiler found; CPU decoding uses XLA's slower operations.")
        return False
    try:
        library = ctypes.CDLL(str(_build(compiler)))
        for target, symbol in _SYMBOLS.items():
            capsule = jax.ffi.pycapsule(getattr(library, symbol))
            jax.ffi.register_ffi_target(target, capsule, platform="cpu")
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        _log.warning("CPU kernels unavailable (%s); using XLA's slower operations.", error)
        return False
    return True


def _build(compiler: str) -> Path:
    """The path of the compiled library, built if it is not there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specjax"
    key = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        key.update(source.read_bytes())
    for part in (compiler, *FLAGS, jax.__version__, platform.machine(), _processor()):
        key.update(part.encode() + b"\0")
    library = cache / f"kernels-{key.hexdigest()[:16]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            built = Path(scratch) / library.name
            command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}"]
            command += [*map(str, sorted(SOURCES.glob("*.cc"))), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, timeout=300)
            os.replace(built, library)  # atomic: nobody ever loads half a library
    return library


def _processor() -> str:
    """What decides the meaning of -march=native."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
