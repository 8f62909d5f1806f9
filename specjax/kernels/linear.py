"""The one matrix product behind every projection of every model and head."""

import jax
import jax.numpy as jnp
from jax import lax

from specjax.kernels import native
from specjax.types import Array

# XLA on CPU multiplies two rows in two to four times the time of one; beyond these many it is no
# slower than the kernel.
FEW_ROWS = 32


def linear(x: Array, w: Array, dtype: jnp.dtype | None = None) -> Array:
    """Multiplies rows by a weight matrix stored as [out, in], Hugging Face's own layout.

    The product runs in the weights' precision and accumulates in float32. On CPU, up to `FEW_ROWS`
    float32 rows go through a kernel whose result for a row does not depend on the other rows.

    Args:
        x: [..., in].
        w: [out, in].
        dtype: of the result; by default that of `x`.

    Returns:
        [..., out].
    """
    rows = x.astype(w.dtype).reshape(-1, x.shape[-1])
    few = rows.shape[0] <= FEW_ROWS and w.dtype == jnp.float32
    if few and native.available():
        y = lax.platform_dependent(rows, w, cpu=_few_rows, default=_dot)
    else:
        y = _dot(rows, w)
    y = y.reshape(*x.shape[:-1], w.shape[0])
    return y.astype(x.dtype if dtype is None else dtype)


def _dot(x: Array, w: Array) -> Array:
    contract_last = (((1,), (1,)), ((), ()))
    return lax.dot_general(x, w, contract_last, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _few_rows(x: Array, w: Array) -> Array:
    result = jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(native.LINEAR, result, vmap_method="sequential")(x, w)


def _forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _few_rows(x, w), (x, w)


def _backward(residual: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = residual
    return dy @ w, dy.T @ x


_few_rows.defvjp(_forward, _backward)
