"""Every drafter with every verifier that the laws allow: all laws are tested on each row here.

`DEFAULTS` has a row for every drafter, with the verifier that suits it, and `CASES` all allowed
pairs besides. Quick tests take the defaults and, of every law, one drafter with all verifiers.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from specjax import engine, testing
from specjax.conformance import EOS_ID as EOS_ID
from specjax.drafters import adaptive, grow
from specjax.drafters.cascade import cascade
from specjax.drafters.combine import alternate, combine
from specjax.drafters.corpus import Corpus, corpus
from specjax.drafters.eagle import eagle
from specjax.drafters.horizontal import horizontal
from specjax.drafters.hydra import hydra
from specjax.drafters.jacobi import jacobi
from specjax.drafters.layer_skip import layer_skip
from specjax.drafters.lookahead import lookahead
from specjax.drafters.lookup import lookup, reference
from specjax.drafters.medusa import medusa
from specjax.drafters.model import model
from specjax.drafters.ngram import ngram
from specjax.drafters.ngrammys import bigrams, ngrammys
from specjax.drafters.none import none
from specjax.drafters.quantized import int8, quantized
from specjax.drafters.recycling import recycling
from specjax.drafters.retrieval import retrieval
from specjax.drafters.sparse import View, snapkv, sparse, streaming
from specjax.drafters.speculative_jacobi import speculative_jacobi
from specjax.drafters.suffix import suffix
from specjax.laboratory import transformer_pair
from specjax.models.eagle import EagleHead, eagle3_head, eagle_head
from specjax.models.hydra import HydraHeads, hydra_heads
from specjax.models.intersection import intersected
from specjax.models.medusa import MedusaHeads, medusa_heads
from specjax.models.transformer import TransformerConfig
from specjax.types import Drafter, Model, Params, PyTree, Verifier
from specjax.verifiers.block import block
from specjax.verifiers.gbv import gbv
from specjax.verifiers.hybrid import hybrid
from specjax.verifiers.kseq import kseq
from specjax.verifiers.match import match
from specjax.verifiers.rejection import rejection
from specjax.verifiers.traversal import traversal

VOCAB_SIZE = 5


class Case(NamedTuple):
    """A drafter and a verifier under test."""

    drafter: Callable[[], Drafter]
    verifier: Callable[[], Verifier]
    params: Callable[[], PyTree]  # the drafter's
    kind: str  # drafters of one kind differ in their trees only: their states have the same shapes


def target() -> tuple[Model, PyTree]:
    """The target of all cases."""
    return transformer_pair().target, transformer_pair().target_params


def draft_model() -> tuple[Model, PyTree]:
    """A different model: other size, other weights."""
    return transformer_pair().draft, transformer_pair().draft_params


def nothing() -> PyTree:
    """The parameters of drafters without any."""
    return ()


Heads = MedusaHeads | HydraHeads | EagleHead


def uneven(heads: Heads) -> PyTree:
    """Weights of heads; new ones predict what the target predicted a token ago."""
    rng = np.random.default_rng(3)
    params = jax.jit(heads.init)(jax.random.key(3))
    # An EAGLE head reads its own output: large weights would make rounding grow step by step.
    scale = 0.12 if isinstance(heads, EagleHead) else 0.4
    return jax.tree.map(lambda x: x + scale * rng.standard_normal(x.shape, np.float32), params)


MEDUSA = medusa_heads(16, num_heads=3)
LAYER = TransformerConfig(5, 16, 24, 1, 2, 1, 6)
HYDRA = hydra_heads(16, num_heads=3, num_layers=2, prefix=LAYER)
EAGLE, EAGLE3 = eagle_head(LAYER), eagle3_head(LAYER, (0, 1))
EAGLE3_OF_THREE = eagle3_head(LAYER, (1,), vocabulary=np.array([0, 2, 3]))


def independent_model(build: grow.Builder) -> Callable[[], Drafter]:
    return lambda: model(draft_model()[0], build)


TREE = (-1, 0, 0, 1, 1, 2, 3)  # depth 3, uneven
IID, WOR = grow.independent(), grow.without_replacement()
BUILDERS: dict[str, tuple[grow.Builder, Callable[[], Verifier]]] = {
    "chain best": (grow.chain(3, grow.best()), match),
    "chain without_replacement": (grow.chain(3, WOR), block),
    "chain coupled": (grow.chain(3, grow.coupled()), match),
    "chain that stops": (adaptive.chain(3, WOR, adaptive.confidence(0.45)), block),
    "dynamic": (grow.dynamic(6, 2, 3), match),
    "best_first": (adaptive.best_first(2, 2, 3, WOR), traversal),
    "tree best": (grow.static(TREE, grow.best()), match),
    "tree without_replacement": (grow.static(TREE, WOR), rejection),
    "tree independent": (grow.static(TREE, IID), kseq),
    "tree hybrid": (grow.static(TREE, grow.hybrid()), hybrid),
    "paths": (grow.paths(2, 3, IID), gbv),
    "paths merged": (grow.merged(grow.paths(2, 3, IID)), traversal),
}

DEFAULTS: dict[str, Case] = {
    "none/match": Case(none, match, nothing, "none"),
    "lookup/match": Case(lambda: lookup(3), match, nothing, "lookup"),
}
for _name, (_build, _verifier) in BUILDERS.items():
    DEFAULTS[f"model {_name}/{_verifier.__name__}"] = Case(
        independent_model(_build), _verifier, lambda: draft_model()[1], "model"
    )


@functools.cache
def foreign_model() -> tuple[Model, PyTree]:
    """Of six tokens, four of which are the target's."""
    own, params = testing.tiny_model(6, seed=4)
    return intersected(own, np.array([5, 0, -1, 2, 3])), params


