"""The CPU kernels: right, the same for a row whatever its company, harmless where absent."""

import contextlib
import functools
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from specjax import engine, testing
from specjax.drafters import grow
from specjax.drafters.corpus import suffix_array
from specjax.drafters.model import model
from specjax.kernels import (
    agreement,
    attention,
    below,
    commit,
    gather,
    native,
    noise,
    search,
    vocabulary,
)
from specjax.kernels.linear import Int8, RMSNorm, Weights, gated, linear, linears, quantize
from specjax.kernels.native import FEW_ROWS
from specjax.sampling import sampling
from specjax.types import Params
from specjax.verifiers.match import match

_NEEDS_COMPILER = pytest.mark.skipif(
    not native.available(), reason="no C++ compiler here: XLA's product is used"
)
_MARGIN = 1e-6  # of a sum, times the sum of its terms' magnitudes
_EPS = 1e-5
_KINDS: dict[str, Callable[[jax.Array], Any]] = {
    "float32": lambda w: w,
    "bfloat16": lambda w: w.astype(jnp.bfloat16),
    "int8": quantize,
}
_EVERY_KIND = pytest.mark.parametrize("kind", _KINDS)


def _operands(rows: int, inputs: int, outputs: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(rows * inputs + outputs)
    x, w = rng.normal(size=(rows, inputs)), rng.normal(size=(outputs, inputs))
    return jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)


def _exact(x: Weights) -> np.ndarray:
    if isinstance(x, Int8):
        return _exact(x.values) * _exact(x.scales)[:, None]
    return np.asarray(x).astype(np.float64)


def _normed(x: np.ndarray, gains: jax.Array) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + _EPS) * _exact(gains)


def _assert_within(found: jax.Array, exact: np.ndarray, margin: np.ndarray) -> None:
    assert found.shape == exact.shape
    excess = np.abs(_exact(found) - exact) - margin
    assert (excess <= 0).all(), f"off by {excess.max(initial=0)} more than the margin"


def _assert_product(found: jax.Array, x: np.ndarray, w: np.ndarray) -> None:
    _assert_within(found, x @ w.T, _MARGIN * np.abs(x) @ np.abs(w).T)


@_EVERY_KIND
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [
        *((1, 1, 1), (3, 1, 40), (40, 3, 1), (0, 20, 5), (4, 20, 0)),
        *((1, 16, 8), (1, 250, 1003), (6, 40, 33), (17, 530, 70), (FEW_ROWS, 512, 64)),
        *((FEW_ROWS + 1, 250, 100), (40, 33, 100), (11, 4096, 40)),
    ],
)
def test_product(kind: str, rows: int, inputs: int, outputs: int) -> None:
    """Widths that fill no lane, no tile and no span; signs that cancel and, worse, that do not."""
    for function in (jnp.positive, jnp.abs):
        x, w = map(function, _operands(rows, inputs, outputs))
        w = _KINDS[kind](w)
        _assert_product(linear(x, w), _exact(x), _exact(w))


@_EVERY_KIND
@pytest.mark.parametrize("rows", [0, 7, FEW_ROWS + 1])
def test_what_goes_with_a_product(kind: str, rows: int) -> None:
    """A norm before it, an addition or a gate after it, several at once, a batch of two axes."""
    (x, w), (residual, v) = _operands(2 * rows, 90, 70), _operands(2 * rows, 70, 90)
    w, v = _KINDS[kind](w), _KINDS[kind](jnp.resize(v, (70, 90)))
    gains = 1 + jnp.arange(90) / 90
    norm = RMSNorm(gains, _EPS)
    x, residual = x.reshape(2, rows, 90), residual.reshape(2, rows, 70)
    rows_exact = _normed(_exact(x), gains)
    sums = [rows_exact @ _exact(m).T for m in (w, v)]
    sizes = [np.abs(rows_exact) @ np.abs(_exact(m)).T for m in (w, v)]
    for found, exact, size in zip(linears(x, (w, v), norm), sums, sizes, strict=True):
        _assert_within(found, exact, _MARGIN * size)
    added = linear(x, w, norm=norm, residual=residual)
    margin = _MARGIN * (sizes[0] + np.abs(_exact(residual)))
    _assert_within(added, sums[0] + _exact(residual), margin)
    twice = 2 * np.sqrt(2 / np.pi) * (sums[0] + 0.044715 * sums[0] ** 3)
    for activation, by in (("silu", sums[0]), ("gelu", twice)):
        gate = sums[0] / (1 + np.exp(-by))
        # Its slope is less than 1.2; its own rounding is a few units more.
        margin = _MARGIN * (1.2 * sizes[0] * np.abs(sums[1]) + np.abs(gate) * (sizes[1] + 1))
        margin += _MARGIN * np.abs(gate * sums[1])
        _assert_within(gated(x, w, v, norm, activation), gate * sums[1], margin)


