"""Every drafter by a short name, with the trees, rules and weights that suit what there is.

`DRAFTERS` and `WEIGHTS` are specs for `build`, which stand for what is only known when a model is
there: "@target" and "@draft", "@build" for the tree, and the fields of `Options`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from specjax import checkpoints, engine, trees
from specjax.build import build, mentions
from specjax.drafters import corpus, grow
from specjax.models.eagle import EagleHead
from specjax.models.hydra import HydraHeads
from specjax.models.medusa import MedusaHeads
from specjax.types import Decoder, Drafter, Model, Params, PyTree, Verifier

_PACKAGE = "specjax.drafters"
_TARGET, _BUILD = {"target": "@target"}, {"build": "@build"}
_CHAIN = {"num_tokens": "@num_draft_tokens"}
_RETRIEVED = {"num_tokens": 4, "num_nodes": 8}

DRAFTERS: dict[str, dict[str, Any]] = {
    "none": {"call": f"{_PACKAGE}.none.none"},
    "lookup": {"call": f"{_PACKAGE}.lookup.lookup", **_CHAIN},
    "ngram": {"call": f"{_PACKAGE}.ngram.ngram", **_CHAIN},
    "ngrammys": {
        "call": f"{_PACKAGE}.ngrammys.ngrammys",
        **_TARGET,
        **{"num_paths": 3, "num_tokens": 3},
    },
    "recycling": {
        "call": f"{_PACKAGE}.recycling.recycling",
        **_TARGET,
        "parents": {"call": f"{_PACKAGE}.recycling.tree", "num_nodes": 12, "depth": 4},
    },
    "jacobi": {"call": f"{_PACKAGE}.jacobi.jacobi", **_CHAIN},
    "lookahead": {
        "call": f"{_PACKAGE}.lookahead.lookahead",
        **_TARGET,
        **{"width": 4, "ngram": 3, "num_guesses": 3},
    },
    "reference": {"call": f"{_PACKAGE}.lookup.reference", **_CHAIN},
    "retrieval": {"call": f"{_PACKAGE}.retrieval.retrieval", **_RETRIEVED},
    "suffix": {"call": f"{_PACKAGE}.suffix.suffix", **_RETRIEVED},
    "layer_skip": {
        "call": f"{_PACKAGE}.layer_skip.layer_skip",
        **_TARGET,
        "layers": "@layers",
        **_BUILD,
    },
    "streaming": {
        "call": f"{_PACKAGE}.sparse.sparse",
        **_TARGET,
        "view": {"call": f"{_PACKAGE}.sparse.streaming", "num_sinks": 4, "window": 60},
        **_BUILD,
    },
    "quantized": {"call": f"{_PACKAGE}.quantized.quantized", **_TARGET, **_BUILD},
    "model": {"call": f"{_PACKAGE}.model.model", "draft_model": "@draft", **_BUILD},
    "medusa": {"call": f"{_PACKAGE}.medusa.medusa", **_TARGET, "heads": "@draft", **_BUILD},
    "hydra": {"call": f"{_PACKAGE}.hydra.hydra", **_TARGET, "heads": "@draft", **_BUILD},
    "eagle": {"call": f"{_PACKAGE}.eagle.eagle", **_TARGET, "head": "@draft", **_BUILD},
}

# What some of them read beside the target; by default the draft's weights.
_CORPUS = {"call": f"{_PACKAGE}.corpus.load", "directory": "@corpus", "tokenizer": "@fingerprint"}
WEIGHTS: dict[str, dict[str, Any]] = {
    "ngrammys": {
        "call": f"{_PACKAGE}.ngrammys.bigrams",
        **_TARGET,
        **{"params": "@target_params", "k": 3},
    },
    "quantized": {"call": f"{_PACKAGE}.quantized.int8", "params": "@target_params"},
    **dict.fromkeys(("reference", "retrieval", "suffix"), _CORPUS),
}

# By what a draft's directory holds.
_OF_DRAFT = {Model: "model", MedusaHeads: "medusa", HydraHeads: "hydra", EagleHead: "eagle"}


_NEEDED = {
    "corpus": "no corpus was given; need a directory that train/corpus.py made",
    "layers": "no layers were given; need those of the target's that stay, see train/calibrate.py",
}


class Options(NamedTuple):
    """What a drafter by name leaves open."""

    num_draft_tokens: int = 4  # of a chain
    tree: tuple[int, ...] = ()  # parents of a tree to draft instead, the root's being -1
    choose: str = ""  # a function of specjax/drafters/grow.py; "": what suits the rule
    corpus: str = ""  # a directory of train/corpus.py
    layers: tuple[int, ...] = ()  # that stay, for layer_skip
    # The trees that heads draft by default: the likelier a node's place, the more it has below.
    tree_of_heads: tuple[int, ...] = (-1, 0, 0, 0, 1, 1, 2, 4, 4, 7)
    dynamic_tree: Mapping[str, int] = {"num_nodes": 12, "width": 3, "depth": 4}  # EAGLE's


DEFAULTS = Options()


def named(
    drafter: str | Mapping[str, Any],
    drafts: Mapping[str, checkpoints.Drafting],
    drafters: Mapping[str, Any] | ConfigDict = DRAFTERS,
) -> tuple[str, Mapping[str, Any]]:
    """A drafter's name, which a spec does not have, and its spec.

    "auto" stands for the draft's own kind, or for `lookup`, which needs none.

    Raises:
        ValueError: a name that is not known.
    """
    if not isinstance(drafter, str):
        return "", drafter
    if drafter == "auto":
        draft = drafts.get("draft")
        drafter = "lookup" if draft is None else _OF_DRAFT[type(draft.model)]
    if drafter not in drafters:
        raise ValueError(f"drafter is {drafter!r}; need auto or one of {', '.join(drafters)}.")
    return drafter, drafters[drafter]


def decoder(
    models: checkpoints.Checkpoints,
    drafter: str | Mapping[str, Any] | Drafter,
    verifier: str | Verifier = "match",
    is_greedy: bool = False,
    options: Options = DEFAULTS,
    drafters: Mapping[str, Any] | ConfigDict = DRAFTERS,
    weights: Mapping[str, Any] | ConfigDict = WEIGHTS,
    drafter_params: PyTree = (),
) -> tuple[Decoder, Params]:
    """A decoder and its weights.

    Args:
        models: the target and its drafts.
        drafter: one of `drafters` or "auto", see `named`; a spec like theirs; or a drafter, whose
            weights are `drafter_params`.
        verifier: a file of specjax/verifiers, or a rule.
        is_greedy: all rows will be.
        options: what a spec leaves open.
        drafters, weights: specs by name.
        drafter_params: see `drafter`.

    Raises:
        ValueError: a name that is not known, a drafter that needs what is not there, or one and a
            rule that do not fit.
    """
    rule = verifier
    if not isinstance(rule, Verifier):
        rule = build({"call": f"specjax.verifiers.{rule}.{rule}"})
    if isinstance(drafter, Drafter):
        joined = engine.decoder(models.target, drafter, rule, eos_ids=models.eos_ids)
        return joined, Params(models.target_params, drafter_params)
    name, spec = named(drafter, models.drafts, drafters)
    draft = models.drafts.get("draft")
    held = None if draft is None else _OF_DRAFT[type(draft.model)]
    if name in _OF_DRAFT.values() and held != name:
        what = "no draft was given" if held is None else f"the draft holds one for {held!r}"
        raise ValueError(f"drafter is {name!r} but {what}; need a directory that holds its own.")
    for option, what in _NEEDED.items():
        if not getattr(options, option) and any(
            mentions(part, option) for part in (spec, weights.get(name))
        ):
            raise ValueError(f"drafter is {name!r} but {what}.")
    choose = options.choose
    if not choose and is_greedy:
        choose = "best"
    elif not choose:
        choose = "coupled" if rule.drafter_invariant else "without_replacement"
    built = build(
        spec,
        **checkpoints.given(models.target, models.drafts),
        build=_builder(options, draft, build({"call": f"{_PACKAGE}.grow.{choose}"})),
        num_draft_tokens=options.num_draft_tokens,
        layers=options.layers or None,
    )
    joined = engine.decoder(models.target, built, rule, eos_ids=models.eos_ids)
    if name not in weights:
        return joined, checkpoints.params(models.target_params, models.drafts, spec)
    own = build(
        weights[name],
        target=models.target,
        target_params=models.target_params,
        corpus=options.corpus or None,
        fingerprint=corpus.fingerprint(models.tokenizer.get_vocab()),
    )
    return joined, Params(models.target_params, own)


def _builder(
    options: Options, draft: checkpoints.Drafting | None, choose: grow.Choose
) -> grow.Builder:
    """The tree that the options give, or one that suits what is drafted with."""
    if options.tree:
        return grow.static(options.tree, choose)
    heads = None if draft is None else draft.model
    if isinstance(heads, (MedusaHeads, HydraHeads)):
        depth = trees.topology(options.tree_of_heads).depth_of
        parents = np.asarray(options.tree_of_heads)[depth <= heads.num_heads]
        return grow.static(tuple(parents), choose)
    if isinstance(heads, EagleHead) and not options.choose:
        return grow.dynamic(**options.dynamic_tree)
    return grow.chain(options.num_draft_tokens, choose)
