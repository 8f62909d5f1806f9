"""The likeliest tokens beside one sampled: the optimal rule for that draft.

Hu et al., arXiv 2502.18779. The children are a set H of fixed tokens and, last, X ~ q', a law that
is 0 on H. X is accepted with probability min(1, p / q'), else the token comes from the residual
(p - q')_+, which on H is p: in all, p(H) + sum min(p, q') off H is accepted, the most there is.
"""

import jax
import jax.numpy as jnp

from specjax.types import Array, Verifier
from specjax.verifiers.descent import descent


def hybrid() -> Verifier:
    """Tries the sampled child, then lets the residual choose among the others."""
    return Verifier(descent("hybrid", _rule), ("hybrid",))


def _rule(p: Array, q: Array, ratio: Array, is_child: Array) -> tuple[Array, Array]:
    younger = jnp.cumsum(is_child[:, ::-1], -1)[:, ::-1]
    return jnp.where(is_child & (younger == 1), ratio, 0.0), jax.nn.relu(p - q)
