"""Lookahead decoding: a window of Jacobi rows fills a pool of n-grams, from which drafts are made.

Fu et al., arXiv 2402.02057, whose W, N and G are here `width`, `ngram` and `num_guesses`. The
window holds N - 1 rows of W guesses, each row a Jacobi sweep later than the one above it and, as
the sweep predicts, a token further on: column i of row j guesses the token at position
`length + i + j`. As a tree it is a comb. Row 0 is its spine, and under each node of the spine hangs
a tooth, the rest of its column; the ancestors of a node are what Lookahead's attention mask lets it
see. The target's choice at a tooth's end makes its column an n-gram, and the row of all of them is
the next. N-grams that begin with the root are verified beside the window in the same pass.
"""

import flax.struct as struct
import jax
import jax.numpy as jnp
import numpy as np

from specjax import trees
from specjax.drafters.jacobi import check_window
from specjax.drafters.trie import common_beginnings, eldest
from specjax.kernels.vocabulary import argmax
from specjax.types import Array, Context, Draft, Drafter, Keys, Model, Outcome, Params, Proposal


@struct.dataclass
class LookaheadState:
    """A window behind the root, and the n-grams seen, each place's most recent first.

    A guess that is not known is drafted as `remembered` says. An n-gram lies at the place of its
    first token, modulo H; tokens of one place share its G n-grams, no two of which are equal.
    """

    window: Array  # [B, N - 1, W] int32, -1 where not known
    pool: Array  # [B, H, G, N] int32, -1 where empty


def comb(width: int, rows: int) -> tuple[trees.Topology, np.ndarray]:
    """The window as a tree, breadth first, and the node [rows, width] of each of its entries."""
    row, column = np.divmod(np.arange(rows * width), width)
    order = np.argsort(row + column, kind="stable")
    node = 1 + np.argsort(order).reshape(rows, width)
    # Above a tooth's node is the one before it in its column, above the spine's the spine's.
    above = np.concatenate([np.append(0, node[0, :-1])[None], node[:-1]])
    return trees.topology([-1, *above.reshape(-1)[order].tolist()]), node


def remembered(window: Array, tokens: Array, length: Array) -> Array:
    """The window with guesses everywhere.

    Guesses that are not known are the newest history over again: a guess at position t is the token
    at t less the window's reach, or the first. It stays so while the window moves.

    Args:
        window: [B, N - 1, W] int32, -1 where not known.
        tokens: [B, S] history, and [B] its `length`.
    """
    rows, width = window.shape[1:]
    ahead = np.add.outer(np.arange(rows), np.arange(width)).reshape(-1)
    source = jnp.maximum(length[:, None] + (ahead - (rows + width - 1)), 0)
    copied = jnp.take_along_axis(tokens, source, 1).reshape(window.shape)
    return jnp.where(window >= 0, window, copied)


def insert(pool: Array, grams: Array, is_new: Array) -> Array:
    """Moves n-grams to the front of their places, one after another; the last of a place go.

    Args:
        pool: [B, H, G, N] int32.
        grams: [B, I, N] int32, the last of which ends up in front.
        is_new: [B, I], which of them to insert.

    Returns:
        The pool. What I insertions in a row would leave is written at once, place by place.
    """
    (_, num_places, num_guesses, _), count = pool.shape, grams.shape[1]
    place = grams[:, :, 0] % num_places
    later = np.triu(np.ones((count, count), bool), 1)  # [x, y]: y is inserted after x
    together = (place[:, :, None] == place[:, None]) & is_new[:, None]  # [B, I, I]
    again = (grams[:, :, None] == grams[:, None]).all(-1) & is_new[:, None] & later
    newest = is_new & ~again.any(-1)
    # What place x holds in the end is made of new n-grams y and of the old ones.
    joins = together & newest[:, None]
    old = jnp.take_along_axis(pool, place[:, :, None, None], 1)  # [B, I, G, N]
    seen = (old[:, :, :, None] == grams[:, None, None]).all(-1) & newest[:, None, None]
    stays = ~seen.any(-1)  # [B, I, G]
    rank_of_new = jnp.where(joins, (joins & later).sum(-1)[:, None], -1)
    rank_of_old = jnp.where(stays, joins.sum(-1)[..., None] + stays.cumsum(-1) - 1, -1)
    rank = jnp.concatenate([rank_of_new, rank_of_old], 2)  # [B, I, I + G]
    new = jnp.broadcast_to(grams[:, None], (*joins.shape, grams.shape[2]))
    either = jnp.concatenate([new, old], 2)  # [B, I, I + G, N]
    takes = rank[:, :, None] == np.arange(num_guesses)[:, None]  # [B, I, G, I + G]
    written = (takes[..., None] * either[:, :, None]).sum(3)  # [B, I, G, N]
    is_last = is_new & ~(together & later).any(-1)  # one writes for all of its place
    target = jnp.where(is_last, place, num_places + np.arange(count))
    return jax.vmap(lambda p, i, x: p.at[i].set(x, mode="drop", unique_indices=True))(
        pool, target, written
    )