@_EVERY_KIND
def test_rows_of_bfloat16(kind: str) -> None:
    """Their product is that of the same numbers in float32, rounded once."""
    x, w = _operands(5, 70, 30)
    x, w = x.astype(jnp.bfloat16), _KINDS[kind](w)
    precise = linear(x, w, jnp.float32)
    _assert_product(precise, _exact(x), _exact(w))
    rounded = linear(x, w)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, precise.astype(jnp.bfloat16))


def _every_use(
    x: jax.Array, residual: jax.Array, gains: jax.Array, w: Weights, v: Weights
) -> tuple[jax.Array, ...]:
    norm = RMSNorm(gains, _EPS)
    return (
        *(linear(x, w), linear(x, w, norm=norm, residual=residual)),
        *(*linears(x, (w, v), norm), gated(x, w, v), gated(x, w, v, norm)),
    )


def _use_operands(kind: str, rows: int, inputs: int, outputs: int) -> tuple[Any, ...]:
    x, w = _operands(rows, inputs, 2 * outputs)
    residual, gains = _operands(rows, outputs, 1)[0], 1 + jnp.arange(inputs) / inputs
    return x, residual, gains, _KINDS[kind](w[:outputs]), _KINDS[kind](w[outputs:])


@_NEEDS_COMPILER
@_EVERY_KIND
def test_a_row_does_not_depend_on_its_company(kind: str) -> None:
    """Bit for bit, whatever number of rows there is, and whichever of them it is."""
    few = native.few_rows(jnp.dtype(kind))
    sizes = [rows for rows in (1, 2, 5, 6, 11, 16, 17, FEW_ROWS, FEW_ROWS + 9) if rows <= few]
    x, residual, *others = _use_operands(kind, sizes[-1], 550, 70)
    uses = jax.jit(_every_use)
    together = uses(x, residual, *others)
    for rows in sizes:
        last = slice(sizes[-1] - rows, None)
        alone = uses(x[last], residual[last], *others)
        for a, t in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a, t[last])


@_NEEDS_COMPILER
@_EVERY_KIND
@pytest.mark.parametrize(("rows", "inputs"), [(5, 40), (20, 600)])
def test_nan_and_infinity_stay_in_their_row(kind: str, rows: int, inputs: int) -> None:
    x, residual, *others = _use_operands(kind, rows, inputs, 50)
    uses = jax.jit(_every_use)
    clean = uses(x, residual, *others)
    x = x.at[0, 3].set(jnp.nan).at[2, inputs - 1].set(jnp.inf).at[rows - 1, 0].set(-jnp.inf)
    spoilt = uses(x, residual, *others)
    spared = np.setdiff1d(np.arange(rows), [0, 2, rows - 1])
    for s, c in zip(spoilt, clean, strict=True):
        np.testing.assert_array_equal(s[spared], c[spared])
        assert np.isnan(s[0]).all()
    with np.errstate(invalid="ignore"):
        exact = _exact(x) @ _exact(others[1]).T
    _assert_same_specials(spoilt[0], exact)


def _assert_same_specials(found: jax.Array, exact: np.ndarray) -> None:
    np.testing.assert_array_equal(np.isnan(found), np.isnan(exact))
    where = np.isinf(exact)
    np.testing.assert_array_equal(np.isinf(found), where)
    np.testing.assert_array_equal(found[where], exact[where])


@_NEEDS_COMPILER
@_EVERY_KIND
@pytest.mark.parametrize(("rows", "inputs"), [(5, 40), (20, 600)])
def test_nan_and_infinity_of_weights_stay_in_their_column(
    kind: str, rows: int, inputs: int
) -> None:
    """Times zero, infinity is NaN; `Int8` may hold either as a scale."""
    x, w = _operands(rows, inputs, 50)
    x = x.at[1].set(0)
    w = _KINDS[kind](w)
    clean = linear(x, w)
    values = (jnp.nan, jnp.inf, -jnp.inf)
    for column, value in zip((1, 17, 49), values, strict=True):
        if isinstance(w, Int8):
            w = w.replace(scales=w.scales.at[column].set(value))
        else:
            w = w.at[column, inputs - 1].set(value)
    spoilt = linear(x, w)
    spared = np.setdiff1d(np.arange(50), [1, 17, 49])
    np.testing.assert_array_equal(spoilt[:, spared], clean[:, spared])
    with np.errstate(invalid="ignore"):
        if isinstance(w, Int8):  # a sum is scaled, not its terms
            exact = (_exact(x) @ _exact(w.values).T) * _exact(w.scales)
        else:
            exact = _exact(x) @ _exact(w).T
    _assert_same_specials(spoilt, exact)


