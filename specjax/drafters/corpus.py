"""Documents to draft from: a suffix array made by the host, searched inside a step.

Sorted suffixes (Manber and Myers, 1993) turn "where does this text occur" into a search for the two
ends of a range, so that a step costs about the same whatever the number of tokens. Nothing here is
a weight: a corpus is shared by all rows, lives in `params.drafter` and may be replaced between
calls.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.struct as struct
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from specjax.kernels.gather import gather
from specjax.kernels.search import search
from specjax.models import hf_config
from specjax.types import Array

COMPARED = 64  # tokens of a suffix that decide its place
LONGEST = COMPARED - 1  # match that can be searched for: what follows it is compared, too
_TENSORS, _FACTS = "corpus.safetensors", "corpus.json"


@struct.dataclass
class Corpus:
    """Documents, the oldest first, each followed by -1; the rest is -1, too.

    Equal beginnings of `COMPARED` tokens stand in the order of their starts.
    """

    tokens: Array  # [L] int32
    order: Array  # [L] int32, the starts of all suffixes in lexicographic order
    vocab_size: int = struct.field(pytree_node=False)
    # Of the tokens' meaning, "" if unknown: see `fingerprint`.
    tokenizer: str = struct.field(pytree_node=False, default="")


# ------------------------------------------------------------------------------ made by the host


def corpus(
    documents: Sequence[np.ndarray],
    vocab_size: int,
    capacity: int | None = None,
    tokenizer: str = "",
) -> Corpus:
    """A corpus of documents; those without a token are passed over.

    Args:
        documents: [T] integers each, the oldest first.
        vocab_size: V of the tokenizer they were made with.
        capacity: L, tokens and one end per document; by default as many as there are. Where they
            are more, the oldest documents are left out; one that is too long by itself, as the
            newest, keeps its end.
        tokenizer: its fingerprint.

    Raises:
        ValueError: no tokens at all, tokens outside the vocabulary, a capacity below 2.
    """
    pieces = [_checked(i, document, vocab_size) for i, document in enumerate(documents)]
    pieces = [piece for piece in pieces if len(piece)]
    if not pieces:
        raise ValueError(
            f"A corpus of {len(documents)} documents has 0 tokens; it needs at least 1."
        )
    return _of(pieces, vocab_size, capacity, tokenizer)


def empty(vocab_size: int, capacity: int, tokenizer: str = "") -> Corpus:
    """Room for documents that `updated` brings.

    Raises:
        ValueError: a capacity below 2.
    """
    return _of([], vocab_size, capacity, tokenizer)


def updated(old: Corpus, documents: Sequence[np.ndarray]) -> Corpus:
    """The same with newer documents, of the same shapes: programs compiled for `old` take it.

    The oldest documents make room, see `corpus`. All suffixes are sorted anew, about a second per
    million tokens of capacity.

    Raises:
        ValueError: tokens outside the vocabulary.
    """
    pieces = [_checked(i, document, old.vocab_size) for i, document in enumerate(documents)]
    tokens = np.asarray(old.tokens)
    ends = np.flatnonzero(tokens < 0)
    kept = [piece[piece >= 0] for piece in np.split(tokens, ends)]
    pieces = [piece for piece in [*kept, *pieces] if len(piece)]
    return _of(pieces, old.vocab_size, len(tokens), old.tokenizer)


def _checked(i: int, document: np.ndarray, vocab_size: int) -> np.ndarray:
    tokens = np.asarray(document)
    if tokens.size == 0:
        return np.zeros(0, np.int32)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"Document {i} is {tokens.dtype} of shape {tokens.shape}; need integers [T]."
        )
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(
            f"Document {i} has tokens {tokens.min()} to {tokens.max()}; "
            f"a vocabulary of {vocab_size} needs 0 to {vocab_size - 1}."
        )
    return tokens.astype(np.int32)


def _of(
    pieces: Sequence[np.ndarray], vocab_size: int, capacity: int | None, tokenizer: str
) -> Corpus:
    if capacity is None:
        capacity = sum(len(piece) + 1 for piece in pieces)
    if capacity < 2:
        raise ValueError(
            f"A corpus of capacity {capacity} has no room for a token and its document's end; "
            "it needs at least 2."
        )
    kept: list[np.ndarray] = []
    room = capacity
    for piece in reversed(pieces):
        if len(piece) + 1 > room and kept:
            break
        kept.append(piece[-(room - 1) :])
        room -= len(kept[-1]) + 1
        if room < 2:
            break
    tokens = np.full(capacity, -1, np.int32)
    at = 0
    for piece in reversed(kept):
        tokens[at : at + len(piece)] = piece
        at += len(piece) + 1
    order = suffix_array(tokens)
    return Corpus(jnp.asarray(tokens), jnp.asarray(order), vocab_size, tokenizer)


def suffix_array(tokens: np.ndarray) -> np.ndarray:
    """The starts of all suffixes [L] in the order of their first `COMPARED` tokens, then by start.

    Prefix doubling: the order by twice as many tokens is that of pairs of ranks. A suffix that has
    ended precedes those that go on.

    Args:
        tokens: [L] int32, at least -1.
    """
    size = len(tokens)
    rank, span = tokens.astype(np.int64) + 2, 1
    while True:
        later = np.zeros(size, np.int64)
        later[: max(size - span, 0)] = rank[span:]
        pairs = rank * (rank.max() + 1) + later
        order = np.argsort(pairs, kind="stable")
        ordered = pairs[order]
        is_new = np.concatenate([[True], ordered[1:] != ordered[:-1]])
        rank = np.empty(size, np.int64)
        rank[order] = np.cumsum(is_new)
        span *= 2
        if span >= COMPARED or is_new.all():
            return order.astype(np.int32)


# ------------------------------------------------------------------------------------- directories


def fingerprint(vocabulary: Mapping[str, int]) -> str:
    """16 hex digits of the SHA-256 of a tokenizer's tokens and their ids."""
    listed = json.dumps(sorted((i, token) for token, i in vocabulary.items()))
    return hashlib.sha256(listed.encode()).hexdigest()[:16]


