"""What a run learns from, as its config asks: text, what the target wrote, what the student writes.

`config.data` gives each kind its shares of a batch at the start and at the end of the training, so
that {"text": (1, 0), "student": (0, 1)} is DistillSpec's move from fixed text to the student's own
(arXiv 2310.08461). Target and student write with the project's decoder, the target speculatively.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from specjax import engine
from specjax.build import build
from specjax.data import batches, generated, mixture, shards, teacher_cache
from specjax.data.fingerprint import fingerprint
from specjax.data.rows import Rows, packed
from specjax.drafters.none import none
from specjax.scripts import progress
from specjax.types import Model, Params, PyTree
from specjax.verifiers.match import match


class Writer(NamedTuple):
    """A model that can write."""

    model: Model
    params: Callable[[], PyTree]  # its weights as they are now


def feed(
    c: ConfigDict,
    tokens: np.ndarray,
    end_id: int,
    workdir: Path,
    target: Writer | None = None,
    student: Writer | None = None,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """An endless iterator over the batches of a run, see `mixture.mixture`.

    Args:
        c: the run's config: `data`, `generated`, `teacher_cache`, `sequence_length`, `batch_size`,
            `num_steps` and `seed` are read.
        tokens: [num_tokens] of the text, which prompts are cut from, too.
        end_id: ends a text.
        workdir: keeps what is written, so that an interrupted run finds it again.
        target: the model that is learnt from, if there is one.
        student: the model that learns, if it can write by itself.

    Raises:
        ValueError: a kind that there is nobody to write, a teacher cache of anything but text; as
            `mixture.mixture`.
    """

    def written(where: str, writer: Writer, drafter: Any, number: int, seed: int, of: dict) -> Rows:
        decoder = engine.decoder(writer.model, drafter, match(), eos_ids=(end_id,))
        params = Params(writer.params())
        prompts = generated.windows(tokens, c.generated.prompt_length, number, seed)

        def make(start: int, stop: int) -> Rows:
            sampled = {"temperature": c.generated.temperature, "seed": seed, "first_row": start}
            size = (c.sequence_length, c.generated.batch_size)
            return generated.generate(decoder, params, prompts[start:stop], *size, **sampled)

        made_from = {**of, **c.generated.to_dict(), "length": c.sequence_length, "seed": seed}
        made_from = json.loads(json.dumps({**made_from, "tokens": fingerprint(tokens)}))
        with progress() as bars:
            task = bars.add_task(f"{where}: rows written", total=number)
            return shards.write(
                *(workdir / where, made_from, number, make),
                chunk_rows=c.generated.batch_size,
                replace=True,
                progress=lambda done, _: bars.update(task, completed=done),
            )

    def write_round(number: int, num_rows: int) -> Rows:
        assert student is not None
        of = {"config": fingerprint(np.frombuffer(c.to_json().encode(), np.uint8))}
        where = f"student/{number:05}"
        return written(where, student, none(), num_rows, c.seed + 1 + number, of)

    found: dict[str, Rows | mixture.OnPolicy] = {}
    for kind in c.data:
        if kind == "text":
            found[kind] = packed(batches.pack(tokens, c.sequence_length))
        elif kind == "target" and target is not None:
            drafter = build(c.generated.drafter, target=target.model)
            of = {"target": fingerprint(target.params())}
            found[kind] = written(kind, target, drafter, c.generated.num_rows, c.seed, of)
        elif kind == "student" and student is not None:
            found[kind] = mixture.OnPolicy(c.generated.round_steps, write_round)
        else:
            raise ValueError(
                f"Data of kind {kind!r} cannot be had for {c.objective}; need text, target (with "
                "a target) or student (where the student writes text by itself)."
            )
    if c.teacher_cache:
        if target is None or set(found) != {"text"}:
            raise ValueError("A teacher cache needs a target and data of kind text alone.")
        found["text"] = _taught(c.teacher_cache, found["text"], target, workdir / "teacher")
    start, end = ({kind: pair[i] for kind, pair in c.data.items()} for i in (0, 1))
    return mixture.mixture(
        *(found, mixture.Schedule(start, end, c.num_steps), c.batch_size, c.seed),
        shard_index=jax.process_index(),
        num_shards=jax.process_count(),
    )


def _taught(k: int, text: Any, target: Writer, path: Path) -> Rows:
    """Rows with the target's k likeliest tokens, computed once."""
    num_rows, length = text.weights.shape
    size = teacher_cache.size(num_rows, length, k, target.model.vocab_size)
    print(f"Teacher cache: {size / 1e6:.0f} MB in {path}.", flush=True)
    params = target.params()
    with progress() as bars:
        task = bars.add_task("teacher: rows", total=num_rows)

        def show(done: int, _: int) -> None:
            bars.update(task, completed=done)

        teacher_cache.build(target.model, params, text, k, path, progress=show)
    return teacher_cache.attach(text, path, params, k)
