"""Hydra's heads, which learn from the text's own tokens what a path's tokens will tell them.

Ankner et al., arXiv 2402.05109. Hydra: cross-entropy of the text, one block per head. Hydra++ is a
set of options: `num_layers` above 1, a `prefix` layer, and the target's law as the only teacher,
`loss` being `losses.forward_kl`. Where ours differ: heads share the target's unembedding unless
told otherwise, start by passing the feature on, and have Medusa's weights.

At position t head k reads the feature and the embeddings of tokens t + 1 to t + 1 + k, and predicts
token t + 2 + k.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from specjax.build import build
from specjax.drafters.hydra import hydra as hydra_drafter
from specjax.models import hf_heads
from specjax.models.hydra import HydraHeads, hydra_heads
from specjax.models.transformer import TransformerConfig
from specjax.objectives import Batch, Objective, losses
from specjax.objectives.heads import (
    head_options,
    heads_loss,
    initial,
    shifted,
    tree,
    unembedding,
)
from specjax.objectives.teacher import teach
from specjax.types import Array, Model, PyTree

_OPTIONS: dict[str, Any] = {
    "num_heads": 4,
    "num_layers": 1,  # residual blocks of each head
    "prefix": None,  # TransformerConfig's fields of the layer before the heads, sizes of the target
    #                  and num_layers aside; None for no such layer
    "own_unembedding": False,  # each head trains a matrix of its own, which starts as the target's
    "loss": losses.hard_ce(),  # of each head's law
    "position_weights": losses.geometric(0.8),  # of the heads
    "temperature": 1.0,  # of both laws
    "build": None,  # the tree to evaluate with; by default `heads.tree` for the number of heads
    "initial": "",  # a directory to start from
    "dtype": jnp.float32,  # of activations and the prefix layer's cache
}


def hydra(config: Mapping[str, Any], target: Model) -> Objective:
    """Hydra or Hydra++: the heads learn, the target stays as it is.

    Args:
        config: see `_OPTIONS`; loss, weights and tree as `specjax.build.build` takes them.
        target: gives features, law, embedding and unembedding.

    Raises:
        ValueError: fields of a prefix that do not exist or are missing; as `head_options`,
            `hydra_heads` and `drafters.hydra.hydra`.
    """
    c = head_options("hydra", config, target, _OPTIONS)
    prefix = None if c.prefix is None else _prefix(c.prefix, target)
    sizes = (target.hidden_size, c.num_heads, c.num_layers)
    heads = hydra_heads(*sizes, prefix, c.own_unembedding, target.vocab_size, c.dtype)
    nats = heads_loss(c)

    def init(rng_key: Array, target_params: PyTree) -> PyTree:
        params = initial("hydra", c.initial, heads, target, rng_key)
        if c.own_unembedding and not c.initial:
            matrix = unembedding(target, target_params)
            for k in range(c.num_heads):
                params[f"heads_{k}"]["lm_head"]["weight"] = jnp.copy(matrix)
        return params

    def loss(
        params: PyTree, target_params: PyTree, batch: Batch, rng_key: Array
    ) -> tuple[Array, dict[str, Array]]:
        del rng_key
        teaching = teach(target, target_params, batch, c.temperature)
        shared = (target, target_params, teaching.features, batch.tokens[:, :-1])
        return nats(predictor(heads, params, *shared), teaching.log_p, batch)

    def export(
        directory: str, trainable: PyTree, eos_ids: tuple[int, ...] = (), bos_id: int | None = None
    ) -> None:
        del eos_ids, bos_id
        hf_heads.save(directory, heads, trainable)

    drafter = hydra_drafter(target, heads, build(c.build) or tree(c.num_heads))
    return Objective(init, loss, export, drafter)


def predictor(
    heads: HydraHeads,
    params: PyTree,
    target: Model,
    target_params: PyTree,
    features: Array,
    tokens: Array,
) -> Callable:
    """(k) -> logits [B, T, V], see `heads.heads_loss`; features [B, T, F] of tokens [B, T]."""
    embeddings = jax.lax.stop_gradient(target.embed(target_params, tokens))
    states = features[..., : heads.hidden_size]
    if heads.prefix is not None:
        b, n = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (b, n))
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((n, n), bool)), (b, n, n))
        states, _ = heads.look_back(params, states, positions, causal, heads.init_cache(b, 0))

    def predict(k: int) -> Array:
        path = [shifted(embeddings, k - i).astype(states.dtype) for i in range(k + 1)]
        hidden = heads.hidden(params, k, jnp.concatenate([shifted(states, k + 1), *path], -1))
        logits: Array = heads.unembed(params, k, target, target_params, hidden)
        return logits

    return predict


def _prefix(fields: Any, target: Model) -> TransformerConfig:
    sizes = {"vocab_size": target.vocab_size, "hidden_size": target.hidden_size, "num_layers": 1}
    try:
        return TransformerConfig(**{**sizes, **fields})
    except TypeError as error:
        raise ValueError(f"Option prefix of hydra has {sorted(fields)}: {error}.") from error
