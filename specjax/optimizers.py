"""How parameters follow gradients: AdamW and Muon, their schedule, scaled and accumulated updates.

A config names an optimizer by its path, "specjax.optimizers.muon". Trees may be nested in any way;
parameters are told apart by their names and ranks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as optax_muon

from specjax.types import Array, PyTree

_BETAS = (0.9, 0.95)  # of Adam's two moments


class Optimizer(NamedTuple):
    """An optax transformation and the learning rate that it follows."""

    init: Callable  # (params) -> state
    update: Callable  # (grads, state, params) -> (updates, state)
    learning_rate: Callable  # (step, from 0) -> float32: what the update of that step multiplies


def schedule(peak: float, warmup_steps: int, num_steps: int) -> optax.Schedule:
    """Linear from 0 to `peak` in `warmup_steps` steps, then a half cosine that ends in 0.

    Raises:
        ValueError: no steps are left after warming up.
    """
    if not 0 <= warmup_steps < num_steps:
        raise ValueError(
            f"{warmup_steps} steps of warm-up do not fit into {num_steps} steps; need 0 to "
            f"{num_steps - 1}."
        )
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, num_steps)


def adamw(
    num_steps: int,
    learning_rate: float,
    warmup_steps: int,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
) -> Optimizer:
    """Adam with decoupled weight decay (arXiv 1711.05101) of matrices, and of nothing else.

    Args:
        num_steps: of the whole training.
        learning_rate: at its peak, see `schedule`.
        warmup_steps: see there.
        weight_decay: of matrices, times the learning rate.
        clip_norm: gradients are scaled down to this norm of them all together.

    Raises:
        ValueError: see `schedule`.
    """
    rate = schedule(learning_rate, warmup_steps, num_steps)
    b1, b2 = _BETAS
    rule = optax.adamw(rate, b1, b2, weight_decay=weight_decay, mask=_matrices)
    return _clipped(clip_norm, rule, rate)


def muon(
    num_steps: int,
    learning_rate: float,
    adam_learning_rate: float,
    warmup_steps: int,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
) -> Optimizer:
    """Muon (Jordan et al. 2024; arXiv 2502.16982) for hidden matrices, Adam for all else.

    Hidden matrices [out, in] are those of layers and heads: all but embeddings and unembeddings.
    Both parts have Nesterov's momentum.

    Args:
        num_steps: of the whole training.
        learning_rate: at its peak, of Muon's part, see `schedule`.
        adam_learning_rate: the same of Adam's part.
        warmup_steps: of both.
        weight_decay: of Muon's matrices, times their learning rate.
        clip_norm: gradients are scaled down to this norm of them all together.

    Raises:
        ValueError: see `schedule`.
    """
    rate = schedule(learning_rate, warmup_steps, num_steps)
    b1, b2 = _BETAS
    rule = optax_muon(
        rate,
        weight_decay=weight_decay,
        adam_b1=b1,
        adam_b2=b2,
        adam_learning_rate=schedule(adam_learning_rate, warmup_steps, num_steps),
        muon_weight_dimension_numbers=_hidden_matrices,
    )
    return _clipped(clip_norm, rule, rate)


def _clipped(
    clip_norm: float, rule: optax.GradientTransformation, rate: optax.Schedule
) -> Optimizer:
    chain = optax.chain(optax.clip_by_global_norm(clip_norm), rule)
    return Optimizer(chain.init, chain.update, rate)


def _matrices(params: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.ndim > 1, params)


def _hidden_matrices(params: PyTree) -> PyTree:
    """The axes (in, out) of what Muon makes orthogonal, None elsewhere."""

    def axes(path: tuple, x: Array) -> MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path)
        is_vocabulary = "embed_tokens" in name or "lm_head" in name
        return MuonDimensionNumbers(1, 0) if x.ndim == 2 and not is_vocabulary else None

    return jax.tree_util.tree_map_with_path(axes, params)


def scaled_updates(updates: PyTree, scales: PyTree) -> PyTree:
    """Updates times `scales`, a tree of which each leaf stands for all that lies below it.

    Scaling what the optimizer says, weight decay included, scales the learning rate there.
    """
    return jax.tree.map(
        lambda scale, part: jax.tree.map(lambda x: (scale * x).astype(x.dtype), part),
        scales,
        updates,
    )


def accumulated(value_and_grad: Callable, num_microbatches: int) -> Callable:
    """The same function of a batch that is too large to be looked at as a whole.

    The mean over microbatches, weighted by their sums of `batch.weights`, is what the whole batch
    gives where a loss and its metrics are means by these weights; randomness differs.

    Args:
        value_and_grad: (params, target_params, batch, rng_key) -> ((loss, metrics), grads), all
            of them arrays.
        num_microbatches: M. Microbatch m takes rows m, m + M, ..: of rows that are split over
            devices in order, every device keeps its own. Its key is `fold_in(rng_key, m)`.

    Returns:
        A function like `value_and_grad`, whose results are float32.

    Raises:
        ValueError: M is not positive; when traced, it does not divide the rows.
    """
    if num_microbatches < 1:
        raise ValueError(f"A batch cannot be split into {num_microbatches}; need 1 or more.")
    if num_microbatches == 1:
        return value_and_grad

    def split(x: Array) -> Array:
        if x.shape[0] % num_microbatches:
            raise ValueError(
                f"{x.shape[0]} rows cannot be split into {num_microbatches} microbatches; the "
                "first must be a multiple of the second."
            )
        return x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1)

    def whole(params: PyTree, target_params: PyTree, batch: Any, rng_key: Array) -> Any:
        def found(i: Array, part: Any) -> tuple[PyTree, Array]:
            rng = jax.random.fold_in(rng_key, i)
            return value_and_grad(params, target_params, part, rng), part.weights.sum()

        def add(total: PyTree, numbered: tuple[Array, Any]) -> tuple[PyTree, None]:
            mean, weight = found(*numbered)
            sums = jax.tree.map(lambda x: weight * x, mean), weight
            return jax.tree.map(lambda t, x: t + x.astype(jnp.float32), total, sums), None

        parts = jnp.arange(num_microbatches), jax.tree.map(split, batch)
        shapes = jax.eval_shape(found, *jax.tree.map(lambda x: x[0], parts))
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
        (sums, weight), _ = jax.lax.scan(add, nothing, parts)
        return jax.tree.map(lambda x: x / jnp.maximum(weight, 1e-6), sums)

    return whole
