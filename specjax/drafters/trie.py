"""Several continuations of one text as a draft: equal beginnings are one node.

Retrieval, suffix decoding and n-grams find places where a text went on; what they make of them is
the same tree (REST, arXiv 2311.08252; SuffixDecoding, arXiv 2411.04975).
"""

import jax.numpy as jnp
import numpy as np

from specjax import trees
from specjax.types import Array, Draft


def same_beginnings(tokens: Array, length: Array) -> Array:
    """Whether two continuations are equal up to and including a depth.

    Args:
        tokens: [B, K, D] int32.
        length: [B, K] int32, how many of a continuation's tokens there are.

    Returns:
        [B, K, K, D] bool; false where either of the two has ended.
    """
    d = tokens.shape[2]
    is_there = jnp.arange(d) < length[..., None]
    is_there = is_there[:, :, None] & is_there[:, None]
    differs = (tokens[:, :, None] != tokens[:, None]) | ~is_there
    # A product with a triangle counts differences so far: one operation, and no scan.
    so_far = np.triu(np.ones((d, d), np.float32))
    return jnp.einsum("bkjd,de->bkje", differs.astype(jnp.float32), so_far) == 0


def trie(
    root: Array, tokens: Array, same: Array, values: Array, num_nodes: int, budget: Array
) -> Draft:
    """The best nodes of all continuations as a tree of point masses.

    Args:
        root: [B, 1] int32, the pending token.
        tokens: [B, K, D] int32, the continuations.
        same: [B, K, K, D], of `same_beginnings`.
        values: [B, K, D], positive, the same for equal strings; no string surpasses its beginnings.
        num_nodes: N of the tree, its root included; places left over are fillers.
        budget: [B] int32, how many nodes below the root are drafted at most.

    Returns:
        The draft, D deep.
    """
    b, k, d = tokens.shape
    eldest = jnp.argmax(same, 2).astype(jnp.int32)  # [B, K, D]
    is_node = same.any(2) & (eldest == jnp.arange(k)[:, None])
    values = jnp.where(is_node, values, -1.0)
    # Candidates level by level: the string of continuation i at depth j stands at 1 + j k + i.
    above = 1 + jnp.arange(d - 1, dtype=jnp.int32) * k + eldest[:, :, :-1]
    parents = jnp.pad(above, ((0, 0), (0, 0), (1, 0)))

    def listed(first: Array, x: Array) -> Array:
        return jnp.concatenate([first, x.swapaxes(1, 2).reshape(b, -1)], 1)

    zeros = jnp.zeros((b, 1), jnp.int32)
    found, parents, values = trees.best_subtree(
        listed(root, tokens), listed(zeros, parents), listed(zeros * 0.0, values), num_nodes
    )
    place = jnp.arange(num_nodes, dtype=jnp.int32)
    is_drafted = (values > 0) & (place <= budget[:, None])
    is_filler = ~is_drafted & (place > 0)
    return Draft(
        tokens=jnp.where(is_filler, root, found),
        parents=jnp.where(is_filler, 0, parents),
        probs=None,
        num_drafted=is_drafted.sum(-1, dtype=jnp.int32) - 1,
        depth=d,
    )