@pytest.mark.parametrize("kind", _KINDS)
def test_a_sum_of_nothing_is_zero(kind: str) -> None:
    w = _KINDS[kind](jnp.zeros((40, 3)))
    w = w.replace(values=w.values[:, :0]) if isinstance(w, Int8) else w[:, :0]
    np.testing.assert_array_equal(linear(jnp.ones((7, 0)), w), np.zeros((7, 40)))


def _shaped(dtype: str, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


_X, _W = _shaped("float32", 8, 64), _shaped("float32", 32, 64)
_W8 = Int8(_shaped("int8", 32, 64), _shaped("float32", 32))


@pytest.mark.parametrize(
    ("function", "operands", "words"),
    [
        (linear, (_shaped("float32", 8, 63), _W), ("8, 63", "32, 64")),
        (linear, (_shaped("float32"), _W), ("()", "32, 64")),
        (linear, (_X, _shaped("float32", 64)), ("8, 64", "(64,)")),
        (linear, (_shaped("float16", 8, 64), _W), ("float16", "8, 64", "float32")),
        (linear, (_shaped("int32", 8, 64), _W), ("int32", "8, 64")),
        (linear, (_X, _shaped("int8", 32, 64)), ("int8", "32, 64", "Int8")),
        (linear, (_X, _shaped("float16", 32, 64)), ("float16", "32, 64")),
        (linear, (_X, _shaped("float8_e4m3fn", 32, 64)), ("float8_e4m3fn", "32, 64")),
        # What the kernel would read beyond the end.
        (linears, (_X, (_W, _shaped("bfloat16", 32, 64))), ("float32", "bfloat16")),
        (linears, (_X, (_W, _W8)), ("float32", "int8")),
        (gated, (_X, _W, _shaped("float32", 31, 64)), ("32, 64", "31, 64")),
        (
            lambda x, w, gains: linear(x, w, norm=RMSNorm(gains, _EPS)),
            (_X, _W, _shaped("float32", 63)),
            ("8, 64", "63"),
        ),
        (
            lambda x, w, residual: linear(x, w, residual=residual),
            (_X, _W, _shaped("float32", 8, 31)),
            ("8, 32", "8, 31"),
        ),
        (linear, (_X, Int8(_W8.values, _shaped("float32", 31))), ("32, 64", "31")),
        (linear, (_X, Int8(_W8.values, _shaped("bfloat16", 32))), ("Int8", "bfloat16")),
    ],
)
def test_what_does_not_fit_is_refused_when_traced(
    function: Callable, operands: tuple[Any, ...], words: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the words are compared below)
        jax.eval_shape(function, *operands)
    assert all(word in str(error.value) for word in words), error.value


def test_float64_is_refused() -> None:
    wide = _shaped("float64", 32, 64)
    for operands in ((wide, _W), (_X, wide)):
        with jax.enable_x64(True), pytest.raises(ValueError, match="float64"):
            jax.eval_shape(linear, *operands)


@_NEEDS_COMPILER
def test_few_rows_go_through_the_kernel() -> None:
    uses = {}
    for rows in (1, FEW_ROWS, FEW_ROWS + 1):
        text = jax.jit(linear).lower(*_operands(rows, 64, 64)).compile().as_text()
        uses[rows] = native.LINEAR in text
    assert uses == {1: True, FEW_ROWS: True, FEW_ROWS + 1: False}


def _attention(
    b: int,
    n: int,
    k: int,
    g: int,
    h: int,
    s: int,
    m: int,
    dtype: str = "float32",
    skips: bool = False,
) -> tuple[Any, ...]:
    """Operands of `attention._two_products`, rows of any history and any mask that holds self."""
    rng = np.random.default_rng(b + n + h + s)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    angle = normal(b, n, h // 2)
    mask = jnp.asarray(rng.random((b, n, m)) < 0.5) | jnp.eye(n, m, m - n, dtype=bool)
    length = jnp.asarray(rng.integers(0, s + 1, b), jnp.int32)
    num_seen = length[:, None] + mask.sum(-1)
    skip = jnp.asarray(rng.random((b, n)) * num_seen, jnp.int32) if skips else None
    return (
        *(normal(b, n, k * g, h), normal(b, n, k, h), normal(b, n, k, h)),
        *(jnp.cos(angle), jnp.sin(angle), mask, skip),
        *(normal(b, k, s, h).astype(dtype), normal(b, k, s, h).astype(dtype), length),
        *(normal(b, k, m - n, h).astype(dtype), normal(b, k, m - n, h).astype(dtype)),
    )


_EVERY_CACHE = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@_NEEDS_COMPILER
@_EVERY_CACHE
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(
    ("b", "n", "k", "g", "h", "s", "m"),
    [
        (1, 1, 2, 2, 64, 70, 1),
        (3, 7, 1, 3, 20, 37, 9),
        (2, 32, 2, 1, 16, 5, 32),
        (2, 5, 3, 2, 130, 50, 5),
        (1, 1, 1, 8, 64, 400, 40),
        (2, 3, 2, 5, 2, 33, 20),
        (2, 11, 1, 7, 46, 18, 12),
    ],
)
def test_attention(
    b: int, n: int, k: int, g: int, h: int, s: int, m: int, softcap: float | None, dtype: str
) -> None:
    """Heads that fill no lanes, groups of rows of every size, earlier nodes in the block."""
    operands = _attention(b, n, k, g, h, s, m, dtype, softcap is not None)
    expected = jax.jit(attention._two_products, static_argnums=0)(softcap, *operands)
    # A rotated key may lie between two numbers of bfloat16, and go to either.
    margin = 3e-6 if dtype == "float32" else 2e-2
    for a, e in zip(attention._few_rows(softcap, *operands), expected, strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (a, e)), margin, margin)


class _Chain(NamedTuple):
    """Tokens of which each sees those before it, and what one call finds for all of them."""

    news: tuple[jax.Array, ...]  # queries, keys, values, cos, sin: [1, T, ...]
    mixed: jax.Array  # [1, T, Q, H]
    block: tuple[jax.Array, jax.Array]  # [1, K, T, H]


def _chain(
    dtype: str, tokens: int = 13, k: int = 2, g: int = 3, h: int = 22, window: int | None = None
) -> _Chain:
    """Tokens see so many of the latest, themselves included."""
    operands = _attention(1, tokens, k, g, h, 1, tokens, dtype)
    causal = jnp.tril(jnp.ones((1, tokens, tokens), bool))
    no_prefix = (*operands[7:9], jnp.zeros(1, jnp.int32))
    skip = jnp.maximum(jnp.arange(tokens, dtype=jnp.int32) - (window or tokens) + 1, 0)[None]
    mixed, *block = attention._few_rows(
        None, *operands[:5], causal, skip, *no_prefix, *operands[10:]
    )
    return _Chain(operands[:5], mixed, (block[0], block[1]))


@_NEEDS_COMPILER
@_EVERY_CACHE
@pytest.mark.parametrize("window", [None, 3, 40])
@pytest.mark.parametrize(
    ("tokens", "places"),
    [
        (13, [(0, 1), (1, 0), (5, 3), (5, 7), (12, 0)]),
        (70, [(30, 20), (31, 9), (32, 8), (50, 0), (64, 5), (69, 0)]),  # tiles add up 32 positions
    ],
)
def test_attention_does_not_depend_on_where_history_lies(
    tokens: int, places: list[tuple[int, int]], window: int | None, dtype: str
) -> None:
    """Some of it in the prefix, some in the block, the rest new; the slots beyond hold NaN."""
    chain = _chain(dtype, tokens, window=window)
    for committed, earlier in places:
        first = committed + earlier
        beyond = ((0, 0), (0, 0), (0, 4), (0, 0))
        slots = (jnp.pad(x[:, :, :committed], beyond, constant_values=jnp.nan) for x in chain.block)
        mixed, *block = attention.attend(
            *(x[:, first:] for x in chain.news),
            jnp.tril(jnp.ones((1, tokens - first, tokens - committed), bool), earlier),
            (*slots, jnp.array([committed], jnp.int32)),
            tuple(x[:, :, committed:first] for x in chain.block),
            jnp.maximum(jnp.arange(first, tokens) - window + 1, 0)[None] if window else None,
        )
        np.testing.assert_array_equal(mixed, chain.mixed[:, first:])
        for found, whole in zip(block, chain.block, strict=True):
            np.testing.assert_array_equal(found, whole[:, :, committed:])


@_NEEDS_COMPILER
@_EVERY_CACHE
def test_attention_does_not_depend_on_siblings(dtype: str) -> None:
    """A path in a tree finds what it finds alone, even beside nodes that are not numbers."""
    chain = _chain(dtype)
    path = np.array([0, 2, 3, 7, 8, 9, 15, 16, 17, 20, 25, 26, 29])
    nodes = jnp.zeros(30, int).at[path].set(jnp.arange(len(path)))
    on_path = jnp.zeros(30, bool).at[path].set(True)
    ancestors = on_path[:, None] & on_path & jnp.tril(jnp.ones((30, 30), bool))
    prefix = (*(jnp.zeros_like(x[:, :, :1]) for x in chain.block), jnp.zeros(1, jnp.int32))
    for other in (1e3, jnp.nan):
        news = (
            jnp.where(on_path.reshape(-1, *[1] * (x.ndim - 2)), x[:, nodes], other)
            for x in chain.news
        )
        mask = ancestors | jnp.eye(30, dtype=bool)
        mixed, _, _ = attention.attend(*news, mask[None], prefix)
        np.testing.assert_array_equal(mixed[:, path], chain.mixed)


@_NEEDS_COMPILER
@_EVERY_CACHE
def test_attention_of_rows_does_not_depend_on_each_other(dtype: str) -> None:
    operands = _attention(3, 4, 2, 2, 34, 20, 6, dtype)
    together = attention._few_rows(None, *operands)
    for i in range(3):
        alone = attention._few_rows(None, *(x if x is None else x[i : i + 1] for x in operands))
        for a, t in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a[0], t[i])