DEFAULTS["model of another vocabulary/rejection"] = Case(
    lambda: model(foreign_model()[0], BUILDERS["chain without_replacement"][0]),
    rejection,
    lambda: foreign_model()[1],
    "model of another vocabulary",
)


def heads_case(
    drafter: Callable,
    heads: Heads,
    build: str,
    verifier: Callable[[], Verifier],
    kind: str = "",
) -> Case:
    return Case(
        lambda: drafter(target()[0], heads, BUILDERS[build][0]),
        verifier,
        lambda: uneven(heads),
        kind or drafter.__name__,
    )


DEFAULTS |= {
    "medusa tree without_replacement/rejection": heads_case(
        medusa, MEDUSA, "tree without_replacement", rejection
    ),
    "hydra chain without_replacement/block": heads_case(
        hydra, HYDRA, "chain without_replacement", block
    ),
    "eagle dynamic/match": heads_case(eagle, EAGLE, "dynamic", match),
    "eagle3 tree without_replacement/traversal": heads_case(
        eagle, EAGLE3, "tree without_replacement", traversal, "eagle3"
    ),
    "eagle3 of three tokens, chain without_replacement/rejection": heads_case(
        eagle, EAGLE3_OF_THREE, "chain without_replacement", rejection, "eagle3"
    ),
}

# ------------------------------------------------------------------------------ by iteration

DEFAULTS |= {
    "jacobi/match": Case(lambda: jacobi(3), match, nothing, "jacobi"),
    "speculative_jacobi coupled/match": Case(
        lambda: speculative_jacobi(target()[0], 3, grow.coupled()),
        match,
        nothing,
        "speculative_jacobi",
    ),
    "speculative_jacobi/block": Case(
        lambda: speculative_jacobi(target()[0], 3, WOR), block, nothing, "speculative_jacobi"
    ),
    "lookahead/match": Case(lambda: lookahead(target()[0], 3, 3, 2), match, nothing, "lookahead"),
}

# ------------------------------------------------------------------------------ out of this text


DEFAULTS |= {
    "ngram/match": Case(lambda: ngram(3, order=3, num_slots=8), match, nothing, "ngram"),
    "ngrammys/match": Case(
        lambda: ngrammys(target()[0], 3, 2, num_matches=4),
        match,
        lambda: bigrams(*target(), 3),
        "ngrammys",
    ),
    "recycling/match": Case(lambda: recycling(target()[0], TREE, 3), match, nothing, "recycling"),
}

# --------------------------------------------------------------------------- out of documents


def documents() -> Corpus:
    """Three of them, random."""
    rng = np.random.default_rng(5)
    return corpus([rng.integers(0, VOCAB_SIZE, n) for n in (30, 1, 20)], VOCAB_SIZE, capacity=64)


DEFAULTS |= {
    "reference/match": Case(lambda: reference(3), match, documents, "reference"),
    "retrieval/match": Case(
        lambda: retrieval(7, 3, longest=4, shortest=1, num_matches=6, vocab_size=VOCAB_SIZE),
        match,
        documents,
        "retrieval",
    ),
    "suffix/match": Case(
        lambda: suffix(7, 3, longest=4, factor=2, num_matches=4), match, documents, "suffix"
    ),
}

# ------------------------------------------------------------------------ with the target itself


