"""The one matrix product behind every projection of every model and head.

On CPU a few rows go through a kernel that reads the weights once, whatever the number of rows, in
the type they are stored in. There a row's result does not depend on the other rows.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import flax.struct as struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning

from specjax.kernels import native
from specjax.types import Array


@struct.dataclass
class Int8:
    """Weights [out, in] of eight bits, each row of them times its own scale."""

    values: Array  # [out, in] int8
    scales: Array  # [out] float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.values.dtype


Weights = Array | Int8


class LayerNorm(NamedTuple):
    """Layer normalisation (arXiv 1607.06450), computed in float32."""

    weight: Array  # [in]
    bias: Array  # [in]
    eps: float

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, -1, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        y = y * self.weight.astype(jnp.float32) + self.bias.astype(jnp.float32)
        return y.astype(x.dtype)


class RMSNorm(NamedTuple):
    """Root mean square normalisation (arXiv 1910.07467), computed in float32."""

    weight: Array  # [in]
    eps: float

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return (y * self.weight.astype(jnp.float32)).astype(x.dtype)


Norm = RMSNorm | LayerNorm


def quantize(w: Array) -> Int8:
    """The nearest multiples of each row's largest magnitude / 127."""
    w = w.astype(jnp.float32)
    scales = jnp.abs(w).max(-1) / 127
    values = jnp.round(w / jnp.where(scales > 0, scales, 1)[:, None])
    return Int8(values.astype(jnp.int8), scales)


def linear(
    x: Array,
    w: Weights,
    dtype: jnp.dtype | None = None,
    *,
    norm: Norm | None = None,
    residual: Array | None = None,
) -> Array:
    """Multiplies rows by a weight matrix stored as [out, in], Hugging Face's own layout.

    Rows and weights meet in the wider of their types; sums are float32.

    Args:
        x: [..., in], float32 or bfloat16.
        w: [out, in], float32, bfloat16 or `Int8`.
        dtype: of the result; by default that of `x`.
        norm: applied to x first.
        residual: [..., out], added to the product.

    Returns:
        [..., out].

    Raises:
        ValueError: shapes that do not fit, other dtypes.
    """
    (y,) = _apply(x, (w,), norm, residual, None, dtype)
    return y


def linears(x: Array, ws: tuple[Weights, ...], norm: Norm | None = None) -> tuple[Array, ...]:
    """Multiplies the same rows by several matrices [out_i, in], to [..., out_i] each."""
    return _apply(x, ws, norm, None, None, None)


def gelu(x: Array) -> Array:
    """x Phi(x) in its tanh form (arXiv 1606.08415)."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS = {"silu": jax.nn.silu, "gelu": gelu}


def gated(
    x: Array, gate: Weights, up: Weights, norm: Norm | None = None, activation: str = "silu"
) -> Array:
    """act(x gate^T) * (x up^T), [..., out], the inner half of arXiv 2002.05202."""
    (y,) = _apply(x, (gate, up), norm, None, activation, None)
    return y


class _Static(NamedTuple):
    """What a call is, beside its arrays."""

    gate: str | None  # the activation of `gated`
    eps: float


class _Operands(NamedTuple):
    """A call's arrays."""

    rows: Array  # [m, in]
    gains: Array | None  # [in], of the norm
    residual: Array | None  # [m, out]
    ws: tuple[Weights, ...]  # [out_i, in]


def _apply(
    x: Array,
    ws: tuple[Weights, ...],
    norm: Norm | None,
    residual: Array | None,
    gate: str | None,
    dtype: jnp.dtype | None,
) -> tuple[Array, ...]:
    _check(x, ws, norm, residual, gate is not None)
    if isinstance(norm, LayerNorm):  # rare enough to be left to XLA
        x, norm = norm(x), None
    num_rows = math.prod(x.shape[:-1])
    operands = _Operands(
        x.reshape(num_rows, x.shape[-1]),
        None if norm is None else norm.weight,
        None if residual is None else residual.reshape(num_rows, residual.shape[-1]),
        ws,
    )
    static = _Static(gate, 0.0 if norm is None else norm.eps)
    plain = partial(_plain, static)
    if num_rows <= native.few_rows(ws[0].dtype):

        def kernel(operands: _Operands) -> tuple[Array, ...]:
            full = jax.tree.map(lambda a: a.astype(jnp.float32), operands._replace(ws=()))
            return _few_rows(static, full._replace(ws=operands.ws))

        ys = lax.platform_dependent(operands, cpu=kernel, default=plain)
    else:
        ys = plain(operands)
    result = x.dtype if dtype is None else dtype
    return tuple(y.reshape(*x.shape[:-1], y.shape[-1]).astype(result) for y in ys)


def _check(
    x: Array,
    ws: tuple[Weights, ...],
    norm: Norm | None,
    residual: Array | None,
    is_gated: bool,
) -> None:
    floats = (jnp.float32, jnp.bfloat16)
    for w in ws:
        both = f"Rows {x.shape} of {x.dtype} and weights {w.shape} of {w.dtype}"
        if len(w.shape) != 2 or not x.ndim or x.shape[-1] != w.shape[1]:
            raise ValueError(f"{both} cannot be multiplied; need [..., in] and [out, in].")
        allowed = (jnp.int8,) if isinstance(w, Int8) else floats
        if w.dtype not in allowed or x.dtype not in floats:
            raise ValueError(
                f"{both}; need float32 or bfloat16 rows, and float32, bfloat16 or Int8 weights."
            )
        if isinstance(w, Int8) and (w.scales.shape, w.scales.dtype) != (w.shape[:1], jnp.float32):
            raise ValueError(
                f"Int8 values {w.shape} have scales {w.scales.shape} of {w.scales.dtype}; need "
                f"{w.shape[:1]} of float32."
            )
        if w.dtype != ws[0].dtype or (is_gated and w.shape != ws[0].shape):
            raise ValueError(
                f"Weights {ws[0].shape} of {ws[0].dtype} and {w.shape} of {w.dtype} multiply the "
                f"same rows; need one dtype{' and shape' if is_gated else ''}."
            )
    if norm is not None and norm.weight.shape != x.shape[-1:]:
        raise ValueError(f"Rows {x.shape} have a norm of {norm.weight.shape}; need {x.shape[-1:]}.")
    wanted = (*x.shape[:-1], ws[0].shape[0])
    if residual is not None and residual.shape != wanted:
        raise ValueError(f"The product is {wanted}, its residual {residual.shape}; need the same.")


