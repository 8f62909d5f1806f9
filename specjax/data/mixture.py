"""Batches from several sources, in shares that change as training goes on.

The batch of a step is a function of the step alone, so a run resumes exactly from one number. The
usual ways to feed a draft model (the data axis of DistillSpec, arXiv 2310.08461) are

    text = rows.packed(batches.pack(tokens, length))
    target = shards.write(...)                       # what the target wrote, once
    student = mixture.OnPolicy(200, write_round)     # what the student writes, anew every 200 steps

    mixture({"text": text}, constant({"text": 1}), ...)
    mixture({"target": target}, constant({"target": 1}), ...)
    mixture({"student": student}, constant({"student": 1}), ...)
    mixture({"text": text, "target": target, "student": student},
            Schedule({"text": 1, "target": 1, "student": 0},
                     {"text": 0, "target": 1, "student": 1}, num_steps), ...)
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import grain
import numpy as np

from specjax.data import batches
from specjax.data.rows import Rows, check_alike, take

_BLOCK = 1024  # steps whose shares are drawn at once


class OnPolicy(NamedTuple):
    """A source whose rows are written anew at the start of every round of steps.

    `write` is called from the first `next` of a round that needs any of them, with the round's
    number, from 0, and how many rows the round will take. What it returns is read in a shuffled
    order, and again where it is fewer. Nothing is made ahead, so it may read the weights that all
    steps before have trained. A run that resumes within a round asks for that round again: only the
    caller can give back rows that earlier weights wrote, from `shards`.
    """

    round_steps: int
    write: Callable[[int, int], Rows]  # (round, num_rows) -> rows, without teacher fields


class Schedule(NamedTuple):
    """The sources' weights, relative to each other: from `start` to `end` in a straight line."""

    start: Mapping[str, float]
    end: Mapping[str, float]
    num_steps: int  # until `end`, which then stays


def constant(weights: Mapping[str, float]) -> Schedule:
    """The same weights throughout."""
    return Schedule(weights, weights, 1)


def shares(schedule: Schedule, steps: np.ndarray) -> np.ndarray:
    """What part of a batch comes from each source, in the order of their names.

    Args:
      schedule: J sources.
      steps: [N], from 0.

    Returns:
      [N, J] float64; rows sum to 1.
    """
    names = sorted(schedule.start)
    start = np.array([float(schedule.start[name]) for name in names])
    end = np.array([float(schedule.end[name]) for name in names])
    progress = np.clip(steps / schedule.num_steps, 0, 1)[:, None]
    return (1 - progress) * start / start.sum() + progress * end / end.sum()


