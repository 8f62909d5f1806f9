"""Drafting in another vocabulary: the map, the law, and a pair of directories end to end."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from directories import save_model

from specjax import checkpoints, engine, exactness, sampling
from specjax.data import tokenizers
from specjax.drafters import grow
from specjax.drafters.model import model
from specjax.laboratory import Pair, Parts, tabular_pair
from specjax.models.intersection import common_tokens, intersected
from specjax.models.tabular import random_table, tabular
from specjax.models.transformer import forward
from specjax.types import Params
from specjax.verifiers.match import match
from specjax.verifiers.rejection import rejection

# Of the target's four tokens the draft has three, among five of its own.
IDS, UNKNOWN = np.array([4, -1, 0, 2]), 1
TABLE = jnp.asarray(random_table(np.random.default_rng(3), 5), jnp.float32)


def test_laws_are_those_of_common_tokens_renormalised() -> None:
    """By enumeration of the draft's law after every pair of the target's tokens."""
    wrapped = intersected(tabular(5), IDS, UNKNOWN)
    assert wrapped.vocab_size == 4
    pairs = np.array([(i, j) for i in range(4) for j in range(4)], np.int32)
    logits = np.asarray(forward(wrapped, TABLE, pairs).logits)[:, 1]
    read = np.where(IDS < 0, UNKNOWN, IDS)
    for (i, j), row in zip(pairs, logits, strict=True):
        own = np.exp(np.asarray(TABLE)[read[i], read[j]].astype(np.float64))
        expected = np.where(IDS < 0, 0, own[IDS])
        found = np.exp(row.astype(np.float64))
        np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), rtol=1e-5)
        assert found[1] == 0


@pytest.mark.parametrize(
    ("choose", "rule"),
    [
        (grow.without_replacement(), rejection),
        pytest.param(grow.coupled(), match, marks=pytest.mark.slow),
    ],
)
def test_every_rule_applies(choose: grow.Choose, rule: object) -> None:
    def factory(pair: Pair) -> Parts:
        # More siblings than there are common tokens: the last is a point mass on what is left.
        build = grow.static((-1, 0, 0, 0, 0), choose)
        return Parts(model(intersected(tabular(5), IDS, UNKNOWN), build), TABLE, rule())

    check = exactness.enumeration(factory, tabular_pair(4))
    assert check.passed, check.verdict
    assert check.figures["expected_tokens"][0] > 1.5


def test_tokens_are_compared_by_their_text() -> None:
    texts = ["def f(x): return x", "for i in range(9): print(i)"]
    one, other = (tokenizers.train_bpe(texts[:n], 262 + 4 * n) for n in (1, 2))
    ids = common_tokens(one, other)
    assert len(ids) == one.get_vocab_size()
    for i, j in enumerate(ids):
        token = one.id_to_token(i)
        assert other.token_to_id(token) == (None if j < 0 else j)
    assert (ids >= 0).sum() >= 256, "all bytes"
    assert (ids < 0).any()
    np.testing.assert_array_equal(common_tokens(one, one), np.arange(len(ids)))


def renumbered(directory: str) -> None:
    """Gives every token another id, in the file alone."""
    path = Path(directory) / "tokenizer.json"
    raw = json.loads(path.read_text())
    vocabulary = raw["model"]["vocab"]
    # Special tokens keep theirs; the others go round by one.
    ids = sorted(vocabulary.values())
    special = {token["id"] for token in raw["added_tokens"]}
    free = [i for i in ids if i not in special]
    after = dict(zip(free, free[1:] + free[:1], strict=True))
    raw["model"]["vocab"] = {token: after.get(i, i) for token, i in vocabulary.items()}
    path.write_text(json.dumps(raw))


def test_a_draft_of_another_tokenizer_is_read_through_common_tokens(tmp_path: Path) -> None:
    target, draft = save_model(tmp_path / "target"), save_model(tmp_path / "draft", seed=1)
    same = checkpoints.load(target, draft)
    assert same.drafts["draft"].num_common is None
    renumbered(draft)
    models = checkpoints.load(target, draft)
    found = models.drafts["draft"]
    assert found.num_common == models.tokenizer.get_vocab_size()
    # The same weights under other names for the tokens: its likeliest token moves along.
    ids = common_tokens(models.tokenizer, tokenizers.load(draft))
    tokens = np.arange(3, 11)[None].astype(np.int32)
    own = forward(same.drafts["draft"].model, same.drafts["draft"].params, ids[tokens]).logits
    renamed = forward(found.model, found.params, tokens).logits
    np.testing.assert_allclose(renamed[..., : len(ids)], own[..., ids], rtol=1e-6)
    decoder = engine.decoder(models.target, model(found.model, grow.chain(3, grow.best())), match())
    state = engine.decode(
        *(decoder, Params(models.target_params, found.params)),
        *(jax.random.split(jax.random.key(0), 1), sampling.sampling(1), tokens),
        *(np.array([8]), np.array([30]), 32),
    )
    assert int(state.context.length[0]) == 30


@pytest.mark.parametrize(
    ("ids", "unknown", "message"),
    [
        (np.full(9, -1), 0, "5 tokens and the target's 9 have 0 in common; need at least 1%"),
        (np.arange(7), 0, "Ids up to 6 .* draft model of 5 tokens"),
        (np.arange(4), 5, "unknown id of 5 .* draft model of 5 tokens"),
    ],
)
def test_impossible_maps_are_refused(ids: np.ndarray, unknown: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        intersected(tabular(5), ids, unknown)
