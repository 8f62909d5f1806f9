"""Drafts with the target's weights in eight bits, over the target's own cache.

In the spirit of QSpec (Zhao et al., arXiv 2410.11305): where reading weights takes the time of a
pass, fewer bits of them draft faster, and they hardly ever disagree with the original.
"""

import jax

from specjax.drafters.grow import Builder
from specjax.drafters.self_speculation import self_speculation
from specjax.kernels.linear import quantize
from specjax.types import Drafter, Model, PyTree


def int8(params: PyTree) -> PyTree:
    """A copy of a model's weights, every matrix of which is `Int8`, tables included."""
    return jax.tree.map(lambda x: quantize(x) if x.ndim == 2 else x, params)


def quantized(target: Model, build: Builder) -> Drafter:
    """Drafts with `params.drafter`, an `int8` copy of the target's weights.

    Args:
        target: the decoder's.
        build: the tree.
    """
    return self_speculation(
        target.apply,
        lambda params: params.drafter,
        lambda cache: cache,
        build,
        target.vocab_size,
    )
