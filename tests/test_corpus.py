"""Corpora: sorted suffixes and their matches, room for new documents, directories, the script."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from directories import ROOT, save_model
from ml_collections import ConfigDict
from refusals import refused
from texts import DOCUMENTS, context_of, following, random_texts

from configs.train import corpus as corpus_config
from specjax.data import tokenizers
from specjax.drafters import corpus as corpora
from specjax.drafters.corpus import COMPARED, Corpus, continuations, corpus, ranges
from specjax.types import Context
from train import corpus as script

TOKENS = np.array([0, 1, 2])

# ---------------------------------------------------------------------------------- sorted suffixes


@pytest.mark.parametrize("vocab_size", [1, 2, 50])
@pytest.mark.parametrize("size", [1, 2, 7, 300])
def test_suffixes_are_sorted(vocab_size: int, size: int) -> None:
    tokens = np.random.default_rng(size).integers(-1, vocab_size, size).astype(np.int32)
    tokens[size // 2 :] = tokens[: size - size // 2]  # long repetitions
    if vocab_size == 1 and size > COMPARED:
        tokens[:] = 0
    expected = sorted(range(size), key=lambda i: (tokens[i : i + COMPARED].tolist(), i))
    assert corpora.suffix_array(tokens).tolist() == expected


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


@pytest.mark.parametrize("size", [2, 3, 15, 16, 17, 64, 65])
def test_a_corpus_of_any_size_is_searched_to_its_ends(size: int) -> None:
    tokens = np.random.default_rng(size).integers(-1, 3, size).astype(np.int32)
    tokens[-1] = -1
    made = Corpus(jnp.asarray(tokens), jnp.asarray(corpora.suffix_array(tokens)), 3)
    context = context_of([[0], [1], [2], [2, 0], [1, 1]])
    first, count = map(
        np.asarray, jax.jit(lambda *x: ranges(*x, [1]))(made, context.tokens, context.length)
    )
    for b, token in enumerate([0, 1, 2, 0, 1]):
        found = np.asarray(made.order)[first[b, 0] : first[b, 0] + count[b, 0]]
        expected = np.flatnonzero((tokens[:-1] == token) & (tokens[1:] >= 0))
        assert sorted(found.tolist()) == expected.tolist()


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


# ---------------------------------------------------------------------------------------- documents


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


REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
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
}


@pytest.mark.parametrize("name", REFUSALS)
def test_impossible_things_are_refused(name: str) -> None:
    refused(*REFUSALS[name])


# -------------------------------------------------------------------------------------- directories


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


# ------------------------------------------------------------------------------------------- script


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
