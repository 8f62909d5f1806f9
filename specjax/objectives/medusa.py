"""Medusa's heads, trained on a frozen target or together with it.

Cai et al., arXiv 2401.10774, sections 2.2 and 2.3. Medusa-1: L = sum_k w_k L_k, where L_k is head
k's cross-entropy of the token it predicts and w_k = 0.8^k, k from 0 here, the target frozen.
Medusa-2: L = L_LM + c L_heads, everything trained; the heads alone come first, and the target's
updates stay smaller than theirs. Where ours differ: heads share the target's unembedding unless
told otherwise.

Position t's feature predicts token t + 1; head k predicts token t + 2 + k, so that the heads at one
position make one draft. `position_weights` weighs them, by default as above.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from specjax.build import build
from specjax.drafters.medusa import medusa as medusa_drafter
from specjax.models import hf, hf_heads
from specjax.models.medusa import MedusaHeads, medusa_heads
from specjax.models.transformer import TransformerConfig, forward
from specjax.objectives import Batch, Objective, losses
from specjax.objectives.heads import (
    head_options,
    heads_loss,
    initial,
    shifted,
    tree,
    unembedding,
)
from specjax.objectives.teacher import mean, teach
from specjax.types import Array, Model, Params, PyTree

_OPTIONS: dict[str, Any] = {
    "num_heads": 4,
    "num_layers": 1,  # residual blocks of each head
    "own_unembedding": False,  # each head trains a matrix of its own, which starts as the target's
    "loss": losses.hard_ce(),  # of each head's law
    "position_weights": losses.geometric(0.8),  # of the heads
    "temperature": 1.0,  # of both laws
    "build": None,  # the tree to evaluate with; by default `heads.tree` for the number of heads
    "initial": "",  # a directory to start from
    "dtype": jnp.float32,  # of activations
}


def medusa(config: Mapping[str, Any], target: Model) -> Objective:
    """Medusa-1: the heads learn, the target stays as it is.

    Args:
        config: see `_OPTIONS`; loss, weights and tree as `specjax.build.build` takes them.
        target: gives features, law and unembedding.

    Raises:
        ValueError: as `head_options`, `medusa_heads` and `drafters.medusa.medusa`.
    """
    c = head_options("medusa", config, target, _OPTIONS)
    heads = _heads(c, target)
    nats = heads_loss(c)

    def init(rng_key: Array, target_params: PyTree) -> PyTree:
        return _first("medusa", c, heads, target, target_params, rng_key)

    def loss(
        params: PyTree, target_params: PyTree, batch: Batch, rng_key: Array
    ) -> tuple[Array, dict[str, Array]]:
        del rng_key
        teaching = teach(target, target_params, batch, c.temperature)
        predict = predictor(heads, params, target, target_params, teaching.features)
        return nats(predict, teaching.log_p, batch)

    def export(
        directory: str, trainable: PyTree, eos_ids: tuple[int, ...] = (), bos_id: int | None = None
    ) -> None:
        del eos_ids, bos_id
        hf_heads.save(directory, heads, trainable)

    drafter = medusa_drafter(target, heads, build(c.build) or tree(c.num_heads))
    return Objective(init, loss, export, drafter)


def medusa2(config: Mapping[str, Any], target: Model) -> Objective:
    """Medusa-2: the target learns too, first not at all, then by smaller updates than the heads'.

    `backbone_loss` judges the target's law against the original target's and the text:
    `losses.hard_ce` trains on the text, `losses.forward_kl` is the paper's self-distillation.
    `model` holds the fields of the target's `TransformerConfig`, to export it by.

    Raises:
        ValueError: a `model` that is not the target's; as `medusa`.
    """
    more = {
        "model": {},
        "heads_weight": 0.2,
        "backbone_loss": losses.hard_ce(),
        "backbone_scale": 0.25,  # of the target's updates, relative to the heads'
        "warmup_steps": 0,  # of the heads alone
    }
    c = head_options("medusa2", config, target, {**_OPTIONS, **more})
    shape = _shape(c.model, target)
    heads = _heads(c, target)
    nats, backbone_nats = heads_loss(c), build(c.backbone_loss)

    def init(rng_key: Array, target_params: PyTree) -> PyTree:
        params = _first("medusa2", c, heads, target, target_params, rng_key)
        # A copy: the original stays the teacher.
        own = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), target_params)
        return {"target": own, "heads": params}

    def loss(
        trainable: PyTree, target_params: PyTree, batch: Batch, rng_key: Array
    ) -> tuple[Array, dict[str, Array]]:
        del rng_key
        params = trainable["target"]
        output = forward(target, params, batch.tokens[:, :-1])
        original = teach(target, target_params, batch).log_p
        found = backbone_nats(original, jax.nn.log_softmax(output.logits), batch.tokens[:, 1:])
        backbone = mean(found, batch.weights)
        # The law that the heads will be judged by teaches them; it does not learn from them.
        law = jax.lax.stop_gradient(jax.nn.log_softmax(output.logits / c.temperature))
        predict = predictor(heads, trainable["heads"], target, params, output.features)
        ahead, metrics = nats(predict, law, batch)
        metrics |= jax.lax.stop_gradient({"backbone_loss": backbone, "heads_loss": ahead})
        return backbone + c.heads_weight * ahead, metrics

    def export(
        directory: str, trainable: PyTree, eos_ids: tuple[int, ...] = (), bos_id: int | None = None
    ) -> None:
        """The target, and its heads in the folder `heads`."""
        hf.save(directory, shape, trainable["target"], jnp.bfloat16, eos_ids, bos_id)
        hf_heads.save(Path(directory) / "heads", heads, trainable["heads"], target_name="..")

    def update_scale(step: Array) -> dict[str, Array]:
        backbone = jnp.where(step < c.warmup_steps, 0.0, c.backbone_scale)
        return {"target": backbone, "heads": jnp.float32(1)}

    drafter = medusa_drafter(target, heads, build(c.build) or tree(c.num_heads))
    return Objective(
        init,
        loss,
        export,
        drafter,
        lambda trainable, target_params: Params(trainable["target"], trainable["heads"]),
        update_scale=update_scale,
    )


def _heads(c: SimpleNamespace, target: Model) -> MedusaHeads:
    sizes = (target.hidden_size, c.num_heads, c.num_layers)
    return medusa_heads(*sizes, c.own_unembedding, target.vocab_size, c.dtype)


def _shape(model: Any, target: Model) -> TransformerConfig:
    try:
        shape = model if isinstance(model, TransformerConfig) else TransformerConfig(**model)
    except TypeError as error:
        raise ValueError(f"Option model of medusa2 has {sorted(model)}: {error}.") from error
    if (shape.vocab_size, shape.hidden_size) != (target.vocab_size, target.hidden_size):
        raise ValueError(
            f"Option model of medusa2 has {shape.vocab_size} tokens and hidden size "
            f"{shape.hidden_size}, the target {target.vocab_size} and {target.hidden_size}; "
            "they must be the same."
        )
    return shape


def predictor(
    heads: MedusaHeads, params: PyTree, target: Model, target_params: PyTree, features: Array
) -> Callable:
    """(k) -> logits [B, T, V], see `heads.heads_loss`, from the target's features [B, T, F]."""

    def predict(k: int) -> Array:
        feature = shifted(features[..., : heads.hidden_size], k + 1)
        hidden = heads.hidden(params, feature, (k,))
        logits: Array = heads.unembed(params, target, target_params, hidden, (k,))[..., 0, :]
        return logits

    return predict


def _first(
    name: str,
    c: SimpleNamespace,
    heads: MedusaHeads,
    target: Model,
    target_params: PyTree,
    rng_key: Array,
) -> PyTree:
    params = initial(name, c.initial, heads, target, rng_key)
    if not heads.own_unembedding or c.initial:
        return params
    matrix = unembedding(target, target_params)
    # Copies: donation refuses an array given twice.
    return {name: {**head, "lm_head": jnp.copy(matrix)} for name, head in params.items()}
