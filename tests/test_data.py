"""Documents, tokenizers, generated rows, caches, and batches that resume exactly."""

import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as hf_tokenizers

from specjax import engine
from specjax.data import batches, generated, rows, shards, sources, teacher_cache, tokenizers
from specjax.data.atomic import replacing
from specjax.data.fingerprint import fingerprint
from specjax.data.mixture import OnPolicy, Schedule, constant, mixture, shares
from specjax.data.rows import Rows
from specjax.data.sources import Document
from specjax.drafters.lookup import lookup
from specjax.drafters.none import none
from specjax.models.transformer import forward
from specjax.objectives import Batch
from specjax.sampling import sampling, shared_gumbel, streams, warp
from specjax.testing import tiny_model
from specjax.types import Model, Params, Sampling
from specjax.verifiers.match import match

ROOT = Path(__file__).resolve().parent.parent

TEXT = (
    "def f(x):\n        return x\n\n"
    "class A:\n        def g(self):\n                pass\n        done\n"
) * 40
ODD = [
    "",
    " ",
    "\ttabs\t\tand  spaces   \n",
    "CRLF\r\n    line\r\n\r\n\rend\r",
    "emoji 🙂🙃 family 👩‍👩‍👧, flag 🇨🇭",
    "four bytes 𐍈𐌰𠜎𒀀, e\u0301 ≠ é, ﷽, \u200b\ufeff",
    "replacement \ufffd\ufffd itself\x00\x01\x7f",
    "def π(x):\n\n\t  return x**2  # 12345.678e-9 ٣٤\n",
]


@pytest.fixture(scope="module")
def tokenizer() -> hf_tokenizers.Tokenizer:
    return tokenizers.train_bpe([TEXT], 320)


@pytest.fixture(scope="module")
def library() -> list[Document]:
    return sources.standard_library()


@pytest.mark.parametrize("text", ODD)
def test_bpe_gives_back_any_text(tokenizer: hf_tokenizers.Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert 0 not in ids
    assert tokenizer.decode(ids) == text


def test_bpe_vocabulary(tokenizer: hf_tokenizers.Tokenizer) -> None:
    assert tokenizer.token_to_id(tokenizers.END_OF_TEXT) == 0
    assert 257 < tokenizer.get_vocab_size() <= 320
    # Newline and indentation are one token, and no space is put before the text.
    assert len(tokenizer.encode("\n        ").ids) == 1
    assert tokenizer.decode(tokenizer.encode("def").ids) == "def"


def test_save_and_load(tokenizer: hf_tokenizers.Tokenizer, tmp_path: Path) -> None:
    tokenizers.save(tokenizer, tmp_path / "new")
    loaded = tokenizers.load(tmp_path / "new")
    assert loaded.to_str() == tokenizer.to_str()
    assert loaded.encode(ODD[4]).ids == tokenizer.encode(ODD[4]).ids


@pytest.mark.parametrize("step", [1, 2, 3, 1000])
def test_stream_equals_whole(tokenizer: hf_tokenizers.Tokenizer, step: int) -> None:
    for text in [*ODD, "".join(ODD), "🙂" * 50]:
        ids = tokenizer.encode(text).ids
        push = tokenizers.stream_decoder(tokenizer)
        shown = ""
        for start in range(0, len(ids), step):
            shown += push(ids[start : start + step])
            assert text.startswith(shown)
        assert shown + push([], final=True) == text


def test_stream_holds_half_a_character(tokenizer: hf_tokenizers.Tokenizer) -> None:
    ids = tokenizer.encode("a🙂").ids
    assert len(ids) == 5
    push = tokenizers.stream_decoder(tokenizer)
    assert [push([i]) for i in ids] == ["a", "", "", "", "🙂"]
    push = tokenizers.stream_decoder(tokenizer)
    assert push(ids[:3]) == "a"
    assert push([0]) == ""
    assert push((), final=True) == "\ufffd"
    assert push((), final=True) == ""


def test_stream_of_broken_bytes_equals_whole(tokenizer: hf_tokenizers.Tokenizer) -> None:
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(320) for _ in range(30)]
        push = tokenizers.stream_decoder(tokenizer)
        shown = "".join(push([i]) for i in ids) + push([], final=True)
        assert shown == tokenizer.decode(ids)


def test_stream_redecodes_a_bounded_window(tokenizer: hf_tokenizers.Tokenizer) -> None:
    lengths = []

    class Spy:
        def decode(self, ids: list[int]) -> str:
            lengths.append(len(ids))
            return tokenizer.decode(ids)

    push = tokenizers.stream_decoder(Spy())  # type: ignore[arg-type]
    for token in tokenizer.encode("🙂 " * 200 + TEXT).ids:
        push([token])
    assert max(lengths) <= 8


def test_held_out_modules(library: list[Document]) -> None:
    training, held_out = sources.split(library)
    assert [document.name for document in held_out] == sorted(sources.HELD_OUT)
    assert not {document.name for document in training} & set(sources.HELD_OUT)
    assert len(training) + len(held_out) == len(library)
    assert 500_000 < sources.describe(held_out)["num_bytes"] < 1_000_000