def skipping(build: str, verifier: Callable[[], Verifier]) -> Case:
    return Case(
        lambda: layer_skip(target()[0], (0,), BUILDERS[build][0]), verifier, nothing, "layer_skip"
    )


def viewing(view: Callable[[Model], View], build: str, verifier: Callable[[], Verifier]) -> Case:
    return Case(
        lambda: sparse(target()[0], view, BUILDERS[build][0]),
        verifier,
        nothing,
        f"sparse {'streaming' if view is STREAMING else 'snapkv'}",
    )


STREAMING, SNAPKV = streaming(1, 3), snapkv(budget=3, window=2, refresh=3, pool=3)
DEFAULTS |= {
    "layer_skip chain coupled/match": skipping("chain coupled", match),
    "layer_skip chain without_replacement/block": skipping("chain without_replacement", block),
    "sparse streaming tree without_replacement/rejection": viewing(
        STREAMING, "tree without_replacement", rejection
    ),
    "sparse snapkv chain coupled/match": viewing(SNAPKV, "chain coupled", match),
    "quantized chain coupled/match": Case(
        lambda: quantized(target()[0], BUILDERS["chain coupled"][0]),
        match,
        lambda: int8(target()[1]),
        "quantized",
    ),
}

# ---------------------------------------------------------------------------- several in one


def drafted_by_a_cascade(choose: grow.Choose, verifier: Callable[[], Verifier]) -> Drafter:
    """The draft model, decoded with lookup or by itself in front of it."""
    small = draft_model()[0]
    inner = engine.decoder(small, model(small, grow.chain(2, choose)), verifier())
    return cascade(inner, 3)


def both() -> tuple[Drafter, Drafter]:
    return lookup(2), independent_model(BUILDERS["tree without_replacement"][0])()


def of_cascade() -> PyTree:
    return Params(draft_model()[1], draft_model()[1])


def of_second() -> PyTree:
    return (), draft_model()[1]


DEFAULTS |= {
    "cascade of coupled match/match": Case(
        lambda: drafted_by_a_cascade(grow.coupled(), match), match, of_cascade, "cascade"
    ),
    "cascade of rejection/block": Case(
        lambda: drafted_by_a_cascade(WOR, rejection), block, of_cascade, "cascade"
    ),
    "combine/rejection": Case(lambda: combine(both()), rejection, of_second, "combine"),
    "alternate/traversal": Case(lambda: alternate(1, both()), traversal, of_second, "combine"),
    "horizontal/block": Case(
        lambda: horizontal(
            independent_model(BUILDERS["chain without_replacement"][0])(), lookup(2)
        ),
        block,
        lambda: (draft_model()[1], ()),
        "horizontal",
    ),
}

# ----------------------------------------------------------------------------- what is allowed

VERIFIERS = (match, rejection, traversal, block, kseq, gbv, hybrid)
OF_LAW = {  # one drafter of each law
    "point": "lookup",
    "chain": "model chain without_replacement",
    "paths": "model paths",
    "siblings": "model tree independent",
    "hybrid": "model tree hybrid",
    "general": "model tree without_replacement",
    "coupled": "model chain coupled",
}


def drafter_of(name: str) -> str:
    """Of a row's name."""
    return name.rpartition("/")[0]


_PLACE = {drafter_of(name): i for i, name in enumerate(DEFAULTS)}


def allowed() -> dict[str, Case]:
    """Every drafter of the defaults with every verifier that is lossless for its law."""
    laws = {name: set(case.drafter().proposal.laws) for name, case in DEFAULTS.items()}
    return {
        f"{drafter_of(name)}/{verifier.__name__}": case._replace(verifier=verifier)
        for name, case in DEFAULTS.items()
        for verifier in VERIFIERS
        if laws[name] & set(verifier().laws)
    }


# The rows of one drafter are neighbours.
CASES = dict(sorted((DEFAULTS | allowed()).items(), key=lambda row: _PLACE[drafter_of(row[0])]))
# Trees that differ from others' in little, and what is one more of its kind.
LATER = {
    "model chain best/match",
    "model dynamic/match",
    "model tree best/match",
    "model best_first/traversal",
    "model paths merged/traversal",
    "speculative_jacobi/block",
    "eagle3 of three tokens, chain without_replacement/rejection",
    "layer_skip chain without_replacement/block",
    "cascade of coupled match/match",
    "alternate/traversal",
}
SLOW = {
    name
    for name in CASES
    if (name not in DEFAULTS or name in LATER) and drafter_of(name) not in OF_LAW.values()
}
