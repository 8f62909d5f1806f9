"""Several continuations of one text as a draft: equal beginnings are one node.

Retrieval, suffix decoding and n-grams find places where a text went on; what they make of them is
the same tree (REST, arXiv 2311.08252; SuffixDecoding, arXiv 2411.04975).
"""

import jax.numpy as jnp

from specjax import trees
from specjax.types import Array, Draft


def common_beginnings(tokens: Array, length: Array) -> Array:
    """How many tokens any two continuations begin with alike.

    Args:
        tokens: [..., K, D] int32.
        length: [..., K] int32, how many of a continuation's tokens there are.

    Returns:
        [..., K, K] int32, at most the shorter one's length.
    """
    depth = jnp.arange(tokens.shape[-1])
    is_there = depth < jnp.minimum(length[..., None], length[..., None, :])[..., None]
    equal = (tokens[..., None, :] == tokens[..., None, :, :]) & is_there
    unbroken = equal[..., 0]
    common = unbroken.astype(jnp.int32)
    for d in range(1, tokens.shape[-1]):
        unbroken &= equal[..., d]
        common += unbroken
    return common


def frequencies(common: Array, depth: int) -> Array:
    """How many continuations begin with the string that each has at each depth, itself included.

    Args:
        common: [..., K, K], of `common_beginnings`.
        depth: D.

    Returns:
        [..., K, D] int32; 0 beyond a continuation's length.
    """
    return (common[..., None] > jnp.arange(depth)).sum(-2, dtype=jnp.int32)


def eldest(common: Array, depth: int) -> tuple[Array, Array]:
    """The first continuation that begins with each one's string at each depth.

    Returns:
        It [..., K, D] int32, any beyond a continuation's length, and whether it is that one itself
        [..., K, D].
    """
    same = common[..., None] > jnp.arange(depth)
    first = jnp.argmax(same, -2).astype(jnp.int32)
    return first, same.any(-2) & (first == jnp.arange(common.shape[-1])[:, None])


def trie(
    root: Array, tokens: Array, common: Array, values: Array, num_nodes: int, budget: Array
) -> Draft:
    """The best nodes of all continuations as a tree of point masses.

    Args:
        root: [B, 1] int32, the pending token.
        tokens: [B, K, D] int32, the continuations.
        common: [B, K, K], of `common_beginnings`.
        values: [B, K, D], positive, the same for equal strings; no string surpasses its beginnings.
        num_nodes: N of the tree, its root included; places left over are fillers.
        budget: [B] int32, how many nodes below the root are drafted at most.

    Returns:
        The draft, D deep.
    """
    b, k, d = tokens.shape
    first, is_node = eldest(common, d)
    values = jnp.where(is_node, values, -1.0)
    # Candidates level by level: the string of continuation i at depth j stands at 1 + j k + i.
    above = 1 + jnp.arange(d - 1, dtype=jnp.int32) * k + first[:, :, :-1]
    parents = jnp.pad(above, ((0, 0), (0, 0), (1, 0)))

    def listed(of_root: Array, x: Array) -> Array:
        return jnp.concatenate([of_root, x.swapaxes(1, 2).reshape(b, -1)], 1)

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
