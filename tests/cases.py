"""Every drafter with every verifier it is legal for: all laws are tested on each row added here."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from specjax.drafters import grow
from specjax.drafters.lookup import lookup
from specjax.drafters.model import model
from specjax.drafters.none import none
from specjax.testing import tiny_model
from specjax.types import Drafter, Model, PyTree, Verifier
from specjax.verifiers.match import match
from specjax.verifiers.rejection import rejection

VOCAB_SIZE = 5
EOS_ID = 4


class Case(NamedTuple):
    """A drafter and a verifier under test."""

    drafter: Callable[[], Drafter]
    verifier: Callable[[], Verifier]
    params: Callable[[], PyTree]  # the drafter's
    kind: str  # drafters of one kind differ in their trees only: their states have the same shapes


@functools.cache
def target() -> tuple[Model, PyTree]:
    """The target of all cases."""
    return tiny_model(VOCAB_SIZE, seed=1)


@functools.cache
def draft_model() -> tuple[Model, PyTree]:
    """A different model: other size, other weights. A single layer would hide cache copies."""
    return tiny_model(VOCAB_SIZE, num_layers=2, hidden_size=8, head_dim=6, seed=2)


def nothing() -> PyTree:
    """The parameters of drafters without any."""
    return ()


def independent_model(build: grow.Builder) -> Callable[[], Drafter]:
    return lambda: model(draft_model()[0], build)


TREE = (-1, 0, 0, 1, 1, 2, 3)  # depth 3, uneven
BUILDERS = {
    "chain best": grow.chain(3, grow.best()),
    "chain without_replacement": grow.chain(3, grow.without_replacement()),
    "chain coupled": grow.chain(3, grow.coupled()),
    "tree best": grow.static(TREE, grow.best()),
    "tree without_replacement": grow.static(TREE, grow.without_replacement()),
    "tree independent": grow.static(TREE, grow.independent()),
}

CASES: dict[str, Case] = {
    "none/match": Case(none, match, nothing, "none"),
    "lookup/match": Case(lambda: lookup(3), match, nothing, "lookup"),
    "lookup/rejection": Case(lambda: lookup(3, ngram=2), rejection, nothing, "lookup"),
}
for _name, _build in BUILDERS.items():
    for _verifier in (match, rejection):
        CASES[f"model {_name}/{_verifier.__name__}"] = Case(
            independent_model(_build), _verifier, lambda: draft_model()[1], "model"
        )
