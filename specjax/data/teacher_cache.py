"""A target's k likeliest tokens after every position of fixed rows, and their laws, on disk.

A target that is large beside its draft then runs once per row, not once per row and epoch, and need
not be in memory while the draft trains. `size` tells what that takes before it is built.
"""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from specjax.data.atomic import replacing
from specjax.data.fingerprint import fingerprint
from specjax.data.rows import Rows
from specjax.models.transformer import forward
from specjax.types import Array, Model, PyTree

_TOKENS, _PROBS, _HEADER, _PROGRESS = "tokens.npy", "probs.npy", "made_from.json", "progress.json"


def size(num_rows: int, length: int, k: int, vocab_size: int) -> int:
    """Bytes on disk: k ids of 2 bytes (4 where the vocabulary needs them) and k float16 each.

    Args:
      num_rows: N.
      length: T.
      k: tokens per position.
      vocab_size: V.
    """
    return num_rows * length * k * (_id_type(vocab_size).itemsize + 2)


def build(
    target: Model,
    params: PyTree,
    rows: Rows,
    k: int,
    path: str | Path,
    temperature: float = 1.0,
    batch_size: int = 16,
    place: Callable[[np.ndarray], Array] = jnp.asarray,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the directory `path`, going on with what an interrupted call has left.

    `path` appears when all of it is there; until then `path`.partial grows.

    Args:
      target: the teacher.
      params: its weights.
      rows: [N, T + 1] tokens.
      k: 1 to V.
      path: of the cache. One that is there, made from the same, stays as it is.
      temperature: of the law whose probabilities are kept; at the others they sum to less.
      batch_size: rows of one pass.
      place: puts tokens [B, T] on devices, for example split by rows.
      progress: called with (rows done, N).

    Raises:
      ValueError: `path` was made from something else, or an argument out of range.
    """
    path = Path(path)
    if not 1 <= k <= target.vocab_size:
        raise ValueError(f"k is {k}; need 1 to {target.vocab_size}, the vocabulary.")
    if temperature <= 0 or batch_size < 1:
        raise ValueError(
            f"temperature is {temperature} and batch_size {batch_size}; both must be positive."
        )
    header = _made_from(params, rows, k, temperature)
    if path.exists():
        _check(path, header)
        return
    partial = path.with_name(f"{path.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    num_rows, length = rows.tokens.shape[0], rows.tokens.shape[1] - 1
    shape = (num_rows, length, k)
    done = 0
    if (partial / _PROGRESS).is_file():
        left = json.loads((partial / _PROGRESS).read_text())
        done = left["rows"] if left["made_from"] == header else 0
    if not done:  # what it said was true of the arrays that now make room
        (partial / _PROGRESS).unlink(missing_ok=True)
    mode = "r+" if done else "w+"
    tokens, probs = (
        np.lib.format.open_memmap(partial / name, mode, dtype, shape if mode == "w+" else None)
        for name, dtype in ((_TOKENS, _id_type(target.vocab_size)), (_PROBS, np.float16))
    )

    while done < num_rows:
        # The last batch is filled with its own last row, so that one shape is compiled.
        which = np.minimum(np.arange(done, done + batch_size), num_rows - 1)
        sequences = place(np.asarray(rows.tokens[which, :-1], np.int32))
        ids, found = _likeliest(target, k, params, sequences, temperature)
        stop = min(done + batch_size, num_rows)
        tokens[done:stop] = np.asarray(ids)[: stop - done]
        probs[done:stop] = np.asarray(found)[: stop - done]
        # What counts as done is on disk before anything says so.
        tokens.flush()
        probs.flush()
        done = stop
        with replacing(partial / _PROGRESS) as file:
            file.write(json.dumps({"rows": done, "made_from": header}).encode())
        if progress is not None:
            progress(done, num_rows)
    with replacing(partial / _HEADER) as file:
        file.write(json.dumps(header).encode())
    os.replace(partial, path)


def attach(rows: Rows, path: str | Path, params: PyTree, k: int, temperature: float = 1.0) -> Rows:
    """Rows with the teacher's fields, mapped from disk; arguments as for `build`.

    Raises:
      ValueError: there is no cache, or it was made from something else.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(
            f"{path} does not exist; need a directory that `teacher_cache.build` wrote."
        )
    _check(path, _made_from(params, rows, k, temperature))
    tokens, probs = (np.load(path / name, mmap_mode="r") for name in (_TOKENS, _PROBS))
    return rows._replace(teacher_tokens=tokens, teacher_probs=probs)


@functools.partial(jax.jit, static_argnames=("target", "k"))
def _likeliest(
    target: Model, k: int, params: PyTree, sequences: Array, temperature: float
) -> tuple[Array, Array]:
    """Ids and probabilities [B, T, k], descending; ties go to the lowest id."""
    law = jax.nn.softmax(forward(target, params, sequences).logits / temperature)
    probs, ids = lax.top_k(law, k)
    return ids, probs


def _id_type(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)


def _made_from(params: PyTree, rows: Rows, k: int, temperature: float) -> dict[str, Any]:
    return {
        "target": fingerprint(params),
        "rows": fingerprint(rows.tokens),
        "num_rows": len(rows.tokens),
        "k": k,
        "temperature": temperature,
    }


def _check(path: Path, header: dict[str, Any]) -> None:
    try:
        found = json.loads((path / _HEADER).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a teacher cache; need another directory.") from error
    for key, value in header.items():
        if found.get(key) != value:
            raise ValueError(
                f"Teacher cache {path} has {key} {found.get(key)} but {value} is asked for; delete "
                "it or name another directory."
            )