def lookahead(
    target: Model, width: int, ngram: int, num_guesses: int, pool_size: int | None = None
) -> Drafter:
    """Drafts the n-grams that begin with the root, and the window beside them.

    N-grams of equal beginnings share nodes, as the paper's verification of sampled text does; the
    duplicates are fillers. The draft is as deep as its n-grams are: the window's nodes below that
    are scored, but never accepted.

    Args:
        target: the decoder's.
        width: W, columns of the window.
        ngram: N, tokens of an n-gram, the one it is found by included.
        num_guesses: G, n-grams that are kept at each place of the pool and drafted.
        pool_size: H, places of the pool; by default one for each token.

    Raises:
        ValueError: a window without guesses, a pool without places; in `init`, a window that no
            buffer of that length holds.
    """
    if width < 1 or ngram < 2 or num_guesses < 1:
        raise ValueError(
            f"lookahead(width={width}, ngram={ngram}, num_guesses={num_guesses}) has nothing to "
            "guess; they must be at least 1, 2 and 1."
        )
    num_places = target.vocab_size if pool_size is None else pool_size
    if num_places < 1:
        raise ValueError(f"pool_size is {pool_size}; n-grams need at least 1 place.")
    rows, reach = ngram - 1, width + ngram - 2
    tree, node = comb(width, rows)
    order = np.argsort(node.reshape(-1))  # entries of the window, breadth first
    num_guessed = num_guesses * rows
    hangs = np.where(tree.parents[1:] > 0, tree.parents[1:] + num_guessed, 0)
    is_live = tree.depth_of[node] <= rows

    def init(batch_size: int, max_length: int) -> LookaheadState:
        check_window("lookahead", reach, max_length)
        return LookaheadState(
            jnp.full((batch_size, rows, width), -1, jnp.int32),
            jnp.full((batch_size, num_places, num_guesses, ngram), -1, jnp.int32),
        )

    def listed(window: Array) -> Array:
        """In the order of the comb's nodes, [B, W (N - 1)]."""
        return window.reshape(len(window), -1)[:, order]

    def propose(
        params: Params, rng_keys: Keys, state: LookaheadState, context: Context
    ) -> tuple[Draft, LookaheadState]:
        del params, rng_keys
        root = trees.root(context)
        b = root.shape[0]
        place = (root % num_places)[:, :, None, None]
        found = jnp.take_along_axis(state.pool, place, 1)[:, 0]  # [B, G, N]
        is_there = found[..., 0] == root
        guess = jnp.where(is_there[..., None], found[..., 1:], root[..., None])
        common = common_beginnings(guess, jnp.where(is_there, rows, 0))
        first, is_node = eldest(common, rows)  # [B, G, N - 1]
        above = 1 + first[:, :, :-1] * rows + np.arange(rows - 1)
        above = jnp.pad(jnp.where(is_there[..., None], above, 0), ((0, 0), (0, 0), (1, 0)))
        window = remembered(state.window, context.tokens, context.length)
        top = jnp.full((b, 1), -1, jnp.int32)
        below = jnp.broadcast_to(jnp.asarray(hangs, jnp.int32), (b, len(hangs)))
        known = (state.window >= 0) & is_live
        draft = Draft(
            tokens=jnp.concatenate([root, guess.reshape(b, -1), listed(window)], 1),
            parents=jnp.concatenate([top, above.reshape(b, -1), below], 1),
            probs=None,
            num_drafted=is_node.sum((1, 2), jnp.int32) + known.sum((1, 2), jnp.int32),
            depth=rows,
        )
        return draft, state

    def observe(
        params: Params, state: LookaheadState, context: Context, outcome: Outcome
    ) -> LookaheadState:
        del params
        draft, count = outcome.draft, outcome.verdict.num_nodes
        is_chain = draft.tokens.shape[1] == draft.depth + 1
        if is_chain and not tree.is_chain:  # then a prompt's logits need not be known
            return LookaheadState(_moved(state.window, count), state.pool)
        window = remembered(state.window, context.tokens, context.length - count)
        own = jnp.concatenate([draft.tokens[:, :1], listed(window)], 1)
        ends = trees.locate(draft, own, tree)[:, node[-1]]  # [B, W]
        # A sweep counts if all of it was seen, and not all of it has become history.
        swept = (ends >= 0).all(1) & (count > 0) & (count <= reach)
        logits = jnp.take_along_axis(outcome.output.logits, jnp.maximum(ends, 0)[..., None], 1)
        fresh = argmax(logits)[:, None]  # [B, 1, W]
        grams = jnp.concatenate([window, fresh], 1).swapaxes(1, 2)  # [B, W, N]
        pool = insert(state.pool, grams, jnp.broadcast_to(swept[:, None], (len(swept), width)))
        # The next row in place of each; a token further on, as a column's next token is.
        up = jnp.concatenate([state.window[:, 1:], fresh], 1)
        up = jnp.where(swept[:, None, None], up, state.window)
        return LookaheadState(_moved(up, count - swept), pool)

    proposal = Proposal("point", 1 + num_guessed + rows * width, rows)
    return Drafter(init, propose, observe, proposal, target.vocab_size)


def _moved(window: Array, columns: Array) -> Array:
    """The window [B, N - 1, W] without its first `columns` [B], and as many unknown ones behind."""
    width = window.shape[2]
    source = columns[:, None, None] + np.arange(width)
    moved = jnp.take_along_axis(window, jnp.minimum(source, width - 1), 2)
    return jnp.where(source < width, moved, -1)
