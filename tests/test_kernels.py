"""The CPU kernel: right, the same for a row whatever its company, harmless where it is absent."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import engine, testing
from specjax.drafters import grow
from specjax.drafters.model import model
from specjax.kernels import native
from specjax.kernels.linear import FEW_ROWS, _few_rows, linear
from specjax.sampling import sampling
from specjax.types import Params
from specjax.verifiers.match import match

_NEEDS_COMPILER = pytest.mark.skipif(
    not native.available(), reason="no C++ compiler here: XLA's product is used"
)


def _operands(rows: int, inputs: int, outputs: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(rows * inputs + outputs)
    x, w = rng.normal(size=(rows, inputs)), rng.normal(size=(outputs, inputs))
    return jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize(("inputs", "outputs"), [(3, 1), (16, 8), (40, 33), (250, 1003)])
def test_product(rows: int, inputs: int, outputs: int) -> None:
    """Widths that fill no lane, no tile and no span; the largest is shared by threads."""
    x, w = _operands(rows, inputs, outputs)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    np.testing.assert_allclose(jax.jit(linear)(x, w), exact, rtol=1e-4, atol=1e-4)


@_NEEDS_COMPILER
def test_a_row_does_not_depend_on_its_company() -> None:
    x, w = _operands(FEW_ROWS, 200, 600)
    together = np.asarray(_few_rows(x, w))
    for rows in (1, 2, 5, 9, 16):
        np.testing.assert_array_equal(_few_rows(x[:rows], w), together[:rows])


@_NEEDS_COMPILER
def test_one_row_is_left_to_xla() -> None:
    """Plain decoding is the baseline of every speed-up, and there XLA's own product is faster."""
    uses = {}
    for rows in (1, 2, FEW_ROWS, FEW_ROWS + 1):
        text = jax.jit(linear).lower(*_operands(rows, 64, 64)).compile().as_text()
        uses[rows] = native.TARGET in text
    assert uses == {1: False, 2: True, FEW_ROWS: True, FEW_ROWS + 1: False}


def test_gradients_and_batching() -> None:
    x, w = _operands(6, 20, 11)
    x = x.reshape(2, 3, 20)

    def plain(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.einsum("...i,oi->...o", x, w)

    def squared(product: object) -> object:
        return jax.grad(lambda x, w: (product(x, w) ** 2).sum(), (0, 1))

    for a, b in zip(squared(linear)(x, w), squared(plain)(x, w), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    weights = jnp.stack([w, 2 * w])
    for axes, second in ((None, w), (0, weights)):
        batched = jax.vmap(linear, (0, axes))(x, second)
        expected = jax.vmap(plain, (0, axes))(x, second)
        np.testing.assert_allclose(batched, expected, rtol=1e-5, atol=1e-5)


@_NEEDS_COMPILER
def test_decoding_goes_through_the_kernel_and_writes_the_same() -> None:
    """Few rows, as users have them; the laws' large batches take XLA's product."""
    target, target_params = testing.tiny_model(48, seed=1)
    draft, draft_params = testing.tiny_model(48, seed=2, hidden_size=8)
    decoder = engine.decoder(target, model(draft, grow.chain(3, grow.coupled())), match())
    prompt = np.arange(10, dtype=np.int32).reshape(2, 5)
    length, limit = np.array([5, 1], np.int32), np.array([40, 31], np.int32)
    keys = jax.random.split(jax.random.key(0), 2)
    arguments = (keys, sampling(2, [0.0, 1.0]), prompt, length, limit)
    params = Params(target_params, draft_params)
    compiled = engine.decode.lower(decoder, params, *arguments, 40).compile()
    assert native.TARGET in compiled.as_text()
    state = compiled(params, *arguments)
    where = (prompt, length, 40)
    greedy = testing.greedy_reference(target, target_params, *where)
    sampled = testing.sample_reference(target, target_params, *arguments[:2], *where)
    tokens = np.asarray(state.context.tokens)
    np.testing.assert_array_equal(state.context.length, limit)
    np.testing.assert_array_equal(tokens[0, :40], greedy.tokens[0])
    np.testing.assert_array_equal(tokens[1, :31], sampled.tokens[1, :31])


def _fresh(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    native.available.cache_clear()


def test_without_a_compiler_xla_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x, w = _operands(4, 30, 20)
    expected = np.asarray(x) @ np.asarray(w).T
    _fresh(monkeypatch, tmp_path)
    try:
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(native.shutil, "which", lambda name: None)
            assert not native.available()
            assert not native.available()
            assert len(caplog.records) == 1
            np.testing.assert_allclose(linear(x, w), expected, rtol=1e-4, atol=1e-5)
        native.available.cache_clear()
        with monkeypatch.context() as patch:
            patch.setenv("SPECJAX_CPU_KERNELS", "0")
            assert not native.available()
        native.available.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(native, "FLAGS", ("-no-such-flag",))
            patch.setattr(native.shutil, "which", lambda name: sys.executable)
            caplog.clear()
            assert not native.available()
            assert "unavailable" in caplog.text
        assert list(tmp_path.rglob("*.so")) == []
    finally:
        native.available.cache_clear()


@_NEEDS_COMPILER
def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": root}
    command = "from specjax.kernels import native; assert native.available()"
    both = [subprocess.Popen([sys.executable, "-c", command], env=environment) for _ in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    built = list((tmp_path / "specjax").iterdir())
    assert [path.suffix for path in built] == [".so"]
