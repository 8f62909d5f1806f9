"""Builds and registers the CPU kernels, once per machine, with the system's C++ compiler.

The library is cached in the user's cache directory under a name made of source, flags, processor
and JAX version. Without a compiler, with `SPECJAX_CPU_KERNELS=0`, or after a failed build, XLA's
own operations are used; the missing compiler and the failure are logged in one line.
"""

import contextlib
import contextvars
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SOURCES = Path(__file__).parent / "cpu"
_NATIVE = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
FLAGS = ("-O3", _NATIVE, "-std=c++20", "-fPIC", "-pthread", "-w")
FEW_ROWS, FEW_ROWS_ON_TILES = 32, 512  # of products
FEW_TOKENS = 512  # of attention
LINEAR, ATTENTION = "specjax_linear", "specjax_attention"
COMMIT, GATHER = "specjax_commit", "specjax_gather"
SEARCH, AGREEMENT = "specjax_search", "specjax_agreement"
GUMBEL, BELOW = "specjax_gumbel", "specjax_below"
ARGMAX, SOFTMAX, TOP_K = "specjax_argmax", "specjax_softmax", "specjax_top_k"
_SYMBOLS = {
    LINEAR: "SpecjaxLinear",
    ATTENTION: "SpecjaxAttention",
    COMMIT: "SpecjaxCommit",
    GATHER: "SpecjaxGather",
    SEARCH: "SpecjaxSearch",
    AGREEMENT: "SpecjaxAgreement",
    GUMBEL: "SpecjaxGumbel",
    BELOW: "SpecjaxBelow",
    ARGMAX: "SpecjaxArgmax",
    SOFTMAX: "SpecjaxSoftmax",
    TOP_K: "SpecjaxTopK",
}

_log = logging.getLogger(__name__)
_off = contextvars.ContextVar("off", default=False)


def available() -> bool:
    """Whether what is traced now may call the kernels; builds them at the first question."""
    return not _off.get() and _loaded() is not None


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """What is traced within uses XLA's own operations, on CPU too."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def few_rows(dtype: jnp.dtype) -> int:
    """Rows up to which the products' kernel is used on CPU, by measurement, for weights of a dtype.

    On tiles it wins at twice as many too. But it rounds bfloat16 activations otherwise than XLA,
    and so far whole batches of conformance tests are rounded in one way.
    """
    library = _loaded()
    if library is None or not available():
        return 0
    on_tiles = dtype != jnp.float32 and library.SpecjaxOnTiles()
    return FEW_ROWS_ON_TILES if on_tiles else FEW_ROWS


def partition(
    function: Callable,
    arguments: Sequence[str],
    results: Sequence[str],
    whole: str,
    mesh: Mesh,
    arg_shapes: Sequence[Any],
    result_shapes: Any,
) -> tuple[Mesh, Callable, Any, Any]:
    """How devices share a kernel's call: what `custom_partitioning` asks for.

    Args:
        function: the kernel, which each device calls with its own part.
        arguments, results: one letter or word for each axis; equal ones are sharded alike.
        whole: the axes that every device needs all of.
    """
    del result_shapes
    axes: dict[str, Any] = dict.fromkeys(whole.split())

    def taken(word: str, axis: Any) -> bool:  # by another word beside this one
        beside = {other for o in (*arguments, *results) if word in o.split() for other in o.split()}
        return any(axes.get(other) == axis for other in beside - {word})

    for words, shape in zip(arguments, arg_shapes, strict=True):
        spec = (*shape.sharding.spec, *[None] * len(shape.shape))
        for word, axis in zip(words.split(), spec, strict=False):
            if axis is not None and word not in axes and not taken(word, axis):
                axes[word] = axis

    def shardings(operands: Sequence[str]) -> tuple[NamedSharding, ...]:
        specs = [PartitionSpec(*(axes.get(word) for word in o.split())) for o in operands]
        return tuple(NamedSharding(mesh, spec) for spec in specs)

    return mesh, function, shardings(results), shardings(arguments)


@functools.cache
def _loaded() -> ctypes.CDLL | None:
    """The library, built if need be, its kernels registered; None without them."""
    if os.environ.get("SPECJAX_CPU_KERNELS", "1") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        _log.warning("No C++ compiler found; CPU decoding uses XLA's slower operations.")
        return None
    try:
        library = ctypes.CDLL(str(_build(compiler)))
        for target, symbol in _SYMBOLS.items():
            capsule = jax.ffi.pycapsule(getattr(library, symbol))
            jax.ffi.register_ffi_target(target, capsule, platform="cpu")
    except (OSError, subprocess.SubprocessError, AttributeError, RuntimeError) as error:
        _log.warning("CPU kernels unavailable (%s); using XLA's slower operations.", error)
        return None
    return library


def _build(compiler: str) -> Path:
    """The path of the compiled library, built if it is not there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specjax"
    key = hashlib.sha256()
    for source in sorted([*SOURCES.glob("*.cc"), *SOURCES.glob("*.h")]):
        key.update(source.read_bytes())
    for part in (compiler, *FLAGS, jax.__version__, platform.machine(), _processor()):
        key.update(part.encode() + b"\0")
    library = cache / f"kernels-{key.hexdigest()[:16]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            built = Path(scratch) / library.name
            include = f"-I{jax.ffi.include_dir()}"

            def compile(source: Path) -> str:
                target = str(Path(scratch) / f"{source.stem}.o")
                _run(compiler, *FLAGS, include, "-c", str(source), "-o", target)
                return target

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(compile, sorted(SOURCES.glob("*.cc"))))
            _run(compiler, *FLAGS, "-shared", *objects, "-o", str(built))
            os.replace(built, library)  # atomic: nobody ever loads half a library
    return library


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=300)


def _processor() -> str:
    """What decides the meaning of -march=native."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
