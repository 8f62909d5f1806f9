"""Loading: what is read is right, lies where it stays, and takes no more memory than it must."""

import dataclasses
import json
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console
from test_hf import assert_same, edit_tensors, message, random_params

from configs.bench import loading as config
from decode import loading
from specjax.models import hf, hf_heads
from specjax.models.medusa import medusa_heads
from specjax.models.transformer import TransformerConfig, num_params
from specjax.types import PyTree

LLAMA = TransformerConfig(
    vocab_size=50,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    max_position_embeddings=64,
)
CONFIGS = {
    "llama": LLAMA,
    "untied": dataclasses.replace(LLAMA, tie_embeddings=False),
    "mixtral": dataclasses.replace(
        LLAMA, family="mixtral", num_experts=3, num_experts_per_token=2, tie_embeddings=False
    ),
    "gpt2": dataclasses.replace(LLAMA, family="gpt2"),
}
families = pytest.mark.parametrize("family", CONFIGS)
dtypes = pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])


def saved(directory: Path, config: TransformerConfig, dtype: Any = jnp.bfloat16) -> PyTree:
    params = random_params(config, dtype)
    hf.save(directory, config, params, max_shard_bytes=1000)
    return params


def pointers(params: PyTree) -> set[int]:
    return {x.unsafe_buffer_pointer() for x in jax.tree.leaves(params)}


# ------------------------------------------------------------------------------------------- memory


@dtypes
@families
def test_parameters_stay_where_they_were_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: str | None
) -> None:
    """And are no part of the file."""
    params = saved(tmp_path, CONFIGS[family])
    made, memory = set(), hf._memory

    def recorded(*args: Any) -> np.ndarray:
        x = memory(*args)
        made.add(x.ctypes.data)
        return x

    monkeypatch.setattr(hf, "_memory", recorded)
    found = hf.load(tmp_path, dtype).params
    assert pointers(found) <= made
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    assert_same(found, jax.tree.map(lambda x: x.astype(dtype or x.dtype), params))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (3, 5), (3, 2**20)])
@pytest.mark.parametrize("kind", [None, "float32"])
def test_jax_takes_what_is_read(tmp_path: Path, shape: tuple[int, ...], kind: str | None) -> None:
    """Large arrays begin with a huge page, where there are any."""
    x = np.ones(shape, jnp.bfloat16)
    safetensors.numpy.save_file({"odd": np.ones(1, np.int8), "x": x}, tmp_path / "file")
    stored = hf.headers([tmp_path / "file"])["x"]
    read = hf.read(stored, None if kind is None else jnp.dtype(kind))
    assert read.shape == shape
    assert read.dtype == (kind or x.dtype)
    np.testing.assert_array_equal(read, x)
    assert jax.device_put(read).unsafe_buffer_pointer() == read.ctypes.data or not read.size
    assert read.ctypes.data % 2**21 == 0 or read.nbytes < 2**22


def test_heads_stay_where_they_were_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = medusa_heads(8, num_heads=2)
    shapes = jax.eval_shape(heads.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16), shapes)
    hf_heads.save(tmp_path, heads, params)
    made, read = set(), hf.read

    def recorded(*args: Any) -> np.ndarray:
        x = read(*args)
        made.add(x.ctypes.data)
        return x

    monkeypatch.setattr(hf, "read", recorded)
    for dtype in (jnp.bfloat16, jnp.float32):
        made.clear()
        found = hf_heads.load(tmp_path, LLAMA, dtype)[1]
        assert pointers(found) <= made
        assert_same(found, jax.tree.map(lambda x, to=dtype: x.astype(to), params))


@families
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_peak_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: str | None
) -> None:
    """The model and its largest tensor, as far as NumPy is concerned."""
    large = dataclasses.replace(CONFIGS[family], vocab_size=20_000, hidden_size=32)
    large = dataclasses.replace(large, head_dim=16, intermediate_size=1000)
    saved(tmp_path, large)
    monkeypatch.setattr(hf, "_HUGE", 2**30)  # what is before an array counts here, but is no memory
    monkeypatch.setattr(hf, "_PIECE", 1000)
    hf.load(tmp_path, dtype)  # imports, caches
    tracemalloc.start()
    try:
        found = hf.load(tmp_path, dtype).params
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    sizes = [x.nbytes for x in jax.tree.leaves(found)]
    assert peak <= sum(sizes) + max(sizes)
    if family != "gpt2":  # whose tensors are turned
        assert peak <= sum(sizes) + 250_000


