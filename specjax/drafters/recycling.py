"""Token Recycling: the target's runners-up of earlier passes are the next passes' guesses.

Luo et al., arXiv 2408.08696. A matrix keeps for every token the k likeliest successors that the
target last named for it, at whatever node of whatever draft, rejected ones included. A static tree
is filled from it breadth first: child r of a node with token t is M[t, r]. Requests may start from
what earlier ones learnt ("hot start"): `inherited` makes `params.drafter` of a decoded state.
"""

from collections.abc import Sequence

import flax.struct as struct
import jax
import jax.numpy as jnp
import numpy as np

from specjax import trees
from specjax.kernels.gather import gather
from specjax.kernels.vocabulary import largest
from specjax.theory import best_tree
from specjax.types import Array, Context, Draft, Drafter, Keys, Model, Outcome, Params, Proposal


@struct.dataclass
class RecyclingState:
    """M: what the target last ranked first after each token, the likeliest first."""

    successors: Array  # [B, V, k] int32, -1 where the token was not seen yet


def recycling(target: Model, parents: Sequence[int], k: int = 8) -> Drafter:
    """Fills the tree `parents`; where a token was not seen yet its descendants are fillers.

    `params.drafter` is () or the matrix [V, k] of earlier calls, read where a row has not yet seen
    a token itself.

    Args:
        target: the decoder's.
        parents: each node's parent, breadth first; -1 for the root. `tree` makes good ones.
        k: successors kept of every token; may exceed what the tree takes.

    Raises:
        ValueError: the tree is impossible, consists of its root alone, or has more than k children
            somewhere; more successors than there are tokens; in the first step, a matrix of
            another shape.
    """
    t = trees.topology(parents)
    if t.depth == 0:
        raise ValueError(f"Tree {tuple(parents)} is its root alone; a draft needs another node.")
    most = int(t.rank.max()) + 1
    if most > k:
        raise ValueError(
            f"Tree {tuple(parents)} has {most} children of one node but recycling keeps {k} "
            "successors; keep more."
        )
    if k > target.vocab_size:
        raise ValueError(
            f"recycling keeps {k} successors but the target has {target.vocab_size} tokens; keep "
            "fewer."
        )

    def init(batch_size: int, max_length: int) -> RecyclingState:
        del max_length
        return RecyclingState(jnp.full((batch_size, target.vocab_size, k), -1, jnp.int32))

    def propose(
        params: Params, rng_keys: Keys, state: RecyclingState, context: Context
    ) -> tuple[Draft, RecyclingState]:
        del rng_keys
        shared = params.drafter
        if len(shared) and shared.shape != (target.vocab_size, k):
            raise ValueError(
                f"recycling keeps {k} successors of {target.vocab_size} tokens but the matrix it "
                f"inherits has shape {shared.shape}; decode with the same k and target."
            )
        root = trees.root(context)
        own = state.successors.reshape(-1, k)
        first = jnp.arange(len(root), dtype=jnp.int32)[:, None] * target.vocab_size
        level, found = root, []  # -1 where unknown
        for depth in range(1, t.depth + 1):
            here, above = t.levels[depth], t.levels[depth - 1]
            parent = np.searchsorted(above, t.parents[here])
            token = jnp.maximum(level, 0)
            known = gather(own, token + first, 1)[:, :, 0]  # [B, W, k]
            if len(shared):
                known = jnp.where(known < 0, gather(shared, token, 1)[:, :, 0], known)
            known = jnp.where(level[..., None] < 0, -1, known)
            level = known[:, parent, t.rank[here]]
            found.append(level)
        guess = jnp.concatenate(found, 1)
        draft = Draft(
            tokens=jnp.concatenate([root, jnp.where(guess < 0, root, guess)], 1),
            parents=jnp.broadcast_to(
                jnp.asarray(t.parents, jnp.int32), (len(root), len(t.parents))
            ),
            probs=None,
            num_drafted=(guess >= 0).sum(1, dtype=jnp.int32),
            depth=t.depth,
        )
        return draft, state

    def observe(
        params: Params, state: RecyclingState, context: Context, outcome: Outcome
    ) -> RecyclingState:
        del params, context
        named, slots = largest(outcome.output.logits, k), destinations(outcome, target.vocab_size)
        successors = jax.vmap(lambda m, i, x: m.at[i].set(x, mode="drop", unique_indices=True))(
            state.successors, slots, named
        )
        return RecyclingState(successors)

    return Drafter(
        init, propose, observe, Proposal("point", len(t.parents), t.depth), target.vocab_size
    )


def inherited(state: RecyclingState, shared: Array | tuple[()] = ()) -> Array:
    """M [V, k] for later calls: what the first row to know a token knows of it.

    Args:
        state: `DecodeState.drafter` of a call that ended.
        shared: [V, k], what that call itself inherited, kept for tokens that no row saw.
    """
    seen = state.successors[..., 0] >= 0  # [B, V]
    row = jnp.argmax(seen, 0)
    found = jnp.take_along_axis(state.successors, row[None, :, None], 0)[0]
    return jnp.where(seen.any(0)[:, None], found, jnp.asarray(shared)) if len(shared) else found


def destinations(outcome: Outcome, vocab_size: int) -> Array:
    """The row of M [B, N] that each node's logits replace, V and more where they replace none.

    Of several nodes of one token the last one counts. Rejected guesses of the root's own token do
    not: the root knows its successors better, and fillers are such guesses.
    """
    draft, verdict = outcome.draft, outcome.verdict
    n = draft.tokens.shape[1]
    node = np.arange(n)
    kept = np.arange(verdict.path.shape[1]) < verdict.num_nodes[:, None]
    is_kept = ((verdict.path[..., None] == node) & kept[..., None]).any(1)  # [B, N]
    is_new = (draft.parents >= 0) & (is_kept | (draft.tokens != draft.tokens[:, :1]))
    is_new = is_new.at[:, 0].set(True) & (verdict.num_nodes > 0)[:, None]
    later = np.triu(np.ones((n, n), bool), 1)  # [x, y]: y stands behind x
    again = (draft.tokens[:, :, None] == draft.tokens[:, None]) & is_new[:, None] & later
    return jnp.where(is_new & ~again.any(2), draft.tokens, vocab_size + node)


def tree(num_nodes: int, depth: int, k: int = 8) -> tuple[int, ...]:
    """The static tree of most expected tokens where successors are right with falling chances.

    The target's token is taken to be among the first r successors with probability r / (r + 1),
    and so the r-th with 1 / (r (r + 1)), whatever went before.

    Args:
        num_nodes: N, the root included; fewer where a chain is so long that rounding hides the
            worth of its end.
        depth: levels below the root at most.
        k: children of a node at most.

    Returns:
        The parents, breadth first.

    Raises:
        ValueError: nothing below the root, more nodes than such trees have.
    """
    if num_nodes < 2 or depth < 1 or k < 1:
        raise ValueError(
            f"tree(num_nodes={num_nodes}, depth={depth}, k={k}) has nothing below its root; they "
            "must be at least 2, 1 and 1."
        )
    most = sum(k**level for level in range(depth + 1))
    if num_nodes > most:
        raise ValueError(
            f"A tree of {num_nodes} nodes was asked for but one of depth {depth} with {k} children "
            f"of a node has {most} at most; ask for fewer."
        )
    acceptance = [1 / (r * (r + 1)) for r in range(1, k + 1)]
    return best_tree(acceptance, num_nodes, depth)[1]
