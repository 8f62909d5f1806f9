"""What the laboratory's checks share: the models they bring, the parts they are given, the outcome.

A `Factory` makes a decoder's parts for models that the laboratory chooses: tables to enumerate,
transformers to sample from. `PROPOSALS` are the ways of drafting that every rule is tried with.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax import engine, testing
from specjax.drafters import grow
from specjax.drafters.model import model
from specjax.models.tabular import random_table, tabular
from specjax.types import Array, Context, Decoder, Drafter, Keys, Model, Params, PyTree, Verifier

# ------------------------------------------------------------------------------ what is certified


class Pair(NamedTuple):
    """A target and a draft model of one vocabulary."""

    target: Model
    target_params: PyTree
    draft: Model
    draft_params: PyTree


class Parts(NamedTuple):
    """What makes a decoder of a target."""

    drafter: Drafter
    drafter_params: PyTree
    verifier: Verifier


Factory = Callable[[Pair], Parts]


def tabular_pair(
    vocab_size: int = 3,
    dtype: jnp.dtype = jnp.float32,
    seed: int = 0,
    zeros: float = 0.0,
    agreement: float = 0.5,
) -> Pair:
    """Two random second-order Markov chains, to enumerate.

    Args:
        vocab_size: V.
        dtype: of the log-weights, and so of all probabilities.
        seed: of the laws.
        zeros: share of tokens that each law rules out, for itself.
        agreement: share of the target's law in the draft's.
    """
    rng = np.random.default_rng(seed)
    p, other = (np.exp(random_table(rng, vocab_size, zeros=zeros)) for _ in range(2))
    q = np.where(other > 0, agreement * p + (1 - agreement) * other, 0)
    with np.errstate(divide="ignore"):
        tables = [jnp.asarray(np.log(x / x.sum(-1, keepdims=True)), dtype) for x in (p, q)]
    return Pair(tabular(vocab_size, dtype), tables[0], tabular(vocab_size, dtype), tables[1])


@functools.cache
def transformer_pair(vocab_size: int = 5, dtype: jnp.dtype = jnp.float32) -> Pair:
    """Two different random transformers whose laws are uneven, to sample from."""
    return Pair(
        # Heads may read any of its layers.
        *testing.tiny_model(vocab_size, seed=1, dtype=dtype, feature_layers=(0, 1)),
        # A single layer would hide cache copies.
        *testing.tiny_model(vocab_size, hidden_size=8, head_dim=6, seed=2, dtype=dtype),
    )


def build_decoder(
    factory: Factory, pair: Pair, eos_ids: tuple[int, ...] = ()
) -> tuple[Decoder, Params]:
    """The factory's decoder for these models, and its weights."""
    drafter, drafter_params, verifier = factory(pair)
    decoder = engine.decoder(pair.target, drafter, verifier, eos_ids=eos_ids)
    return decoder, Params(pair.target_params, drafter_params)


class Proposing(NamedTuple):
    """A way for a draft model to propose, small enough to enumerate with any rule."""

    build: grow.Builder
    zeros: float = 0.0  # share of tokens that both models' laws rule out
    vocab_size: int = 3


def _beside() -> grow.Choose:
    """The likeliest token as a point mass, and siblings drawn from all of the law."""
    points, others = grow.best(), grow.independent()

    def draw(
        rng_keys: Keys, context: Context, depth: int, logits: Array, k: int
    ) -> tuple[Array, Array]:
        tokens, laws = others.draw(rng_keys, context, depth, logits, k)
        point, _ = points.draw(rng_keys, context, depth, logits, 1)
        hot = jax.nn.one_hot(point[..., 0], logits.shape[-1], dtype=bool)
        laws = laws.at[:, :, 0].set(jnp.where(hot, 0.0, -jnp.inf))
        return tokens.at[:, :, 0].set(point[..., 0]), laws

    return grow.Choose(draw, "general")


_FORK = (-1, 0, 0, 1)  # two siblings, the elder of which has a child
_TREE = (-1, 0, 0, 1, 2)  # ... or both
PROPOSALS: dict[str, Proposing] = {
    "chain": Proposing(grow.chain(2, grow.without_replacement())),
    "chain of points": Proposing(grow.chain(2, grow.best())),
    "tree of points": Proposing(grow.static(_TREE, grow.best())),
    "paths": Proposing(grow.paths(2, 2, grow.independent()), vocab_size=2),
    "paths, merged": Proposing(grow.merged(grow.paths(2, 2, grow.independent())), vocab_size=2),
    "siblings": Proposing(grow.static((-1, 0, 0, 1, 1), grow.independent()), vocab_size=2),
    "siblings, merged": Proposing(grow.merged(grow.static(_FORK, grow.independent()))),
    "without replacement": Proposing(grow.static(_FORK, grow.without_replacement())),
    "exhausted support": Proposing(
        grow.static((-1, 0, 0, 0, 1), grow.without_replacement()), zeros=0.4
    ),
    "hybrid": Proposing(grow.static(_FORK, grow.hybrid())),
    "point beside siblings": Proposing(grow.static((-1, 0, 0, 0), _beside())),
    "coupled": Proposing(grow.static(_FORK, grow.coupled())),
}


def proposing(name: str, verifier: Verifier) -> Factory:
    """A verifier behind one of the `PROPOSALS`."""
    build = PROPOSALS[name].build
    return lambda pair: Parts(model(pair.draft, build), pair.draft_params, verifier)


# -------------------------------------------------------------------------------------- outcomes


class Check(NamedTuple):
    """The outcome of one check."""

    name: str
    passed: bool
    verdict: str  # one line
    figures: dict[str, Any]
    seconds: float


def checked(name: str, run: Callable[[], tuple[bool, str, dict[str, Any]]]) -> Check:
    """Runs a check on the clock; `run` returns what passed, verdict and figures are."""
    start = time.perf_counter()
    passed, verdict, figures = run()
    return Check(name, bool(passed), verdict, figures, time.perf_counter() - start)
