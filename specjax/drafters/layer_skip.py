"""Drafts with some of the target's layers, which hand on to each other what the others left out.

Any layers may go (*Draft & verify*, arXiv 2309.08168; SWIFT, arXiv 2410.06916; `calibration`
searches for those that are missed least), or all that follow the first few, as in early exit
(LayerSkip, arXiv 2404.16710). Those that stay read their own keys and values in the target's cache.
"""

from collections.abc import Sequence

from specjax.drafters.grow import Builder
from specjax.drafters.self_speculation import self_speculation
from specjax.types import Cache, Drafter, Model


def layer_skip(target: Model, layers: Sequence[int], build: Builder) -> Drafter:
    """Drafts with the target's own weights, `params.target`, and has no others.

    Args:
        target: the decoder's.
        layers: those that stay, in order, counted from 0; `range(e)` exits after the first e.
        build: the tree.

    Raises:
        ValueError: layers that do not exist, are out of order or none; a target without layers.
    """
    if target.stack is None:
        raise ValueError(
            f"layer_skip would keep layers {tuple(layers)} but this target has none to choose "
            "from; pass a whole transformer."
        )
    part = target.stack.only(layers)

    def view(cache: Cache) -> Cache:
        keys, values = (tuple(x[i] for i in layers) for x in (cache.keys, cache.values))
        return Cache(keys, values, cache.length)

    return self_speculation(
        part.apply, lambda params: params.target, view, build, target.vocab_size
    )
