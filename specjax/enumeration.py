"""The exact law of what a decoder writes, by enumerating every random choice it makes.

The decoder's own jitted step runs; only its draws (`types.Draws`) are made here. In the laboratory
every key stands for one uniform number, and a draw inverts the cumulative law at it. A number is
known by the interval in which it lies, its *cell*: a draw splits the cell into a part for each
outcome, follows one part and leaves the others to later rows. The lengths of a row's cells are the
probability of all that happened in it; the sum over all rows is the law of the output, as precise
as the laws that the decoder computes.

Equal keys are one number: who draws twice from a key sees the same noise twice, within a step and
in later steps, as outside the laboratory. (Outside, one Gumbel noise under two laws couples them in
another way. Both ways draw from each law exactly, and a lossless rule may not count on more.)

Between steps, rows in the same state become one row, of the sum of their probabilities, unless the
next step reads numbers again that tell them apart. So the work grows with the number of texts, not
of histories.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax import sampling
from specjax.engine import prefill
from specjax.types import Array, Cache, Decoder, DecodeState, Draws, Keys, Params

_ROWS = 4096  # of every batch: one program serves all
_SLIVER = 1e-14  # shorter parts of a cell are rounding


class Enumeration(NamedTuple):
    """All that a decoder can do in some steps."""

    texts: dict[tuple[int, ...], float]  # new tokens -> probability
    expected_tokens: list[float]  # gained in each step
    reused: frozenset[str]  # sites that drew again from a key of the private stream
    shared_by_rows: frozenset[str]  # sites at which rows drew from one key
    complaints: frozenset[str]  # laws that are none: "accept: NaN"
    num_rows: int  # decoded for this, one step each


class Enumerator:
    """A decoder whose draws are made here, compiled once for all weights and prompts."""

    def __init__(self, decoder: Decoder) -> None:
        """Prepares the decoder; the fewer tokens and nodes it has, the fewer outcomes."""
        self._decoder = decoder
        self._bench = _Bench()
        self._step = jax.jit(
            lambda params, keys, state: _keyless(
                decoder.step(params, replace(state, rng_keys=keys))[0]
            )
        )

    def enumerate(
        self,
        params: Params,
        prompt: Sequence[int],
        horizon: int,
        num_steps: int = 2,
        temperature: float = 1.0,
    ) -> Enumeration:
        """Follows every outcome of the steps after a prompt.

        Args:
            params: weights.
            prompt: [T] tokens, at least one.
            horizon: where texts end, in new tokens.
            num_steps: two or more show what one step leaves behind for the next.
            temperature: above 0.

        Raises:
            ValueError: no prompt, no horizon.
        """
        bench = self._bench
        bench.complaints.clear()
        state = self._start(params, prompt, horizon, temperature)
        one = jax.tree.map(lambda x: jnp.broadcast_to(x, _ROWS), state.rng_keys)
        each = sampling.streams(jax.random.split(jax.random.key(1), _ROWS), bench.draws)

        def advance(states: DecodeState, keys: Keys = one) -> DecodeState:
            return jax.tree.map(np.array, self._step(params, keys, states))

        states = jax.tree.map(np.array, _keyless(state))
        bench.probe(lambda states: advance(states, each), _take(states, np.zeros(_ROWS, int)))
        shared_by_rows = bench.drawn_by_several_rows()
        weight, cells = np.ones(1), _Cells.none(1)
        finished: list[tuple[DecodeState, np.ndarray]] = []
        expected_tokens: list[float] = []
        reused: set[str] = set()
        num_rows = 0
        for _ in range(num_steps):
            run, read_again = bench.advance(advance, states, weight, cells)
            reused |= bench.private(cells, read_again) | bench.private(run.cells, run.again)
            num_rows += len(run.weight)
            expected_tokens.append(float((run.weight * run.gained).sum()))
            ended = run.states.done
            finished.append(_take((run.states, run.weight), ended))
            states, weight, cells = _take((run.states, run.weight, run.cells), ~ended)
            if not len(weight):
                break
        finished.append((states, weight))
        texts: dict[tuple[int, ...], float] = {}
        for states, weight in finished:
            context = states.context
            for tokens, end, w in zip(context.tokens, context.length, weight, strict=True):
                text = tuple(tokens[len(prompt) : end].tolist())
                texts[text] = texts.get(text, 0.0) + float(w)
        complaints = frozenset(bench.complaints)
        return Enumeration(
            texts, expected_tokens, frozenset(reused), shared_by_rows, complaints, num_rows
        )

    def _start(
        self, params: Params, prompt: Sequence[int], horizon: int, temperature: float
    ) -> DecodeState:
        """One row that has absorbed its prompt."""
        if not len(prompt) or horizon < 1:
            raise ValueError(
                f"The prompt has {len(prompt)} tokens and {horizon} follow; each must be at least "
                "1."
            )
        end = len(prompt) + horizon
        state = prefill(
            self._decoder,
            params,
            jax.random.split(jax.random.key(0), 1),
            sampling.sampling(1, temperature),
            np.array([prompt], np.int32),
            np.array([len(prompt)], np.int32),
            np.array([end], np.int32),
            end,
        )
        return replace(state, rng_keys=replace(state.rng_keys, draws=self._bench.draws))


def _keyless(state: DecodeState) -> Any:
    """All rows have the same keys: they are handed in apart."""
    return state.replace(rng_keys=())  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------- numbers


class _Cells(NamedTuple):
    """What rows know of the numbers that they drew from; an id of 0 is no number."""

    ids: np.ndarray  # [R, W] uint64
    low: np.ndarray  # [R, W] float64
    high: np.ndarray  # [R, W] float64
    site: np.ndarray  # [R, W] int, index of the site's name

    @classmethod
    def none(cls, num_rows: int, width: int = 0) -> "_Cells":
        shape = (num_rows, width)
        return cls(
            np.zeros(shape, np.uint64), np.zeros(shape), np.ones(shape), np.zeros(shape, int)
        )

    def only(self, keep: np.ndarray) -> "_Cells":
        """Forgets the other numbers; the order that is left is that of the ids."""
        cells = [np.where(keep, x, y) for x, y in zip(self, _Cells.none(*keep.shape), strict=True)]
        width = int(keep.sum(1).max(initial=0))
        order = np.argsort(~cells[0], 1, kind="stable")[:, :width]  # no number comes last
        return _Cells(*(np.take_along_axis(x, order, 1) for x in cells))

    def padded(self, width: int) -> "_Cells":
        more = _Cells.none(len(self.ids), width - self.ids.shape[1])
        return _Cells(*(np.concatenate(x, 1) for x in zip(self, more, strict=True)))

    def length(self) -> np.ndarray:
        """The probability [R] of lying in all of a row's cells."""
        return (self.high - self.low).prod(1)

    def bytes(self) -> np.ndarray:
        return np.concatenate([_bytes(x) for x in self[:3]], 1)


