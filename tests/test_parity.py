"""The same files give the same logits here and in transformers, whichever way tokens are fed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import cache as caches
from specjax import trees
from specjax.models import hf
from specjax.models.transformer import forward, transformer
from specjax.types import Block, Cache, Model, PyTree

torch = pytest.importorskip("torch", reason="compares with transformers, which needs torch")
transformers = pytest.importorskip("transformers", reason="compares with transformers")

TOLERANCE = 1e-4
BATCH, LENGTH = 2, 48
PARENTS = (-1, 0, 0, 0, 1, 1, 3, 4, 6)  # breadth first
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "rms_norm_eps": 1e-3,  # large enough to show, as the theta above
    "initializer_range": 0.25,  # wide, so that logits differ by far more than the tolerance
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # a third of LENGTH
}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped tied": {"tie_word_embeddings": True},
    "ungrouped untied": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "llama3 rope": {"tie_word_embeddings": False, "rope_parameters": LLAMA3},
    "own head size": {"tie_word_embeddings": True, "head_dim": 20},
}


class Pair(NamedTuple):
    theirs: Any
    model: Model
    found: hf.Checkpoint
    tokens: np.ndarray  # [B, N] int32
    logits: np.ndarray  # [B, N, V], theirs


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()


def largest_difference(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


@pytest.fixture(scope="module", autouse=True)
def full_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", params=list(VARIANTS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    directory = tmp_path_factory.mktemp("theirs")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES | VARIANTS[request.param])
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():  # all ones otherwise, which hides a norm in the wrong place
        for name, weight in theirs.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    theirs.save_pretrained(directory)
    found = hf.load(directory)
    tokens = np.random.default_rng(0).integers(0, 64, (BATCH, LENGTH), np.int32)
    logits = torch_logits(theirs, tokens)
    assert logits.std() > 1.0
    return Pair(theirs, transformer(found.config), found, tokens, logits)


@pytest.fixture(scope="module")
def uncached(pair: Pair) -> Callable[..., jax.Array]:
    """(params, tokens [B, N]) -> logits [B, N, V] of one causal pass."""
    return jax.jit(lambda params, tokens: forward(pair.model, params, tokens).logits)


def test_uncached(pair: Pair, uncached: Callable[..., jax.Array]) -> None:
    assert largest_difference(uncached(pair.found.params, pair.tokens), pair.logits) < TOLERANCE


def test_special_ids(pair: Pair) -> None:
    assert (pair.found.eos_ids, pair.found.bos_id) == ((2, 3), 1)


def test_token_by_token(pair: Pair) -> None:
    visible = jnp.ones((BATCH, 1, 1), bool)

    @jax.jit
    def step(params: PyTree, token: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        position = cache.length[:, None]
        output, block = pair.model.apply(params, token[:, None], position, visible, cache)
        root, one = jnp.zeros((BATCH, 1), jnp.int32), jnp.ones(BATCH, jnp.int32)
        return output.logits[:, 0], caches.commit(cache, block, root, one)

    cache, rows = pair.model.init_cache(BATCH, LENGTH + 5), []
    for token in pair.tokens.T:
        logits, cache = step(pair.found.params, token, cache)
        rows.append(logits)
    assert largest_difference(jnp.stack(rows, 1), pair.logits) < TOLERANCE


def test_tree(pair: Pair, uncached: Callable[..., jax.Array]) -> None:
    """A node fed at once or level by level sees its path alone, after a ragged prefix."""
    tree, params = trees.topology(PARENTS), pair.found.params
    rng = np.random.default_rng(1)
    nodes = rng.integers(0, 64, (BATCH, len(PARENTS)), np.int32)
    prefix = np.array([LENGTH - 5, 20], np.int32)
    positions = (prefix[:, None] + tree.depth_of).astype(np.int32)

    # Every node's path, run alone: a row per (batch row, node).
    alone = np.repeat(pair.tokens, len(PARENTS), 0)
    last = positions.reshape(-1)
    for row in range(len(alone)):
        b, node = divmod(row, len(PARENTS))
        while node >= 0:
            alone[row, positions[b, node]] = nodes[b, node]
            node = PARENTS[node]
    theirs = torch_logits(pair.theirs, alone)[np.arange(len(alone)), last]
    ours = uncached(params, alone)[np.arange(len(alone)), last]
    needed = theirs.reshape(BATCH, len(PARENTS), -1)

    @jax.jit
    def prefill(params: PyTree, tokens: jax.Array, count: jax.Array) -> Cache:
        n = tokens.shape[1]
        everywhere = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), tokens.shape)
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((n, n), bool)), (BATCH, n, n))
        empty = pair.model.init_cache(BATCH, LENGTH)
        _, block = pair.model.apply(params, tokens, everywhere, mask, empty)
        return caches.commit(empty, block, everywhere, count)

    @jax.jit
    def at_once(params: PyTree, cache: Cache) -> jax.Array:
        mask = jnp.broadcast_to(
            trees.ancestor_mask(jnp.asarray(PARENTS)), (BATCH, *tree.mask.shape)
        )
        return pair.model.apply(params, nodes, positions, mask, cache)[0].logits

    @jax.jit
    def by_level(params: PyTree, cache: Cache) -> jax.Array:
        block: Block | None = None
        rows = []
        for level in tree.levels:
            mask = np.broadcast_to(
                tree.mask[level, : level[-1] + 1], (BATCH, len(level), level[-1] + 1)
            )
            output, block = pair.model.apply(
                params, nodes[:, level], positions[:, level], mask, cache, block
            )
            rows.append(output.logits)
        assert block is not None
        assert block.positions.shape == block.keys[0].shape[::2] == (BATCH, len(PARENTS))
        return jnp.concatenate(rows, 1)

    cache = prefill(params, pair.tokens, prefix)
    # Slots at or beyond the length hold garbage, which must not show.
    cache = jax.tree.map(lambda x: x if x.ndim == 1 else x.at[1, :, 20:].set(1e3), cache)
    for name, logits in (
        ("alone", ours.reshape(needed.shape)),
        ("at once", at_once(params, cache)),
        ("by level", by_level(params, cache)),
    ):
        assert largest_difference(logits, needed) < TOLERANCE, name


@pytest.mark.parametrize("max_shard_bytes", [None, 10_000])
def test_transformers_reads_what_is_saved(
    pair: Pair, tmp_path: Path, max_shard_bytes: int | None
) -> None:
    found = pair.found
    hf.save(
        tmp_path,
        found.config,
        found.params,
        eos_ids=found.eos_ids,
        bos_id=found.bos_id,
        max_shard_bytes=max_shard_bytes,
    )
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert theirs.dtype == torch.float32
    np.testing.assert_array_equal(torch_logits(theirs.eval(), pair.tokens), pair.logits)
    assert theirs.generation_config.eos_token_id == [2, 3]
    assert theirs.generation_config.bos_token_id == 1


def test_bfloat16_both_ways(pair: Pair, tmp_path: Path) -> None:
    hf.save(tmp_path / "ours", pair.found.config, pair.found.params, dtype=jnp.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    theirs.save_pretrained(tmp_path / "theirs")
    found = hf.load(tmp_path / "theirs").params
    same = jax.tree.map(
        lambda x, y: x.dtype == jnp.bfloat16 and bool((x == y.astype(x.dtype)).all()),
        found,
        pair.found.params,
    )
    assert all(jax.tree.leaves(same))
