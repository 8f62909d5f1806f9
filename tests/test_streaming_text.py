"""Text of a stream of tokens: whole characters only, and nothing from a stop string on."""

import random
import time
from collections.abc import Callable, Sequence

import pytest
import tokenizers as hf_tokenizers
from refusals import refused
from tokenizers import decoders, models, normalizers

from specjax.data import tokenizers
from specjax.data.tokenizers import Writer

CHARACTERS = "ab é🙂👩\u200d🚀\n漢\u0301"  # of one to four bytes


@pytest.fixture(scope="module")
def tokenizer() -> hf_tokenizers.Tokenizer:
    return tokenizers.train_bpe(["abab aab baab é🙂 abba bbb a漢 \n ab aaa"] * 3, 280)


def byte_fallback(prefix: bool) -> hf_tokenizers.Tokenizer:
    """Characters that are no tokens become tokens of bytes, as in Llama 2 and Gemma.

    Args:
      prefix: whether a space is put before a text and taken away again, as Llama 2 does.
    """
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "▁▁"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "▁")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = hf_tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        parts.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def groups(draw: random.Random, ids: Sequence[int]) -> list[Sequence[int]]:
    """The tokens in calls of 0 to 4."""
    parts, start = [], 0
    while start < len(ids):
        end = start + draw.randrange(5)
        parts.append(ids[start:end])
        start = end
    return parts


def written(writer: Writer, parts: Sequence[Sequence[int]]) -> tuple[str, int, str | None]:
    """What a writer says after these calls and a last one."""
    pieces = [writer.push(part) for part in parts] + [writer.push([], final=True)]
    assert "".join(pieces) == writer.text
    return writer.text, writer.num_tokens, writer.stopped


def searched(
    decode: Callable[[Sequence[int]], str], ids: Sequence[int], stop: Sequence[str]
) -> tuple[str, int, str | None]:
    """The same by decoding every beginning of the tokens and searching all of it."""
    for n in range(1, len(ids) + 2):
        text = decode(ids[:n])
        text = text if n > len(ids) else text.rstrip("\ufffd")
        found = [(text.find(string), -len(string), string) for string in stop if string in text]
        if found:
            begin, _, string = min(found)
            return text[:begin], min(n, len(ids)), string
    return decode(ids), len(ids), None


def random_text(draw: random.Random, length: int) -> str:
    return "".join(draw.choice(CHARACTERS) for _ in range(length))


# ----------------------------------------------------------------------------- stop strings


def test_says_what_a_search_of_everything_says(tokenizer: hf_tokenizers.Tokenizer) -> None:
    draw = random.Random(0)
    num_stopped = 0
    for _ in range(300):
        text = random_text(draw, 30)
        ids = tokenizer.encode(text).ids
        stop = [random_text(draw, draw.randint(1, 4)) for _ in range(draw.randrange(4))]
        start = draw.randrange(25)
        stop += [text[start : start + draw.randint(2, 5)]] * draw.randrange(2)
        needed = searched(tokenizer.decode, ids, stop)
        num_stopped += needed[2] is not None
        for parts in [[ids], [[i] for i in ids], groups(draw, ids), groups(draw, ids)]:
            assert written(Writer(tokenizer, stop), parts) == needed
    assert 100 < num_stopped < 290


def test_broken_bytes_do_not_matter_either(tokenizer: hf_tokenizers.Tokenizer) -> None:
    draw = random.Random(1)
    for _ in range(200):
        ids = [draw.randrange(280) for _ in range(20)]
        whole = tokenizer.decode(ids)
        start = draw.randrange(len(whole))
        stop = [whole[start : start + draw.randint(1, 3)], "\ufffd\ufffd"][: draw.randint(1, 2)]
        needed = searched(tokenizer.decode, ids, stop)
        for parts in [[ids], groups(draw, ids)]:
            assert written(Writer(tokenizer, stop), parts) == needed


def test_holds_back_no_more_than_it_must(tokenizer: hf_tokenizers.Tokenizer) -> None:
    draw = random.Random(2)
    for _ in range(100):
        stop = [random_text(draw, draw.randint(1, 5)) for _ in range(3)]
        ids = tokenizer.encode(random_text(draw, 20)).ids
        writer = Writer(tokenizer, stop)
        for n, token in enumerate(ids, 1):
            writer.push([token])
            if writer.stopped is not None:
                break
            text = tokenizer.decode(ids[:n]).rstrip("\ufffd")
            beginnings = {string[:k] for string in stop for k in range(len(string))}
            held = max(len(b) for b in beginnings if text.endswith(b))
            assert writer.text == text[: len(text) - held]


@pytest.mark.parametrize(
    ("text", "stop", "needed", "met"),
    [
        ("a🙂b", ["🙂"], "a", "🙂"),
        ("a🙂b", ["b"], "a🙂", "b"),
        ("aaab", ["aab"], "a", "aab"),  # the match restarts within itself
        ("ababac", ["abac"], "ab", "abac"),
        ("abab", ["bb", "abb"], "abab", None),  # held to the end, then given out
        ("xaby", ["b", "ab"], "x", "ab"),  # the one that begins first
        ("xab", ["a", "ab"], "x", "a"),  # the one whose token comes first
        ("éé\n\n漢", ["\n\n"], "éé", "\n\n"),
        ("a漢", ["a🙂", "漢"], "a", "漢"),  # 漢 ends the wait for 🙂 and is met itself
        ("ab", ["ab"], "", "ab"),
        ("ab", ["abc"], "ab", None),
        ("", ["a"], "", None),
    ],
)
def test_stop_strings(text: str, stop: list[str], needed: str, met: str | None) -> None:
    tokenizer = tokenizers.train_bpe([], 257)  # every byte a token
    ids = tokenizer.encode(text).ids
    for parts in [[ids], [[i] for i in ids], [ids[:2], ids[2:]]]:
        found = written(Writer(tokenizer, stop), parts)
        assert (found[0], found[2]) == (needed, met)


