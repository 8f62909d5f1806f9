"""From documents to resumable batches of packed token sequences."""

from collections.abc import Sequence

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
        raise ValueError(f"{len(tokens)} tokens; need {length + 1} or more for length {length}")
    windows = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)
    return windows[::length].astype(np.int32)


def batches(sequences: np.ndarray, batch_size: int, seed: int) -> grain.DatasetIterator[np.ndarray]:
    """An endless iterator over int32 batches [batch_size, length + 1], each epoch in a new order.

    Epochs follow each other without a gap: a batch may hold the end of one and the start of the
    next. `get_state()` is a JSON-able dict from which `set_state()` resumes exactly.

    Args:
      sequences: int32 [num_sequences, length + 1].
      batch_size: sequences per batch.
      seed: fixes the order of every epoch.

    Raises:
      ValueError: `batch_size` is not in 1 to num_sequences.
    """
    if not 1 <= batch_size <= len(sequences):
        raise ValueError(f"batch_size is {batch_size}; need 1 to {len(sequences)}, the sequences")
    dataset = (
        grain.MapDataset.source(sequences)
        .shuffle(seed)
        .repeat()
        .batch(batch_size, drop_remainder=True)
    )
    # The rows are in memory already, so threads that read ahead would only cost.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(dataset.to_iter_dataset(options))


def bytes_per_token(documents: Sequence[Document], tokens: np.ndarray) -> float:
    """UTF-8 bytes per token: a loss in nats / (this * log 2) is a loss in bits per byte.

    Args:
      documents: the text.
      tokens: its encoding [num_tokens], document ends counted.
    """
    return sum(len(document.text.encode()) for document in documents) / len(tokens)
