"""What a model or drafter is trained for: one file per objective, each building an `Objective`.

Every objective is a function `objective(config, target) -> Objective`: `config` is a mapping of its
options, `target` the `Model` that it learns from (None where it learns from text alone).
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import flax.struct as struct

from specjax.types import Array, Drafter, Model, Params


@struct.dataclass
class Batch:
    """Sequences to learn from. Position i reads tokens up to i and predicts token i + 1."""

    tokens: Array  # [B, T + 1] int32
    weights: Array  # [B, T] float32: how much token i + 1 counts as something to predict
    # The target's k likeliest tokens after each position and their probabilities, descending.
    teacher_tokens: Array | None = None  # [B, T, k] int32
    teacher_probs: Array | None = None  # [B, T, k] float32


class Objective(NamedTuple):
    """A training objective. Parameters are float32; `loss` also takes them in a smaller type."""

    init: Callable  # (rng_key, target_params) -> trainable parameters
    loss: Callable  # (trainable, target_params, batch: Batch, rng_key) -> (scalar, metrics), in
    #                 nats per token; metrics: a dict of scalars, see `objectives.teacher.report`
    export: Callable  # (directory, trainable, eos_ids, bos_id): writes a directory in bfloat16
    drafter: Drafter | None = None  # what the evaluation decodes with
    params: Callable = lambda trainable, target_params: Params(target_params, trainable)
    student: Model | None = None  # writes text by itself, `trainable` being its weights
    update_scale: Callable | None = None  # (step) -> multipliers of updates, a prefix of trainable


def options(objective: str, config: Mapping[str, Any], **defaults: Any) -> SimpleNamespace:
    """The options of an objective, completed by its defaults.

    Raises:
        ValueError: an option that it does not have.
    """
    given = {name: config[name] for name in config}
    for name in given:
        if name not in defaults:
            raise ValueError(
                f"Objective {objective} has no option {name!r}; it has {', '.join(defaults)}."
            )
    return SimpleNamespace(**{**defaults, **given})
