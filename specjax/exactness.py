"""The laboratory: does a decoder write exactly what its target would, whatever rule it follows?

A `Factory` makes the parts of a decoder for models that the laboratory chooses. `certify` puts them
through every check and returns a `Certificate`:

    enumeration     the exact law of two steps and more on a tiny vocabulary, through the decoder's
                    own compiled step, against the target's; keys drawn from twice or by several
                    rows, laws that are none, drafts that contradict themselves
    sampling        a chi-square test of the first three tokens that finds a total variation of 0.02
                    with probability 0.99
    greedy          at temperature 0 the tokens of an uncached argmax loop, bit for bit
    invariance      where the verifier promises it, sampled tokens are plain sampling's, bit for bit
    rows            a row's text does not depend on its place and its neighbours
    foreign drafts  having judged others' drafts, the same text, and as many tokens per step
    ends            EOS, limits and full buffers cut texts where they should
    caches          after decoding, what a fresh prefill of the text would have cached
    bfloat16        by how much the target preferred its own token where bfloat16 first differs

All but enumeration and bfloat16 run one program: a large ragged batch in which every row has its
own prompt, limit, temperature and truncation.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax import conformance, engine, testing
from specjax.enumeration import Enumeration, Enumerator
from specjax.laboratory import Check, Factory, Pair, checked, tabular_pair
from specjax.sampling import sampling
from specjax.types import (
    Array,
    Context,
    Draft,
    Keys,
    ModelOutput,
    Params,
    Proposal,
    Verdict,
    Verifier,
)


class Certificate(NamedTuple):
    """All checks of one decoder."""

    name: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        checks = [check._asdict() for check in self.checks]
        return {"name": self.name, "passed": self.passed, "checks": checks}


def certify(
    name: str, factory: Factory, num_tests: int = 1, bfloat16: bool = False
) -> Iterator[Check]:
    """Runs every check on a decoder, one after another; `Certificate(name, tuple(...))`.

    A decoder that cannot be built, as one whose verifier does not declare the drafter's law, fails
    the first check with the reason, and there are no others.

    Args:
        name: seeds the sampling.
        factory: makes the parts.
        num_tests: how many certificates are made in all; their sampling tests together refute true
            laws with probability .001 at most.
        bfloat16: also run in bfloat16.
    """
    check = enumeration(factory, tabular_pair())
    yield check
    if not check.figures:
        return
    program = conformance.Program(name, factory)
    yield conformance.sampled_law(program, num_tests)
    yield conformance.greedy_identity(program)
    if program.parts.verifier.drafter_invariant:
        yield conformance.invariance(program)
    yield conformance.row_independence(program)
    yield conformance.foreign_drafts(program)
    yield conformance.ends(program)
    yield conformance.cached_history(program)
    if bfloat16:
        yield conformance.bfloat16_margin(factory)


# ------------------------------------------------------------------------------------- enumeration


def enumeration(
    factory: Factory,
    pair: Pair,
    prompt: Sequence[int] = (1, 0),
    horizon: int = 3,
    num_steps: int = 2,
    temperature: float = 0.8,
    tolerance: float | None = None,
) -> Check:
    """Enumerates what the decoder writes, and compares with the target's law.

    Args:
        factory: makes the parts.
        pair: models of a tiny vocabulary.
        prompt: [T] tokens.
        horizon: tokens compared.
        num_steps: steps followed; what is missing of the horizon then, the target adds.
        temperature: not 1, for laws reported at another temperature than the row's.
        tolerance: total variation that passes; 1e-6 in float32, 1e-12 in float64.
    """
    dtype = pair.target.init_cache(1, 1).keys[0].dtype
    limit = tolerance or (1e-12 if dtype == jnp.float64 else 1e-6)

    def run() -> tuple[bool, str, dict[str, Any]]:
        drafter, drafter_params, verifier = factory(pair)
        complaints: set[str] = set()
        verifier = _watched(verifier, drafter.proposal, complaints)
        try:
            decoder = engine.decoder(pair.target, drafter, verifier)
        except ValueError as error:
            return False, f"refused: {error}", {}
        params = Params(pair.target_params, drafter_params)
        found = Enumerator(decoder).enumerate(params, prompt, horizon, num_steps, temperature)
        distance = total_variation(found, pair, prompt, horizon, temperature)
        complaints |= found.complaints
        complaints |= {f"{site}: drew again from one key" for site in found.reused}
        complaints |= {f"{site}: rows drew from one key" for site in found.shared_by_rows}
        mass = sum(found.texts.values())
        if abs(mass - 1) > 1e-9:
            complaints.add(f"the probabilities of all outcomes sum to {mass}")
        figures = {
            "total_variation": distance,
            "expected_tokens": found.expected_tokens,
            "num_rows": found.num_rows,
            "complaints": sorted(complaints),
        }
        passed = distance < limit and not complaints
        verdict = f"total variation {distance:.1e}, at most {limit:g} allowed"
        return passed, "; ".join([verdict, *sorted(complaints)]), figures

    return checked("enumeration", run)


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """64 bits in every thread, for `tabular_pair(dtype=jnp.float64)` and its enumeration.

    `jax.enable_x64` would hold in this thread alone, and the laboratory's draws are made in others,
    where laws would be rounded to float32 on their way.
    """
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def total_variation(
    found: Enumeration, pair: Pair, prompt: Sequence[int], horizon: int, temperature: float = 1.0
) -> float:
    """Between the enumerated texts, continued by the target, and the target's own law."""
    v = pair.target.vocab_size
    laws = testing.conditional_laws(
        pair.target, pair.target_params, prompt, sampling(1, temperature), horizon
    )
    output = np.zeros(v**horizon)
    for text, weight in found.texts.items():
        first = sum(token * v ** (horizon - 1 - i) for i, token in enumerate(text))
        block = slice(first, first + v ** (horizon - len(text)))
        output[block] += weight * laws[block, len(text) :].prod(1)
    return float(abs(output - laws.prod(1)).sum() / 2)


