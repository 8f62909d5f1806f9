"""Training on eight devices is training on one: same losses, smaller shares of the state."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from specjax import optimizers, sharding
from specjax.checkpointing import checkpoints
from specjax.models.transformer import TransformerConfig, forward, transformer
from specjax.objectives import Batch
from specjax.types import Array, PyTree

# Its processes are started once, not by every worker.
pytestmark = pytest.mark.xdist_group("sharding")

_NUM_STEPS, _BATCH_SIZE, _LENGTH = 5, 16, 16
_CONFIG = TransformerConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    tie_embeddings=False,
)
# Meshes and numbers of microbatches.
_RUNS: dict[str, tuple[dict[str, int], int]] = {
    "one": ({"data": 1}, 1),
    "data": ({"data": -1}, 2),
    "fsdp": ({"fsdp": 8}, 1),
    "all": ({"data": 2, "fsdp": 2, "tensor": 2}, 1),
}


# ------------------------------------------------------ in a process of its own with eight devices


def _loss(params: PyTree, _: Any, batch: Batch, rng_key: Array) -> tuple[Array, dict]:
    del rng_key
    logits = forward(transformer(_CONFIG), params, batch.tokens[:, :-1]).logits
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens[:, 1:])
    return (nats * batch.weights).sum() / batch.weights.sum(), {}


def _train(name: str, optimizer: optimizers.Optimizer, directory: Path) -> dict[str, Any]:
    """As short a training as can be, and what the tests want to know of it."""
    shape, num_microbatches = _RUNS[name]
    mesh = sharding.mesh(shape)
    sharding.check_batch(mesh, _BATCH_SIZE, num_microbatches)
    gradient = optimizers.accumulated(sharding.value_and_grad(mesh, _loss), num_microbatches)

    def init(rng_key: Array) -> PyTree:
        params = transformer(_CONFIG).init(rng_key)
        return {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}

    def train_step(state: PyTree, batch: Batch) -> tuple[PyTree, Array]:
        params = state["params"]
        (nats, _), grads = gradient(params, (), batch, jax.random.key(0))
        updates, opt_state = optimizer.update(grads, state["opt_state"], params)
        params = optax.apply_updates(params, updates)
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, nats

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, _CONFIG.vocab_size, (_BATCH_SIZE, _LENGTH + 1))
    batch = Batch(jnp.int32(tokens), jnp.float32(rng.uniform(size=(_BATCH_SIZE, _LENGTH))))
    abstract = jax.eval_shape(init, jax.random.key(1))
    places, rows = sharding.state_sharding(mesh, abstract), sharding.batch_sharding(mesh)
    state = jax.jit(init, out_shardings=places)(jax.random.key(1))
    step = jax.jit(
        train_step, in_shardings=(places, rows), out_shardings=(places, None), donate_argnums=0
    )
    compiled = step.lower(state, batch).compile()
    losses, batch = [], jax.device_put(batch, rows)
    for _ in range(_NUM_STEPS):
        state, nats = compiled(state, batch)
        losses.append(float(nats))

    same = [
        x.sharding.is_equivalent_to(place, x.ndim)
        for x, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True)
    ]
    if name == "fsdp":
        kept = checkpoints(directory, keep=1)
        kept.save(_NUM_STEPS, state, {})
        kept.close()
    elif name == "all":  # what was saved on another mesh comes back on this one
        like = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            abstract,
            places,
        )
        other, _ = checkpoints(directory, keep=1).restore(_NUM_STEPS, like)
        for x, y in zip(jax.tree.leaves(other), jax.tree.leaves(state), strict=True):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
            np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-4)
    return {
        "losses": losses,
        "unchanged": all(same),
        "shares": {
            jax.tree_util.keystr(path, simple=True, separator="."): x.addressable_shards[
                0
            ].data.shape
            for path, x in jax.tree_util.tree_leaves_with_path(state)
        },
        "bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
        "bytes_of_params": sum(x.nbytes for x in jax.tree.leaves(state["params"])),
        "bytes_of_a_device": compiled.memory_analysis().argument_size_in_bytes,
        "communicated": _communicated(compiled.as_text()),
    }


def _communicated(program: str) -> dict[str, int]:
    """Bytes that each kind of collective operation of a compiled program results in."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found: dict[str, int] = {}
    for result, kind in re.findall(rf"= (\([^)]*\)|\S+) ({kinds})(?:-start)?\(", program):
        sizes = re.findall(r"[fs]32\[([\d,]*)\]", result)
        total = sum(4 * math.prod(int(n) for n in size.split(",") if n) for size in sizes)
        found[kind] = found.get(kind, 0) + total
    return found


def _main(optimizer: str, directory: str, *names: str) -> None:
    options = {"num_steps": 20, "warmup_steps": 0, "learning_rate": 0.02, "weight_decay": 0.1}
    if optimizer == "muon":
        options["adam_learning_rate"] = 0.02
    chosen = getattr(optimizers, optimizer)(**options)
    for name in names:
        print(json.dumps((name, _train(name, chosen, Path(directory)))))


