"""From documents to packed rows, and from rows to batches that resume exactly."""

import functools
import sys
from collections.abc import Callable, Sequence

import grain
import numpy as np
from tokenizers import Tokenizer

from specjax.data.sources import Document

_DOCUMENTS_AT_ONCE = 64


def encode(documents: Sequence[Document], tokenizer: Tokenizer, end_id: int) -> np.ndarray:
    """All documents in one row, each followed by `end_id`: int32 [num_tokens].

    Raises:
      ValueError: there are no documents.
    """
    if not documents:
        raise ValueError("0 documents to encode; need at least 1")
    pieces: list[np.ndarray] = []
    # Encodings are far larger than their ids; a few documents at a time keep memory flat.
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        texts = [document.text for document in documents[start : start + _DOCUMENTS_AT_ONCE]]
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            pieces.append(np.asarray([*encoding.ids, end_id], np.int32))
    return np.concatenate(pieces)


def pack(tokens: np.ndarray, length: int) -> np.ndarray:
    """Consecutive windows that share one token: int32 [num_sequences, length + 1].

    Inputs `x[:, :-1]` hold every token once, and so do labels `x[:, 1:]` one place further on.
    Tokens that do not fill a last window are dropped.

    Raises:
      ValueError: `length` is not positive or there are fewer than `length + 1` tokens.
    """
    if length < 1:
        raise ValueError(f"length is {length}; need 1 or more")
    if len(tokens) < length + 1:
        raise ValueError(
            f"The text has {len(tokens)} tokens; a sequence of {length} needs {length + 1}."
        )
    windows = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)
    return windows[::length].astype(np.int32)


def order(num_rows: int, seed: int, *stream: int) -> Callable[[int, int], np.ndarray]:
    """(start, stop) -> that part of an endless list of row numbers, int64 [stop - start].

    Each number comes once an epoch, every epoch in a new order, which depends on `seed`, `stream`
    and the epoch alone. (Grain's own shuffle is slow, and far from uniform, for few rows.)
    """

    @functools.lru_cache(maxsize=2)
    def epoch(number: int) -> np.ndarray:
        entropy = np.random.SeedSequence(seed, spawn_key=(*stream, number))
        return np.random.default_rng(entropy).permutation(num_rows)

    def numbers(start: int, stop: int) -> np.ndarray:
        return np.array([epoch(i // num_rows)[i % num_rows] for i in range(start, stop)], np.int64)

    return numbers


def stream(
    batch_of: Callable[[int], dict[str, np.ndarray]], prefetch: int
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """An endless iterator over `batch_of(0)`, `batch_of(1)` and so on.

    Its state is the number of batches handed out, whatever a thread has made ahead: from
    `get_state()`, a JSON-able dict, `set_state()` resumes exactly.

    Args:
      batch_of: the batch of each step, whatever was asked for before; called by one thread at
        a time.
      prefetch: batches that a thread makes ahead; 0 makes each when it is asked for.
    """
    if prefetch < 0:
        raise ValueError(f"prefetch is {prefetch}; need 0 or more batches.")
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.range(sys.maxsize).map(batch_of).to_iter_dataset(options))


def shard(batch_size: int, shard_index: int, num_shards: int) -> range:
    """The rows of every batch that one process makes: a stretch of them, in the order of processes.

    Raises:
      ValueError: the batch is empty or cannot be divided, or there is no such process.
    """
    if batch_size < 1 or num_shards < 1 or batch_size % num_shards:
        raise ValueError(
            f"batch_size is {batch_size} and num_shards {num_shards}; need a positive multiple."
        )
    if not 0 <= shard_index < num_shards:
        raise ValueError(f"shard_index is {shard_index}; need 0 to {num_shards - 1}.")
    size = batch_size // num_shards
    return range(shard_index * size, (shard_index + 1) * size)


def bytes_per_token(documents: Sequence[Document], tokens: np.ndarray) -> float:
    """UTF-8 bytes per token: a loss in nats / (this * log 2) is a loss in bits per byte.

    Args:
      documents: the text.
      tokens: its encoding [num_tokens], document ends counted.
    """
    return sum(len(document.text.encode()) for document in documents) / len(tokens)