def _watched(verifier: Verifier, proposal: Proposal, complaints: set[str]) -> Verifier:
    """The verifier, with an eye on what the drafter hands it."""

    def look(*arrays: Any) -> np.ndarray:
        tokens, parents, q, p = (np.asarray(x) for x in arrays)
        close = 1e-4 if q.dtype == np.float32 else 1e-9
        kept = np.take_along_axis(q, tokens[..., None], 2)[:, 1:, 0]
        wrong = {
            "the target's log-weights are NaN": np.isnan(p).any(),
            "draft: probs are NaN or negative": not (q[:, 1:] >= 0).all(),
            "draft: probs do not sum to 1": (abs(q[:, 1:].sum(-1) - 1) > close).any(),
            "draft: a drafted token has probability 0": (kept <= 0).any(),
        }
        if proposal.law in ("paths", "siblings"):
            related = (parents[:, :, None] == parents[:, None]) & (parents[:, :, None] >= 0)
            apart = abs(q[:, :, None] - q[:, None]).max(-1)
            wrong["draft: siblings differ in their laws"] = (related & (apart > close)).any()
        complaints.update(text for text, is_so in wrong.items() if is_so)
        return np.zeros(len(tokens), np.int32)

    def verify(
        params: Params,
        rng_keys: Keys,
        context: Context,
        draft: Draft,
        output: ModelOutput,
        warped: Array,
    ) -> Verdict:
        verdict = verifier.verify(params, rng_keys, context, draft, output, warped)
        probs = draft.probs
        if probs is None:
            probs = jax.nn.one_hot(draft.tokens, warped.shape[-1], dtype=warped.dtype)
        result = jax.ShapeDtypeStruct(verdict.num_nodes.shape, jnp.int32)
        seen = jax.pure_callback(look, result, draft.tokens, draft.parents, probs, warped)
        return verdict.replace(num_nodes=verdict.num_nodes + seen)

    return verifier._replace(verify=verify)
