"""The CPU kernels: right, the same for a row whatever its company, harmless where absent."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import engine, testing
from specjax.drafters import grow
from specjax.drafters.model import model
from specjax.kernels import attention, below, commit, native, noise
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
def test_few_rows_go_through_the_kernel() -> None:
    uses = {}
    for rows in (1, FEW_ROWS, FEW_ROWS + 1):
        text = jax.jit(linear).lower(*_operands(rows, 64, 64)).compile().as_text()
        uses[rows] = native.LINEAR in text
    assert uses == {1: True, FEW_ROWS: True, FEW_ROWS + 1: False}


def _attention(b: int, n: int, k: int, g: int, h: int, s: int, m: int) -> tuple[jax.Array, ...]:
    """Operands of `attention._two_products`, rows of any history and any mask that holds self."""
    rng = np.random.default_rng(b + n + h + s)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    angle = normal(b, n, h // 2)
    mask = jnp.asarray(rng.random((b, n, m)) < 0.5) | jnp.eye(n, m, m - n, dtype=bool)
    length = jnp.asarray(rng.integers(0, s + 1, b), jnp.int32)
    return (
        *(normal(b, n, k * g, h), normal(b, n, k, h), normal(b, n, k, h)),
        *(jnp.cos(angle), jnp.sin(angle), mask),
        *(normal(b, k, s, h), normal(b, k, s, h), length),
        *(normal(b, k, m - n, h), normal(b, k, m - n, h)),
    )


@_NEEDS_COMPILER
@pytest.mark.parametrize(
    ("b", "n", "k", "g", "h", "s", "m"),
    [
        (1, 1, 2, 2, 64, 70, 1),
        (3, 7, 1, 3, 20, 37, 9),
        (2, 32, 2, 1, 16, 5, 32),
        (2, 5, 3, 2, 130, 50, 5),
        (1, 1, 1, 8, 64, 400, 40),
    ],
)
def test_attention(b: int, n: int, k: int, g: int, h: int, s: int, m: int) -> None:
    """Heads that fill no lanes, groups of rows of every size, earlier nodes in the block."""
    operands = _attention(b, n, k, g, h, s, m)
    expected = jax.jit(attention._two_products)(*operands)
    for a, e in zip(attention._few_rows(*operands), expected, strict=True):
        np.testing.assert_allclose(a, e, atol=3e-6)


@_NEEDS_COMPILER
def test_attention_reads_history_only_and_rows_alone() -> None:
    operands = list(_attention(2, 6, 2, 2, 32, 40, 6))
    mixed, keys, _ = attention._few_rows(*operands)
    garbage = jnp.arange(40) >= operands[8][:, None]
    for i in (6, 7):
        operands[i] = jnp.where(garbage[:, None, :, None], jnp.nan, operands[i])
    np.testing.assert_array_equal(attention._few_rows(*operands)[0], mixed)
    # The first two tokens alone, of which the second may see what it saw.
    two = [x[:, :2] for x in operands[:5]]
    two += [operands[5][:, :2, :2], *operands[6:]]
    others = operands[5].at[:, :2, 2:].set(False)
    operands[5] = others
    np.testing.assert_allclose(
        attention._few_rows(*two)[0], attention._few_rows(*operands)[0][:, :2], atol=1e-6
    )
    np.testing.assert_array_equal(attention._few_rows(*two)[1], keys[:, :, :2])


@_NEEDS_COMPILER
def test_attention_has_the_plain_gradient() -> None:
    operands = _attention(1, 3, 2, 2, 8, 6, 4)
    floats = (0, 1, 2, 6, 7, 9, 10)

    def gradient(function: Callable) -> tuple[jax.Array, ...]:
        return jax.grad(lambda *x: sum((y**2).sum() for y in function(*x)), floats)(*operands)

    plain = gradient(attention._two_products)
    for a, e in zip(gradient(attention._few_rows), plain, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)


@_NEEDS_COMPILER
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_commit_writes_what_the_scatter_writes(dtype: jnp.dtype) -> None:
    """Rows that gain nothing, something, more than there is room for; nodes in any order."""
    rng = np.random.default_rng(0)

    def layers(slots: int) -> tuple[jax.Array, ...]:
        return tuple(jnp.asarray(rng.normal(size=(4, 2, slots, 3)), dtype) for _ in range(3))

    path = jnp.asarray(rng.integers(0, 6, (4, 5)), jnp.int32)
    start, count = jnp.array([0, 2, 7, 9], jnp.int32), jnp.array([0, 5, 4, 1], jnp.int32)
    operands = (layers(9), layers(6), path, start, count)
    expected = jax.jit(commit._scatter)(*operands)
    for a, e in zip(jax.jit(commit._kernel)(*operands), expected, strict=True):
        np.testing.assert_array_equal(a, e)


@pytest.mark.parametrize("shape", [(), (7,), (3, 700), (40000,)])
def test_noise_is_that_of_jax(shape: tuple[int, ...]) -> None:
    keys = jax.random.split(jax.random.key(3), 4)
    straight = noise.straight(keys)
    for draw in (jax.random.bits, jax.random.uniform):
        expected = jax.vmap(draw, (0, None))(keys, shape)
        np.testing.assert_array_equal(jax.vmap(draw, (0, None))(straight, shape), expected)
    expected = jax.vmap(jax.random.gumbel, (0, None))(keys, shape)
    np.testing.assert_allclose(noise.gumbel(straight, shape), expected, rtol=1e-5, atol=1e-6)


def test_keys_derive_as_those_of_jax() -> None:
    keys = jax.random.split(jax.random.key(3), 4)
    for derive in (lambda key: jax.random.fold_in(key, 12345), lambda key: jax.random.split(key)):
        expected = jax.random.key_data(jax.vmap(derive)(keys))
        actual = jax.random.key_data(jax.vmap(derive)(noise.straight(keys)))
        np.testing.assert_array_equal(actual, expected)
    other = noise.straight(jax.random.split(jax.random.key(0, impl="rbg"), 3))
    assert len(np.unique(jax.random.key_data(other))) == 6


@pytest.mark.parametrize("shape", [(1,), (3, 700), (2, 2, 16384)])
def test_below_sums_in_the_order_of_the_keys(shape: tuple[int, ...]) -> None:
    """Few ties, many, nothing else; by the kernel and by sorting."""
    rng = np.random.default_rng(0)
    uniform = rng.random(shape)
    tied = np.minimum(np.round(10 * uniform) / 8, 1)
    for keys in (uniform, tied, np.zeros(shape), np.ones(shape)):
        keys, weights = keys.astype(np.float32), rng.random(shape).astype(np.float32)
        order = np.argsort(keys, -1, kind="stable")
        sums = np.take_along_axis(weights.astype(np.float64), order, -1).cumsum(-1)
        sums = np.concatenate([np.zeros_like(sums[..., :1]), sums[..., :-1]], -1)
        expected = np.empty(shape)
        np.put_along_axis(expected, order, sums, -1)
        found = jax.jit(below.below)(keys, weights)
        plain = jax.jit(below._sorted)(*(x.reshape(-1, shape[-1]) for x in (keys, weights)))
        np.testing.assert_allclose(found, expected, rtol=3e-6)
        np.testing.assert_allclose(plain.reshape(shape), expected, rtol=3e-5)


@_NEEDS_COMPILER
def test_callers_at_once_do_not_mix() -> None:
    """The kernels' threads serve one caller at a time; whoever comes meanwhile works alone."""
    operands = [_operands(4, 300, 2000 + 8 * i) for i in range(4)]
    expected = [np.asarray(_few_rows(x, w)) for x, w in operands]

    def call(i: int) -> bool:
        return all((np.asarray(_few_rows(*operands[i])) == expected[i]).all() for _ in range(100))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(4)))


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
    assert native.LINEAR in compiled.as_text()
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
