"""What a model is trained for: one file per objective, each building an `Objective`."""

from collections.abc import Callable
from typing import NamedTuple


class Objective(NamedTuple):
    """A training objective.

    init: (rng_key, target_params) -> trainable parameters.
    loss: (trainable, target_params, batch [B, T + 1] int32, rng_key) -> (scalar, metrics), in nats
        per token; metrics is a dict of scalars.
    """

    init: Callable
    loss: Callable
