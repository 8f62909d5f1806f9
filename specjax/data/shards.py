"""Rows on disk, in chunks that are each written as a whole: an interrupted writer goes on.

Every chunk carries what it was made from, so a directory is complete when all its chunks are there,
and rows of two makings never mix.
"""

import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from specjax.data.atomic import replacing
from specjax.data.rows import Rows, concatenate

_PATTERN = "rows_*.npz"
_DAMAGE = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)


def write(
    directory: str | Path,
    made_from: Mapping[str, Any],
    num_rows: int,
    make: Callable[[int, int], Rows],
    chunk_rows: int = 256,
    replace: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Rows:
    """The rows of a directory, made where they are not there yet.

    Args:
      directory: made where it is missing.
      made_from: all that decides what the rows are, JSON-able: fingerprints, seed, lengths.
      num_rows: N.
      make: (start, stop) -> rows start to stop - 1, which must not depend on the division.
      chunk_rows: rows of a file; those of one unfinished file are lost when the process is killed.
      replace: whether rows made from something else give way, instead of being refused.
      progress: called with (rows that are there, N).

    Raises:
      ValueError: the directory holds rows made from something else, or nothing is asked for.
    """
    if num_rows < 1 or chunk_rows < 1:
        raise ValueError(f"num_rows is {num_rows} and chunk_rows {chunk_rows}; need 1 or more.")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    header = _header(made_from, num_rows, chunk_rows)
    for path in sorted(directory.glob(_PATTERN)):
        if (found := _read_header(path)) != header:
            if not replace:
                raise ValueError(
                    f"{directory} holds rows made from {found} but {header} is asked for; delete "
                    "it or name another directory."
                )
            path.unlink()
    for start in range(0, num_rows, chunk_rows):
        stop = min(start + chunk_rows, num_rows)
        path = _path(directory, start // chunk_rows)
        if not path.exists():
            rows = make(start, stop)
            if len(rows.tokens) != stop - start:
                raise ValueError(f"{len(rows.tokens)} rows were made; need {stop - start}.")
            with replacing(path) as file:
                np.savez_compressed(
                    file,
                    made_from=np.array(header),
                    tokens=rows.tokens.astype(np.int32),
                    weights=rows.weights.astype(np.float32),
                )
        if progress is not None:
            progress(stop, num_rows)
    return read(directory)


def read(directory: str | Path) -> Rows:
    """The rows of a complete directory, whatever they were made from.

    Raises:
      ValueError: there are none, some are missing, or a file is damaged.
    """
    paths = sorted(Path(directory).glob(_PATTERN))
    if not paths:
        raise ValueError(f"{directory} holds no rows; need a directory of {_PATTERN}.")
    size = json.loads(_read_header(paths[0]))
    num_chunks = -(-size["num_rows"] // size["chunk_rows"])
    if [path.name for path in paths] != [_path(Path(), i).name for i in range(num_chunks)]:
        raise ValueError(f"{directory} holds {len(paths)} of {num_chunks} files; finish it first.")
    parts = []
    for path in paths:
        try:
            with np.load(path) as file:
                parts.append(Rows(file["tokens"], file["weights"]))
        except _DAMAGE as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and finish again.") from error
    return concatenate(parts)


def _path(directory: Path, chunk: int) -> Path:
    return directory / f"rows_{chunk:06d}.npz"


def _header(made_from: Mapping[str, Any], num_rows: int, chunk_rows: int) -> str:
    made = {"made_from": dict(made_from), "num_rows": num_rows, "chunk_rows": chunk_rows}
    return json.dumps(made, sort_keys=True)


def _read_header(path: Path) -> str:
    try:
        with np.load(path) as file:
            return str(file["made_from"])
    except _DAMAGE as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and finish again.") from error
