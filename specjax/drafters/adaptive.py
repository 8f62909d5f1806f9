"""Trees that follow the draft model's confidence: chains that stop, branches where it pays.

What may depend on what has been drawn is which nodes exist further down, never whether a drawn
token stays: both builders keep every token they draw, so that every rule which is lossless for the
fixed tree is so here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from specjax import trees
from specjax.drafters.grow import Builder, Choose, tied
from specjax.kernels.vocabulary import softmax
from specjax.types import Array, Context, Draft, Keys, Proposal

# (probs [B, V] of the next token at temperature 1, path [B], the probability of all drafted so far)
# -> [B] bool, whether to stop before it.
Stop = Callable[[Array, Array], Array]


def confidence(threshold: float) -> Stop:
    """Stops where no token has that probability, as assisted generation and Kangaroo do.

    Raises:
        ValueError: a threshold outside [0, 1].
    """
    _check("confidence", threshold, 1.0)
    return lambda probs, path: probs.max(-1) < threshold


def entropy(threshold: float) -> Stop:
    """Stops where the root of the law's entropy, in nats, exceeds the threshold: SVIP.

    The acceptance that a law of entropy H can count on falls about as sqrt(H) (arXiv 2411.18462).

    Raises:
        ValueError: a negative threshold.
    """
    _check("entropy", threshold, jnp.inf)

    def stop(probs: Array, path: Array) -> Array:
        del path
        nats = -jnp.where(probs > 0, probs * jnp.log(jnp.where(probs > 0, probs, 1.0)), 0.0)
        return jnp.sqrt(nats.sum(-1)) > threshold

    return stop


def path(threshold: float) -> Stop:
    """Stops where even the likeliest next path has less probability than the threshold.

    What another token is expected to gain, as dynamic depth decoding (arXiv 2409.00142) and
    OPT-Tree (arXiv 2406.17276) weigh it.

    Raises:
        ValueError: a threshold outside [0, 1].
    """
    _check("path", threshold, 1.0)
    return lambda probs, path: path * probs.max(-1) < threshold


def _check(name: str, threshold: float, most: float) -> None:
    if not 0 <= threshold <= most:
        bound = "at least 0" if most == jnp.inf else f"between 0 and {most:g}"
        raise ValueError(f"{name} stops at a threshold of {threshold}; it must be {bound}.")


def chain(num_tokens: int, choose: Choose, stop: Stop) -> Builder:
    """A chain that ends, row by row, where `stop` says so; fillers follow.

    The first token is always drafted, for its law is known before. Once all rows have stopped, the
    draft's remaining passes are left out.

    Args:
        num_tokens: at most.
        choose: how tokens are picked.
        stop: `confidence`, `entropy` or `path`.

    Raises:
        ValueError: fewer than one token.
    """
    if num_tokens < 1:
        raise ValueError(f"A chain of at most {num_tokens} tokens is empty; need at least 1.")
    law = choose.law if choose.law in ("point", "coupled") else "chain"

    def grow(
        expand: Callable, rng_keys: Keys, context: Context, logits: Array, carry: Any
    ) -> Draft:
        b, vocab_size = logits.shape
        root = trees.root(context)
        hot = jax.nn.one_hot(root[:, 0], vocab_size, dtype=bool)
        filler = jnp.where(hot, 0.0, -jnp.inf)[:, None]
        tokens, laws = [root], [jnp.zeros((b, 1, vocab_size))]
        goes_on, so_far = jnp.ones([b], bool), jnp.ones([b])
        num_drafted = jnp.zeros([b], jnp.int32)
        for depth in range(1, num_tokens + 1):
            probs = softmax(logits)
            if depth > 1:
                goes_on &= ~stop(probs, so_far)
            level = logits[:, None]
            drawn, drawn_from = choose.draw(rng_keys, tied(context, level), depth, level, 1)
            token = jnp.where(goes_on[:, None], drawn[:, 0], root)
            so_far *= jnp.take_along_axis(probs, token, 1)[:, 0]
            num_drafted += goes_on
            tokens.append(token)
            if drawn_from is not None:
                laws.append(jnp.where(goes_on[:, None, None], drawn_from[:, 0], filler))
            if depth < num_tokens:

                def feed(token: Array = token, carry: Any = carry, depth: int = depth) -> Any:
                    parents = jnp.zeros((b, 1), jnp.int32)
                    return expand(carry, token, parents, jnp.ones((b, 1, depth), bool), depth)

                shapes = jax.eval_shape(feed)

                def leave_out(shapes: Any = shapes) -> Any:
                    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

                found, carry = lax.cond(goes_on.any(), feed, leave_out)
                logits = found[:, 0]
        q = softmax(jnp.concatenate(laws, 1)) if len(laws) > 1 else None
        return trees.chain(jnp.concatenate(tokens, 1), q, num_drafted)

    return Builder(grow, Proposal(law, num_tokens + 1, num_tokens))


def best_first(width: int, num_children: int, depth: int, choose: Choose) -> Builder:
    """A tree that branches where the draft is sure, of tokens that may be drawn: DySpec.

    A node's value is the probability of its path, of the draft's law at temperature 1. Of every
    level the `width` best nodes get `num_children` children each (arXiv 2410.11744; OPT-Tree, arXiv
    2406.17276). All that were drawn stay, as they were drawn: pruning them by their values, as
    `grow.dynamic` does with points, would not be lossless.

    Args:
        width: nodes that a level expands.
        num_children: of every expanded node, the root included.
        depth: levels below the root.
        choose: how children are picked.

    Raises:
        ValueError: fewer than one of each; more nodes to expand than the first level has.
    """
    if min(width, num_children, depth) < 1 or width > num_children:
        raise ValueError(
            f"A tree of width {width} cannot be grown from {num_children} children at depth "
            f"{depth}; it needs a width and depth of at least 1 and as many children as its width."
        )
    num_nodes = 1 + num_children + (depth - 1) * width * num_children
    law = choose.law
    if law not in ("point", "coupled"):
        law = "chain" if num_nodes == depth + 1 else "general"

    def grow(
        expand: Callable, rng_keys: Keys, context: Context, logits: Array, carry: Any
    ) -> Draft:
        b, vocab_size = logits.shape
        logits = logits[:, None]
        tokens, laws = [trees.root(context)], [jnp.zeros((b, 1, vocab_size))]
        parents = [jnp.full((b, 1), -1, jnp.int32)]
        # Of the nodes fed last: place, value, and their ancestors among all fed below the root.
        fed, value_of = jnp.zeros((b, 1), jnp.int32), jnp.ones((b, 1))
        seen, count = jnp.zeros((b, 1, 0), bool), 1
        for level in range(1, depth + 1):
            here = tied(context, logits)
            drawn, law = choose.draw(rng_keys, here, level, logits, num_children)  # [B, W, k]
            value = value_of[..., None] * jnp.take_along_axis(softmax(logits), drawn, 2)
            tokens.append(drawn.reshape(b, -1))
            parents.append(jnp.repeat(fed, num_children, 1))
            if law is not None:
                laws.append(law.reshape(b, -1, vocab_size))
            if level < depth:
                value_of, best = lax.top_k(value.reshape(b, -1), width)
                fed, parent = count + best, best // num_children
                above = jnp.take_along_axis(seen, parent[..., None], 1)
                itself = jnp.broadcast_to(jnp.eye(width, dtype=bool), (b, width, width))
                seen = jnp.concatenate([above, itself], 2)
                chosen = jnp.take_along_axis(tokens[-1], best, 1)
                logits, carry = expand(carry, chosen, parent, seen, level)
            count += tokens[-1].shape[1]
        return Draft(
            tokens=jnp.concatenate(tokens, 1),
            parents=jnp.concatenate(parents, 1),
            probs=softmax(jnp.concatenate(laws, 1)) if len(laws) > 1 else None,
            num_drafted=jnp.full([b], num_nodes - 1, jnp.int32),
            depth=depth,
        )

    return Builder(grow, Proposal(law, num_nodes, depth))
