"""Prompts: from files or from held-out text, as tokens, in padded batches."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from specjax import engine
from specjax.data import sources


class Batch(NamedTuple):
    """Prompts as `engine.prefill` takes them. Rows that pad the last batch have limit 1: they
    are done from the start."""

    tokens: np.ndarray  # [B, T] int32, garbage from `length` on
    length: np.ndarray  # [B] int32
    limit: np.ndarray  # [B] int32
    which: np.ndarray  # [B] int32, of all prompts; a row's randomness depends on it


def read(path: str | Path) -> list[str]:
    """The prompts of a file: one per line, or of `.jsonl` each line's "prompt".

    Raises:
        ValueError: as `requests`; a line that holds no text.
    """
    found = requests(path)
    for i, request in enumerate(found, 1):
        if "prompt" not in request:
            raise ValueError(f'Prompt {i} of {path} has no "prompt" but {[*request]}; need text.')
    return [request["prompt"] for request in found]


def requests(path: str | Path) -> list[dict[str, Any]]:
    """What a file asks for: a "prompt" per line, or `.jsonl` with "prompt" or "messages" in each.

    Raises:
        ValueError: no such file, nothing in it, or a line that holds neither or both.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; need a file of prompts.")
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8; need a text file of prompts.") from error
    if not lines:
        raise ValueError(f"{path} is empty; need at least one prompt.")
    if path.suffix != ".jsonl":
        return [{"prompt": line} for line in lines]
    found = []
    for i, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            found.append(None)
        given = [*found[-1]] if isinstance(found[-1], dict) else []
        if ("prompt" in given) == ("messages" in given):
            raise ValueError(
                f'Prompt {i} of {path} is {line[:40]!r}; need a JSON object with "prompt" or '
                '"messages".'
            )
        if "prompt" in given and not isinstance(found[-1]["prompt"], str):
            raise ValueError(f"Prompt {i} of {path} is {found[-1]['prompt']!r:.60}; need text.")
    return found


def encode(texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Each text's tokens [T], with whatever the tokenizer itself puts around them.

    Raises:
        ValueError: a text is empty.
    """
    for i, text in enumerate(texts, 1):
        if not text:
            raise ValueError(f"Prompt {i} of {len(texts)} is empty; need at least one character.")
    return [np.asarray(tokenizer.encode(text).ids, np.int32) for text in texts]


def held_out(tokenizer: Tokenizer, num_prompts: int, length: int, seed: int) -> list[np.ndarray]:
    """Windows [length] of the standard library's held-out files, which no demo model saw.

    Raises:
        ValueError: fewer than one prompt or token, or longer than the text.
    """
    if num_prompts < 1 or length < 1:
        raise ValueError(f"{num_prompts} prompts of {length} tokens; need at least 1 of 1.")
    documents = sources.split(sources.standard_library())[1]
    texts = [np.asarray(tokenizer.encode(d.text).ids, np.int32) for d in documents]
    texts = [text for text in texts if len(text) >= length]
    if not texts:
        raise ValueError(f"No held-out file has {length} tokens; choose a shorter prompt length.")
    rng = np.random.default_rng(seed)
    prompts = []
    for _ in range(num_prompts):
        text = texts[rng.integers(len(texts))]
        start = rng.integers(len(text) - length + 1)
        prompts.append(text[start : start + length])
    return prompts


def batches(
    prompts: Sequence[np.ndarray],
    batch_size: int,
    max_new_tokens: int | np.ndarray,
    context: int,
) -> list[Batch]:
    """Batches of one shape.

    Args:
        prompts: tokens [T] each.
        batch_size: B.
        max_new_tokens: a row ends after so many, or at the end of the context; one or one each.
        context: the positions that the models have.

    Raises:
        ValueError: a prompt that is empty or fills the context, nothing to generate, no batch.
    """
    if batch_size < 1 or np.min(max_new_tokens) < 1:
        raise ValueError(
            f"batch_size is {batch_size} and max_new_tokens {max_new_tokens}; both must be at "
            "least 1."
        )
    for i, prompt in enumerate(prompts, 1):
        if not 1 <= len(prompt) < context:
            raise ValueError(
                f"Prompt {i} of {len(prompts)} has {len(prompt)} tokens; the context is {context}, "
                f"so it needs 1 to {context - 1}."
            )
    width = engine.bucket(max(len(prompt) for prompt in prompts))
    most = np.broadcast_to(max_new_tokens, [len(prompts)])
    found = []
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        tokens = np.zeros((batch_size, width), np.int32)
        length, limit = np.ones(batch_size, np.int32), np.ones(batch_size, np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
            length[i], limit[i] = len(row), min(len(row) + most[start + i], context)
        found.append(Batch(tokens, length, limit, np.arange(start, start + batch_size)))
    return found


def max_length(found: Sequence[Batch]) -> int:
    """The length of buffers that hold every batch."""
    return engine.bucket(max(max(b.tokens.shape[1], int(b.limit.max())) for b in found))