def test_standard_library(library: list[Document]) -> None:
    names = [document.name for document in library]
    assert names == sorted(set(names))
    assert {"os.py", "json/decoder.py", "idlelib/pyshell.py"} <= set(names)
    left_out = {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"}
    assert not any(left_out & set(name.split("/")) for name in names)
    assert not any(name.startswith("_sysconfigdata") for name in names)


def test_many_documents_are_held_out_by_their_text() -> None:
    documents = [Document(f"{i}.txt", f"text {i // 2}\n") for i in range(1000)]
    training, held_out = sources.split(documents, 0.1)
    assert 100 <= len(held_out) <= 101
    assert sorted(training + held_out) == sorted(documents)
    assert not {d.text for d in training} & {d.text for d in held_out}  # copies stay together
    assert held_out != sources.split(documents, 0.1, seed=1)[1]
    assert held_out == sources.split(documents, 0.1)[1]
    # Another document moves one at most.
    more = sources.split([*documents, Document("x", "new\n")], 0.1)[1]
    assert len(set(more) ^ set(held_out)) <= 3


def test_few_documents_lose_their_ends() -> None:
    lines = "".join(f"line {i}\n" for i in range(1000))
    documents = [Document("a", lines), Document("b", "x" * 1000), Document("c", "")]
    training, held_out = sources.split(documents)
    assert [d.name for d in training] == ["a", "b"]
    assert [d.name for d in held_out] == ["a (end)", "b (end)"]
    for document, first, last in zip(documents[:2], training, held_out, strict=True):
        assert first.text + last.text == document.text
        assert 0.02 <= len(last.text) / len(document.text) < 0.041
    assert held_out[0].text.startswith("line ")
    assert held_out[1].text == "x" * 20
    # A name of the list decides, as ever.
    assert sources.split([*documents, Document("csv.py", "z")])[1] == [Document("csv.py", "z")]
    with pytest.raises(ValueError, match="1 documents leave 0 to train on and 1 for validation"):
        sources.split([Document("a", "x")])
    with pytest.raises(ValueError, match="fraction is 0; need one between 0 and 1"):
        sources.split(documents, 0)


def test_data_set_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> Any:
        asked.append((name, config, split, streaming))
        if name == "away":
            raise ConnectionError("Couldn't reach 'away' on the Hub\nsecond line")
        return iter([{"text": f"{i}", "id": i} for i in range(5)])

    library = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", library)  # type: ignore[arg-type]
    found = sources.dataset("some/text", num_documents=2)
    assert found == [Document("some/text/train/0", "0"), Document("some/text/train/1", "1")]
    assert len(sources.dataset("some/text", split="test", config="v2")) == 5
    assert asked == [("some/text", None, "train", True), ("some/text", "v2", "test", False)]
    away = r"away \(train\) cannot be read: Couldn't reach 'away' on the Hub; need internet the"
    with pytest.raises(ValueError, match=away) as error:
        sources.dataset("away")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="record 0 has text, id but no text in 'content'"):
        sources.dataset("some/text", field="content")
    monkeypatch.setitem(sys.modules, "datasets", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the library datasets; pip install datasets, or"):
        sources.dataset("some/text")


def test_describe_tells_documents_apart() -> None:
    one = sources.describe([Document("a", "é"), Document("b", "")])
    assert (one["num_files"], one["num_bytes"]) == (2, 2)
    assert one == sources.describe([Document("a", "é"), Document("b", "")])
    other = sources.describe([Document("a", ""), Document("b", "é")])
    assert one["sha256"] != other["sha256"]


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "d" / ".hidden").mkdir(parents=True)
    (tmp_path / "d" / ".hidden" / "x.txt").write_text("no")
    (tmp_path / "d" / "b.txt").write_bytes(b"b\r\n")
    (tmp_path / "d" / "a.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "one.md").write_text("one")
    documents = sources.text_files([str(tmp_path / "one.md"), str(tmp_path / "d")])
    assert documents == [Document("one.md", "one"), Document("b.txt", "b\r\n")]


def test_encode_ends_each_document(tokenizer: hf_tokenizers.Tokenizer) -> None:
    documents = [Document(str(i), text) for i, text in enumerate(ODD * 20)]
    tokens = batches.encode(documents, tokenizer, 0)
    assert tokens.dtype == np.int32
    ends = np.flatnonzero(tokens == 0)
    assert len(ends) == len(documents)
    assert ends[-1] == len(tokens) - 1
    texts = [tokenizer.decode(part.tolist()) for part in np.split(tokens, ends)]
    assert texts == [*(ODD * 20), ""]
    num_bytes = sum(len(text.encode()) for text in ODD * 20)
    assert batches.bytes_per_token(documents, tokens) == pytest.approx(num_bytes / len(tokens))


@pytest.mark.parametrize(("num_tokens", "num_sequences"), [(5, 1), (8, 1), (9, 2), (103, 25)])
def test_pack_covers_every_token_once(num_tokens: int, num_sequences: int) -> None:
    tokens = np.arange(num_tokens, dtype=np.uint16)
    packed = batches.pack(tokens, 4)
    assert packed.shape == (num_sequences, 5)
    assert packed.dtype == np.int32
    np.testing.assert_array_equal(packed[:, :-1].ravel(), np.arange(num_sequences * 4))
    np.testing.assert_array_equal(packed[:, 1:].ravel(), np.arange(num_sequences * 4) + 1)


SEQUENCES = batches.pack(np.arange(12 * 4 + 1), 4)


def _rows(first: int, n: int, length: int = 4) -> Rows:
    """Rows that tell themselves apart: row i's tokens all are first + i."""
    tokens = np.repeat(np.arange(first, first + n, dtype=np.int32)[:, None], length + 1, 1)
    return rows.packed(tokens)


def _fixed(found: Rows, *arguments: Any, **options: Any) -> Iterator[dict[str, np.ndarray]]:
    """Batches of one source."""
    return mixture({"text": found}, constant({"text": 1}), *arguments, **options)


def _drawn(iterator: Iterator[dict[str, np.ndarray]], num_batches: int) -> list[list[int]]:
    """The rows of each batch, by their first token."""
    return [next(iterator)["tokens"][:, 0].tolist() for _ in range(num_batches)]


def test_batches_visit_each_sequence_once_an_epoch_in_a_new_order() -> None:
    iterator = _fixed(rows.packed(SEQUENCES), 4, seed=1)
    found = [[next(iterator) for _ in range(3)] for _ in range(3)]
    epochs = [np.concatenate([batch["tokens"] for batch in epoch]) for epoch in found]
    for epoch in epochs:
        assert epoch.dtype == np.int32
        assert epoch.shape == (12, 5)
        np.testing.assert_array_equal(epoch[np.argsort(epoch[:, 0])], SEQUENCES)
    orders = {tuple(epoch[:, 0]) for epoch in epochs}
    assert len(orders) == 3
    assert sorted(found[0][0]) == ["tokens", "weights"]
    np.testing.assert_array_equal(found[0][0]["weights"], np.ones((4, 4), np.float32))
    assert Batch(**found[0][0]).teacher_tokens is None


def test_seed_fixes_the_order() -> None:
    def drawn(seed: int) -> list[list[int]]:
        return _drawn(_fixed(_rows(0, 12), 4, seed), 7)

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def _mixed(prefetch: int) -> Iterator[dict[str, np.ndarray]]:
    schedule = Schedule({"a": 1, "b": 0, "c": 1}, {"a": 0, "b": 3, "c": 1}, 40)
    sources = {"a": _rows(0, 9), "b": _rows(100, 7), "c": _rows(200, 50)}
    return mixture(sources, schedule, 5, seed=2, prefetch=prefetch)


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("kind", ["one", "mixed"])
def test_batches_resume_exactly(kind: str, prefetch: int) -> None:
    def start(prefetch: int) -> Any:
        if kind == "mixed":
            return _mixed(prefetch)
        return _fixed(_rows(0, 12), 5, seed=2, prefetch=prefetch)

    whole = _drawn(start(0), 60)
    iterator, at = start(prefetch), 0
    draw = random.Random(0)
    for _ in range(12):  # forward in pieces, then back to a random place in the same iterator
        n = draw.randrange(1, 9)
        state = json.loads(json.dumps(iterator.get_state()))
        assert _drawn(iterator, n) == whole[at : at + n]
        if draw.random() < 0.5:
            iterator = start(prefetch)
        iterator.set_state(state)
        skipped = draw.randrange(n + 1)
        assert _drawn(iterator, skipped) == whole[at : at + skipped]
        at += skipped
        if draw.random() < 0.5:  # what a thread made ahead is not part of the state
            time.sleep(0.01)
    assert at > 10


def test_shards_are_disjoint_and_complete() -> None:
    def start(i: int, n: int) -> Any:
        sources: dict = {"a": _rows(0, 9), "b": OnPolicy(4, lambda r, count: _rows(100 * r, 7))}
        schedule = Schedule({"a": 1, "b": 0}, {"a": 0, "b": 1}, 20)
        return mixture(sources, schedule, 6, seed=1, shard_index=i, num_shards=n)

    whole, parts = start(0, 1), [start(i, 3) for i in range(3)]
    expected = _drawn(whole, 30)
    found = [_drawn(part, 30) for part in parts]
    assert [a + b + c for a, b, c in zip(*found, strict=True)] == expected
    assert all(part.get_state() == whole.get_state() for part in parts)
    fixed = [_fixed(_rows(0, 6), 6, 0, i, 2) for i in range(2)]
    halves = [_drawn(shard, 1)[0] for shard in fixed]
    assert [len(half) for half in halves] == [3, 3]
    assert sorted(halves[0] + halves[1]) == list(range(6))


def test_shares_follow_the_schedule() -> None:
    schedule = Schedule({"a": 3, "b": 1, "c": 0}, {"a": 0, "b": 1, "c": 1}, 1500)
    steps = np.array([0, 750, 1500, 9999])
    expected = [[0.75, 0.25, 0], [0.375, 0.375, 0.25], [0, 0.5, 0.5], [0, 0.5, 0.5]]
    np.testing.assert_allclose(shares(schedule, steps), expected)

    sources = {"a": _rows(0, 40), "b": _rows(100, 40), "c": _rows(200, 40)}
    iterator = mixture(sources, schedule, 8, seed=5, prefetch=0)
    counts = np.array(
        [np.bincount(np.array(b) // 100, minlength=3) for b in _drawn(iterator, 2500)]
    )
    assert (counts.sum(1) == 8).all()
    wanted = 8 * shares(schedule, np.arange(2500))
    assert (np.abs(counts - wanted) < 1 + 1e-9).all()  # rounded up or down, no further
    # A sum of 2500 roundings, variance at most 1/4 each: five deviations are 125 rows.
    np.testing.assert_allclose(counts.sum(0), wanted.sum(0), atol=125)
    rare = mixture({"a": sources["a"], "b": sources["b"]}, constant({"a": 9, "b": 1}), 4, seed=0)
    # 0.4 rows a batch: 400 in all, of standard deviation 15.5, and never two at once.
    of_b = [sum(row >= 100 for row in batch) for batch in _drawn(rare, 1000)]
    assert 400 - 80 < sum(of_b) < 400 + 80
    assert max(of_b) == 1
    assert not counts[1500:, 0].any()
    assert not counts[0, 2]
    turned = (
        {name: sources[name] for name in "cab"},
        Schedule({"b": 1, "c": 0, "a": 3}, *schedule[1:]),
    )
    assert _drawn(mixture(*turned, 8, seed=5), 5) == _drawn(
        mixture(sources, schedule, 8, seed=5), 5
    )
    other = mixture(sources, schedule, 8, seed=6, prefetch=0)
    assert _drawn(other, 5) != _drawn(mixture(sources, schedule, 8, seed=5), 5)


def test_each_source_of_a_mixture_keeps_its_own_epochs() -> None:
    numbers = np.concatenate(_drawn(_mixed(2), 100))
    for first, n in ((0, 9), (100, 7), (200, 50)):
        own = numbers[(numbers >= first) & (numbers < first + n)]
        epochs = [own[i : i + n] for i in range(0, len(own) - n + 1, n)]
        assert len(epochs) > 1
        assert all(sorted(epoch) == list(range(first, first + n)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_on_policy_rows_are_written_at_the_start_of_their_round() -> None:
    weights = {"step": 0}  # stands for what training changes
    calls = []

    def write(number: int, num_rows: int) -> Rows:
        calls.append((number, num_rows, weights["step"]))
        return _rows(1000 * (number + 1), num_rows)

    schedule = Schedule({"text": 1, "student": 0}, {"text": 0, "student": 1}, 12)
    sources: dict = {"text": _rows(0, 50), "student": OnPolicy(5, write)}

    def start() -> Any:
        return mixture(sources, schedule, 4, seed=0, prefetch=4)

    iterator, found = start(), []
    for step in range(25):
        weights["step"] = step
        found += _drawn(iterator, 1)
    by_round = [np.concatenate(found[i : i + 5]) for i in range(0, 25, 5)]
    assert [call[0] for call in calls] == list(range(5))
    for (number, num_rows, step), numbers in zip(calls, by_round, strict=True):
        # Exactly as many rows as are read, by the weights of the first step that needs one.
        own = numbers[numbers >= 1000]
        assert sorted(own) == list(range(1000 * (number + 1), 1000 * (number + 1) + num_rows))
        assert step == 5 * number or (number == 0 and np.max(found[:step]) < 1000)
    assert calls[-1][1] == 20

    calls.clear()
    resumed = start()
    resumed.set_state({"next_index": 13})  # within a round: it is asked for again
    assert _drawn(resumed, 12) == found[13:]
    assert [call[:2] for call in calls] == [
        (n, len(by_round[n][by_round[n] >= 1000])) for n in (2, 3, 4)
    ]


def test_fewer_on_policy_rows_are_read_again() -> None:
    student = OnPolicy(3, lambda number, num_rows: _rows(10 * number, 4))
    iterator = mixture({"student": student}, constant({"student": 1}), 4, seed=0)
    found = _drawn(iterator, 6)
    assert all(sorted(batch) == [0, 1, 2, 3] for batch in found[:3])
    assert all(sorted(batch) == [10, 11, 12, 13] for batch in found[3:])
    assert len({tuple(batch) for batch in found[:3]}) > 1


# ------------------------------------------------------------------------------- generated rows


V, LENGTH, END = 11, 12, 3


@pytest.fixture(scope="module")
def teacher() -> tuple[Model, Any]:
    return tiny_model(V, num_layers=1)


def test_generated_rows_equal_plain_sampling(teacher: tuple[Model, Any]) -> None:
    target, params = teacher
    draw = np.random.default_rng(0)
    texts = [draw.integers(V, size=n).astype(np.int32) for n in (1, 5, 12, 3, 3, 2, 7)]
    temperatures = np.array([0.0, 1.0, 0.7])[np.arange(10, 17) % 3]
    decoder = engine.decoder(target, lookup(2), match(), eos_ids=(END,))
    seen: list[tuple[int, int]] = []

    def generate(rows: slice) -> Rows:
        return generated.generate(
            decoder,
            Params(params),
            texts[rows],
            LENGTH,
            batch_size=4,
            temperature=(0.0, 1.0, 0.7),
            seed=4,
            first_row=10 + rows.start,
            progress=lambda done, total: seen.append((done, total)),
        )

    # In batches of any company: of four, of two, of one.
    found = rows.concatenate([generate(slice(0, 6)), generate(slice(6, 7))])
    assert seen == [(4, 6), (6, 6), (1, 1)]

    # What plain sampling writes after the same tokens, with the noise of row and position.
    @jax.jit
    def sample(tokens: jax.Array, asked: Sampling) -> jax.Array:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(4), jnp.arange(10, 17))
        positions = jnp.broadcast_to(jnp.arange(1, LENGTH + 1), (7, LENGTH))
        noise = shared_gumbel(streams(keys), positions, V)
        noise *= (asked.temperature > 0)[:, None, None]
        return jnp.argmax(warp(forward(target, params, tokens).logits, asked) + noise, -1)

    emitted = np.asarray(sample(jnp.asarray(found.tokens[:, :-1]), sampling(7, temperatures)))
    labels, ended = found.tokens[:, 1:], 0
    for i, text in enumerate(texts):
        assert found.tokens[i, : len(text)].tolist() == text.tolist()
        new = emitted[i, len(text) - 1 :]
        count = int(np.argmax(new == END)) + 1 if END in new else len(new)
        ended += count < len(new)
        # Label j is token j + 1; the token that ends the text is worth predicting, too.
        written = slice(len(text) - 1, len(text) - 1 + count)
        assert labels[i, written].tolist() == new[:count].tolist()
        expected = np.zeros(LENGTH)
        expected[written] = 1
        assert found.weights[i].tolist() == expected.tolist()
        assert not labels[i, written.stop :].any()
    assert ended
    assert found.tokens.dtype == np.int32
    assert found.weights.dtype == np.float32


def test_windows_are_spread_over_the_stream() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    found = np.stack(generated.windows(tokens, 10, 20, seed=0))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, found[:, :1] + np.arange(10))
    stretch = 991 / 20  # of the possible starts
    assert (np.abs(found[:, 0] - (np.arange(20) + 0.5) * stretch) <= stretch / 2 + 1).all()
    again = generated.windows(tokens, 10, 20, seed=0)
    np.testing.assert_array_equal(found, again)
    assert (found != np.stack(generated.windows(tokens, 10, 20, seed=1))).any()
    assert len(generated.windows(np.arange(10), 10, 3, seed=0)) == 3


# ---------------------------------------------------------------------------------- rows on disk


def test_interrupted_shards_go_on(tmp_path: Path) -> None:
    made: list[tuple[int, int]] = []
    whole = _rows(0, 10)

    def make(start: int, stop: int) -> Rows:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append((start, stop))
        return Rows(whole.tokens[start:stop], whole.weights[start:stop] * (start > 3))

    def write(**changes: Any) -> Rows:
        arguments = {"made_from": {"seed": 1}, "num_rows": 10, "chunk_rows": 3, **changes}
        return shards.write(tmp_path / "new" / "rows", make=make, **arguments)

    for expected in ([(0, 3), (3, 6)], [(6, 9), (9, 10)]):
        made.clear()
        if len(expected) == 2 and expected[0][0] == 0:
            with pytest.raises(KeyboardInterrupt):
                write()
            with pytest.raises(ValueError, match="rows holds 2 of 4 files; finish it first"):
                shards.read(tmp_path / "new" / "rows")
        else:
            found = write()
        assert made == expected
    np.testing.assert_array_equal(found.tokens, whole.tokens)
    np.testing.assert_array_equal(found.weights, whole.weights * (np.arange(10) >= 6)[:, None])
    progress: list[tuple[int, int]] = []
    write(progress=lambda done, total: progress.append((done, total)))
    assert progress == [(3, 10), (6, 10), (9, 10), (10, 10)]
    assert made == [(6, 9), (9, 10)]

    for changes in ({"made_from": {"seed": 2}}, {"num_rows": 9}, {"chunk_rows": 5}):
        with pytest.raises(
            ValueError, match=r"holds rows made from .* but .* is asked for"
        ) as error:
            write(**changes)
        assert "\n" not in str(error.value)
    made.clear()
    assert len(write(made_from={"seed": 2}, num_rows=5, replace=True).tokens) == 5
    assert made == [(0, 3), (3, 5)]
    (tmp_path / "new" / "rows" / "rows_000001.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"rows_000001\.npz is damaged"):
        shards.read(tmp_path / "new" / "rows")


_KILLED = """
import sys, numpy as np
from specjax.data import shards
from specjax.data.rows import Rows
def make(start, stop):
    draw = np.random.default_rng(start)
    n = stop - start
    return Rows(draw.integers(60000, size=(n, 9001)), draw.random((n, 9000)))
shards.write(sys.argv[1], {}, 96, make, 4)
"""


def test_killed_writer_leaves_whole_chunks(tmp_path: Path) -> None:
    directory = tmp_path / "rows"
    for target in (3, 10):  # kill -9 while the next file is being made or written
        child = subprocess.Popen([sys.executable, "-c", _KILLED, str(directory)], cwd=ROOT)
        deadline = time.monotonic() + 60
        while len(list(directory.glob("rows_*"))) < target and time.monotonic() < deadline:
            time.sleep(0.003)
        time.sleep(0.004 * target)
        child.kill()
        assert child.wait() == -signal.SIGKILL
    there = {path.name: path.stat().st_mtime_ns for path in directory.glob("rows_*")}
    assert 10 <= len(there) < 24
    subprocess.run([sys.executable, "-c", _KILLED, str(directory)], cwd=ROOT, check=True)
    assert {name: (directory / name).stat().st_mtime_ns for name in there} == there
    found = shards.read(directory)
    for start in range(0, 96, 4):
        draw = np.random.default_rng(start)
        np.testing.assert_array_equal(
            found.tokens[start : start + 4], draw.integers(60000, size=(4, 9001))
        )


def test_atomic_file_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:  # noqa: PT012
        file.write(b"half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"
    with path.open("rb") as reader:
        with replacing(path) as file:
            file.write(b"new")
        assert reader.read() == b"old"  # replaced, not overwritten
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"new"


def test_fingerprint_sees_values_names_and_types() -> None:
    tree = {"a": np.arange(6, dtype=np.int32), "b": np.float32(1)}
    others = [
        {"a": np.arange(6, dtype=np.int32), "b": np.float32(2)},
        {"a": np.arange(6, dtype=np.int32), "c": np.float32(1)},
        {"a": np.arange(6, dtype=np.int32).reshape(2, 3), "b": np.float32(1)},
        {"a": np.arange(6, dtype=np.uint32), "b": np.float32(1)},
    ]
    assert fingerprint(tree) == fingerprint(jax.tree.map(jnp.asarray, tree))
    assert fingerprint(np.arange(6)[::2]) == fingerprint(np.array([0, 2, 4]))
    assert len({fingerprint(tree), *map(fingerprint, others)}) == 5
    assert len(fingerprint(jnp.ones(3, jnp.bfloat16))) == 16


def test_teacher_cache(teacher: tuple[Model, Any], tmp_path: Path) -> None:
    target, params = teacher
    tokens = np.random.default_rng(1).integers(V, size=(7, 6)).astype(np.int32)
    data, path = rows.packed(tokens), tmp_path / "new" / "cache"
    k, temperature, seen = 4, 0.8, []

    def build(stop_at: int = 99, data: Rows = data, k: int = k, place: Any = jnp.asarray) -> None:
        def progress(done: int, total: int) -> None:
            seen.append(done)
            if done >= stop_at:
                raise KeyboardInterrupt

        teacher_cache.build(target, params, data, k, path, temperature, 2, place, progress)

    with pytest.raises(KeyboardInterrupt):
        build(stop_at=4)
    partial = tmp_path / "new" / "cache.partial"
    assert not path.exists()
    # Killed within the next write: what is beyond the rows that count is garbage.
    half = np.load(partial / "probs.npy", mmap_mode="r+")
    half[4:] = 7
    half.flush()
    build()
    assert seen == [2, 4, 6, 7]
    assert not partial.exists()
    build()  # it is there
    assert seen == [2, 4, 6, 7]

    found = teacher_cache.attach(data, path, params, k, temperature)
    forward_all = jax.jit(lambda x: forward(target, params, x).logits)
    logits = np.asarray(forward_all(tokens[:, :-1]), np.float64)
    law = np.exp(logits / temperature)
    law /= law.sum(-1, keepdims=True)
    best = np.argsort(-law, -1)[..., :k]
    batch = rows.take(found, np.array([6, 0]))
    np.testing.assert_array_equal(batch["teacher_tokens"], best[[6, 0]])
    expected = np.take_along_axis(law, best, 2)[[6, 0]]
    np.testing.assert_allclose(batch["teacher_probs"], expected, rtol=1e-3, atol=1e-6)
    assert batch["teacher_tokens"].dtype == np.int32
    assert batch["teacher_probs"].dtype == np.float32
    shape = found.tokens[:, 1:].shape
    on_disk = sum(np.load(path / name).nbytes for name in ("tokens.npy", "probs.npy"))
    assert teacher_cache.size(*shape, k, V) == on_disk == 7 * 5 * 4 * 4
    assert teacher_cache.size(10, 20, 8, 2**16 + 1) == 10 * 20 * 8 * 6
    through = next(mixture({"text": found}, constant({"text": 1}), 3, seed=0))
    assert Batch(**through).teacher_probs.shape == (3, 5, 4)

    other = rows.packed(tokens[::-1].copy())
    with pytest.raises(ValueError, match=r"cache has rows [0-9a-f]{16} but [0-9a-f]{16} is asked"):
        teacher_cache.attach(other, path, params, k, temperature)
    with pytest.raises(ValueError, match=r"has target .* but .* is asked"):
        teacher_cache.attach(data, path, jax.tree.map(lambda x: x + 1, params), k, temperature)
    with pytest.raises(ValueError, match=r"has temperature 0\.8 but 1\.0 is asked"):
        teacher_cache.attach(data, path, params, k)
    with pytest.raises(ValueError, match="has k 4 but 3 is asked"):
        build(k=3)
    with pytest.raises(ValueError, match="absent does not exist; need a directory"):
        teacher_cache.attach(data, tmp_path / "absent", params, k)
    with pytest.raises(ValueError, match="k is 12; need 1 to 11"):
        build(k=12)

    # What is left of other rows does not count, nor once another call has overwritten it.
    shutil.rmtree(path)
    seen.clear()

    def killed(tokens: np.ndarray) -> Any:
        raise KeyboardInterrupt

    for data_now, stop_at, place in (
        (data, 4, jnp.asarray),
        (other, 2, jnp.asarray),
        (data, 4, jnp.asarray),
        (other, 99, killed),  # before anything of it counts
        (data, 99, jnp.asarray),
    ):
        with contextlib.suppress(KeyboardInterrupt):
            build(stop_at, data_now, place=place)
    assert seen == [2, 4, 2, 2, 4, 2, 4, 6, 7]
    again = teacher_cache.attach(data, path, params, k, temperature)
    np.testing.assert_array_equal(again.teacher_tokens, best)


_KILLED_CACHE = """
import sys, jax, numpy as np
from specjax.data import rows, teacher_cache
from specjax.testing import tiny_model
jax.config.update("jax_platforms", "cpu")
target, params = tiny_model(11, num_layers=1)
tokens = np.random.default_rng(0).integers(11, size=(600, 33)).astype(np.int32)
teacher_cache.build(target, params, rows.packed(tokens), 11, sys.argv[1], batch_size=2)
"""


@pytest.mark.slow
def test_killed_teacher_cache_goes_on(tmp_path: Path) -> None:
    path, at = tmp_path / "cache", tmp_path / "cache.partial" / "progress.json"
    done = []
    for target in (2, 100, 250):
        child = subprocess.Popen([sys.executable, "-c", _KILLED_CACHE, str(path)], cwd=ROOT)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and child.poll() is None:
            with contextlib.suppress(FileNotFoundError):
                if json.loads(at.read_text())["rows"] >= target:
                    break
        child.kill()
        assert child.wait() == -signal.SIGKILL
        done.append(json.loads(at.read_text())["rows"])
    assert 2 <= done[0] < 100 <= done[1] < 250 <= done[2] < 600
    for name in (path, tmp_path / "whole"):
        subprocess.run([sys.executable, "-c", _KILLED_CACHE, str(name)], cwd=ROOT, check=True)
    for name in ("tokens.npy", "probs.npy", "made_from.json"):
        assert (path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("sources", "schedule", "arguments", "message"),
    [
        ({"a": 3}, {"a": 1}, {"batch_size": 16}, "batch_size is 16; need 1 to 3: source a has 3"),
        ({"a": 9, "b": 3}, {"a": 1, "b": 1}, {"batch_size": 8}, "need 1 to 6: source b has 3"),
        ({"a": 9}, {"b": 1}, {}, "start weighs b but the sources are a; they must be the same"),
        ({"a": 9, "b": 9}, {"a": 1}, {}, "start weighs a but the sources are a, b"),
        ({"a": 9}, {"a": 0}, {}, "start is {'a': 0}; need weights of 0 or more"),
        ({"a": 9}, {"a": -1}, {}, "need weights of 0 or more"),
        ({"a": 9}, {"a": float("nan")}, {}, "need weights of 0 or more"),
        ({}, {}, {}, "start weighs nothing but the sources are none"),
        ({"a": 9}, {"a": 1}, {"num_shards": 3}, "batch_size is 4 and num_shards 3; need"),
        ({"a": 9}, {"a": 1}, {"num_shards": 2, "shard_index": 2}, "shard_index is 2; need 0 to 1"),
        ({"a": 9}, {"a": 1}, {"prefetch": -1}, "prefetch is -1; need 0"),
    ],
)
def test_mixtures_that_cannot_be(
    sources: dict, schedule: dict, arguments: dict, message: str
) -> None:
    given = {name: _rows(0, n) for name, n in sources.items()}
    arguments = {"batch_size": 4, **arguments}
    with pytest.raises(ValueError, match=message):
        mixture(given, constant(schedule), seed=0, **arguments)


def test_sources_of_a_mixture_must_be_alike() -> None:
    even = constant({"a": 1, "b": 1})
    plain = _rows(0, 9)
    taught = plain._replace(
        teacher_tokens=np.zeros((9, 4, 2), np.uint16), teacher_probs=np.ones((9, 4, 2), np.float16)
    )
    with pytest.raises(ValueError, match="a has rows of 4 tokens and no teacher but source b rows"):
        mixture({"a": plain, "b": _rows(0, 9, 5)}, even, 4, seed=0)
    with pytest.raises(
        ValueError, match=r"and the 2 likeliest of a teacher but source b .* no tea"
    ):
        mixture({"a": taught, "b": plain}, even, 4, seed=0)
    student = OnPolicy(2, lambda number, num_rows: _rows(0, num_rows, 5))
    with pytest.raises(ValueError, match="a has a teacher's probabilities but source b, which is"):
        mixture({"a": taught, "b": student}, even, 4, seed=0)
    with pytest.raises(ValueError, match="source b rows of 5 tokens"):
        next(mixture({"a": plain, "b": student}, even, 4, seed=0))
    empty = OnPolicy(2, lambda number, num_rows: _rows(0, 0))
    with pytest.raises(ValueError, match="Source b wrote 0 rows in round 0; need 4"):
        next(mixture({"a": plain, "b": empty}, even, 4, seed=0))
    with pytest.raises(ValueError, match="Source b has rounds of 0 steps; need 1"):
        mixture({"a": plain, "b": student._replace(round_steps=0)}, even, 4, seed=0)
    with pytest.raises(ValueError, match="schedule has 0 steps; need at least 1"):
        mixture({"a": plain, "b": plain}, even._replace(num_steps=0), 4, seed=0)


def test_errors(tokenizer: hf_tokenizers.Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff")
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="vocab_size is 256; need 257"):
        tokenizers.train_bpe(["a"], 256)
    with pytest.raises(ValueError, match=r"no tokenizer\.json in .*; need a directory"):
        tokenizers.load(tmp_path)
    with pytest.raises(ValueError, match="absent does not exist; need a text file"):
        sources.text_files([str(tmp_path / "absent")])
    with pytest.raises(ValueError, match="bytes is not UTF-8; need a UTF-8"):
        sources.text_files([str(tmp_path / "bytes")])
    with pytest.raises(ValueError, match=r"no text in \[.*void'\]; need at least one"):
        sources.text_files([str(tmp_path / "void")])
    with pytest.raises(ValueError, match="0 documents to encode; need at least 1"):
        batches.encode([], tokenizer, 0)
    with pytest.raises(ValueError, match="has 4 tokens; a sequence of 4 needs 5"):
        batches.pack(np.arange(4), 4)
    with pytest.raises(ValueError, match="length is 0; need 1"):
        batches.pack(np.arange(4), 0)
    with pytest.raises(ValueError, match="batch_size is 13; need 1 to 12"):
        _fixed(rows.packed(SEQUENCES), 13, seed=0)
    with pytest.raises(ValueError, match="batch_size is 0 and num_shards 1; need a positive"):
        _fixed(rows.packed(SEQUENCES), 0, seed=0)
    with pytest.raises(ValueError, match="4 tokens; need 5 or more for prompts of 5"):
        generated.windows(np.arange(4), 5, 2, seed=0)
    with pytest.raises(ValueError, match="0 prompts of 5 tokens; need at least 1 of 1"):
        generated.windows(np.arange(9), 5, 0, seed=0)
    with pytest.raises(ValueError, match="num_rows is 0 and chunk_rows 256; need 1"):
        shards.write(tmp_path, {}, 0, lambda start, stop: _rows(start, stop - start))
    with pytest.raises(ValueError, match="1 rows were made; need 5"):
        shards.write(tmp_path, {}, 5, lambda start, stop: _rows(0, 1))
    with pytest.raises(ValueError, match="holds no rows; need a directory of"):
        shards.read(tmp_path)


def test_generation_refuses_bad_input(teacher: tuple[Model, Any]) -> None:
    decoder = engine.decoder(teacher[0], none(), match())

    def generate(texts: list, length: int = 4, batch_size: int = 2, temperature: Any = 1.0) -> None:
        generated.generate(decoder, Params(teacher[1]), texts, length, batch_size, temperature)

    one = [np.ones(3, np.int32)]
    with pytest.raises(ValueError, match="0 prompts to continue; need at least 1"):
        generate([])
    with pytest.raises(ValueError, match=r"Prompt 1 of 1 has 3 tokens; .* needs 1 to 2"):
        generate(one, length=2)
    with pytest.raises(ValueError, match="Prompt 1 of 1 has 0 tokens"):
        generate([one[0][:0]])
    with pytest.raises(ValueError, match="batch_size is 0"):
        generate(one, batch_size=0)
    with pytest.raises(ValueError, match=r"temperature is .*; it must be at least 0"):
        generate(one, temperature=-1.0)
    with pytest.raises(ValueError, match=r"temperature is \(\); need a number or several"):
        generate(one, temperature=())
