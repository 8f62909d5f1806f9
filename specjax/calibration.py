"""Which layers a draft can do without: two searches that train nothing.

    draft_and_verify  any layers; the best is what should decode fastest (Zhang et al., arXiv
                      2309.08168)
    swift             a fixed share of layers, the first and the last never; the best is what agrees
                      most with the whole model (Xia et al., arXiv 2410.06916)

Both ask how often a draft's tokens are the target's own. One compiled program answers for all sets
of layers: which of them are open is data.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax import theory
from specjax.types import Array, Block, Model, PyTree

_POOL = 256  # sets among which the model of what was tried chooses


class Try(NamedTuple):
    """A set of layers and how it did."""

    layers: tuple[int, ...]  # that stay
    agreement: float  # share of drafted tokens that are the whole model's likeliest
    score: float


# ---------------------------------------------------------------------------------- how they agree


def agreement(
    model: Model, params: PyTree, tokens: np.ndarray, window: int, num_drafted: int
) -> Callable[[Sequence[int]], float]:
    """Prepares to measure sets of layers on a text.

    The text's last tokens are drafted as `drafters.layer_skip` would, in chains that begin at every
    `num_drafted`-th of them: before a chain's root, layers read the whole model's keys and values,
    in the chain their own. The tokens fed are the text's, whatever is drafted.

    Args:
        model: a transformer.
        params: its weights.
        tokens: [B, T] texts.
        window: how many of each one's last tokens are fed to the draft.
        num_drafted: γ, tokens of a chain.

    Returns:
        (layers) -> the share of drafted tokens that the whole model finds likeliest there.

    Raises:
        ValueError: a model without layers, a window longer than the text, nothing to draft.
    """
    if model.stack is None:
        raise ValueError("A model without layers has none to leave out; need a transformer.")
    stack, (b, t) = model.stack, tokens.shape
    if not 1 <= window <= t or num_drafted < 1:
        raise ValueError(
            f"A window of {window} of {t} tokens and chains of {num_drafted}; need 1 to {t} and at "
            "least 1."
        )
    at, fed = np.arange(t), np.arange(t - window, t)
    chain = (fed - fed[0]) // num_drafted
    root = fed[0] + chain * num_drafted
    own = (chain[:, None] == chain) & (fed <= fed[:, None])
    drafting = np.concatenate([at < root[:, None], own], 1)  # [window, T + window]
    everything = jnp.ones([stack.num_layers], bool)

    def run(
        params: PyTree, gates: Array, where: np.ndarray, mask: np.ndarray, block: Block | None
    ) -> tuple[Array, Block]:
        text, positions, seen = (
            jnp.asarray(x)
            for x in (
                tokens[:, where],
                np.broadcast_to(where, (b, len(where))),
                np.broadcast_to(mask, (b, *mask.shape)),
            )
        )
        cache = model.init_cache(b, 0)
        output, block = stack.gated(gates, params, text, positions, seen, cache, block)
        return jnp.argmax(output.logits[:, -window:], -1), block

    @jax.jit
    def whole(params: PyTree) -> tuple[Array, Block]:
        return run(params, everything, at, at <= at[:, None], None)

    @jax.jit
    def share(params: PyTree, gates: Array, wanted: Array, block: Block) -> Array:
        drafted, _ = run(params, gates, fed, drafting, block)
        return (drafted == wanted).mean()

    wanted, block = whole(params)

    def measure(layers: Sequence[int]) -> float:
        gates = np.isin(np.arange(stack.num_layers), layers)
        return float(share(params, gates, wanted, block))

    return measure


# --------------------------------------------------------------------------------- which are tried


def draft_and_verify(
    measure: Callable[[Sequence[int]], float],
    num_layers: int,
    num_drafted: int,
    head: float = 0.0,
    num_tries: int = 200,
    num_random: int = 20,
    seed: int = 0,
) -> Iterator[Try]:
    """Searches for the layers, not all, with which decoding should be fastest.

    The score is the speed-up over plain decoding: tokens per pass of a chain whose acceptance is
    the agreement, by the time of that pass and its draft. A model of what was tried chooses what
    comes next.

    Args:
        measure: of `agreement`.
        num_layers: L.
        num_drafted: γ, tokens of a chain.
        head: what a pass takes besides its layers, in layers.
        num_tries: at most.
        num_random: of these, the first, are drawn blindly.
        seed: of the draws.

    Raises:
        ValueError: a single layer, which cannot be left out; nothing to try.
    """
    _at_least_one("num_tries", num_tries)
    if num_layers < 2:
        raise ValueError(f"The model has {num_layers} layer; need 2 to leave one out.")

    def evaluate(layers: tuple[int, ...]) -> Try:
        agree = measure(layers)
        cost = (len(layers) + head) / (num_layers + head)
        return Try(layers, agree, theory.chain_speedup(agree, num_drafted, cost))

    def draw(rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(num_layers) < rng.integers(1, num_layers)

    def change(rng: np.random.Generator, gates: np.ndarray) -> np.ndarray:
        changed = gates ^ (np.arange(num_layers) == rng.integers(num_layers))
        return changed if changed.any() and not changed.all() else gates

    rng = np.random.default_rng(seed)
    tries = _search(evaluate, draw, change, lambda i: i >= num_random, rng)
    for _, tried in zip(range(num_tries), tries, strict=False):
        yield tried


def swift(
    measure: Callable[[Sequence[int]], float],
    num_layers: int,
    num_drafted: int = 0,
    head: float = 0.0,
    skip_ratio: float = 0.45,
    enough: float = 0.93,
    num_tries: int = 1000,
    guided_every: int = 25,
    patience: int = 300,
    seed: int = 0,
) -> Iterator[Try]:
    """Searches for the layers that agree most with the whole model, which is the score.

    Args:
        measure: of `agreement`, on text that the model itself wrote.
        num_layers: L.
        num_drafted: not used; the layers' number is given.
        head: not used.
        skip_ratio: share of the layers that are left out.
        enough: a score at which the search ends.
        num_tries: at most.
        guided_every: one of so many tries is chosen by a model of what was tried, the others are
            drawn blindly.
        patience: tries without a better one, after which the search ends.
        seed: of the draws.

    Raises:
        ValueError: a share that leaves out no layer, or not the first and the last alone.
    """
    del num_drafted, head
    num_skipped = round(skip_ratio * num_layers)
    if not 1 <= num_skipped <= num_layers - 2:
        raise ValueError(
            f"skip_ratio {skip_ratio:g} leaves out {num_skipped} of {num_layers} layers; need 1 "
            f"to {num_layers - 2}, for the first and the last stay."
        )
    _at_least_one("num_tries", num_tries)
    _at_least_one("guided_every", guided_every)

    def evaluate(layers: tuple[int, ...]) -> Try:
        agree = measure(layers)
        return Try(layers, agree, agree)

    def draw(rng: np.random.Generator) -> np.ndarray:
        middle = rng.permutation(num_layers - 2) >= num_skipped
        return np.concatenate([[True], middle, [True]])

    def change(rng: np.random.Generator, gates: np.ndarray) -> np.ndarray:
        kept = np.flatnonzero(gates)[1:-1]
        if not len(kept):
            return gates
        changed = gates.copy()
        changed[rng.choice(kept)], changed[rng.choice(np.flatnonzero(~gates))] = False, True
        return changed

    rng = np.random.default_rng(seed)
    tries = _search(evaluate, draw, change, lambda i: (i + 1) % guided_every == 0, rng)
    best, since = -1.0, 0
    for _, tried in zip(range(num_tries), tries, strict=False):
        yield tried
        best, since = max(best, tried.score), 0 if tried.score > best else since + 1
        if best >= enough or since >= patience:
            return


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1.")


def _search(
    evaluate: Callable[[tuple[int, ...]], Try],
    draw: Callable[[np.random.Generator], np.ndarray],
    change: Callable[[np.random.Generator, np.ndarray], np.ndarray],
    is_guided: Callable[[int], bool],
    rng: np.random.Generator,
) -> Iterator[Try]:
    """Tries sets of layers, none of them twice, until no new one is found.

    Args:
        evaluate: (layers) -> a try.
        draw: (rng) -> random gates [L] bool.
        change: (rng, gates) -> gates a little different.
        is_guided: (i) -> whether a model of the tries so far chooses the i-th.
        rng: of the draws.
    """
    tried: dict[bytes, np.ndarray] = {}
    scores: list[float] = []
    while True:
        guided = bool(tried) and is_guided(len(tried))
        pool: dict[bytes, np.ndarray] = {}
        for attempt in range(4 * _POOL):
            if len(pool) == (_POOL if guided else 1):
                break
            is_near = guided and attempt % 2 == 0
            best = list(tried.values())[int(np.argmax(scores))] if is_near else None
            gates = draw(rng) if best is None else change(rng, best)
            if gates.tobytes() not in tried:
                pool[gates.tobytes()] = gates
        if not pool:
            return
        found = list(pool.values())
        at = _most_promising(list(tried.values()), scores, found) if guided else 0
        result = evaluate(tuple(int(layer) for layer in np.flatnonzero(found[at])))
        tried[found[at].tobytes()] = found[at]
        scores.append(result.score)
        yield result


def _most_promising(
    tried: Sequence[np.ndarray], scores: Sequence[float], pool: Sequence[np.ndarray]
) -> int:
    """Which of the pool has the largest upper confidence bound under a Gaussian process.

    Sets of layers resemble each other by the share of layers they differ in; scores are taken in
    units of their own spread, and the bound lies two deviations above the mean.
    """
    known, new, score = np.array(tried), np.array(pool), np.array(scores)

    def covariance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(-4 * (a[:, None] != b).mean(-1))

    centred = (score - score.mean()) / max(score.std(), 1e-9)
    across = covariance(new, known)
    inner = covariance(known, known) + 1e-4 * np.eye(len(known))
    solved = np.linalg.solve(inner, np.column_stack([centred, across.T]))
    mean = across @ solved[:, 0]
    variance = 1 - (across * solved[:, 1:].T).sum(1)
    return int(np.argmax(mean + 2 * np.sqrt(np.maximum(variance, 0))))


# ------------------------------------------------------------------------------------- what is kept


def layers(path: str | Path) -> tuple[int, ...]:
    """The layers of a file that `train/calibrate.py` wrote, for the config of a `layer_skip`.

    Raises:
        ValueError: no such file, or one that names no layers.
    """
    try:
        return tuple(int(layer) for layer in json.loads(Path(path).read_text())["layers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} names no layers ({type(error).__name__}); need a file that train/calibrate.py "
            "wrote."
        ) from error