@_NEEDS_COMPILER
@_EVERY_CACHE
def test_attention_to_nan_is_nan(dtype: str) -> None:
    """In a key of the prefix, of the block or a new one, for whoever sees it and nobody else."""
    operands = _attention(2, 3, 2, 2, 20, 9, 5, dtype)
    *news, mask, skip, keys, values, _, block_keys, block_values = operands
    length = jnp.array([9, 4], jnp.int32)

    def mixed(new_keys: jax.Array, keys: jax.Array, block_keys: jax.Array) -> np.ndarray:
        rest = (*news[2:], mask, skip, keys, values, length, block_keys, block_values)
        mixed = attention._few_rows(None, news[0], new_keys, *rest)[0]
        return np.asarray(mixed).reshape(2, 3, 2, -1)

    clean = mixed(news[1], keys, block_keys)
    for spoilt, seen in (
        (mixed(news[1], keys.at[:, 0, 4, 3].set(jnp.nan), block_keys), length[:, None] > 4),
        (mixed(news[1], keys, block_keys.at[:, 0, 1, 3].set(jnp.nan)), mask[:, :, 1]),
        (mixed(news[1].at[:, 1, 0, 3].set(jnp.nan), keys, block_keys), mask[:, :, 3]),
    ):
        expected = np.array(clean)
        expected[np.broadcast_to(seen, (2, 3)), 0] = np.nan  # the first head only
        np.testing.assert_array_equal(spoilt, expected)


