"""Drafts out of texts: sorted suffixes, copies, and tries of what followed."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from directories import ROOT, save_model
from ml_collections import ConfigDict

from configs.train import corpus as corpus_config
from specjax import engine, exactness
from specjax.data import tokenizers
from specjax.drafters import corpus as corpora
from specjax.drafters.corpus import COMPARED, LONGEST, Corpus, continuations, corpus, ranges
from specjax.drafters.lookup import lookup, reference
from specjax.drafters.retrieval import retrieval
from specjax.drafters.suffix import suffix
from specjax.laboratory import Pair, Parts, tabular_pair
from specjax.sampling import sampling
from specjax.types import Cache, Context, Draft, Drafter, Params, Verifier
from specjax.verifiers.match import match
from specjax.verifiers.rejection import rejection
from train import corpus as script

assert ROOT.exists()  # `directories` has made the scripts importable

SLOTS = 16
Text = Sequence[int]
Strings = dict[tuple[int, ...], float]


def context_of(texts: Sequence[Text], slots: int = SLOTS) -> Context:
    """Histories with garbage behind them."""
    tokens = np.random.default_rng(7).integers(0, 3, (len(texts), slots)).astype(np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    length = jnp.asarray([len(text) for text in texts], jnp.int32)
    cache = Cache((), (), length - 1)
    return Context(jnp.asarray(tokens), length, length, cache, sampling(len(texts)))


def proposing(drafter: Drafter) -> Callable[[Any, Context], Draft]:
    def propose(weights: Any, context: Context) -> Draft:
        return drafter.propose(Params((), weights), None, (), context)[0]

    return jax.jit(propose)


def strings_of(draft: Draft, row: int) -> list[tuple[int, ...]]:
    """What each drafted node spells, the root left out. Fillers hang below the root."""
    tokens, parents = np.asarray(draft.tokens[row]), np.asarray(draft.parents[row])
    found: list[tuple[int, ...]] = [()]
    for i in range(1, len(tokens)):
        assert 0 <= parents[i] < i
        found.append((*found[parents[i]], int(tokens[i])))
    return found[1 : 1 + int(draft.num_drafted[row])]


def copied(draft: Draft, row: int) -> list[int]:
    """The tokens of a chain, without its root and its fillers."""
    return np.asarray(draft.tokens[row, 1 : 1 + int(draft.num_drafted[row])]).tolist()


def random_texts(seed: int, count: int, longest: int, vocab_size: int = 3) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, count)
    return [rng.integers(0, vocab_size, n).tolist() for n in lengths]


# ------------------------------------------------------------------------------- sorted suffixes


@pytest.mark.parametrize("vocab_size", [1, 2, 50])
@pytest.mark.parametrize("size", [1, 2, 7, 300])
def test_suffixes_are_sorted(vocab_size: int, size: int) -> None:
    tokens = np.random.default_rng(size).integers(-1, vocab_size, size).astype(np.int32)
    tokens[size // 2 :] = tokens[: size - size // 2]  # long repetitions
    if vocab_size == 1 and size > COMPARED:
        tokens[:] = 0
    expected = sorted(range(size), key=lambda i: (tokens[i : i + COMPARED].tolist(), i))
    assert corpora.suffix_array(tokens).tolist() == expected


DOCUMENTS = [*random_texts(1, 12, 12), [0, 0, 0, 0, 0], [2]]


def following(documents: Sequence[Text], end: Text) -> list[tuple[int, ...]]:
    """Whatever follows a text in documents, to their ends."""
    m = len(end)
    return [
        tuple(document[i:])
        for document in documents
        for i in range(m, len(document))
        if list(document[i - m : i]) == list(end)
    ]


def test_matches_are_found() -> None:
    """All of them, with all that follows, and none that nothing follows."""
    made = corpus([np.array(x) for x in DOCUMENTS], 3)
    texts = random_texts(2, 60, 9)
    sizes, k, d = (5, 3, 2, 1), 40, 4
    context = context_of(texts)

    @jax.jit
    def find(made: Corpus, context: Context) -> tuple:
        first, count = ranges(made, context.tokens, context.length, sizes)
        size = jnp.broadcast_to(jnp.asarray(sizes), count.shape)
        return count, *continuations(made, first, count, size, k, d)

    count, tokens, length = map(np.asarray, find(made, context))
    assert (count > 0).any(0).all()
    for b, text in enumerate(texts):
        for i, m in enumerate(sizes):
            expected = following(DOCUMENTS, text[-m:]) if len(text) >= m else []
            assert count[b, i] == len(expected) <= k
            found = Counter(
                tuple(t[:n].tolist()) for t, n in zip(tokens[b, i], length[b, i], strict=True) if n
            )
            assert found == Counter(x[:d] for x in expected)


def test_many_matches_are_sampled_in_proportion() -> None:
    shares = {1: 60, 2: 25, 0: 15}
    documents = [np.array([3, token]) for token, n in shares.items() for _ in range(n)]
    made = corpus(documents, 4)
    context = context_of([[3]])
    sizes = (1, 3, 20, 99, 100)

    @jax.jit
    def sample(made: Corpus, context: Context) -> tuple:
        first, count = ranges(made, context.tokens, context.length, [1])
        samples = [continuations(made, first, count, jnp.ones_like(count), k, 2) for k in sizes]
        return count, samples

    count, samples = sample(made, context)
    assert count == 100
    for k, (tokens, length) in zip(sizes, samples, strict=True):
        assert (np.asarray(length) == 1).all()
        found = Counter(np.asarray(tokens)[0, 0, :, 0].tolist())
        assert found.total() == k
        for token, n in shares.items():
            assert abs(found[token] - n * k / 100) <= 1
    assert samples[0][0][0, 0, 0, 0] == 1, "of one, what the majority has"


# ------------------------------------------------------------------------------------- documents


def listed(made: Corpus) -> list[list[int]]:
    tokens = np.asarray(made.tokens)
    pieces = np.split(tokens, np.flatnonzero(tokens < 0))
    return [piece[piece >= 0].tolist() for piece in pieces if (piece >= 0).any()]


def test_the_oldest_documents_make_room() -> None:
    made = corpus([np.array([1, 1]), np.array([], np.int32), np.array([2, 2, 2])], 5, capacity=10)
    assert listed(made) == [[1, 1], [2, 2, 2]]
    made = corpora.updated(made, [np.array([3, 3])])
    assert listed(made) == [[1, 1], [2, 2, 2], [3, 3]]
    made = corpora.updated(made, [np.array([4])])
    assert listed(made) == [[2, 2, 2], [3, 3], [4]]
    made = corpora.updated(made, [])
    assert listed(made) == [[2, 2, 2], [3, 3], [4]]
    made = corpora.updated(made, [np.arange(30) % 5])
    assert listed(made) == [(np.arange(30) % 5)[-9:].tolist()]
    assert made.tokens.shape == made.order.shape == (10,)
    assert listed(corpora.empty(5, 8)) == []
    assert listed(corpora.updated(corpora.empty(5, 8), [np.array([3])])) == [[3]]


def test_updates_compile_nothing() -> None:
    made = corpora.empty(3, 32, "made with this")
    draft = proposing(suffix(5, 2, longest=3))
    context = context_of([[0, 1]])
    assert draft(made, context).num_drafted[0] == 0
    made = corpora.updated(made, [np.array([2, 0, 1, 2, 2])])
    assert strings_of(draft(made, context), 0) == [(2,), (2, 2)]
    made = corpora.updated(made, [np.array([1, 0])] * 9)
    assert strings_of(draft(made, context), 0)[0] == (0,)
    assert draft._cache_size() == 1
    assert made.tokenizer == "made with this"


# ------------------------------------------------------------------------------- lookup, reference


def test_lookup_prefers_agreement_then_the_latest() -> None:
    texts = [
        [1, 2, 0, 0, 2, 1, 1, 2],  # 1 2 before 2 alone
        [2, 0, 2, 1, 2],  # the latest 2
        [0, 1, 2, 0, 2, 1, 1, 2],
        [0, 1],  # nothing
    ]
    draft = proposing(lookup(2, ngram=3))(None, context_of(texts))
    assert [copied(draft, b) for b in range(4)] == [[0, 0], [1, 2], [0, 2], []]
    draft = proposing(lookup(2, ngram=3, min_ngram=2))(None, context_of(texts))
    assert [copied(draft, b) for b in range(4)] == [[0, 0], [], [0, 2], []]


def test_reference_copies_from_where_the_match_is_longer() -> None:
    documents = [np.array([4, 1, 2, 3, 3, 3, 3]), np.array([1, 0]), np.array([2, 4, 4, 0])]
    made = corpus(documents, 5)
    texts = [
        [4, 1, 2],  # three tokens, in documents only
        [1, 2, 0, 4, 1, 2],  # two in the text, three in a document
        [2, 3, 0, 1, 2, 0, 1, 2],  # three in the text
        [1, 3, 1],  # one in either: the text
        [3, 0],  # nothing follows it
        [0, 2, 4],  # to the document's end
    ]
    draft = proposing(reference(4))(made, context_of(texts))
    expected = [[3, 3, 3, 3], [3, 3, 3, 3], [0, 1, 2, 0], [3, 1, 3, 1], [], [4, 0]]
    assert [copied(draft, b) for b in range(6)] == expected
    draft = proposing(reference(4, ngram=3, min_ngram=2))(made, context_of(texts))
    expected[3] = []
    assert [copied(draft, b) for b in range(6)] == expected


# -------------------------------------------------------------------------------------- retrieval


def test_retrieval_keeps_what_follows_most() -> None:
    documents = [
        *([0, 1, 2, 3],) * 3,
        *([0, 1, 2, 4],) * 2,
        *([0, 1, 4, 4],) * 2,
        [2, 0, 1, 3],
        [1, 0],
    ]
    made = corpus([np.array(x) for x in documents], 5)
    drafter = retrieval(5, 2, longest=3, shortest=1, num_matches=8)
    texts = [[4, 0, 1], [2, 0, 1], [1], [3], [0, 2]]
    draft = proposing(drafter)(made, context_of(texts))
    # After 0 1: 2 five times, 4 twice, 3 once; of two tokens 2 3 and then 2 4, 4 4. Depth first
    # among equals is what comes first.
    assert strings_of(draft, 0) == [(2,), (2, 3), (4,), (2, 4)]
    assert strings_of(draft, 1) == [(3,)]  # a longer match counts alone
    assert sorted(strings_of(draft, 2), key=len)[0] == (2,)
    assert strings_of(draft, 3) == []  # ends its documents
    assert np.asarray(draft.tokens[3]).tolist() == [3] * 5
    assert strings_of(draft, 4)[0] in ((0,), (3,))
    assert drafter.proposal == ("point", 5, 2)
    cautious = proposing(retrieval(5, 2, longest=3, shortest=2, num_matches=8))
    assert np.asarray(cautious(made, context_of(texts)).num_drafted).tolist() == [4, 1, 0, 0, 0]


# ----------------------------------------------------------------------------------------- suffix


def expected_tries(
    documents: Sequence[Text], text: Text, longest: int, d: int
) -> dict[tuple[str, int], Strings]:
    """D of every string, of both sources and every length of a match."""
    tries = {}
    for p in range(1, min(longest, len(text)) + 1):
        for source, where in (("own", [text]), ("past", documents)):
            count = Counter(
                found[:depth]
                for found in following(where, text[-p:])
                for depth in range(1, min(d, len(found)) + 1)
            )
            value: Strings = {(): 1.0}
            for string in sorted(count, key=len):
                above = string[:-1]
                siblings = sum(n for x, n in count.items() if x[:-1] == above)
                value[string] = value[above] * count[string] / siblings
            del value[()]
            tries[source, p] = value
    return tries


def test_suffix_drafts_the_best_trie() -> None:
    longest, d, n, factor = 4, 3, 7, 2.5
    drafter = suffix(n, d, longest=longest, factor=factor, num_matches=30)
    documents = DOCUMENTS[:6]
    made = corpus([np.array(x) for x in documents], 3)
    texts = random_texts(4, 80, SLOTS - 2)
    draft = proposing(drafter)(made, context_of(texts))
    winners: Counter[tuple[str, int]] = Counter()
    for b, text in enumerate(texts):
        tries = expected_tries(documents, text, longest, d)
        budget = {p: min(int(factor * p), n - 1) for p in range(1, longest + 1)}
        best = {
            (source, p): sorted(value.values(), reverse=True)[: budget[p]]
            for (source, p), value in tries.items()
        }
        most = max(map(sum, best.values()))
        drafted = strings_of(draft, b)
        assert len(set(drafted)) == len(drafted)
        if most == 0:
            assert drafted == []
            continue
        # Rounding may decide between sums that are equal.
        fitting = [
            key
            for key in best
            if sum(best[key]) > most - 1e-5
            and all(string in tries[key] for string in drafted)
            and np.allclose([tries[key][string] for string in drafted], best[key][: len(drafted)])
            and len(drafted) == len(best[key])
        ]
        assert fitting, (text, drafted)
        winners[fitting[0]] += 1
    assert {source for source, _ in winners} == {"own", "past"}
    assert {p for _, p in winners} >= {1, 2, 3, 4}


def test_suffix_prefers_the_longer_match_then_its_own_text() -> None:
    drafter = suffix(6, 3, longest=2, factor=3, num_matches=4)
    made = corpus([np.array([0, 1, 2, 2, 2]), np.array([1, 4, 4, 4])], 5)
    texts = [
        [0, 1, 3, 3, 3, 0, 1],  # three certain tokens in either source
        [1, 3, 3, 3, 0, 1],  # two tokens agree in documents, one in the text
    ]
    draft = proposing(drafter)(made, context_of(texts))
    assert strings_of(draft, 0) == [(3,), (3, 3), (3, 3, 3)]
    assert strings_of(draft, 1) == [(2,), (2, 2), (2, 2, 2)]


def test_a_row_has_more_matches_than_are_looked_at() -> None:
    """Those that agree on most stay, then the latest."""
    draft = proposing(suffix(4, 2, longest=2, factor=2, num_matches=2))
    text = [0, 1, 2, 1, 3, 1, 4, 1, 0, 0, 1]
    found = draft(corpora.empty(5, 4), context_of([text]))
    # Two tokens agree at 2, one at 3, 4 and 0; the match of one token sees 2 and 0, half each.
    assert strings_of(found, 0) == [(2,), (2, 1)]


# ------------------------------------------------------------------------------------------ exact


EXACT: dict[str, Callable[[], Drafter]] = {
    "reference": lambda: reference(2, ngram=2),
    "retrieval": lambda: retrieval(5, 2, longest=2, shortest=1, num_matches=4),
    "suffix": lambda: suffix(5, 2, longest=2, factor=2, num_matches=4),
}


@pytest.mark.parametrize("verifier", [match, rejection])
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.slow
def test_drafts_are_exact(name: str, verifier: Callable[[], Verifier]) -> None:
    def factory(pair: Pair) -> Parts:
        documents = [np.array(x) for x in random_texts(5, 3, 9)]
        return Parts(EXACT[name](), corpus(documents, pair.target.vocab_size), verifier())

    check = exactness.enumeration(factory, tabular_pair(3))
    assert check.passed, check.verdict
    assert check.figures["expected_tokens"][0] > 1.01
    jax.clear_caches()


# --------------------------------------------------------------------------------------- refusals

TOKENS = np.array([0, 1, 2])
REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "no n-gram": (lambda: lookup(2, ngram=3, min_ngram=0), "needs 0 tokens to agree; need 1 to 3"),
    "n-grams crossed": (lambda: lookup(2, 3, 4), "ngram=3.* needs 4 tokens to agree; need 1 to 3"),
    "no tokens": (lambda: reference(0), "num_tokens=0.* both must be at least 1"),
    "too long": (
        lambda: reference(2, ngram=LONGEST + 1),
        f"compares {LONGEST + 1} tokens but a corpus is sorted for matches of {LONGEST};",
    ),
    "no match": (lambda: retrieval(9, 2, num_matches=0), "0 matches.* at least 1"),
    "shortest 0": (lambda: retrieval(9, 2, shortest=0), "shortest 0.* at least 1"),
    "no continuation": (lambda: retrieval(9, 0), "num_tokens=0.* at least 1"),
    "crossed": (lambda: retrieval(9, 2, longest=2, shortest=3), "for 3 to 2 tokens"),
    "long": (lambda: suffix(9, 2, longest=64), f"64 tokens but .* sorted .* of {LONGEST}"),
    "a chain": (lambda: retrieval(3, 2), "has 3 nodes but a chain of 2 tokens has 3"),
    "too many nodes": (
        lambda: retrieval(10, 2, num_matches=4),
        "10 nodes but 4 matches of 2 tokens give 9 at most",
    ),
    "a suffix's chain": (lambda: suffix(5, 4), "has 5 nodes but a chain of 4 tokens has 5"),
    "no factor": (lambda: suffix(9, 2, factor=0.0), "drafts 0.0 nodes per token"),
    "a small factor": (
        lambda: suffix(9, 2, longest=4, factor=1.5),
        "9 nodes but a match of 4 tokens with factor 1.5 gives 7 at most",
    ),
    "an empty corpus": (lambda: corpus([], 3), "0 documents has 0 tokens; it needs at least 1"),
    "empty documents": (lambda: corpus([TOKENS[:0]] * 2, 3), "2 documents has 0 tokens"),
    "other tokens": (lambda: corpus([TOKENS], 2), "tokens 0 to 2; a vocabulary of 2 needs 0 to 1"),
    "negative": (lambda: corpus([TOKENS - 1], 3), "tokens -1 to 1; .* needs 0 to 2"),
    "floats": (lambda: corpus([TOKENS * 1.0], 3), "float64 of shape .*; need integers"),
    "a batch": (lambda: corpus([TOKENS[None]], 3), r"of shape \(1, 3\); need integers"),
    "no capacity": (lambda: corpora.empty(3, 1), "capacity 1 has no room.* at least 2"),
    "an update": (
        lambda: corpora.updated(corpora.empty(2, 8), [TOKENS]),
        "tokens 0 to 2; a vocabulary of 2",
    ),
    "a vocabulary, at once": (
        lambda: engine.decoder(tabular_pair(3).target, retrieval(9, 2, vocab_size=4), match()),
        "vocabulary has 4 tokens and the target's 3",
    ),
    "a vocabulary, in a step": (
        lambda: prefilled(suffix(5, 2, longest=2), corpora.empty(4, 8)),
        "vocabulary of 4 tokens and the target one of 3",
    ),
    "no corpus": (
        lambda: prefilled(retrieval(5, 2), ()),
        "retrieval has a tuple .* needs a Corpus",
    ),
}


def prefilled(drafter: Drafter, weights: Any) -> None:
    pair = tabular_pair(3)
    decoder = engine.decoder(pair.target, drafter, match())
    engine.prefill(
        *(decoder, Params(pair.target_params, weights), jax.random.split(jax.random.key(0), 1)),
        *(sampling(1), np.ones((1, 2), np.int32), np.array([2]), np.array([8]), 8),
    )


@pytest.mark.parametrize("name", REFUSALS)
def test_impossible_things_are_refused(name: str) -> None:
    build, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message) as refusal:
        build()
    assert "\n" not in str(refusal.value)


# ------------------------------------------------------------------------------------ directories


def test_a_corpus_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = corpus([np.array(x) for x in DOCUMENTS], 3, capacity=200, tokenizer="this")
    corpora.save(made, tmp_path / "new" / "one", {"text": "about"})
    for tokenizer in ("", "this"):
        read = corpora.load(tmp_path / "new" / "one", tokenizer)
        assert (read.vocab_size, read.tokenizer) == (3, "this")
        np.testing.assert_array_equal(read.tokens, made.tokens)
        np.testing.assert_array_equal(read.order, made.order)


def damaged(directory: Path, how: str) -> None:
    facts, tensors = directory / "corpus.json", directory / "corpus.safetensors"
    arrays = {name: x.copy() for name, x in safetensors.numpy.load_file(tensors).items()}
    if how == "no facts":
        facts.unlink()
    elif how == "no tensors":
        tensors.unlink()
    elif how == "half a file":
        tensors.write_bytes(tensors.read_bytes()[:50])
    elif how in ("capacity", "compared", "vocab_size"):
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {how: 2}))
    elif how == "no number":
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"capacity": "8"}))
    elif how == "one array":
        del arrays["order"]
        safetensors.numpy.save_file(arrays, tensors)
    elif how == "an order":
        arrays["order"][0] = arrays["order"][1]
        safetensors.numpy.save_file(arrays, tensors)
    elif how == "nothing in it":
        corpora.save(corpora.empty(3, 8), directory)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("another tokenizer", "made with tokenizer 'this' but the target's is 'that'"),
        ("no facts", "has no corpus.json; need one"),
        ("no tensors", "corpus.safetensors cannot be read"),
        ("half a file", "corpus.safetensors cannot be read"),
        ("capacity", r"has int32 \[8\] for tokens, not int32 \[2\]"),
        ("compared", "sorted suffixes by 2 tokens, not by 64"),
        ("vocab_size", "has tokens outside its vocabulary of 2"),
        ("no number", "gives capacity as '8', which is no int"),
        ("one array", r"has nothing for order, not int32 \[8\]"),
        ("an order", "has an order that is none of its suffixes"),
        ("nothing in it", "has 0 tokens in 8 places"),
    ],
)
def test_a_directory_is_refused(tmp_path: Path, how: str, message: str) -> None:
    corpora.save(corpus([TOKENS], 3, capacity=8, tokenizer="this"), tmp_path)
    damaged(tmp_path, how)
    with pytest.raises(ValueError, match=message) as refusal:
        corpora.load(tmp_path, "that" if how == "another tokenizer" else "")
    assert "\n" not in str(refusal.value)


# ----------------------------------------------------------------------------------------- script


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "target")


def config(target: str, output: Path, **options: Any) -> ConfigDict:
    c = corpus_config.get_config()
    c.update(target=target, output=str(output), sources=(str(ROOT / "train"),), **options)
    return c


def test_the_script_runs_by_itself(target: str, tmp_path: Path) -> None:
    """A process that knows the root from its script alone."""
    (tmp_path / "empty.txt").touch()
    output = tmp_path / "corpus"
    command = [sys.executable, str(ROOT / "train" / "corpus.py"), f"--config.target={target}"]
    command += [f"--config.sources=('{tmp_path / 'empty.txt'}',)", f"--config.output={output}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not output.exists()


def test_the_script_makes_a_corpus(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(config(target, tmp_path / "corpus", max_tokens=500, room=100))
    tokenizer = tokenizers.load(target)
    made = corpora.load(tmp_path / "corpus", corpora.fingerprint(tokenizer.get_vocab()))
    texts = [tokenizer.decode(document) for document in listed(made)]
    assert texts[0] in "".join(path.read_text() for path in (ROOT / "train").glob("*.py"))
    assert sum(map(len, listed(made))) == 500
    assert made.tokens.shape == (600 + len(texts),)
    assert made.vocab_size == 300
    facts = json.loads((tmp_path / "corpus" / "corpus.json").read_text())
    assert (facts["num_tokens"], facts["text"]["num_files"]) == (500, len(texts))
    assert "500 tokens" in capsys.readouterr().out
    other = save_model(tmp_path / "other", vocab_size=310)
    with pytest.raises(ValueError, match=r"made with tokenizer .* but the target's is"):
        corpora.load(tmp_path / "corpus", corpora.fingerprint(tokenizers.load(other).get_vocab()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"room": -1}, "room -1"),
        ({"target": "nowhere"}, "nowhere is not a directory"),
        ({"sources": ("nowhere",)}, "nowhere does not exist"),
        ({"output": __file__}, "is a file; need the name of a directory"),
    ],
)
def test_the_script_refuses(
    target: str, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    c = config(target, tmp_path)
    c.update(options)
    with pytest.raises(ValueError, match=message):
        script.main(c)
