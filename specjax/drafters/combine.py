"""Several drafters side by side: all of them observe, and one or all of them propose.

`combine` glues the trees of several sources at the root, so that the target judges them all in one
pass. `alternate` lets one of them propose, for schedulers that switch between decoders
(`schedulers.switch`). What one drafts the others observe as anybody's draft.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from specjax import trees
from specjax.types import (
    Context,
    Draft,
    Drafter,
    Keys,
    Outcome,
    Params,
    Proposal,
)


def combine(drafters: Sequence[Drafter]) -> Drafter:
    """Drafts the trees of all, joined at their roots; earlier drafters' nodes are elder siblings.

    Args:
        drafters: their weights are the entries of `params.drafter`.

    Raises:
        ValueError: no drafter; vocabularies that differ.
    """
    vocab_size = _vocab_size(drafters)
    proposals = [drafter.proposal for drafter in drafters]
    laws = {proposal.law for proposal in proposals}
    law = "point" if laws == {"point"} else "coupled" if "coupled" in laws else "general"
    num_nodes = 1 + sum(proposal.num_nodes - 1 for proposal in proposals)
    proposal = Proposal(law, num_nodes, max(proposal.depth for proposal in proposals))

    def propose(
        params: Params, rng_keys: Keys, state: tuple, context: Context
    ) -> tuple[Draft, tuple]:
        drafts, states = [], []
        for i, drafter in enumerate(drafters):
            part, believed = drafter.propose(
                _own(params, i), _apart(rng_keys, i), state[i], context
            )
            drafts.append(part)
            states.append(believed)
        return _glued(drafts), tuple(states)

    return Drafter(_init(drafters), propose, _observe(drafters), proposal, vocab_size)


def alternate(i: int, drafters: Sequence[Drafter]) -> Drafter:
    """Drafts what the i-th drafter does; states and weights are those of `combine`.

    Raises:
        ValueError: no such drafter; vocabularies that differ.
    """
    if not 0 <= i < len(drafters):
        raise ValueError(f"Drafter {i} is to propose, but there are {len(drafters)}, from 0 on.")

    def propose(
        params: Params, rng_keys: Keys, state: tuple, context: Context
    ) -> tuple[Draft, tuple]:
        draft, believed = drafters[i].propose(
            _own(params, i), _apart(rng_keys, i), state[i], context
        )
        return draft, (*state[:i], believed, *state[i + 1 :])

    proposal, vocab_size = drafters[i].proposal, _vocab_size(drafters)
    return Drafter(_init(drafters), propose, _observe(drafters), proposal, vocab_size)


def _vocab_size(drafters: Sequence[Drafter]) -> int | None:
    """That of all drafters that have one."""
    if not drafters:
        raise ValueError("There are 0 drafters to combine; need at least 1.")
    sizes = {drafter.vocab_size for drafter in drafters} - {None}
    if len(sizes) > 1:
        listed = " and ".join(map(str, sorted(x for x in sizes if x is not None)))
        raise ValueError(f"Drafters have vocabularies of {listed} tokens; they must be the same.")
    return next(iter(sizes), None)


def _own(params: Params, i: int) -> Params:
    return Params(params.target, params.drafter[i])


def _apart(rng_keys: Keys, i: int) -> Keys:
    """A private stream for each drafter: sites of two of them may have one name."""
    private = jax.vmap(lambda key: jax.random.fold_in(key, i))(rng_keys.private)
    return dataclasses.replace(rng_keys, private=private)


def _init(drafters: Sequence[Drafter]) -> Any:
    def init(batch_size: int, max_length: int) -> tuple:
        return tuple(drafter.init(batch_size, max_length) for drafter in drafters)

    return init


def _observe(drafters: Sequence[Drafter]) -> Any:
    def observe(params: Params, state: tuple, context: Context, outcome: Outcome) -> tuple:
        return tuple(
            drafter.observe(_own(params, i), state[i], context, outcome)
            for i, drafter in enumerate(drafters)
        )

    return observe


def _glued(drafts: Sequence[Draft]) -> Draft:
    tokens, parents = [drafts[0].tokens[:, :1]], [drafts[0].parents[:, :1]]
    before = 0  # nodes below the root that earlier drafts have
    for draft in drafts:
        above = draft.parents[:, 1:]
        tokens.append(draft.tokens[:, 1:])
        parents.append(jnp.where(above > 0, above + before, above))
        before += draft.tokens.shape[1] - 1
    probs = None
    drawn = [draft.probs.shape[-1] for draft in drafts if draft.probs is not None]
    if drawn:
        laws = [trees.node_probs(draft, drawn[0]) for draft in drafts]
        probs = jnp.concatenate([laws[0][:, :1], *(x[:, 1:] for x in laws)], 1)
    return Draft(
        tokens=jnp.concatenate(tokens, 1),
        parents=jnp.concatenate(parents, 1),
        probs=probs,
        num_drafted=sum((draft.num_drafted for draft in drafts[1:]), drafts[0].num_drafted),
        depth=max(draft.depth for draft in drafts),
    )
