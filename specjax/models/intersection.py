"""A draft model that speaks another vocabulary, as one that speaks the target's.

Token-level intersection (TLI; Timor et al., arXiv 2502.05202): the draft's law is restricted to the
tokens that both vocabularies have and renormalised, which is a law over the target's vocabulary, so
that every rule applies. A token of the text that the draft does not have it reads as unknown.
"""

import jax.numpy as jnp
import numpy as np
import tokenizers

from specjax.types import Array, Block, Cache, Model, ModelOutput, PyTree

_LEAST = 0.01  # share of the target's tokens below which drafting is hopeless


def common_tokens(target: tokenizers.Tokenizer, draft: tokenizers.Tokenizer) -> np.ndarray:
    """The draft's id of each of the target's tokens [V of the tokenizer] int; -1 where it has none.

    Tokens are compared by their text as the tokenizers store it.
    """
    ids = draft.get_vocab(with_added_tokens=True)
    found = np.full(target.get_vocab_size(), -1)
    for token, i in target.get_vocab(with_added_tokens=True).items():
        found[i] = ids.get(token, -1)
    return found


def intersected(model: Model, ids: np.ndarray, unknown_id: int = 0) -> Model:
    """The model over the target's vocabulary, with the same params and cache.

    Args:
        model: over its own vocabulary.
        ids: [V] int, its id of each of the target's tokens; -1 where it has none.
        unknown_id: what it reads in place of those.

    Returns:
        A model whose logits are -inf at tokens that it does not have.

    Raises:
        ValueError: ids outside the model's vocabulary; hardly any token in common.
    """
    ids = np.asarray(ids)
    num_common = int((ids >= 0).sum())
    if max(int(ids.max(initial=-1)), unknown_id) >= model.vocab_size or unknown_id < 0:
        raise ValueError(
            f"Ids up to {max(int(ids.max(initial=-1)), unknown_id)} and an unknown id of "
            f"{unknown_id} were given for a draft model of {model.vocab_size} tokens."
        )
    if num_common < max(1, _LEAST * len(ids)):
        raise ValueError(
            f"The draft's {model.vocab_size} tokens and the target's {len(ids)} have {num_common} "
            f"in common; need at least {_LEAST:.0%} of the target's."
        )
    read_as = np.where(ids < 0, unknown_id, ids).astype(np.int32)
    column = np.where(ids < 0, model.vocab_size, ids)  # one more than there are: -inf

    def restricted(logits: Array) -> Array:
        nothing = jnp.full((*logits.shape[:-1], 1), -jnp.inf, logits.dtype)
        return jnp.concatenate([logits, nothing], -1)[..., column]

    def apply(
        params: PyTree,
        tokens: Array,
        positions: Array,
        mask: Array,
        cache: Cache,
        block: Block | None = None,
    ) -> tuple[ModelOutput, Block]:
        tokens = jnp.asarray(read_as)[tokens]
        output, block = model.apply(params, tokens, positions, mask, cache, block)
        return ModelOutput(restricted(output.logits), output.features), block

    def embed(params: PyTree, tokens: Array) -> Array:
        embeddings: Array = model.embed(params, jnp.asarray(read_as)[tokens])
        return embeddings

    def unembed(params: PyTree, hidden: Array) -> Array:
        return restricted(model.unembed(params, hidden))

    return model._replace(
        apply=apply, embed=embed, unembed=unembed, vocab_size=len(ids), stack=None
    )
