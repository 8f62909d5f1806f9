"""A trained model from elsewhere writes the text that was published with it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import llama2c
import numpy as np
import pytest

from specjax import cache as caches
from specjax.models import hf
from specjax.models.transformer import TransformerConfig, forward, transformer
from specjax.types import Array, Cache, Model, PyTree

NUM_TOKENS = 256


class Stories(NamedTuple):
    config: TransformerConfig
    model: Model
    params: PyTree
    tokens: np.ndarray  # [257], BOS first
    logits: np.ndarray  # [256, V], as the cached loop saw them


def data_directory() -> Path:
    """stories260K; skips the test where there is none."""
    root = Path(__file__).resolve().parents[2] / "shared" / "data"
    directory = Path(os.environ.get("SPECJAX_TEST_DATA", root)) / "stories260K"
    if not (directory / "checkpoint_legacy.bin").is_file():
        pytest.skip(f"no {directory.name} in {directory.parent}; SPECJAX_TEST_DATA names another")
    return directory


def greedy(model: Model, params: PyTree, first: int, count: int) -> tuple[Array, Array]:
    """`count` times the likeliest token, one at a time: tokens [count + 1], logits [count, V]."""

    def body(i: Array, state: tuple[Array, Array, Cache]) -> tuple[Array, Array, Cache]:
        tokens, logits, cache = state
        visible = jnp.ones((1, 1, 1), bool)
        position = i.reshape(1, 1)
        output, block = model.apply(params, tokens[i].reshape(1, 1), position, visible, cache)
        row = output.logits[0, 0]
        cache = caches.commit(cache, block, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32))
        return tokens.at[i + 1].set(jnp.argmax(row)), logits.at[i].set(row), cache

    tokens = jnp.full(count + 1, first, jnp.int32)
    logits = jnp.zeros((count, model.vocab_size), jnp.float32)
    start = (tokens, logits, model.init_cache(1, count))
    return jax.lax.fori_loop(0, count, body, start)[:2]


@pytest.fixture(scope="module", autouse=True)
def full_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def stories() -> Stories:
    config, params = llama2c.load(data_directory() / "checkpoint_legacy.bin")
    model = transformer(config)
    decode = jax.jit(lambda p: greedy(model, p, llama2c.BOS, NUM_TOKENS))
    tokens, logits = decode(params)
    return Stories(config, model, params, np.asarray(tokens), np.asarray(logits))


def test_published_text(stories: Stories) -> None:
    directory = data_directory()
    published = (directory / "stories260K.md").read_text().split(" -t 0.0\n")[1].split("\n```")[0]
    assert published.startswith("Once upon a time")
    assert published.endswith("We can help you.")
    pieces = llama2c.load_pieces(directory / "tokenizer.bin")
    assert len(pieces) == stories.config.vocab_size
    assert llama2c.decode(pieces, stories.tokens[1:]) == published


def test_without_a_cache(stories: Stories) -> None:
    tokens = jnp.asarray(stories.tokens[None, :-1])
    logits = jax.jit(lambda p, t: forward(stories.model, p, t).logits)(stories.params, tokens)[0]
    np.testing.assert_allclose(logits, stories.logits, atol=2e-4)
    np.testing.assert_array_equal(logits.argmax(-1), stories.tokens[1:])


def test_through_a_directory(stories: Stories, tmp_path: Path) -> None:
    hf.save(tmp_path, stories.config, stories.params, eos_ids=(llama2c.BOS,), bos_id=llama2c.BOS)
    found = hf.load(tmp_path)
    assert found.config == stories.config
    assert (found.eos_ids, found.bos_id) == ((llama2c.BOS,), llama2c.BOS)
    same = jax.tree.map(np.array_equal, found.params, stories.params)
    assert all(jax.tree.leaves(same))
