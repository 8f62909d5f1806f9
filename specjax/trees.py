"""Trees stored as `parents`: everything else about them is derived here, where it is used."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from specjax.types import Array, Context, Draft


def ancestor_mask(parents: Array) -> Array:
    """Marks ancestors and self.

    Args:
        parents: [..., N] int, -1 at the root.

    Returns:
        [..., N, N] bool; `mask[..., i, j]` says that node j is node i or one of its ancestors.
    """
    n = parents.shape[-1]
    mask = (parents[..., :, None] == jnp.arange(n)) | jnp.eye(n, dtype=bool)
    # Squaring doubles the reach: after k rounds paths of 2 ** k edges are covered.
    for _ in range(max(n - 2, 0).bit_length()):
        reach = mask.astype(jnp.float32)
        mask = jnp.einsum("...ij,...jk->...ik", reach, reach) > 0
    return mask


def depths(mask: Array) -> Array:
    """Depth of every node, root 0, from its ancestor mask [..., N, N] -> [..., N] int32."""
    return mask.sum(-1, dtype=jnp.int32) - 1


def deepest(agrees: Array, mask: Array, depth: int) -> tuple[Array, Array, Array]:
    """Finds the deepest node that agrees with its parent's verdict, as do all of its ancestors.

    Args:
        agrees: [B, N] bool, true at the root.
        mask: [B, N, N] ancestor mask.
        depth: nodes below this depth are dead.

    Returns:
        The node [B] (the first of the deepest), its path [B, depth + 1] from the root, 0 beyond
        the node, and the path's number of nodes [B].
    """
    depth_of = depths(mask)
    alive = (mask <= agrees[:, None, :]).all(-1) & (depth_of <= depth)
    last = jnp.argmax(jnp.where(alive, depth_of, -1), -1).astype(jnp.int32)
    ancestors = jnp.take_along_axis(mask, last[:, None, None], 1)[:, 0]  # [B, N]
    at = (depth_of[:, None, :] == jnp.arange(depth + 1)[:, None]) & ancestors[:, None, :]
    path = (at * jnp.arange(mask.shape[-1])).sum(-1, dtype=jnp.int32)
    return last, path, ancestors.sum(-1, dtype=jnp.int32)


def locate(draft: Draft, tokens: Array, tree: "Topology") -> Array:
    """Finds the nodes of a tree inside a draft: those of equal strings.

    A drafter may observe another's draft; what it knows of its own nodes it finds so.

    Args:
        draft: any, rooted where the tree is.
        tokens: [B, M] int32, the tree's.
        tree: of M nodes.

    Returns:
        [B, M] int32, the first node of the draft that spells what the tree's node does; -1 where
        there is none, 0 at the root.
    """
    ways = np.zeros((len(tree.parents), tree.depth + 1), np.int64)  # node by depth, 0 beyond
    for node, ancestors in enumerate(tree.mask):
        ways[node, : tree.depth_of[node] + 1] = np.flatnonzero(ancestors)
    depth = np.arange(tree.depth + 1)
    mask = ancestor_mask(draft.parents)
    depth_of = depths(mask)  # [B, N]
    at = mask[:, :, None] & (depth_of[:, None, None] == depth[:, None])  # [B, N, P, N]
    theirs = (at * draft.tokens[:, None, None]).sum(-1)  # [B, N, P], the string of every node
    same = (tokens[:, ways][:, :, None] == theirs[:, None]) | (depth > tree.depth_of[:, None])[
        :, None
    ]
    same = same.all(-1) & (depth_of[:, None] == tree.depth_of[:, None])  # [B, M, N]
    found = jnp.where(same.any(-1), jnp.argmax(same, -1), -1).astype(jnp.int32)
    return found.at[:, 0].set(0)


def best_subtree(
    tokens: Array, parents: Array, values: Array, num_nodes: int
) -> tuple[Array, Array, Array]:
    """The best nodes of a tree, a tree again.

    Args:
        tokens: [B, C] int32, of candidates; the first is the root.
        parents: [B, C] int32, places of candidates, before their children's; any at the root.
        values: [B, C]; no child surpasses its parent.
        num_nodes: N, how many stay, the root included.

    Returns:
        The tokens, parents and values of those that stay, [B, N] each, the best first.
    """
    # Nothing surpasses the root. Equals keep their order, so that parents precede their children.
    values = values.at[:, 0].set(jnp.inf)
    values, kept = lax.top_k(values, num_nodes)
    parent = jnp.take_along_axis(parents, kept, 1)
    node = jnp.arange(num_nodes, dtype=jnp.int32)
    is_parent = kept[:, None, :] == parent[:, :, None]
    parent = jnp.where(node == 0, -1, (is_parent * node).sum(-1, dtype=jnp.int32))
    return jnp.take_along_axis(tokens, kept, 1), parent, values


def root(context: Context) -> Array:
    """The pending token of each row, [B, 1]."""
    return jnp.take_along_axis(context.tokens, context.length[:, None] - 1, 1)


def chain(tokens: Array, probs: Array | None = None, num_drafted: Array | None = None) -> Draft:
    """A chain of guesses as a draft.

    Args:
        tokens: [B, N] int32, the root first.
        probs: [B, N, V] or None for point masses; the root's row is ignored.
        num_drafted: [B] int32; by default no node is a filler.
    """
    b, n = tokens.shape
    if num_drafted is None:
        num_drafted = jnp.full([b], n - 1, jnp.int32)
    parents = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32) - 1, (b, n))
    return Draft(tokens, parents, probs, num_drafted, depth=n - 1)


def node_probs(draft: Draft, vocab_size: int) -> Array:
    """The law of every node as rows [B, N, V], point masses spelled out."""
    if draft.probs is not None:
        return draft.probs
    return jax.nn.one_hot(draft.tokens, vocab_size, dtype=jnp.float32)


class Topology(NamedTuple):
    """A static tree in breadth-first order, with what growing it level by level needs."""

    parents: np.ndarray  # [N], -1 at the root
    depth_of: np.ndarray  # [N]
    mask: np.ndarray  # [N, N] bool, ancestors and self
    rank: np.ndarray  # [N], place among siblings
    levels: list[np.ndarray]  # node indices of each depth

    @property
    def depth(self) -> int:
        return len(self.levels) - 1

    @property
    def is_chain(self) -> bool:
        return len(self.parents) == len(self.levels)

    @property
    def is_bundle(self) -> bool:
        """Paths of equal length that meet in the root only."""
        widths = {len(level) for level in self.levels[1:]}
        return len(widths) == 1 and not self.rank[self.depth_of > 1].any()


def topology(parents: Sequence[int]) -> Topology:
    """Checks and unfolds a static tree.

    Args:
        parents: for each node its parent's index; -1 for node 0, the root. Breadth first.

    Raises:
        ValueError: a root elsewhere, a parent that does not precede its child, depths that fall.
    """
    p = np.asarray(parents, np.int64).reshape(-1)
    n = len(p)
    if n == 0 or p[0] != -1:
        raise ValueError(f"Tree {tuple(parents)} must start with its root, whose parent is -1.")
    depth_of, mask = np.zeros(n, np.int64), np.eye(n, dtype=bool)
    for i in range(1, n):
        if not 0 <= p[i] < i:
            raise ValueError(
                f"Node {i} of tree {tuple(parents)} has parent {p[i]}; it needs one of 0 to "
                f"{i - 1}."
            )
        depth_of[i] = depth_of[p[i]] + 1
        mask[i] |= mask[p[i]]
        if depth_of[i] < depth_of[i - 1]:
            raise ValueError(
                f"Node {i} of tree {tuple(parents)} has depth {depth_of[i]} but follows one of "
                f"depth {depth_of[i - 1]}; list the nodes breadth first."
            )
    rank = np.array([(p[:i] == p[i]).sum() for i in range(n)])
    levels = [np.flatnonzero(depth_of == d) for d in range(depth_of.max() + 1)]
    return Topology(p, depth_of, mask, rank, levels)
