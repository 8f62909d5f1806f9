"""What it takes to test a drafter or a verifier: tiny models, exact laws, references, statistics.

A losslessness test enumerates the target's joint law of a few tokens exactly (`exact_law`), decodes
many rows, counts (`count_strings`) and compares (`law_test`); `sample_size` tells how many rows a
fault of a given size takes. Where the output is determined token for token, `greedy_reference` and
`sample_reference` compute it without caches, trees or drafts. `whole_buffer_ops` finds what a
compiled loop does to whole caches.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax.models.transformer import TransformerConfig, forward, transformer
from specjax.sampling import shared_gumbel, streams, warp
from specjax.types import Array, Keys, Model, PyTree, Sampling

# ------------------------------------------------------------------------------------------- models


def tiny_model(
    vocab_size: int,
    num_layers: int = 2,
    hidden_size: int = 16,
    seed: int = 0,
    scale: float = 25.0,
    num_heads: int = 2,
    num_kv_heads: int = 1,
    head_dim: int = 8,
    feature_layers: tuple[int, ...] = (),
    dtype: jnp.dtype = jnp.float32,
    cache_dtype: jnp.dtype | None = None,
) -> tuple[Model, PyTree]:
    """A model small enough to enumerate, and its weights.

    Freshly initialised weights predict nearly nothing, and every rule looks lossless on a uniform
    law; `scale` multiplies all matrices so that the laws are uneven and depend on what came before.
    The head is not tied to the embedding, which would favour repeating the last token.
    """
    config = TransformerConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size + hidden_size // 2,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        tie_embeddings=False,
    )
    model = transformer(config, dtype, feature_layers, cache_dtype)
    params = jax.jit(transformer(config, jnp.float32, feature_layers).init)(jax.random.key(seed))
    params = jax.tree.map(lambda x: x * scale if x.ndim > 1 else x, params)
    return model, jax.tree.map(lambda x: x.astype(dtype), params)


# --------------------------------------------------------------------------------------------- laws


def conditional_laws(
    model: Model,
    params: PyTree,
    prompt: Sequence[int] | np.ndarray,
    sampling: Sampling,
    horizon: int,
    eos_id: int | None = None,
) -> np.ndarray:
    """Each token's probability given what is before it, by teacher forcing every continuation.

    Args:
        model: the target.
        params: its weights.
        prompt: [T] tokens.
        sampling: of one row, every array [1].
        horizon: H.
        eos_id: a token that is followed by itself only.

    Returns:
        [V ** H, H] float64, for every string of H tokens, the first the most significant digit.
    """
    v, t = model.vocab_size, len(prompt)
    strings = np.array(list(itertools.product(range(v), repeat=horizon)))
    n = len(strings)
    tokens = np.concatenate([np.tile(np.asarray(prompt), (n, 1)), strings], 1)
    logits = jax.jit(lambda x: forward(model, params, x).logits)(jnp.asarray(tokens, jnp.int32))
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, [n]), sampling)
    weights = np.asarray(warp(logits[:, t - 1 : t - 1 + horizon], rows), np.float64)
    laws = np.exp(weights - weights.max(-1, keepdims=True))
    laws /= laws.sum(-1, keepdims=True)  # [V ** H, H, V]
    if eos_id is not None:
        ended = np.cumsum(strings == eos_id, 1) - (strings == eos_id) > 0
        laws = np.where(ended[..., None], np.arange(v) == eos_id, laws)
    return np.take_along_axis(laws, strings[..., None], 2)[..., 0]


def exact_law(
    model: Model,
    params: PyTree,
    prompt: Sequence[int] | np.ndarray,
    sampling: Sampling,
    horizon: int,
    eos_id: int | None = None,
) -> np.ndarray:
    """The joint law [V ** H] of the next H tokens; arguments as for `conditional_laws`."""
    return conditional_laws(model, params, prompt, sampling, horizon, eos_id).prod(1)


def count_strings(
    tokens: np.ndarray,
    start: np.ndarray,
    length: np.ndarray,
    horizon: int,
    vocab_size: int,
    eos_id: int | None = None,
) -> np.ndarray:
    """How often each string of `horizon` tokens begins at `start`, [V ** H] int.

    Args:
        tokens: [B, S] decoded rows.
        start: [B], where the generated text begins.
        length: [B]; a row that ends before `start + horizon` must have ended with `eos_id`.
        horizon: H.
        vocab_size: V.
        eos_id: continues rows that ended, as in `exact_law`.

    Raises:
        ValueError: a row is too short and did not end with `eos_id`.
    """
    at = np.asarray(start)[:, None] + np.arange(horizon)
    length = np.asarray(length)
    ended = at >= length[:, None]
    last = np.take_along_axis(tokens, length[:, None] - 1, 1)[:, 0]
    if (ended.any(1) & ((last != eos_id) | (length <= start))).any():
        raise ValueError(f"Some rows have fewer than {horizon} new tokens and no EOS.")
    strings = np.take_along_axis(tokens, np.minimum(at, tokens.shape[1] - 1), 1)
    strings = np.where(ended, 0 if eos_id is None else eos_id, strings)
    digits = vocab_size ** np.arange(horizon)[::-1]
    return np.bincount((strings * digits).sum(1), minlength=vocab_size**horizon)


# --------------------------------------------------------------------------------------- statistics


class LawTest(NamedTuple):
    """The outcome of `law_test`."""

    p_value: float  # of the counts, were the law true
    threshold: float  # the p-value below which the law is refuted
    statistic: float  # chi-square
    dof: int  # its degrees of freedom
    num_rows: int
    impossible: int  # rows in cells of probability 0

    @property
    def passed(self) -> bool:
        return self.impossible == 0 and self.p_value >= self.threshold


def law_test(
    counts: np.ndarray,
    law: np.ndarray,
    num_tests: int,
    family_error: float = 1e-3,
    smallest_expectation: float = 5.0,
) -> LawTest:
    """Pearson's chi-square test that `counts` were drawn from `law`.

    Cells expected less often than `smallest_expectation` are pooled; a single row in a cell of
    probability 0 refutes the law.

    Args:
        counts: [C] int.
        law: [C], sums to 1.
        num_tests: how many such tests are run in all, those of other cases included. All of them
            together refute a true law with probability `family_error` at most.
    """
    counts, law = np.asarray(counts), np.asarray(law, np.float64)
    n = int(counts.sum())
    possible = law > 0
    impossible = int(counts[~possible].sum())
    observed, expected = _pool(counts[possible], law[possible] * n, smallest_expectation)
    statistic = float(((observed - expected) ** 2 / expected).sum())
    dof = len(expected) - 1
    p_value = float(_stats().chi2.sf(statistic, dof)) if dof else 1.0
    return LawTest(p_value, family_error / num_tests, statistic, dof, n, impossible)


def _pool(
    observed: np.ndarray, expected: np.ndarray, smallest: float
) -> tuple[np.ndarray, np.ndarray]:
    """Merges the rarest cells until every cell is expected `smallest` times."""
    order = np.argsort(-expected, kind="stable")
    observed, expected = observed[order], expected[order]
    start = int((expected >= smallest).sum())
    if start and expected[start:].sum() < smallest:
        start -= 1  # the pool itself is too rare: the rarest of the others joins it
    return (
        np.append(observed[:start], observed[start:].sum()),
        np.append(expected[:start], expected[start:].sum()),
    )


def power(
    num_rows: int, num_cells: int, delta: float, num_tests: int, family_error: float = 1e-3
) -> float:
    """The probability with which `law_test` refutes a law that is wrong by `delta`.

    `delta` is the total variation distance. Among all laws that far away the one hardest to see is
    meant: its chi-square is noncentral with parameter `num_rows * (2 * delta) ** 2`, which is the
    least that Cauchy and Schwarz allow; an actual fault is more conspicuous.
    """
    stats = _stats()
    critical = stats.chi2.isf(family_error / num_tests, num_cells - 1)
    return float(stats.ncx2.sf(critical, num_cells - 1, num_rows * (2 * delta) ** 2))


def sample_size(
    num_cells: int,
    delta: float,
    num_tests: int,
    detection: float = 0.99,
    family_error: float = 1e-3,
) -> int:
    """The rows with which `power` reaches `detection` for a law that is wrong by `delta`."""
    low, high = 0, 1
    while power(high, num_cells, delta, num_tests, family_error) < detection:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        enough = power(middle, num_cells, delta, num_tests, family_error) >= detection
        low, high = (low, middle) if enough else (middle, high)
    return high


def _stats() -> Any:
    try:
        import scipy.stats
    except ImportError as error:
        raise ImportError(
            "Statistical tests need scipy; install it or specjax's `test` extra."
        ) from error
    return scipy.stats


# --------------------------------------------------------------------------------------- references


class Reference(NamedTuple):
    """What plain decoding writes, computed without caches, trees and drafts."""

    tokens: np.ndarray  # [B, S] int32, prompt included, never ending
    margin: np.ndarray  # [B, S], by how much each token beat the runner-up; inf on the prompt


def greedy_reference(
    model: Model, params: PyTree, prompt: np.ndarray, prompt_length: np.ndarray, max_length: int
) -> Reference:
    """The likeliest token after every prefix, ties to the lowest id.

    Args:
        model: the target.
        params: its weights.
        prompt: [B, T] int32.
        prompt_length: [B].
        max_length: S.
    """
    return _reference(model, params, prompt, prompt_length, max_length, lambda x, position: x)


def sample_reference(
    model: Model,
    params: PyTree,
    rng_keys: Array,
    sampling: Sampling,
    prompt: np.ndarray,
    prompt_length: np.ndarray,
    max_length: int,
) -> Reference:
    """Plain sampling with each position's shared noise: what `match` writes, whatever the draft.

    Args:
        rng_keys: [B] keys, as for `engine.decode`.
        sampling: of every row; a greedy row is none of its business, see `greedy_reference`.
    """
    keys = streams(rng_keys)

    @jax.jit
    def perturb(keys: Keys, logits: Array, position: Array) -> Array:
        noise = shared_gumbel(keys, jnp.full(logits.shape[:1], position), model.vocab_size)
        return warp(logits[:, None], sampling)[:, 0] + noise

    return _reference(
        model,
        params,
        prompt,
        prompt_length,
        max_length,
        lambda x, position: np.asarray(perturb(keys, jnp.asarray(x), position)),
    )


def _reference(
    model: Model,
    params: PyTree,
    prompt: np.ndarray,
    prompt_length: np.ndarray,
    max_length: int,
    score: Callable[[np.ndarray, int], np.ndarray],
) -> Reference:
    b, t = prompt.shape
    tokens = np.zeros((b, max_length), np.int32)
    tokens[:, :t] = prompt
    margin = np.full((b, max_length), np.inf)
    logits_of = jax.jit(lambda x: forward(model, params, x).logits)
    for position in range(1, max_length):
        logits = np.asarray(logits_of(jnp.asarray(tokens)))[:, position - 1]
        scores = score(logits, position)
        first, second = -np.sort(-scores, 1)[:, :2].T
        generated = position >= prompt_length
        tokens[:, position] = np.where(generated, scores.argmax(1), tokens[:, position])
        margin[:, position] = np.where(generated, first - second, np.inf)
    return Reference(tokens, margin)


def cut(
    tokens: np.ndarray, prompt_length: np.ndarray, limit: np.ndarray, eos_ids: Sequence[int] = ()
) -> np.ndarray:
    """Where never-ending text `tokens` [B, S] ends: just after its first EOS, at its limit, at S.

    Returns:
        Lengths [B], at least `prompt_length`.
    """
    s = tokens.shape[1]
    is_new = np.arange(s) >= np.asarray(prompt_length)[:, None]
    is_eos = np.isin(tokens, list(eos_ids)) & is_new
    until_eos = np.where(is_eos.any(1), is_eos.argmax(1) + 1, s)
    return np.maximum(np.minimum(until_eos, np.minimum(limit, s)), prompt_length)


# -------------------------------------------------------------------------------- compiled programs

_INSTRUCTION = re.compile(r"(?:ROOT )?%?[\w.\-]+ = \w+\[([\d,]*)\]\S* ([\w\-]+)\(")
_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
# What passes a buffer on or writes a few of its entries in place.
_IN_PLACE = frozenset(
    {
        "bitcast",
        "call",  # this, conditional, fusion and while are judged by what they contain
        "conditional",
        "dynamic-update-slice",
        "fusion",
        "get-tuple-element",
        "opt-barrier",
        "optimization-barrier",
        "parameter",
        "scatter",
        "while",
    }
)


def whole_buffer_ops(text: str, shapes: Iterable[Sequence[int]]) -> Counter[str]:
    """What a compiled program does to whole buffers inside its loops.

    Copies in the entry computation do not count: they happen once. Anything found here happens at
    every step and costs time in proportion to the buffer.

    Args:
        text: `compiled.as_text()`, of `jax.jit(f).lower(...).compile()`.
        shapes: of the buffers, for example of every array of a cache.

    Returns:
        How many instructions of each kind other than in-place writes produce a whole buffer in a
        loop's body or in what it calls; empty is good.
    """
    wanted = {",".join(map(str, shape)) for shape in shapes}
    computations: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if line[:1] not in ("", " ", "}") and line.rstrip().endswith("{"):
            name = line.removeprefix("ENTRY ").lstrip("%").split(" ")[0]
            computations[name] = []
        elif " = " in line:
            computations.setdefault(name, []).append(line.strip())
    in_loops: set[str] = set()
    pending = [
        body
        for lines in computations.values()
        for line in lines
        if " while(" in line
        for body in re.findall(r"body=%?([\w.\-]+)", line)
    ]
    if not pending:
        raise ValueError("The program has no loop.")
    while pending:
        name = pending.pop()
        if name in in_loops:
            continue
        in_loops.add(name)
        for line in computations[name]:
            for one, several in _CALLED.findall(line):
                pending += [x.strip().lstrip("%") for x in (one or several).split(",")]
    found: Counter[str] = Counter()
    for name in in_loops:
        for line in computations[name]:
            match = _INSTRUCTION.match(line)
            if match and match[1] in wanted and match[2] not in _IN_PLACE:
                found[match[2]] += 1
    return found