@_NEEDS_COMPILER
def test_attention_reads_history_only_and_rows_alone() -> None:
    operands = list(_attention(2, 6, 2, 2, 32, 40, 6))
    mixed, keys, _ = attention._few_rows(None, *operands)
    garbage = jnp.arange(40) >= operands[9][:, None]
    for i in (7, 8):
        operands[i] = jnp.where(garbage[:, None, :, None], jnp.nan, operands[i])
    np.testing.assert_array_equal(attention._few_rows(None, *operands)[0], mixed)
    # The first two tokens alone, of which the second may see what it saw.
    two = [x[:, :2] for x in operands[:5]]
    two += [operands[5][:, :2, :2], *operands[6:]]
    others = operands[5].at[:, :2, 2:].set(False)
    operands[5] = others
    np.testing.assert_allclose(
        attention._few_rows(None, *two)[0],
        attention._few_rows(None, *operands)[0][:, :2],
        atol=1e-6,
    )
    np.testing.assert_array_equal(attention._few_rows(None, *two)[1], keys[:, :, :2])


@_NEEDS_COMPILER
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention_has_the_plain_gradient(softcap: float | None) -> None:
    operands = _attention(1, 3, 2, 2, 8, 6, 4, skips=softcap is not None)
    floats = (0, 1, 2, 7, 8, 10, 11)

    def gradient(function: Callable) -> tuple[jax.Array, ...]:
        squares = jax.grad(lambda *x: sum((y**2).sum() for y in function(softcap, *x)), floats)
        return jax.jit(squares)(*operands)

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


@_NEEDS_COMPILER
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16])
def test_gather_copies_what_indexing_reads(dtype: jnp.dtype) -> None:
    """Within the table, over either end of it and beyond; entries of one number and of several."""
    start = jnp.array([[0, 3, 8], [-2, 9, 40]], jnp.int32)
    for shape in ((10,), (10, 3)):
        table = jnp.arange(np.prod(shape)).reshape(shape).astype(dtype)
        for size in (1, 4, 12):
            expected = np.asarray(table)[np.clip(start[..., None] + np.arange(size), 0, 9)]
            for read in (gather._kernel, gather._plain):
                found = jax.jit(read, static_argnums=2)(table, start, size)
                np.testing.assert_array_equal(found, expected)


