"""Genuine acceptance: what a drafter gains in the very decoding that its users run.

Beside it stands the teacher-forced estimate, which takes every drafted token from held-out text:
cheap, and too kind or too harsh by as much as texts that the models write differ from it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import engine, metrics, prompts, sampling
from specjax.types import Drafter, Model, Params
from specjax.verifiers.rejection import rejection


def acceptance(
    target: Model,
    drafter: Drafter,
    texts: Sequence[np.ndarray],
    max_new_tokens: int,
    context: int,
    eos_ids: Sequence[int] = (),
    temperatures: Sequence[float] = (0.0, 1.0),
    seed: int = 0,
) -> Callable[[Params], dict[float, dict[str, Any]]]:
    """Prepares the decoding of held-out prompts at all temperatures in one batch, by `rejection`.

    Args:
        target: as decoded with.
        drafter: for its own proposal law at temperature 1, and its likeliest tokens at 0.
        texts: prompts [T] each.
        max_new_tokens: per prompt.
        context: the positions that the models have.
        eos_ids: end a text.
        temperatures: every prompt is decoded at each.
        seed: of the draws; the same at every call, so that two calls differ by weights alone.

    Returns:
        (params) -> `metrics.summary` for each temperature. Weights of the same shapes compile
        nothing anew.
    """
    decoder = engine.decoder(target, drafter, rejection(), eos_ids=eos_ids)
    rows = [text for text in texts for _ in temperatures]
    (batch,) = prompts.batches(rows, len(rows), max_new_tokens, context)
    max_length = prompts.max_length([batch])
    temperature = np.tile(np.asarray(temperatures, np.float32), len(texts))
    which = jnp.arange(len(rows))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), which)
    how = sampling.sampling(len(rows), temperature)

    def measure(params: Params) -> dict[float, dict[str, Any]]:
        state = engine.prefill(
            *(decoder, params, keys, how, jnp.asarray(batch.tokens)),
            *(jnp.asarray(batch.length), jnp.asarray(batch.limit), max_length),
        )
        counted = jax.tree.map(np.asarray, metrics.measure(decoder, params, state, max_length)[1])
        return {
            t: metrics.summary(
                jax.tree.map(lambda x, t=t: x[temperature == np.float32(t)], counted)
            )
            for t in temperatures
        }

    return measure


def teacher_forced(found: Mapping[str, float], depth: int) -> dict[float, float]:
    """Tokens per pass of a chain that `objectives.teacher.report` promises, at temperatures 0, 1.

    A drafted token beyond those reported is accepted as the last of them: 1 + sum_k prod_i<=k a_i.
    """
    estimates = {}
    for temperature, name in ((0.0, "agreement"), (1.0, "acceptance")):
        rates: list[float] = []
        for k in range(1, depth + 1):
            rates.append(found.get(f"{name}_{k}", rates[-1] if rates else 0.0))
        estimates[temperature] = float(1 + np.cumprod(rates).sum())
    return estimates