def mixture(
    sources: Mapping[str, Rows | OnPolicy],
    schedule: Schedule,
    batch_size: int,
    seed: int,
    shard_index: int = 0,
    num_shards: int = 1,
    prefetch: int = 2,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """An endless iterator over batches, see `rows.take`; one source is a mixture of one.

    Each batch holds every source's share of rows, rounded up or down at random so that the mean is
    the share. A source's own rows come each once an epoch, every epoch in a new order. Every
    process makes its own rows of the same batches, so that they, and the state, do not depend on
    how many processes there are. The state is that of `batches.stream`.

    Args:
      sources: by name; all rows have the same length and fields.
      schedule: their weights, of all of them.
      batch_size: B, of all processes together.
      seed: fixes the rounding and all orders.
      shard_index: of this process.
      num_shards: the processes.
      prefetch: batches made ahead; none are where a source is on-policy.

    Raises:
      ValueError: sources that do not fit together, the schedule or the batch size.
    """
    own = batches.shard(batch_size, shard_index, num_shards)
    _check(sources, schedule, batch_size)
    names = sorted(sources)
    fixed = {name: source for name, source in sources.items() if isinstance(source, Rows)}
    # What each source is read from, and in which order; by round where it is on-policy.
    read = {
        name: (0, rows, batches.order(len(rows.tokens), seed, names.index(name)))
        for name, rows in fixed.items()
    }

    @functools.lru_cache(maxsize=4)
    def taken(block: int) -> np.ndarray:
        """Rows of each source in a block's first batches, [_BLOCK + 1, J]."""
        entropy = np.random.SeedSequence(seed, spawn_key=(len(names), block))
        u = np.random.default_rng(entropy).random(_BLOCK)[:, None]
        share = shares(schedule, np.arange(block * _BLOCK, (block + 1) * _BLOCK))
        until = np.cumsum(share, 1)
        # Source j has the rows i for which (i + u) / B lies in its part of the unit interval.
        until = np.ceil(batch_size * (until / until[:, -1:]) - u)
        counts = np.diff(until, axis=1, prepend=0).astype(np.int64)
        return np.concatenate([np.zeros_like(counts[:1]), np.cumsum(counts, 0)])

    before = [np.zeros(len(names), np.int64)]  # rows of each source before each block

    def used(step: int) -> np.ndarray:
        """Rows of each source in all batches before `step`, [J]."""
        block, within = divmod(step, _BLOCK)
        while len(before) <= block:
            before.append(before[-1] + taken(len(before) - 1)[-1])
        return before[block] + taken(block)[within]

    def enter(name: str, source: OnPolicy, step: int) -> int:
        """Reads the rows of the round of `step` from now on; how many came before the round."""
        j, number = names.index(name), step // source.round_steps
        since = int(used(number * source.round_steps)[j])
        if name not in read or read[name][0] != number:
            read.pop(name, None)  # two rounds need not be in memory
            count = int(used((number + 1) * source.round_steps)[j]) - since
            rows = source.write(number, count)
            if not len(rows.tokens):
                raise ValueError(f"Source {name} wrote 0 rows in round {number}; need {count}.")
            check_alike({**fixed, name: rows})
            read[name] = number, rows, batches.order(len(rows.tokens), seed, j, number)
        return since

    def batch_of(step: int) -> dict[str, np.ndarray]:
        first, last = used(step), used(step + 1)
        parts, start = [], 0
        for j, name in enumerate(names):
            stop = start + int(last[j] - first[j])  # its place in the batch of all processes
            if start < stop:
                source = sources[name]
                # Every process enters a round at the same step, also one without rows of it.
                since = enter(name, source, step) if isinstance(source, OnPolicy) else 0
                _, rows, numbers = read[name]
                offset = int(first[j]) - since - start
                inside = max(start, own.start), max(start, own.start, min(stop, own.stop))
                parts.append(take(rows, numbers(offset + inside[0], offset + inside[1])))
            start = stop
        return {field: np.concatenate([part[field] for part in parts]) for field in parts[0]}

    return batches.stream(batch_of, prefetch if len(fixed) == len(sources) else 0)


def _check(sources: Mapping[str, Rows | OnPolicy], schedule: Schedule, batch_size: int) -> None:
    names = sorted(sources)
    for which, weights in (("start", schedule.start), ("end", schedule.end)):
        if sorted(weights) != names or not names:
            raise ValueError(
                f"The schedule's {which} weighs {', '.join(weights) or 'nothing'} but the sources "
                f"are {', '.join(sources) or 'none'}; they must be the same."
            )
        values = list(weights.values())
        if not (np.isfinite(values).all() and min(values) >= 0 and sum(values) > 0):
            raise ValueError(
                f"The schedule's {which} is {dict(weights)}; need weights of 0 or more."
            )
    if schedule.num_steps < 1:
        raise ValueError(f"The schedule has {schedule.num_steps} steps; need at least 1.")
    fixed = {name: source for name, source in sources.items() if isinstance(source, Rows)}
    if fixed:
        check_alike(fixed)
    ends = shares(schedule, np.array([0, schedule.num_steps]))
    largest = dict(zip(names, ends.max(0), strict=True))
    for name, source in sources.items():
        if isinstance(source, OnPolicy):
            if source.round_steps < 1:
                raise ValueError(f"Source {name} has rounds of {source.round_steps} steps; need 1.")
            for other, rows in fixed.items():
                if rows.teacher_tokens is not None:
                    raise ValueError(
                        f"Source {other} has a teacher's probabilities but source {name}, which is "
                        "written while training, has none; attach no teacher cache."
                    )
        elif largest[name] * batch_size > len(source.tokens):
            n, share = len(source.tokens), largest[name]
            raise ValueError(
                f"batch_size is {batch_size}; need 1 to {int(n / share)}: source {name} has {n} "
                f"sequences and a share of up to {share:.3g}."
            )
