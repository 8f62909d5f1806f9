"""Jacobi decoding: guess a window of tokens, and let every pass of the target correct all of it.

Santilli et al., arXiv 2305.10427. The window holds guesses y_1 .. y_n of what follows the root. A
sweep replaces them all at once by y_i <- argmax p(. | ..., y_<i), the y_<i being those of the sweep
before. What a verifier accepts is the part that its own sweep does not change; the window moves on
by as much. A first guess at least is right after every sweep, so greedy text is a fixed point that
is reached in n sweeps or fewer.
"""

import flax.struct as struct
import jax.numpy as jnp

from specjax import trees
from specjax.kernels.vocabulary import argmax
from specjax.types import Array, Context, Draft, Drafter, Keys, Outcome, Params, Proposal


@struct.dataclass
class JacobiState:
    """Guesses at the tokens that follow the root, in order; those that are not known come last.

    A guess that is not known is drafted as the root once more, and as a filler. It stays unknown
    here: forcing a prompt at once or by its tokens then leaves the same state.
    """

    tokens: Array  # [B, n] int32, -1 where not known


def check_window(drafter: str, reach: int, max_length: int) -> None:
    """Refuses a window that no buffer of that length holds.

    Args:
        drafter: its name.
        reach: tokens beyond the root.
        max_length: S.

    Raises:
        ValueError: with the root it does not fit.
    """
    if reach >= max_length:
        raise ValueError(
            f"{drafter}'s window reaches {reach} tokens beyond the root but the buffer holds "
            f"{max_length}; raise max_length or narrow the window."
        )


def swept(outcome: Outcome, tokens: Array) -> tuple[Array, Array]:
    """What a pass says about the window that follows its verdict.

    Position i of the new window is position `num_nodes + i` of the old one, and was predicted by
    the node before it; what lies beyond the old window is taken to go on like its end.

    Args:
        outcome: of any draft.
        tokens: [B, n] int32, the old window, -1 where nothing can be found.

    Returns:
        For each position of the new window the draft's node that predicted it, [B, n] int32, and
        whether there is one, [B, n]. No node that has become history counts. That which was found
        comes first.
    """
    n = tokens.shape[1]
    own = jnp.concatenate([outcome.draft.tokens[:, :1], tokens], 1)
    node = trees.locate(outcome.draft, own, trees.topology(range(-1, n)))  # [B, n + 1]
    ahead = jnp.minimum(outcome.verdict.num_nodes[:, None] + jnp.arange(n), n)
    node = jnp.take_along_axis(node, ahead, 1)
    # A forced prompt that happens to spell the window is history, too.
    return node, (node >= 0) & (ahead >= outcome.verdict.num_nodes[:, None])


def moved(window: Array, count: Array) -> tuple[Array, Array]:
    """A window [B, n, ...] after `count` [B] positions, and which of its positions it had, [B, n].

    The others hold its last entry.
    """
    n = window.shape[1]
    place = count[:, None] + jnp.arange(n)
    rows = jnp.minimum(place, n - 1).reshape(*place.shape, *[1] * (window.ndim - 2))
    return jnp.take_along_axis(window, rows, 1), place < n


def jacobi(num_tokens: int) -> Drafter:
    """Drafts a window of `num_tokens` guesses as a chain.

    Raises:
        ValueError: fewer than one token; in `init`, a window that no buffer of that length holds.
    """
    if num_tokens < 1:
        raise ValueError(f"jacobi(num_tokens={num_tokens}) has no window; it must be at least 1.")

    def init(batch_size: int, max_length: int) -> JacobiState:
        check_window("jacobi", num_tokens, max_length)
        return JacobiState(jnp.full((batch_size, num_tokens), -1, jnp.int32))

    def propose(
        params: Params, rng_keys: Keys, state: JacobiState, context: Context
    ) -> tuple[Draft, JacobiState]:
        del params, rng_keys
        root, known = trees.root(context), state.tokens >= 0
        tokens = jnp.concatenate([root, jnp.where(known, state.tokens, root)], 1)
        return trees.chain(tokens, num_drafted=known.sum(1, dtype=jnp.int32)), state

    def observe(
        params: Params, state: JacobiState, context: Context, outcome: Outcome
    ) -> JacobiState:
        del params, context
        count = outcome.verdict.num_nodes
        root = outcome.draft.tokens[:, :1]
        node, found = swept(outcome, jnp.where(state.tokens >= 0, state.tokens, root))
        new = jnp.take_along_axis(argmax(outcome.output.logits), jnp.maximum(node, 0), 1)
        old, within = moved(state.tokens, count)
        tokens = jnp.where(found, new, jnp.where(within, old, -1))
        return JacobiState(jnp.where(count[:, None] > 0, tokens, state.tokens))

    proposal = Proposal("point", num_tokens + 1, num_tokens)
    return Drafter(init, propose, observe, proposal)
