"""Rows that a model writes itself, with the project's own decoder.

DistillSpec (arXiv 2310.08461) finds that what a draft learns from matters as much as the loss: text
that the target writes, or the draft itself, serves better than text found elsewhere. A row is one
prompt, its continuation and padding. Rows are not packed together: whatever comes second in a row
would be read after the first, and no longer be what the model writes after its prompt.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specjax import engine, prompts
from specjax.data.rows import Rows
from specjax.sampling import sampling
from specjax.types import Array, Decoder, Params


def windows(tokens: np.ndarray, length: int, num_prompts: int, seed: int) -> list[np.ndarray]:
    """Prompts [length] from a stream of tokens, one from each of `num_prompts` equal stretches.

    Prompts overlap where the stream is too short for so many.

    Raises:
      ValueError: fewer than one prompt or token, or a stream shorter than a prompt.
    """
    if num_prompts < 1 or length < 1:
        raise ValueError(f"{num_prompts} prompts of {length} tokens; need at least 1 of 1.")
    if len(tokens) < length:
        raise ValueError(f"{len(tokens)} tokens; need {length} or more for prompts of {length}.")
    within = np.random.default_rng(seed).random(num_prompts)
    starts = (np.arange(num_prompts) + within) / num_prompts * (len(tokens) - length + 1)
    return [tokens[i : i + length].astype(np.int32) for i in starts.astype(np.int64)]


def generate(
    decoder: Decoder,
    params: Params,
    texts: Sequence[np.ndarray],
    length: int,
    batch_size: int,
    temperature: float | Sequence[float] = 1.0,
    seed: int = 0,
    first_row: int = 0,
    place: Callable[[Array], Array] = jnp.asarray,
    progress: Callable[[int, int], None] | None = None,
) -> Rows:
    """Continues every prompt until its row is full or the model ends it.

    Only what the model wrote counts: weights are 0 where a token of the prompt is predicted and
    from the end on, where tokens are 0. A row depends on the weights, `seed` and its number alone,
    and under `match` on the target's weights alone. `shards.write` keeps many rows on disk.

    Args:
      decoder: ends a row after one of its `eos_ids`.
      params: its weights.
      texts: prompts, of 1 to `length` tokens each.
      length: T; rows are [T + 1], prompt included.
      batch_size: rows decoded together.
      temperature: of every row, or several that take turns by the row's number.
      seed: of the randomness.
      first_row: the number of the first row, where this is a part of more.
      place: puts an array [B, ...] on devices, for example split by rows.
      progress: called with (rows written, all rows).

    Raises:
      ValueError: no prompt, one that is empty or too long, no batch, or a temperature below 0.
    """
    if not texts:
        raise ValueError("0 prompts to continue; need at least 1.")
    temperatures = np.atleast_1d(np.asarray(temperature, np.float32))
    if temperatures.ndim != 1 or not len(temperatures):
        raise ValueError(f"temperature is {temperature}; need a number or several of them.")
    # A full row, not a number of new tokens, is the end: no part of a batch is wasted.
    found = prompts.batches(texts, batch_size, length, length + 1)
    max_length = prompts.max_length(found)
    tokens = np.zeros((len(texts), length + 1), np.int32)
    weights = np.zeros((len(texts), length), np.float32)
    for batch in found:
        row = first_row + batch.which
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(row))
        asked = sampling(len(row), temperatures[row % len(temperatures)])
        keys, asked, prompt, prompt_length, limit = jax.tree.map(
            place, (keys, asked, batch.tokens, batch.length, batch.limit)
        )
        state = engine.decode(
            decoder, params, keys, asked, prompt, prompt_length, limit, max_length
        )
        stop = min(int(batch.which[-1]) + 1, len(texts))
        part = slice(int(batch.which[0]), stop)
        n = part.stop - part.start
        ends = np.asarray(state.context.length)[:n, None]
        position = np.arange(length + 1)
        written = np.asarray(state.context.tokens)[:n, : length + 1]
        tokens[part] = np.where(position < ends, written, 0)
        weights[part] = ((position >= batch.length[:n, None]) & (position < ends))[:, 1:]
        if progress is not None:
            progress(stop, len(texts))
    return Rows(tokens, weights)
