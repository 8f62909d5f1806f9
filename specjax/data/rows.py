"""Rows of tokens to learn from, whatever wrote them."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Sequences in memory or mapped into it; the fields are those of `objectives.Batch`."""

    tokens: np.ndarray  # [N, T + 1] integers
    weights: np.ndarray  # [N, T]: how much token i + 1 counts as something to predict
    teacher_tokens: np.ndarray | None = None  # [N, T, k], see `teacher_cache`
    teacher_probs: np.ndarray | None = None  # [N, T, k], descending


_DTYPES = (np.int32, np.float32, np.int32, np.float32)


def packed(sequences: np.ndarray) -> Rows:
    """Rows that count everywhere, of windows [N, T + 1] from `batches.pack`."""
    n, length = sequences.shape
    return Rows(sequences, np.broadcast_to(np.float32(1), (n, length - 1)))


def take(rows: Rows, indices: Any) -> dict[str, np.ndarray]:
    """Some rows as a batch: int32 tokens, float32 numbers; fields that are None are left out."""
    return {
        name: np.asarray(field[indices], dtype)
        for name, field, dtype in zip(Rows._fields, rows, _DTYPES, strict=True)
        if field is not None
    }


def concatenate(parts: Iterable[Rows]) -> Rows:
    """One after the other; parts without teacher fields."""
    found = list(parts)
    return Rows(
        np.concatenate([part.tokens for part in found]),
        np.concatenate([part.weights for part in found]),
    )


def check_alike(sources: dict[str, Rows]) -> None:
    """Rows that meet in one batch must have the same length and the same fields.

    Raises:
      ValueError: a source differs from the first.
    """

    def shape(rows: Rows) -> str:
        teacher = rows.teacher_tokens
        of = "no teacher" if teacher is None else f"the {teacher.shape[-1]} likeliest of a teacher"
        return f"rows of {rows.tokens.shape[1] - 1} tokens and {of}"

    (first, *others) = [(name, shape(rows)) for name, rows in sources.items()]
    for name, found in others:
        if found != first[1]:
            raise ValueError(
                f"Source {first[0]} has {first[1]} but source {name} {found}; they must be alike."
            )