@_NEEDS_COMPILER
@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 300])
def test_the_kernel_finds_the_ranges_that_plain_operations_find(size: int) -> None:
    """Strings that are there, that are not, at either end; documents' ends in the text."""
    rng = np.random.default_rng(size)
    tokens = rng.integers(-1, 3, size).astype(np.int32)
    tokens[-1] = -1
    operands = (jnp.asarray(suffix_array(tokens)), jnp.asarray(tokens))
    wanted = jnp.asarray(rng.integers(0, 4, (20, 3, 3)), jnp.int32)
    sizes = np.array([3, 2, 1])
    found = jax.jit(lambda *x: search._kernel(*x, sizes))(*operands, wanted)
    np.testing.assert_array_equal(
        found, jax.jit(lambda *x: search._plain(*x, sizes))(*operands, wanted)
    )


@_NEEDS_COMPILER
@pytest.mark.parametrize("ngram", [1, 4, 30])
def test_the_kernel_counts_the_agreement_that_plain_operations_count(ngram: int) -> None:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 2, (6, 20)), jnp.int32)
    operands = (tokens.at[5].set(1), jnp.array([0, 1, 2, 13, 20, 19], jnp.int32))
    found = jax.jit(agreement._kernel, static_argnums=2)(*operands, ngram)
    np.testing.assert_array_equal(found, agreement._plain(*operands, ngram))
    assert found.max() == min(ngram, 18)


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


@pytest.mark.parametrize("shape", [(1,), (3, 17), (2, 5, 4096), (20, 4099)])
def test_vocabularies_are_reduced_as_numpy_does(shape: tuple[int, ...]) -> None:
    """Ties, weights of nothing, and rows enough for several threads."""
    rng = np.random.default_rng(1)
    x = np.round(rng.normal(size=shape) * 4).astype(np.float32) / 4
    x[..., ::3] = -np.inf
    x[..., 0] = 0
    noise = rng.gumbel(size=shape).astype(np.float32)
    np.testing.assert_array_equal(vocabulary.argmax(x), x.argmax(-1))
    np.testing.assert_array_equal(vocabulary.argmax(x, noise), (x + noise).argmax(-1))
    law = np.exp(x.astype(np.float64))
    law /= law.sum(-1, keepdims=True)
    np.testing.assert_allclose(vocabulary.softmax(x), law, rtol=3e-6)
    slope = jax.grad(lambda x: vocabulary.softmax(x)[..., 0].sum())(jnp.asarray(x))
    of_first = -law[..., :1] * law + law * (np.arange(shape[-1]) == 0)
    np.testing.assert_allclose(slope, of_first, atol=1e-6)
    batched = jax.vmap(vocabulary.argmax)(np.stack([x, noise]))
    np.testing.assert_array_equal(batched, np.stack([x.argmax(-1), noise.argmax(-1)]))


def test_a_nan_is_no_choice() -> None:
    x = np.zeros((2, 40), np.float32)
    x[0, 33] = np.nan
    np.testing.assert_array_equal(vocabulary.argmax(x), [40, 0])
    law = np.asarray(vocabulary.softmax(x))
    assert np.isnan(law[0]).all()
    np.testing.assert_allclose(law[1], 1 / 40)


def _rows_to_sort(v: int) -> np.ndarray:
    """[7, v]: at random, tied, partly and all of no weight, constant, rising and falling."""
    rng = np.random.default_rng(v)
    x = rng.normal(size=(7, v)).astype(np.float32)
    x[1] = np.round(x[1] * 2) / 2 + 0.0  # XLA holds -0 for less than 0
    x[2, ::3] = -np.inf
    x[3], x[4] = -np.inf, 1.5
    x[5] = np.sort(x[5])
    x[6] = -x[5]
    return x


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(
    ("v", "k"),
    [
        *((1, 1), (5, 1), (5, 3), (5, 5), (17, 16), (40, 40)),
        *((129, 1), (300, 8), (4099, 40), (20000, 3)),
    ],
)
def test_the_largest_are_those_of_jax(v: int, k: int, kernels: bool) -> None:
    """Fewer than lanes and than a stretch of them, and rows enough for several threads."""
    x = _rows_to_sort(v)
    with contextlib.nullcontext() if kernels else native.disabled():
        found = vocabulary.largest(x, k)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, lax.top_k(x, k)[1])
    np.testing.assert_array_equal(found, np.argsort(-x, -1, kind="stable")[:, :k])


def test_the_largest_of_rows_on_several_axes() -> None:
    rows = _rows_to_sort(70)
    x = np.stack([rows, np.minimum(rows, 0.3), rows[::-1]])
    expected = np.argsort(-x, -1, kind="stable")[..., :9]
    largest = functools.partial(vocabulary.largest, k=9)
    np.testing.assert_array_equal(largest(x[None]), expected[None])
    np.testing.assert_array_equal(largest(x[0, 0]), expected[0, 0])
    np.testing.assert_array_equal(jax.vmap(largest)(x), expected)
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.vmap(largest), 1, 1))(x), expected)
    halves = x.astype(jnp.bfloat16)
    expected = np.argsort(-halves.astype(np.float32), -1, kind="stable")[..., :9]
    np.testing.assert_array_equal(largest(halves), expected)


