"""No drafter: plain autoregression in the same engine, the baseline of every speed-up."""

from typing import Any

from specjax import trees
from specjax.types import Context, Draft, Drafter, Keys, Outcome, Params, Proposal


def none() -> Drafter:
    """Drafts the root alone, so that each target pass adds one token."""

    def init(batch_size: int, max_length: int) -> tuple:
        del batch_size, max_length
        return ()

    def propose(params: Params, rng_keys: Keys, state: Any, context: Context) -> tuple[Draft, Any]:
        del params, rng_keys
        return trees.chain(trees.root(context)), state

    def observe(params: Params, state: Any, context: Context, outcome: Outcome) -> Any:
        del params, context, outcome
        return state

    return Drafter(init, propose, observe, Proposal("point", 1, 0))