def test_longest_of_those_that_one_token_completes(tokenizer: hf_tokenizers.Tokenizer) -> None:
    ids = tokenizer.encode("ab").ids
    assert len(ids) == 1
    for stop in (["a", "ab"], ["ab", "a", "b"]):
        assert written(Writer(tokenizer, stop), [ids]) == ("", 1, "ab")


def test_takes_nothing_after_a_stop_string() -> None:
    tokenizer = tokenizers.train_bpe([], 257)
    writer = Writer(tokenizer, ["--"])
    ids = tokenizer.encode("ab--cd").ids
    assert [writer.push([i]) for i in ids] == ["a", "b", "", "", "", ""]
    assert (writer.text, writer.num_tokens, writer.stopped) == ("ab", 4, "--")
    assert writer.push(ids, final=True) == ""
    assert (writer.text, writer.num_tokens, writer.stopped) == ("ab", 4, "--")


def test_waits_for_a_character_within_a_stop_string() -> None:
    tokenizer = tokenizers.train_bpe([], 257)
    writer = Writer(tokenizer, ["é🙂"])
    assert [writer.push([i]) for i in tokenizer.encode("xé漢").ids] == ["x", *[""] * 4, "é漢"]
    writer = Writer(tokenizer, ["é🙂"])
    assert writer.push(tokenizer.encode("xé🙂").ids[:-1]) == "x"
    assert writer.stopped is None
    assert writer.push([], final=True) == "é\ufffd"


def test_without_stop_strings_is_the_plain_stream(tokenizer: hf_tokenizers.Tokenizer) -> None:
    draw = random.Random(3)
    for _ in range(50):
        ids = [draw.randrange(280) for _ in range(20)]
        writer, push = Writer(tokenizer), tokenizers.stream_decoder(tokenizer)
        for i in ids:
            assert writer.push([i]) == push([i])
        assert writer.push([], final=True) == push([], final=True)
        assert writer.num_tokens == len(ids)


def test_time_is_linear(tokenizer: hf_tokenizers.Tokenizer) -> None:
    # A search that starts over at every character would look at 10^9 of them here.
    writer = Writer(tokenizer, ["a" * 20_000 + "b"])
    ids = tokenizer.encode("a" * 50_000).ids
    start = time.perf_counter()
    for i in ids:
        writer.push([i])
    assert len(writer.text) == 30_000
    assert time.perf_counter() - start < 10


def test_refuses_stop_strings(tokenizer: hf_tokenizers.Tokenizer) -> None:
    refused(
        lambda: Writer(tokenizer, ["a", "", "b"]),
        "^Stop string 2 of 3 is empty; need at least one character.$",
    )
    refused(lambda: tokenizers.check_stop("ab"), "are the string 'ab'; need a list of strings")
    refused(lambda: tokenizers.check_stop([5]), "1 of 1 is 5; need a string")  # type: ignore[list-item]
    tokenizers.check_stop([])
    tokenizers.check_stop(["\n", "ab"])


# ----------------------------------------------------------------------------- byte fallback


@pytest.mark.parametrize("prefix", [True, False])
def test_byte_fallback_streams_what_the_whole_decodes_to(prefix: bool) -> None:
    tokenizer = byte_fallback(prefix)
    draw = random.Random(4)
    for _ in range(200):
        text = random_text(draw, 20)
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
        # Texts one after another, so that spaces of every kind are within and at the beginning.
        ids += [*tokenizer.encode("  " + random_text(draw, 5)).ids, 2]
        ids = tokenizer.encode(" " * draw.randrange(3)).ids + ids
        whole = tokenizer.decode(ids)
        push = tokenizers.stream_decoder(tokenizer)
        pieces = [push(part) for part in groups(draw, ids)] + [push([], final=True)]
        assert "".join(pieces) == whole
        for stop in ([], [random_text(draw, 2), "🙂", whole[-3:]]):
            needed = searched(tokenizer.decode, ids, stop)
            for parts in [[ids], [[i] for i in ids], groups(draw, ids)]:
                assert written(Writer(tokenizer, stop), parts) == needed


def test_byte_fallback_holds_half_a_character() -> None:
    tokenizer = byte_fallback(True)
    ids = tokenizer.encode("a\n🙂b").ids
    assert len(ids) == 7
    writer = Writer(tokenizer)
    assert [writer.push([i]) for i in ids] == ["a", "\n", "", "", "", "🙂", "b"]


@pytest.mark.parametrize("prefix", [True, False])
def test_byte_fallback_of_broken_bytes_does_not_depend_on_groups(prefix: bool) -> None:
    tokenizer = byte_fallback(prefix)
    draw = random.Random(5)
    for _ in range(100):
        ids = [draw.randrange(tokenizer.get_vocab_size()) for _ in range(20)]
        needed = written(Writer(tokenizer, ["ab", "\ufffda"]), [ids])
        assert written(Writer(tokenizer, ["ab", "\ufffda"]), groups(draw, ids)) == needed