@pytest.mark.parametrize("kernels", [True, False])
def test_the_largest_beside_nan_are_ids(kernels: bool) -> None:
    """Any, but different ones; other rows do not notice."""
    x = _rows_to_sort(300)
    expected = np.argsort(-x, -1, kind="stable")[:, :20]
    x[1, 0] = x[2, 299] = x[3, 130:200] = x[4] = np.nan
    with contextlib.nullcontext() if kernels else native.disabled():
        found = np.asarray(vocabulary.largest(x, 20))
    spared = [0, 5, 6]
    np.testing.assert_array_equal(found[spared], expected[spared])
    assert ((found >= 0) & (found < 300)).all()
    assert all(len(set(row)) == 20 for row in found.tolist())


@pytest.mark.parametrize("kernels", [True, False])
def test_more_than_all_are_refused(kernels: bool) -> None:
    with (
        contextlib.nullcontext() if kernels else native.disabled(),
        pytest.raises(ValueError, match="The 6 largest of 5 entries"),
    ):
        vocabulary.largest(jnp.zeros((2, 5)), 6)


@_NEEDS_COMPILER
def test_the_largest_are_found_by_the_kernel() -> None:
    """By one call for all rows that `vmap` adds."""
    search = jax.jit(jax.vmap(lambda x: vocabulary.largest(x, 2)))
    text = search.lower(jnp.zeros((3, 4, 50))).compile().as_text()
    assert text.count(f'custom_call_target="{native.TOP_K}"') == 1


@_NEEDS_COMPILER
def test_callers_at_once_do_not_mix() -> None:
    """The kernels' threads serve one caller at a time; whoever comes meanwhile works alone."""
    operands = [_operands(4, 300, 2000 + 8 * i) for i in range(4)]
    expected = [np.asarray(linear(x, w)) for x, w in operands]

    def call(i: int) -> bool:
        return all((np.asarray(linear(*operands[i])) == expected[i]).all() for _ in range(100))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(4)))


@_EVERY_KIND
def test_gradients_and_batching(kind: str) -> None:
    x, w = _operands(6, 20, 11)
    x = x.reshape(2, 3, 20)

    def plain(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.einsum("...i,oi->...o", x, w)

    def squared(product: Callable) -> Callable:
        return jax.grad(lambda x, w: (product(x, w) ** 2).sum(), (0, 1)[: 1 + (kind == "float32")])

    stored = _KINDS[kind](w)
    rounded = jnp.asarray(_exact(stored), jnp.float32)
    for a, b in zip(squared(linear)(x, stored), squared(plain)(x, rounded), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    both = jax.tree.map(lambda *ws: jnp.stack(ws), stored, _KINDS[kind](2 * w))
    found = jax.vmap(linear)(x, both)
    expected = jax.vmap(plain)(x, jnp.stack([rounded, 2 * rounded]))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@_NEEDS_COMPILER
@_EVERY_KIND
def test_batched_rows_go_through_one_kernel(kind: str) -> None:
    """Those that `vmap` adds are rows like the others, and share what is not batched."""
    x, residual, gains, w, _ = _use_operands(kind, 6, 40, 30)

    def call(x: jax.Array, residual: jax.Array) -> jax.Array:
        return linear(x, w, norm=RMSNorm(gains, _EPS), residual=residual)

    batched = jax.jit(jax.vmap(call, (0, None)))
    operands = (x.reshape(3, 2, 40), residual[:2])
    compiled = batched.lower(*operands).compile()
    assert compiled.as_text().count(f'custom_call_target="{native.LINEAR}"') == 1
    alone = jnp.stack([call(rows, residual[:2]) for rows in operands[0]])
    np.testing.assert_array_equal(compiled(*operands), alone)


_ON_EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from specjax.kernels import native
from specjax.kernels.attention import attend
from specjax.kernels.linear import RMSNorm, gated, linear, linears, quantize

mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
rng = np.random.default_rng(0)

def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

def put(x, *axes):
    return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P(*axes[: a.ndim]))), x)

def check(name, function, operands, sharded):
    compiled = jax.jit(function).lower(*sharded).compile()
    text = compiled.as_text()
    assert "specjax" in text and "all-gather" not in text, name
    expected, found = jax.jit(function)(*operands), compiled(*sharded)
    for e, f in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert len(f.sharding.device_set) == 8, name
        np.testing.assert_array_equal(f, e, name)

x, residual, norm = normal(8, 64), normal(8, 32), RMSNorm(1 + normal(64), 1e-5)

def products(x, residual, ws):
    added = linear(x, ws[0], norm=norm, residual=residual)
    return added, linears(x, ws, norm), gated(x, *ws[:2], norm)