class _Frontier(NamedTuple):
    """The rows from which a step starts."""

    weight: np.ndarray  # [F], the probability of getting there
    state: np.ndarray  # [F], index into the distinct states
    cells: _Cells  # of numbers drawn before and read again


class _Run(NamedTuple):
    """All outcomes of one step."""

    states: DecodeState  # [R, ...]
    weight: np.ndarray  # [R]
    gained: np.ndarray  # [R], tokens
    origin: np.ndarray  # [R], the frontier's row that each comes from
    cells: _Cells
    again: np.ndarray  # [R, W] bool, drawn from twice within the step


class _Bench:
    """Makes the draws of a batch of rows, each by its cells."""

    def __init__(self) -> None:
        self.draws = Draws(self._bernoulli, self._noise, self._pick)
        self.complaints: set[str] = set()
        self._sites = ["none"]
        self._lock = threading.Lock()  # XLA may call from several threads

    def private(self, cells: _Cells, which: np.ndarray) -> set[str]:
        """Names of the private sites among some cells."""
        return {self._sites[i] for i in np.unique(cells.site[which])} - {"shared"}

    def drawn_by_several_rows(self) -> frozenset[str]:
        """Sites, of either stream, at which rows of the last batch drew from the same number."""
        found, count = np.unique(self._cells.ids, return_counts=True)
        several = np.isin(self._cells.ids, found[(count > 1) & (found > 0)])
        return frozenset(self._sites[i] for i in np.unique(self._cells.site[several]))

    # ---------------------------------------------------------------------- what rows go through

    def advance(
        self,
        advance: Callable[[DecodeState], DecodeState],
        states: DecodeState,
        weight: np.ndarray,
        cells: _Cells,
    ) -> tuple[_Run, np.ndarray]:
        """One step of rows [R], those in the same state together.

        Returns:
            All outcomes, and which of the rows' numbers [R, W] the step reads again: their cells
            keep rows apart. What a step reads is known after a look, and for certain after it.
        """
        first, group = _distinct(_visible(states))
        states = _take(states, first)
        read = self.probe(advance, states)[group]
        again = (cells.ids[:, :, None] == read[:, None]).any(-1) & (cells.ids > 0)
        while True:
            kept = cells.only(again)
            first, merged = _distinct(np.concatenate([_bytes(group), kept.bytes()], 1))
            total = np.bincount(merged, weight, len(first))
            run = self.follow(advance, states, _Frontier(total, group[first], _take(kept, first)))
            shared = self._sites.index("shared") if "shared" in self._sites else -1
            dropped = ~again & (cells.site != shared) & (cells.ids > 0)
            # By rows: what one has dropped another may draw from for the first time.
            missed = dropped & np.isin(_owned(merged, cells.ids), _owned(run.origin, run.cells.ids))
            if not missed.any():
                return run, again
            again |= missed

    def follow(
        self,
        advance: Callable[[DecodeState], DecodeState],
        states: DecodeState,
        start: _Frontier,
    ) -> _Run:
        """Runs every row of the frontier through the step, once for each of its outcomes."""
        pending = [(np.arange(len(start.weight)), start.cells)]
        runs: list[_Run] = []
        before = start.cells.length()
        while pending:
            batch, count = [pending.pop()], 0
            while pending and sum(len(chunk[0]) for chunk in batch) < _ROWS:
                batch.append(pending.pop())  # the newest first, or they would pile up
            origin, cells = _joined(batch)
            count = min(len(origin), _ROWS)
            if count < len(origin):
                pending.append((origin[count:], _take(cells, slice(count, None))))
            origin, cells = origin[:count], _take(cells, slice(count))
            after, others = self._run(advance, _take(states, start.state[origin]), cells)
            pending += [(origin[rows], cells) for rows, cells in others]
            weight = start.weight[origin] * self._cells.length()[:count] / before[origin]
            length = np.asarray(states.context.length)[start.state[origin]]
            cells, again = _take((self._cells, self._again), slice(count))
            gained = np.asarray(after.context.length) - length
            runs.append(_Run(after, weight, gained, origin, cells, again))
        width = max(run.cells.ids.shape[1] for run in runs)
        padded = [
            run._replace(
                cells=run.cells.padded(width),
                again=np.pad(run.again, ((0, 0), (0, width - run.again.shape[1]))),
            )
            for run in runs
        ]
        return jax.tree.map(lambda *x: np.concatenate(x), *padded)

    def probe(
        self, advance: Callable[[DecodeState], DecodeState], states: DecodeState
    ) -> np.ndarray:
        """The ids [G, W] of the numbers that a step draws from in each state."""
        found = []
        for rows in np.array_split(np.arange(len(states.done)), -(-len(states.done) // _ROWS)):
            self._run(advance, _take(states, rows), _Cells.none(len(rows)))
            found.append(self._cells.ids[: len(rows)])
        width = max(ids.shape[1] for ids in found)
        return np.concatenate([np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in found])

    def _run(
        self, advance: Callable[[DecodeState], DecodeState], states: DecodeState, cells: _Cells
    ) -> tuple[DecodeState, list[tuple[np.ndarray, _Cells]]]:
        """One batch: each row follows one outcome; the others are returned with their rows."""
        self._count = len(cells.ids)
        full = np.resize(np.arange(self._count), _ROWS)
        self._cells = _take(cells, full)
        self._drawn = np.zeros(self._cells.ids.shape, bool)
        self._again = np.zeros(self._cells.ids.shape, bool)
        self._others: list[tuple[np.ndarray, _Cells]] = []
        after = advance(_take(states, full))
        return _take(after, slice(self._count)), self._others

    # ------------------------------------------------------------------------------------- draws

    def _bernoulli(self, site: str, keys: Array, probs: Array) -> Array:
        def draw(data: np.ndarray, probs: np.ndarray) -> np.ndarray:
            p = np.asarray(probs, np.float64).reshape(len(probs), -1)
            self._check(site, ~np.isfinite(p), "a probability is not finite")
            p = np.clip(np.nan_to_num(p, nan=0.5), 0, 1)
            ends = np.stack([np.zeros_like(p), p, np.ones_like(p)], -1)
            data = np.broadcast_to(np.asarray(data)[:, None], (*p.shape, 2))
            outcome = self._draw(site, data, np.arange(p.shape[1]), 0, ends)
            return (outcome == 0).reshape(probs.shape)

        result = jax.ShapeDtypeStruct(probs.shape, jnp.bool_)
        return jax.pure_callback(draw, result, jax.random.key_data(keys), probs)

    def _noise(self, site: str, keys: Array, shape: tuple[int, ...]) -> Array:
        """The numbers' names: two words of the key, the offset, the site."""
        if site not in self._sites:
            self._sites.append(site)
        shape = (*keys.shape, *shape[:-1])
        data = jax.random.key_data(keys).reshape(*keys.shape, *[1] * (len(shape) - keys.ndim), 2)
        data = jnp.broadcast_to(data, (*shape, 2))
        size = int(np.prod(shape[keys.ndim :], dtype=int))
        offset = jnp.arange(size, dtype=jnp.uint32).reshape(shape[keys.ndim :])
        index = jnp.full(shape, self._sites.index(site), jnp.uint32)
        rest = jnp.stack([jnp.broadcast_to(offset, shape), index], -1)
        return jnp.concatenate([data, rest], -1)

    def _pick(self, noise: Array, log_weights: Array, turn: int) -> Array:
        def draw(noise: np.ndarray, log_weights: np.ndarray) -> np.ndarray:
            rows, vocab_size = len(noise), log_weights.shape[-1]
            noise = np.asarray(noise).reshape(rows, -1, 4)
            x = np.asarray(log_weights, np.float64).reshape(rows, -1, vocab_size)
            site = self._sites[int(noise[0, 0, 3])]
            peak = x.max(-1, keepdims=True)
            self._check(site, np.isnan(x) | (x == np.inf), "a log-weight is NaN or infinite")
            self._check(site, peak == -np.inf, "a law has no mass")
            with np.errstate(invalid="ignore"):
                mass = np.where(np.isfinite(peak), np.exp(x - peak), 1.0)
            ends = np.concatenate([np.zeros((*mass.shape[:2], 1)), mass.cumsum(-1)], -1)
            ends = ends / ends[..., -1:]
            return self._draw(site, noise[..., :2], noise[..., 2], turn + 1, ends).reshape(
                log_weights.shape[:-1]
            )

        shape = log_weights.shape[:-1]
        noise = jnp.broadcast_to(noise, (*shape, noise.shape[-1]))
        result = jax.ShapeDtypeStruct(shape, jnp.int32)
        return jax.pure_callback(draw, result, noise, log_weights)

    def _check(self, site: str, wrong: np.ndarray, what: str) -> None:
        if wrong[: self._count].any():
            self.complaints.add(f"{site}: {what}")

    def _draw(
        self, site: str, data: np.ndarray, offset: np.ndarray, turn: int, ends: np.ndarray
    ) -> np.ndarray:
        """Outcomes [R, n] of laws, given as parts of [0, 1] that end at `ends` [R, n, V + 1]."""
        with self._lock:
            if site not in self._sites:
                self._sites.append(site)
            ids = _names(data, np.broadcast_to(offset, data.shape[:2]), turn)
            places = [
                self._draw_one(self._sites.index(site), ids[:, i], ends[:, i])
                for i in range(ids.shape[1])
            ]
            return np.stack(places, 1).astype(np.int32)

    def _draw_one(self, site: int, ids: np.ndarray, ends: np.ndarray) -> np.ndarray:
        row = np.arange(len(ids))
        same = self._cells.ids == ids[:, None]
        column = same.argmax(1) if same.shape[1] else np.zeros(len(ids), int)
        is_new = ~same.any(1)
        if is_new.any():
            # Rows have drawn from different numbers before: each fills its own next column.
            column = np.where(is_new, (self._cells.ids > 0).sum(1), column)
            more = int(column.max()) + 1 - same.shape[1]
            if more > 0:
                self._cells = self._cells.padded(same.shape[1] + more)
                self._drawn = np.pad(self._drawn, ((0, 0), (0, more)))
                self._again = np.pad(self._again, ((0, 0), (0, more)))
            self._cells.ids[row[is_new], column[is_new]] = ids[is_new]
            self._cells.site[row[is_new], column[is_new]] = site
        self._again[row, column] |= self._drawn[row, column]
        self._drawn[row, column] = True
        _, low, high, _ = self._cells
        left = np.maximum(ends[:, :-1], low[row, column, None])
        right = np.minimum(ends[:, 1:], high[row, column, None])
        possible = right - left > _SLIVER
        outcome = np.where(possible.any(1), possible.argmax(1), (right - left).argmax(1))
        other = possible & (np.arange(possible.shape[1]) != outcome[:, None])
        rows, tokens = np.nonzero(other[: self._count])
        if len(rows):
            cells = _take(self._cells, rows)
            at = (np.arange(len(rows)), column[rows])
            cells.low[at], cells.high[at] = left[rows, tokens], right[rows, tokens]
            self._others.append((rows, cells))
        low[row, column], high[row, column] = left[row, outcome], right[row, outcome]
        return outcome


def _names(data: np.ndarray, offset: np.ndarray, turn: int) -> np.ndarray:
    """64 bits that tell numbers apart: key words [..., 2], offset within the key, turn."""
    words = (*np.moveaxis(data, -1, 0), offset, turn)
    mixed = np.zeros(data.shape[:-1], np.uint64)
    for word in words:  # splitmix64
        mixed = (mixed ^ np.asarray(word, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed


def _owned(owner: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """64 bits [R, W] that tell numbers [R, W] of one owner [R] from those of another."""
    offset = np.broadcast_to(owner[:, None], ids.shape)
    words = np.stack([ids >> np.uint64(32), ids & np.uint64(0xFFFFFFFF)], -1)
    return _names(words, offset, 0)


# ------------------------------------------------------------------------------------ rows of trees


def _take(tree: Any, rows: Any) -> Any:
    """The same rows of every array."""
    return jax.tree.map(lambda x: x[rows], tree)


def _joined(chunks: list[tuple[np.ndarray, _Cells]]) -> tuple[np.ndarray, _Cells]:
    width = max(cells.ids.shape[1] for _, cells in chunks)
    padded = [(origin, cells.padded(width)) for origin, cells in chunks]
    return jax.tree.map(lambda *x: np.concatenate(x), *padded)


def _bytes(x: Any) -> np.ndarray:
    """Each row's bytes [R, n]."""
    x = np.ascontiguousarray(x)
    return x.reshape(len(x), -1).view(np.uint8) if x.size else np.zeros((len(x), 0), np.uint8)


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first of each kind of rows [R, n] of bytes, and each row's kind."""
    if not rows.shape[1]:
        return np.zeros(min(len(rows), 1), int), np.zeros(len(rows), int)
    whole = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.shape[1])))[:, 0]
    _, first, kind = np.unique(whole, return_index=True, return_inverse=True)
    return first, kind


def history(x: Any, length: Any, axis: int) -> np.ndarray:
    """A buffer [B, ..., S, ...] with zeros for the garbage from `length` [B] on, along `axis`."""
    keep = np.arange(x.shape[axis]) < length[:, None]
    keep = keep.reshape(len(x), *[1] * (axis - 1), -1, *[1] * (x.ndim - axis - 1))
    return np.where(keep, x, 0)


def _visible(states: DecodeState) -> np.ndarray:
    """The bytes of all that later steps can see of a state: no garbage, floats to four digits."""

    def clean(node: Any) -> Any:
        if not isinstance(node, Cache):
            return node
        return [history(x, node.length, 2) for x in node.keys + node.values], node.length

    context = states.context
    tokens = history(context.tokens, context.length, 1)
    seen = (context.length, tokens, context.cache, states.drafter, states.done)
    leaves = jax.tree.leaves(jax.tree.map(clean, seen, is_leaf=lambda x: isinstance(x, Cache)))
    rounded = [np.round(x, 4) + 0.0 if np.issubdtype(x.dtype, np.floating) else x for x in leaves]
    return np.concatenate([_bytes(x) for x in rounded], 1)