@pytest.mark.parametrize("family", ["llama", "untied"])
def test_loaded_parameters_can_be_donated(tmp_path: Path, family: str) -> None:
    params = saved(tmp_path, CONFIGS[family])
    if family == "llama":  # a head that is compared with the embedding
        shard = hf.headers(hf.weight_files(tmp_path))["model.embed_tokens.weight"].path
        edit_tensors(shard, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    step = jax.jit(lambda params: jax.tree.map(lambda x: 2 * x, params), donate_argnums=0)
    first, second = hf.load(tmp_path).params, hf.load(tmp_path).params
    doubled = step(step(first))
    assert all(x.is_deleted() for x in jax.tree.leaves(first))
    assert_same(doubled, jax.tree.map(lambda x: 4 * x, params))
    assert_same(second, params)
    del first, second
    assert_same(hf.load(tmp_path).params, params)
    assert_same(doubled, jax.tree.map(lambda x: 4 * x, params))


# ------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("piece", [1, 7, 2**16, 2**18])
def test_every_bfloat16_becomes_its_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """Infinities, subnormals and all that is not a number keep their bits."""
    monkeypatch.setattr(hf, "_PIECE", piece)
    bits = np.arange(2**16 if piece > 7 else 300, dtype=np.uint16)
    safetensors.numpy.save_file({"x": bits.view(jnp.bfloat16)}, tmp_path / "file")
    read = hf.read(hf.headers([tmp_path / "file"])["x"], np.dtype(np.float32))
    np.testing.assert_array_equal(read.view(np.uint32), bits.astype(np.uint32) << 16)


@pytest.mark.parametrize("kind", [None, np.dtype(np.float32)])
def test_a_file_that_ends_early(tmp_path: Path, kind: np.dtype | None) -> None:
    """Such as one that is cut short while it is read; one that was before tells by its header."""
    path = tmp_path / "file"
    safetensors.numpy.save_file({"x": np.ones((3, 5), jnp.bfloat16)}, path)
    stored = hf.headers([path])["x"]
    path.write_bytes(path.read_bytes()[:-1])
    for refused in (message(hf.read, stored, kind), message(hf.headers, [path])):
        assert str(path) in refused
        assert "complete safetensors file" in refused


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_tied_head_is_compared_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str | None
) -> None:
    monkeypatch.setattr(hf, "_PIECE", 7)
    params = random_params(LLAMA, jnp.bfloat16)
    hf.save(tmp_path, LLAMA, params)
    path = tmp_path / "model.safetensors"
    embedding = np.asarray(params["embed_tokens"])
    edit_tensors(path, lambda t: t.update({"lm_head.weight": embedding}))
    kept = jax.tree.map(lambda x: x.astype(dtype or x.dtype), params)
    assert_same(hf.load(tmp_path, dtype).params, kept)
    other = embedding.copy()
    other[-1, -1] += 1
    edit_tensors(path, lambda t: t.update({"lm_head.weight": other}))
    assert "tie_word_embeddings" in message(hf.load, tmp_path, dtype)
    edit_tensors(path, lambda t: t.update({"lm_head.weight": embedding[:-1]}))
    assert "(49, 8); need (50, 8)" in message(hf.load, tmp_path, dtype)


# --------------------------------------------------------------------------------------- the script


def test_script(tmp_path: Path) -> None:
    c = config.get_config()
    c.model.update(vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=1)
    c.model.update(num_heads=2, num_kv_heads=1, head_dim=8)
    c.update(output=str(tmp_path), directory=str(tmp_path / "checkpoint"))
    c.update(repeats=1, max_shard_bytes=2000)
    loading.main(c)
    records = json.loads((tmp_path / "results.json").read_text())
    assert [r["what"] for r in records] == ["reading", "loading", "loading as float32"]
    shards = hf.weight_files(tmp_path / "checkpoint")
    assert len(shards) > 1
    size = 2 * num_params(hf.load(tmp_path / "checkpoint").params)
    assert [r["model_bytes"] for r in records] == [size, size, 2 * size]
    for r in records:
        assert r["file_bytes"] == sum(shard.stat().st_size for shard in shards)
        assert r["seconds"] > 0
        assert r["ratio"] == pytest.approx(r["ratio_of_medians"]), "of one round"
        assert (r["peak_bytes"] is not None) == Path("/proc/self/status").is_file()
    page = (tmp_path / "results.md").read_text()
    assert all(page.count(f"| {way} |") == 1 for way in loading.WAYS)
    assert (tmp_path / "results.png").stat().st_size > 1000


def test_script_makes_a_checkpoint_once(tmp_path: Path) -> None:
    c = config.get_config()
    c.model = dataclasses.asdict(LLAMA)
    loading.make(c, tmp_path / "made", Console())
    before = (tmp_path / "made/model.safetensors").stat()
    loading.make(c, tmp_path / "made", Console())
    assert (tmp_path / "made/model.safetensors").stat() == before
    c.model.vocab_size += 1
    assert "another model" in message(loading.make, c, tmp_path / "made", Console())
    c.repeats = 0
    assert "repeats is 0" in message(loading.main, c)
