"""Optimizers against their formulas in numpy, and accumulated gradients against the whole batch."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from specjax import optimizers
from specjax.build import build
from specjax.objectives import Batch
from specjax.types import Array, PyTree


def test_schedule_rises_linearly_and_falls_as_a_cosine() -> None:
    rate = optimizers.schedule(2.0, 4, 12)
    expected = {0: 0.0, 1: 0.5, 4: 2.0, 6: 1 + math.sqrt(0.5), 8: 1.0, 12: 0.0, 20: 0.0}
    for step, value in expected.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-6)
    assert float(optimizers.schedule(2.0, 0, 12)(0)) == 2.0
    for warmup_steps in (-1, 12):
        with pytest.raises(
            ValueError, match=f"^{warmup_steps} steps of warm-up do not fit into 12"
        ):
            optimizers.schedule(2.0, warmup_steps, 12)


def test_adamw_clips_decays_matrices_only_and_follows_the_schedule() -> None:
    rng, shapes = np.random.default_rng(0), {"w": (3, 2), "norm": (3,)}
    params = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    spec = {"call": "specjax.optimizers.adamw", "num_steps": 6, "warmup_steps": 2}
    optimizer = build({**spec, "learning_rate": 0.1, "weight_decay": 0.3, "clip_norm": 2.0})
    found = jax.tree.map(jnp.float32, params)
    state, update = optimizer.init(found), jax.jit(optimizer.update)
    mu = {name: np.zeros(shape) for name, shape in shapes.items()}
    nu = {name: np.zeros(shape) for name, shape in shapes.items()}
    # The first and the last gradient are cut to a norm of 2, the second is left alone.
    for t, size in enumerate((5.0, 0.1, 9.0)):
        grads = {name: size * rng.standard_normal(shape) for name, shape in shapes.items()}
        updates, state = update(jax.tree.map(jnp.float32, grads), state, found)
        found = optax.apply_updates(found, updates)
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        assert (norm > 2) == (t != 1)
        rate = 0.1 * (0.0, 0.5, 1.0)[t]
        assert float(optimizer.learning_rate(t)) == pytest.approx(rate)
        for name, g in grads.items():
            g = g * min(1, 2 / norm)
            mu[name] = 0.9 * mu[name] + 0.1 * g
            nu[name] = 0.95 * nu[name] + 0.05 * g**2
            step = mu[name] / (1 - 0.9 ** (t + 1))
            step = step / (np.sqrt(nu[name] / (1 - 0.95 ** (t + 1))) + 1e-8)
            decay = 0.3 * params[name] if name == "w" else 0.0
            params[name] = params[name] - rate * (step + decay)
    for name in shapes:
        np.testing.assert_allclose(found[name], params[name], rtol=2e-5)


def _orthogonalised(g: np.ndarray) -> np.ndarray:
    """Five of Muon's Newton-Schulz steps, by their definition."""
    x = g / np.linalg.norm(g)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def _nested() -> PyTree:
    """The names of a target with one layer and of several kinds of heads, matrices uneven."""
    layer = {"mlp": {"up_proj": (6, 4), "down_proj": (4, 6)}, "input_layernorm": {"weight": (4,)}}
    heads = {"heads_0": {"blocks_0": {"weight": (6, 4), "bias": (4,)}, "lm_head": (6, 4)}}
    heads |= {"fc": {"weight": (4, 6)}, "midlayer": layer, "prefix": {"layers_0": layer}}
    target = {"embed_tokens": (6, 4), "layers_0": layer, "norm": {"weight": (4,)}}
    return {"target": target | {"lm_head": (6, 4)}, "heads": heads}


