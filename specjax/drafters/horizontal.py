"""The first tokens by one drafter, the later ones by a cheaper one.

The horizontal cascade of CS-Drafting (Chen et al., arXiv 2312.11462): the further a token is from
the root, the less likely it is to be looked at, so the less may be spent on it.
"""

import dataclasses

import jax.numpy as jnp

from specjax import cache as caches
from specjax import trees
from specjax.drafters.combine import alternate
from specjax.types import Context, Draft, Drafter, Keys, Params, Proposal

_FIRST, _SECOND = 0, 1


def horizontal(first: Drafter, second: Drafter) -> Drafter:
    """Drafts a chain that `second` continues where `first` ends.

    Args:
        first: drafts a chain.
        second: drafts a chain from the text alone, which is all that it is shown of the first's
            tokens: it may copy, look up and count. Weights are `params.drafter[0]` and `[1]`.

    Raises:
        ValueError: a drafter of trees; vocabularies that differ.
    """
    drafters = (first, second)
    proposers = [alternate(i, drafters) for i in (_FIRST, _SECOND)]
    for drafter in drafters:
        law, num_nodes, depth = drafter.proposal
        if num_nodes != depth + 1:
            raise ValueError(
                f"A chain can only go on from a chain, but a drafter of law {law!r} has "
                f"{num_nodes} nodes at depth {depth}; need {depth + 1}."
            )
    laws = {drafter.proposal.law for drafter in drafters}
    law = "point" if laws == {"point"} else "coupled" if "coupled" in laws else "chain"

    def propose(
        params: Params, rng_keys: Keys, state: tuple, context: Context
    ) -> tuple[Draft, tuple]:
        head, state = proposers[_FIRST].propose(params, rng_keys, state, context)
        news = head.tokens[:, 1:]
        room = context.tokens.shape[1] - context.length
        count = jnp.minimum(room, news.shape[1])
        supposed = dataclasses.replace(
            context,
            tokens=caches.write(context.tokens, news, context.length, count),
            length=context.length + count,
        )
        tail, state = proposers[_SECOND].propose(params, rng_keys, state, supposed)
        tokens = jnp.concatenate([head.tokens, tail.tokens[:, 1:]], 1)
        drawn = [draft.probs.shape[-1] for draft in (head, tail) if draft.probs is not None]
        probs = None
        if drawn:
            q, more = (trees.node_probs(draft, drawn[0]) for draft in (head, tail))
            probs = jnp.concatenate([q, more[:, 1:]], 1)
        return trees.chain(tokens, probs, head.num_drafted + tail.num_drafted), state

    depth = first.proposal.depth + second.proposal.depth
    return Drafter(
        proposers[_FIRST].init,
        propose,
        proposers[_FIRST].observe,
        Proposal(law, depth + 1, depth),
        proposers[_FIRST].vocab_size,
    )