def save(saved: Corpus, directory: str | Path, about: Mapping[str, Any] | None = None) -> None:
    """Writes corpus.safetensors and corpus.json, making the directory where it is missing.

    Args:
        saved: what `load` gives back.
        directory: to write to.
        about: what else corpus.json is to tell people.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(getattr(saved, name)) for name in ("tokens", "order")}
    (directory / _FACTS).unlink(missing_ok=True)  # it comes last: without it nothing is read
    safetensors.numpy.save_file(arrays, directory / _TENSORS)
    facts = {
        "vocab_size": saved.vocab_size,
        "tokenizer": saved.tokenizer,
        "capacity": len(arrays["tokens"]),
        "compared": COMPARED,
        **(about or {}),
    }
    hf_config.write_json(directory / _FACTS, facts)


def load(directory: str | Path, tokenizer: str = "") -> Corpus:
    """Reads what `save` wrote.

    Args:
        directory: with both files.
        tokenizer: the fingerprint of the one that the target uses; "" takes any.

    Raises:
        ValueError: a file that is missing or damaged, a corpus without tokens, one made with
            another tokenizer.
    """
    directory = Path(directory)
    facts = hf_config.read_json(directory / _FACTS)
    path = directory / _TENSORS
    try:
        arrays = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); make the corpus again.") from error
    made_with = facts.get("tokenizer")
    if tokenizer and made_with != tokenizer:
        raise ValueError(
            f"{directory} was made with tokenizer {made_with!r} but the target's is {tokenizer!r}; "
            "make the corpus again."
        )
    if wrong := _damage(facts, arrays):
        raise ValueError(f"{directory} {wrong}; make the corpus again.")
    if not (arrays["tokens"] >= 0).any():
        raise ValueError(
            f"{directory} has 0 tokens in {facts['capacity']} places; it needs at least 1."
        )
    tokens, order = (jnp.asarray(arrays[name]) for name in ("tokens", "order"))
    return Corpus(tokens, order, facts["vocab_size"], facts["tokenizer"])


def _damage(facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """What is wrong with the contents of a directory, if anything is."""
    kinds = {"vocab_size": int, "capacity": int, "compared": int, "tokenizer": str}
    for name, kind in kinds.items():
        if type(facts.get(name)) is not kind:
            return f"gives {name} as {facts.get(name)!r}, which is no {kind.__name__}"
    if facts["compared"] != COMPARED:
        return f"sorted suffixes by {facts['compared']} tokens, not by {COMPARED}"
    for name in ("tokens", "order"):
        x = arrays.get(name)
        if x is None or x.shape != (facts["capacity"],) or x.dtype != np.int32:
            found = "nothing" if x is None else f"{x.dtype} {list(x.shape)}"
            return f"has {found} for {name}, not int32 [{facts['capacity']}]"
    tokens, order = arrays["tokens"], arrays["order"]
    if tokens.size < 2 or tokens.min() < -1 or tokens.max() >= facts["vocab_size"]:
        return f"has tokens outside its vocabulary of {facts['vocab_size']}"
    if tokens[-1] != -1 or not (np.sort(order) == np.arange(order.size)).all():
        return "has an order that is none of its suffixes"
    return ""


# --------------------------------------------------------------------------------- inside a step


def expect(drafter: str, found: Any, vocab_size: int) -> None:
    """Refuses weights that are no corpus of the target's tokens, while a step is traced.

    Raises:
        ValueError: they are something else, or the vocabularies differ.
    """
    if not isinstance(found, Corpus):
        raise ValueError(
            f"{drafter} has a {type(found).__name__} in params.drafter; it needs a Corpus."
        )
    if found.vocab_size != vocab_size:
        raise ValueError(
            f"The corpus has a vocabulary of {found.vocab_size} tokens and the target one of "
            f"{vocab_size}; they must be the same."
        )


def ranges(
    corpus: Corpus, tokens: Array, length: Array, sizes: Sequence[int] | np.ndarray
) -> tuple[Array, Array]:
    """Where each row's newest tokens occur in documents and are followed by more.

    Args:
        corpus: to search.
        tokens: [B, S] history.
        length: [B].
        sizes: M numbers of newest tokens, each searched for, 1 to `LONGEST`.

    Returns:
        The first place in `corpus.order` [B, M] and the number of places [B, M], 0 where the
        history is shorter.
    """
    size = np.asarray(sizes, np.int32)
    place = np.arange(size.max(), dtype=np.int32)
    newest = jnp.maximum(length[:, None, None] - size[:, None] + place, 0)
    newest = jnp.minimum(newest, tokens.shape[1] - 1).reshape(len(tokens), -1)
    wanted = jnp.take_along_axis(tokens, newest, 1).reshape(len(tokens), *size.shape, -1)
    bound = search(corpus.order, corpus.tokens, wanted, size)
    count = jnp.where(length[:, None] >= size, bound[..., 1] - bound[..., 0], 0)
    return bound[..., 0], count


def continuations(
    corpus: Corpus, first: Array, count: Array, size: Array, num_matches: int, num_tokens: int
) -> tuple[Array, Array]:
    """What follows matches, a sample of them where they are many.

    Places of a range are sorted by what follows. So `num_matches` of them at equal distances stand
    for all: what follows a share s of the matches follows s of the sample, up to one place. A
    sample of one is the median, which has the majority's next token if there is a majority.

    Args:
        corpus: searched by `ranges`.
        first: [...] of its result.
        count: [...] of its result.
        size: [...] int32, of the match.
        num_matches: K, places of a range that are looked at, at most.
        num_tokens: D, of a continuation.

    Returns:
        Tokens [..., K, D], garbage beyond their lengths, and lengths [..., K]: 1 to D, as far as
        the document goes, or 0 where there is no such match.
    """
    which = jnp.arange(num_matches, dtype=jnp.int32)
    is_there = which < count[..., None]
    stride, rest = count[..., None] // num_matches, count[..., None] % num_matches
    # Multiplied out, a large count would overflow.
    spread = which * stride + which * rest // num_matches + stride // 2
    which = first[..., None] + jnp.where(count[..., None] > num_matches, spread, which)
    # What is not there is read all the same, but not from all over the corpus.
    which = jnp.where(is_there, which, 0)
    start = gather(corpus.order, which, 1)[..., 0] + size[..., None]
    tokens = gather(corpus.tokens, start, num_tokens)
    depth = jnp.arange(num_tokens, dtype=jnp.int32)
    length = jnp.where(tokens < 0, depth, num_tokens).min(-1)
    return tokens, jnp.where(is_there, length, 0)