def test_muon_takes_hidden_matrices_wherever_they_are() -> None:
    rng = np.random.default_rng(1)
    grads = jax.tree.map(
        lambda shape: jnp.float32(rng.standard_normal(shape)),
        _nested(),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    params = jax.tree.map(lambda g: g + 0.5, grads)
    options = {"num_steps": 9, "warmup_steps": 0, "learning_rate": 0.1, "adam_learning_rate": 0.01}
    optimizer = optimizers.muon(**options, weight_decay=0.2)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    assert float(optimizer.learning_rate(0)) == pytest.approx(0.1)

    hidden = 0
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = jax.tree_util.keystr(path)
        g, w = (np.asarray(_at(tree, path), np.float64) for tree in (grads, params))
        if g.ndim == 2 and "embed" not in name and "lm_head" not in name:
            hidden += 1
            out, into = g.shape
            step = _orthogonalised(g) * max(1, out / into) ** 0.5
            expected = -0.1 * (step + 0.2 * w)
        else:
            # Adam's first step, its momentum being Nesterov's too: b1 m / (1 - b1^2) + g, m = .1 g.
            expected = -0.01 * np.sign(g) * (0.9 * 0.1 / 0.19 + 1)
        np.testing.assert_allclose(update, expected, rtol=1e-3, atol=1e-5, err_msg=name)
    assert hidden == 2 + 3 * 2  # a block, an fc and three layers


def _at(tree: PyTree, path: tuple) -> Array:
    for key in path:
        tree = tree[key.key]
    return tree


def test_scales_multiply_all_that_lies_below_them() -> None:
    ones = {"a": jnp.ones(2), "b": {"c": jnp.ones(3, jnp.bfloat16)}}
    updates = {"target": ones, "heads": {"heads_0": ones, "heads_1": ones}}
    scales = {"target": 0.0, "heads": {"heads_0": jnp.float32(2), "heads_1": {"a": 3.0, "b": 4.0}}}
    scaled = optimizers.scaled_updates(updates, scales)
    assert [float(x[0]) for x in jax.tree.leaves(scaled)] == [2, 2, 3, 4, 0, 0]
    assert jax.tree.map(jnp.result_type, scaled) == jax.tree.map(jnp.result_type, updates)


def _gradient(params: PyTree, target_params: PyTree, batch: Batch, rng_key: Array) -> Any:
    """Of a loss of many positions, each with its own weight, and two metrics."""

    def loss(params: PyTree) -> tuple[Array, dict[str, Array]]:
        x = jnp.sin(batch.tokens[:, :-1, None] * target_params)
        error = jnp.square(x @ params["w"] + params["b"] - batch.tokens[:, 1:])
        total = jnp.maximum(batch.weights.sum(), 1e-6)
        noise = jax.random.uniform(rng_key)
        return (error * batch.weights).sum() / total, {"noise": noise, "size": total / total}

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("num_microbatches", [1, 2, 3])
def test_accumulated_gradients_are_those_of_the_whole_batch(num_microbatches: int) -> None:
    rng = np.random.default_rng(2)
    weights = rng.uniform(size=(6, 4)) * (rng.uniform(size=(6, 4)) < 0.6)
    weights[1::3] = 0.0  # of three microbatches one has nothing to predict
    batch = Batch(jnp.asarray(rng.integers(0, 9, (6, 5)), jnp.int32), jnp.float32(weights))
    params = {"w": jnp.float32(rng.standard_normal(3)), "b": jnp.float32(0.3)}
    arguments = params, jnp.arange(1.0, 4.0), batch, jax.random.key(3)
    (loss, metrics), grads = jax.jit(optimizers.accumulated(_gradient, num_microbatches))(
        *arguments
    )
    (whole_loss, whole_metrics), whole_grads = jax.jit(_gradient)(*arguments)
    np.testing.assert_allclose(loss, whole_loss, rtol=1e-5)
    for name in params:
        np.testing.assert_allclose(grads[name], whole_grads[name], rtol=1e-5)
    np.testing.assert_allclose(metrics["size"], 1.0, rtol=1e-6)

    if num_microbatches == 1:
        assert metrics["noise"] == whole_metrics["noise"]
        return
    # Rows m, m + M, .. have the m-th key.
    share = [weights[m::num_microbatches].sum() / weights.sum() for m in range(num_microbatches)]
    keys = [jax.random.fold_in(arguments[3], m) for m in range(num_microbatches)]
    expected = sum(s * float(jax.random.uniform(key)) for s, key in zip(share, keys, strict=True))
    np.testing.assert_allclose(metrics["noise"], expected, rtol=1e-5)


def test_batches_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(ValueError, match="A batch cannot be split into 0; need 1 or more"):
        optimizers.accumulated(_gradient, 0)
    batch = Batch(jnp.zeros((6, 5), jnp.int32), jnp.ones((6, 4)))
    with pytest.raises(ValueError, match="6 rows cannot be split into 4 microbatches"):
        optimizers.accumulated(_gradient, 4)({}, (), batch, jax.random.key(0))
