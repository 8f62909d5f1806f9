"""Loops that the compiler cannot shorten, and their times in interleaved repeats.

What a loop's body computes decides, in a way that the compiler cannot see through, the input of its
next round, so nothing is dropped or hoisted and no dispatch is timed.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import jaxprs_in_params
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from specjax import engine
from specjax.types import Array, Decoder, DecodeState, Params

Timed = Callable[[int], float]  # rounds -> seconds

_MOST = 10**6  # rounds


def nothing(x: Array) -> Array:
    """An int32 0 that depends on all of x: no token is negative and no number here is NaN."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.isnan(x.max()).astype(jnp.int32)
    return jnp.minimum(x.min(), 0).astype(jnp.int32)


def loop(body: Callable[[Any, Any], Any], inputs: Any, carry: Any) -> Timed:
    """Rounds of carry = body(inputs, carry); the inputs never change."""

    @jax.jit
    def many(n: Array, inputs: Any, carry: Any) -> Any:
        return lax.fori_loop(0, n, lambda _, carry: body(inputs, carry), carry)

    def timed(n: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(many(n, inputs, carry))
        return time.perf_counter() - start

    return timed


def steps(decoder: Decoder, params: Params, state: DecodeState) -> Timed:
    """Rounds of whole steps; the state is copied first, for `advance` consumes it."""

    def timed(n: int) -> float:
        fresh = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        start = time.perf_counter()
        jax.block_until_ready(engine.advance(decoder, params, fresh, n))
        return time.perf_counter() - start

    return timed


def rounds(timed: Timed, seconds: float, most: int = _MOST) -> int:
    """How many rounds take `seconds`; compiles first."""
    timed(1)
    n, taken = 2, 0.0
    while taken < seconds / 2 and n < most:
        taken = timed(n)
        n = min(most, max(2, int(n * seconds / taken)))
    return n


def interleaved(
    loops: Mapping[str, Timed],
    most: Mapping[str, int],
    repeats: int,
    seconds: float,
    name: str,
    console: Console,
) -> dict[str, list[float]]:
    """Milliseconds of a round of each loop in each of the interleaved repeats.

    A repeat takes `seconds`, but no more rounds than `most` has for the loop.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    left = TimeRemainingColumn()
    quiet = not console.is_terminal
    with Progress(*columns, left, console=console, transient=True, disable=quiet) as progress:
        task = progress.add_task(name, total=len(loops) * (repeats + 1))
        sizes = {}
        for part, timed in loops.items():
            progress.update(task, description=f"{name}: compiling {part}")
            sizes[part] = rounds(timed, seconds, most.get(part, _MOST))
            progress.advance(task)
        found: dict[str, list[float]] = {part: [] for part in loops}
        for repeat in range(repeats):
            progress.update(task, description=f"{name}: repeat {repeat + 1}")
            for part, timed in loops.items():
                found[part].append(1e3 * timed(sizes[part]) / sizes[part])
                progress.advance(task)
    return found


def matmul_peak(dtype: jnp.dtype, repeats: int = 5) -> float:
    """Operations per second of one device in the product of two large square matrices, at best."""
    width = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((width, width), dtype)
    # As models multiply: with float32 sums a CPU's own units for bfloat16 serve.
    product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    jax.block_until_ready(product(x))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(product(x))
        seconds.append(time.perf_counter() - start)
    return 2 * width**3 / min(seconds)


def matmul_flops(function: Callable, *args: Any) -> float:
    """Operations of all matrix products in one call, 2 for every multiplication and addition.

    Loops count as often as they go round, and of a choice the mean of its branches, which is right
    where a loop takes each in turn.
    """

    def count(jaxpr: Any) -> float:
        total = 0.0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
                total += 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
                continue
            inner = [count(part) for part in jaxprs_in_params(equation.params)]
            if equation.primitive.name == "scan":
                total += equation.params["length"] * sum(inner)
            elif equation.primitive.name == "cond":
                total += sum(inner) / len(inner)
            else:
                total += sum(inner)
        return total

    return count(jax.make_jaxpr(function)(*args).jaxpr)