def _found(directory: Path, optimizer: str, *names: str) -> dict[str, dict]:
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    done = subprocess.run(
        [sys.executable, __file__, optimizer, str(directory), *names],
        env={**os.environ, **environment, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return _found(tmp_path_factory.mktemp("runs"), "adamw", *_RUNS)


# ------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", ["data", "fsdp", "all"])
def test_losses_on_eight_devices_are_those_on_one(runs: dict[str, dict], name: str) -> None:
    assert runs["one"]["losses"][-1] < runs["one"]["losses"][0] - 0.3  # the updates are seen
    np.testing.assert_allclose(runs[name]["losses"], runs["one"]["losses"], rtol=1e-5)
    assert runs[name]["unchanged"]  # the state lies where it lay before the step


def test_matrices_and_their_moments_are_really_split(runs: dict[str, dict]) -> None:
    for prefix in ("params", "opt_state.1.0.mu", "opt_state.1.0.nu"):
        for matrix, of_fsdp, of_all in (
            ("embed_tokens", [24, 2], [12, 8]),
            ("lm_head", [24, 2], [12, 8]),
            ("layers_0.self_attn.q_proj", [32, 2], [16, 8]),
            ("layers_0.self_attn.o_proj", [2, 32], [8, 16]),
            ("layers_0.mlp.up_proj", [32, 2], [16, 8]),
            ("layers_0.mlp.down_proj", [2, 32], [8, 16]),
            ("norm.weight", [16], [16]),
        ):
            name = f"{prefix}.{matrix}"
            assert runs["fsdp"]["shares"][name] == of_fsdp
            assert runs["all"]["shares"][name] == of_all
    batch = _BATCH_SIZE * (2 * _LENGTH + 1) * 4
    share = {"one": 1, "data": 1, "fsdp": 8, "all": 4}
    for name, parts in share.items():
        held, rows = runs[name]["bytes_of_a_device"], batch // (4 if name == "all" else 8)
        assert held < 1.3 * runs[name]["bytes"] / parts + (batch if name == "one" else rows)


def test_a_step_moves_weights_and_gradients_and_no_rows(runs: dict[str, dict]) -> None:
    assert runs["one"]["communicated"] == {}
    params = runs["one"]["bytes_of_params"]
    # Rows of two microbatches come from where they are: gradients are all that is exchanged.
    assert set(runs["data"]["communicated"]) == {"all-reduce"}
    assert runs["data"]["communicated"]["all-reduce"] < 1.1 * params
    # FSDP gathers each weight once, and sums each gradient once. One activation has more bytes.
    moved = runs["fsdp"]["communicated"]
    assert _BATCH_SIZE * _LENGTH * _CONFIG.hidden_size * 4 > params
    assert set(moved) <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert 0.9 * params < moved["all-gather"] < 1.1 * params
    assert moved["all-reduce"] + moved.get("reduce-scatter", 0) < 1.1 * params


@pytest.mark.slow
def test_muon_on_eight_devices_is_muon_on_one(tmp_path: Path) -> None:
    runs = _found(tmp_path, "muon", "one", "fsdp", "all")
    for name in ("fsdp", "all"):
        np.testing.assert_allclose(runs[name]["losses"], runs["one"]["losses"], rtol=1e-5)
        assert runs[name]["unchanged"]
    mu = "opt_state.1.inner_states.muon.inner_state.0.mu.layers_0.mlp.down_proj"
    assert runs["all"]["shares"][mu] == [8, 16]


def test_meshes_that_cannot_be_are_refused_in_one_line() -> None:
    assert dict(sharding.mesh({}).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert sharding.mesh({"fsdp": -1}).shape["fsdp"] == jax.device_count()
    for shape, message in (
        ({"data": 2, "model": 2}, "Mesh data=2 x model=2 has an axis 'model'; need some of data, "),
        ({"data": 0}, "Mesh data=0 has no such sizes; need 1 or more, at most one being -1"),
        ({"data": -1, "fsdp": -1}, "Mesh data=-1 x fsdp=-1 has no such sizes"),
        ({"data": 3, "fsdp": 2}, "Mesh data=3 x fsdp=2 takes 6 devices, which do not divide the 1"),
    ):
        with pytest.raises(ValueError, match=message):
            sharding.mesh(shape)


def test_batches_must_come_out_even() -> None:
    shape = {"data": 2, "fsdp": 2, "tensor": 2}
    mesh = jax.sharding.AbstractMesh(tuple(shape.values()), tuple(shape))
    sharding.check_batch(mesh, 16, 4)
    with pytest.raises(ValueError, match="Batch 6 does not divide over data x fsdp = 4 devices"):
        sharding.check_batch(mesh, 6)
    with pytest.raises(ValueError, match=r"Batch 8 in 4 microbatches .* need a multiple of 16"):
        sharding.check_batch(mesh, 8, 4)


def test_places_follow_names_and_ranks_and_what_divides() -> None:
    mesh = jax.sharding.AbstractMesh((1, 4, 2), sharding.AXES)
    heads = {
        "heads_0": {"blocks_0": {"weight": (8, 16), "bias": (8,)}, "lm_head": {"weight": (10, 8)}},
        "fc": {"weight": (8, 18)},
        "midlayer": {"self_attn": {"q_proj": (7, 16), "o_proj": (8, 8)}},
    }
    state = {"params": heads, "opt_state": ({"mu": heads}, {"count": ()}), "step": ()}
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        state,
        is_leaf=lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x),
    )
    places = jax.tree.map(lambda place: place.spec, sharding.state_sharding(mesh, shapes))
    expected = {
        "heads_0": {
            "blocks_0": {"weight": P("tensor", "fsdp"), "bias": P()},
            "lm_head": {"weight": P("tensor", "fsdp")},
        },
        "fc": {"weight": P("tensor", None)},
        "midlayer": {"self_attn": {"q_proj": P(None, "fsdp"), "o_proj": P("fsdp", "tensor")}},
    }
    assert places["params"] == expected
    assert places["opt_state"][0]["mu"] == expected
    assert places["opt_state"][1]["count"] == places["step"] == P()


if __name__ == "__main__":
    _main(*sys.argv[1:])