def _plain(static: _Static, operands: _Operands) -> tuple[Array, ...]:
    """The same in XLA's own operations."""
    x, gains, residual, ws = operands
    if gains is not None:
        x = RMSNorm(gains, static.eps)(x)
    ys = tuple(_dot(x, w) for w in ws)
    if static.gate is not None:
        ys = (ACTIVATIONS[static.gate](ys[0]) * ys[1],)
    if residual is not None:
        ys = (ys[0] + residual,)
    return ys


def _dot(x: Array, w: Weights) -> Array:
    if isinstance(w, Int8):
        return _dot(x, w.values.astype(x.dtype)) * w.scales
    kind = jnp.promote_types(x.dtype, w.dtype)
    return _product(x.astype(kind), w.astype(kind))


@jax.custom_vjp
def _product(x: Array, w: Array) -> Array:
    """x w^T in float32, [m, in] and [out, in] of one type."""
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _product_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, w), (x, w)


def _product_backward(operands: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    """Both products take the operands' type: JAX's own would take float32, many times slower."""
    x, w = operands
    d_y = d_y.astype(x.dtype)
    product = partial(lax.dot_general, preferred_element_type=jnp.float32)
    d_x = product(d_y, w, (((1,), (0,)), ((), ())))
    d_w = product(d_y, x, (((0,), (0,)), ((), ())))
    return d_x.astype(x.dtype), d_w.astype(w.dtype)


_product.defvjp(_product_forward, _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _few_rows(static: _Static, operands: _Operands) -> tuple[Array, ...]:
    """The kernel, for all rows at once under `vmap` and for a device's own under sharding."""
    kernel = custom_vmap(partial(_sharded, static))

    @kernel.def_vmap
    def rule(size: int, batched: Any, operands: _Operands) -> tuple[tuple[Array, ...], Any]:
        (are,) = batched
        several = (True,) * (1 if static.gate else len(operands.ws))
        if any(jax.tree.leaves((are.gains, are.ws))):
            axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, are)
            return jax.vmap(partial(_plain, static), (axes,), axis_size=size)(operands), several

        def merged(a: Any, is_batched: Any) -> Any:
            if a is None:
                return None
            a = a if is_batched else jnp.broadcast_to(a, (size, *a.shape))
            return a.reshape(-1, a.shape[-1])

        operands = operands._replace(
            rows=merged(operands.rows, are.rows),
            residual=merged(operands.residual, are.residual),
        )
        few = len(operands.rows) <= native.few_rows(operands.ws[0].dtype)
        ys = kernel(operands) if few else _plain(static, operands)
        return tuple(y.reshape(size, -1, y.shape[-1]) for y in ys), several

    results: tuple[Array, ...] = kernel(operands)
    return results


def _forward(static: _Static, operands: _Operands) -> tuple[tuple[Array, ...], _Operands]:
    return _few_rows(static, operands), operands


def _backward(static: _Static, operands: _Operands, d_results: tuple[Array, ...]) -> Any:
    return jax.vjp(partial(_plain, static), operands)[1](d_results)


_few_rows.defvjp(_forward, _backward)


def _sharded(static: _Static, operands: _Operands) -> tuple[Array, ...]:
    """Rows may lie on different devices, and so may the outputs of each matrix."""
    flat, tree = jax.tree.flatten(operands)

    def part(*flat: Array) -> tuple[Array, ...]:
        return _kernel(static, jax.tree.unflatten(tree, flat))

    kernel = custom_partitioning(part)
    _, gains, residual, ws = operands
    factors = ["n" if static.gate else f"n{j}" for j in range(len(ws))]
    arguments = ["m k"] + ["k"] * (gains is not None) + [f"m {factors[0]}"] * (residual is not None)
    for factor, w in zip(factors, ws, strict=True):
        arguments += [f"{factor} k"] + [factor] * isinstance(w, Int8)
    results = [f"m {factor}" for factor in dict.fromkeys(factors)]
    kernel.def_partition(
        partition=partial(native.partition, part, arguments, results, "k"),
        sharding_rule=f"{', '.join(arguments)} -> {', '.join(results)}",
        need_replication_factors=("k",),
    )
    return kernel(*flat)


def _kernel(static: _Static, operands: _Operands) -> tuple[Array, ...]:
    x, gains, residual, ws = operands
    num_results = 1 if static.gate else len(ws)
    results = [jax.ShapeDtypeStruct((len(x), w.shape[0]), jnp.float32) for w in ws[:num_results]]
    call = jax.ffi.ffi_call(native.LINEAR, results)
    nothing = jnp.zeros([0])
    gains, residual = (nothing if a is None else a for a in (gains, residual))
    matrices = [w.values if isinstance(w, Int8) else w for w in ws]
    scales = [w.scales for w in ws if isinstance(w, Int8)]
    eps = np.float32(static.eps)
    gates = {"gated": static.gate is not None, "gelu": static.gate == "gelu"}
    return tuple(call(x, gains, residual, *matrices, *scales, **gates, eps=eps))
