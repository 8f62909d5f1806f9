"""Documents, tokenizers and batches."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf_tokenizers

from specjax.data import batches, sources, tokenizers
from specjax.data.sources import Document

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


def test_batches_visit_each_sequence_once_an_epoch_in_a_new_order() -> None:
    iterator = batches.batches(SEQUENCES, 4, seed=1)
    epochs = [np.concatenate([next(iterator) for _ in range(3)]) for _ in range(3)]
    for epoch in epochs:
        assert epoch.dtype == np.int32
        assert epoch.shape == (12, 5)
        np.testing.assert_array_equal(epoch[np.argsort(epoch[:, 0])], SEQUENCES)
    orders = {tuple(epoch[:, 0]) for epoch in epochs}
    assert len(orders) == 3


def test_batches_resume_in_mid_epoch() -> None:
    iterator = batches.batches(SEQUENCES, 5, seed=2)
    for _ in range(4):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(6)]
    resumed = batches.batches(SEQUENCES, 5, seed=2)
    resumed.set_state(state)
    np.testing.assert_array_equal([next(resumed) for _ in range(6)], expected)


def test_seed_fixes_the_order() -> None:
    def rows(seed: int) -> np.ndarray:
        iterator = batches.batches(SEQUENCES, 4, seed)
        return np.stack([next(iterator) for _ in range(7)])

    np.testing.assert_array_equal(rows(3), rows(3))
    assert (rows(3) != rows(4)).any()


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
    with pytest.raises(ValueError, match="4 tokens; need 5 or more for length 4"):
        batches.pack(np.arange(4), 4)
    with pytest.raises(ValueError, match="length is 0; need 1"):
        batches.pack(np.arange(4), 0)
    with pytest.raises(ValueError, match="batch_size is 13; need 1 to 12"):
        batches.batches(SEQUENCES, 13, seed=0)
    with pytest.raises(ValueError, match="batch_size is 0; need 1 to 12"):
        batches.batches(SEQUENCES, 0, seed=0)
