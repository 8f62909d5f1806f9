"""The one matrix product behind every projection of every model and head."""

import jax.numpy as jnp
from jax import lax

from specjax.types import Array


def linear(x: Array, w: Array, dtype: jnp.dtype | None = None) -> Array:
    """Multiplies rows by a weight matrix stored as [out, in], Hugging Face's own layout.

    The product runs in the weights' precision and accumulates in float32.

    Args:
        x: [..., in].
        w: [out, in].
        dtype: of the result; by default that of `x`.

    Returns:
        [..., out].
    """
    contract_last = (((x.ndim - 1,), (1,)), ((), ()))
    y = lax.dot_general(x.astype(w.dtype), w, contract_last, preferred_element_type=jnp.float32)
    return y.astype(x.dtype if dtype is None else dtype)