for kind in (lambda w: w, lambda w: w.astype(jnp.bfloat16), quantize):
    ws = tuple(kind(normal(n, 64)) for n in (32, 32, 16))
    operands = (x, residual, ws)
    sharded = (put(x, "data"), put(residual, "data", "model"), put(ws, "model"))
    check("products", products, operands, sharded)

w = normal(32, 64)
inner = jax.jit(linear)(put(x, "data", "model"), put(w, None, "model"))
np.testing.assert_allclose(inner, x @ w.T, rtol=1e-5, atol=1e-5)

b, n, k, g, h, s = 4, 3, 4, 2, 16, 20
angle, length = normal(b, n, h // 2), jnp.array([0, 20, 7, 3], jnp.int32)
mask = jnp.tril(jnp.ones((b, n, n + 2), bool), 2)
news = (normal(b, n, k * g, h), normal(b, n, k, h), normal(b, n, k, h))
place = (jnp.cos(angle), jnp.sin(angle), mask)
caches = tuple(normal(b, k, size, h) for size in (s, s, 2, 2))

def call(news, place, length, caches):
    return attend(*news, *place, (*caches[:2], length), caches[2:])

check(
    "attend",
    call,
    (news, place, length, caches),
    (
        put(news, "data", None, "model"),
        put(place, "data"),
        put(length, "data"),
        put(caches, "data", "model"),
    ),
)
"""


@_NEEDS_COMPILER
def test_devices_share_the_kernels() -> None:
    """Rows on one axis, matrices and heads on another: the same numbers, nothing gathered."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1"
    _python(_ON_EIGHT_DEVICES, XLA_FLAGS=flags, JAX_DEFAULT_MATMUL_PRECISION="highest")


@_NEEDS_COMPILER
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_decoding_goes_through_the_kernel_and_writes_the_same(dtype: str) -> None:
    """Few rows, as users have them; the laws' large batches take XLA's product.

    `dtype` is that of weights and cache.
    """
    target, target_params = testing.tiny_model(48, seed=1, cache_dtype=jnp.dtype(dtype))
    target_params = jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, target_params)
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


def _python(script: str, **environment: str) -> None:
    """Runs a script in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**_ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


_ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
    "JAX_PLATFORMS": "cpu",
}


@pytest.fixture
def absent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> Callable[[], list[str]]:
    """Asserts that there are no kernels, that XLA serves, and returns what was logged.

    Nothing is known of the kernels at first, and the cache is empty. What was known before is known
    again afterwards: no process may register them twice.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_loaded", functools.cache(native._loaded.__wrapped__))

    def check() -> list[str]:
        with caplog.at_level(logging.INFO, logger=native.__name__):
            assert [native.available() for _ in range(2)] == [False, False]
            assert native.few_rows(jnp.dtype(jnp.bfloat16)) == 0
            x, w = _operands(4, 30, 20)
            _assert_product(linear(x, w), _exact(x), _exact(w))
        return [record.getMessage() for record in caplog.records]

    return check


def test_without_a_compiler_xla_serves(
    absent: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    (line,) = absent()
    assert "No C++ compiler" in line


def test_kernels_can_be_forbidden(
    absent: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECJAX_CPU_KERNELS", "0")
    assert absent() == []


def test_after_a_failed_build_xla_serves(
    absent: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name: sys.executable)
    (line,) = absent()
    assert "unavailable" in line
    assert "\n" not in line
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@_NEEDS_COMPILER
def test_without_a_place_for_the_build_xla_serves(
    absent: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file where the cache should be stops even those who may write anywhere."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (line,) = absent()
    assert "unavailable" in line


@_NEEDS_COMPILER
def test_kernels_can_be_left_out_of_a_trace() -> None:
    operands = _operands(4, 30, 20)

    def text() -> str:
        return jax.jit(lambda x, w: linear(x, w)).lower(*operands).as_text()

    with native.disabled():
        assert not native.available()
        assert native.LINEAR not in text()
    assert native.LINEAR in text()


@pytest.mark.slow
@_NEEDS_COMPILER
def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    """Beside what a process that was killed has left; unoptimised, which takes less time."""
    left = tmp_path / "specjax" / "tmp1234"
    left.mkdir(parents=True)
    (left / "kernels-1234.so").write_bytes(b"half a library")
    command = (
        "from specjax.kernels import native\n"
        "native.FLAGS = tuple('-O0' if x == '-O3' else x for x in native.FLAGS)\n"
        "assert native.available()"
    )
    environment = {**_ENVIRONMENT, "XDG_CACHE_HOME": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", command], env=environment) for _ in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    built = sorted((tmp_path / "specjax").iterdir())
    assert [path.suffix for path in built] == [".so", ""]
