"""`specjax.load` and `specjax.generate`: one text per prompt and seed, whatever made it faster."""

import dataclasses
import functools
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from directories import CONTEXT, save_model
from refusals import refused

import specjax
from specjax import engine, generation, presets, sampling
from specjax.data import tokenizers
from specjax.drafters import corpus as corpora
from specjax.drafters import grow
from specjax.drafters.lookup import lookup
from specjax.drafters.model import model as model_drafter
from specjax.models import hf
from specjax.models.transformer import forward, transformer
from specjax.types import Array

PROMPTS = [
    "import os",
    "def f(a, b):\n    return",
    "x",
    "class Array:\n    tokens: Array  # [B]\n" * 6,
]
LAWS: dict[str, Any] = {
    "temperature": [0.0, 1.0, 0.7, 1.3],
    "top_k": [0, 0, 20, 0],
    "top_p": [1.0, 1.0, 1.0, 0.9],
    "min_p": [0.0, 0.05, 0.0, 0.0],
    "seed": [0, 1, 2, 1],
    "max_new_tokens": [24, 30, 17, 21],
}
UNTRAINED = ("lookup", "ngram")
SLOW = (
    "recycling",
    "jacobi",
    "lookahead",
    "ngrammys",
    "quantized",
    "reference",
    "retrieval",
    "suffix",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> specjax.LanguageModel:
    path = tmp_path_factory.mktemp("models")
    save_model(path / "target")
    save_model(path / "draft", seed=1)
    return specjax.load(path / "target", path / "draft")


@pytest.fixture(scope="module")
def alone(model: specjax.LanguageModel) -> list[specjax.Generation]:
    """Each prompt by itself, plainly."""
    return [
        specjax.generate(model, prompt, None, **{name: of[i] for name, of in LAWS.items()})
        for i, prompt in enumerate(PROMPTS)
    ]


def logits_of(model: specjax.LanguageModel, tokens: np.ndarray) -> Array:
    """[T, V] of one teacher-forced pass, unwarped."""
    models = model.checkpoints
    padded = np.zeros((1, CONTEXT), np.int32)
    padded[0, : len(tokens)] = tokens
    return _forward(models.target, models.target_params, padded)[0, : len(tokens)]


@functools.partial(jax.jit, static_argnums=0)
def _forward(target: Any, params: Any, tokens: np.ndarray) -> Array:
    return forward(target, params, tokens).logits


def assert_same(
    model: specjax.LanguageModel, prompt: str, i: int, found: list[int], expected: list[int]
) -> None:
    """Equal tokens; or else a tie in float32, whose margin is shown."""
    if found == expected:
        return
    at = next(j for j, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b)
    before = np.concatenate([model.encode(prompt), expected[:at]]).astype(np.int32)
    law = sampling.sampling(
        1, *(LAWS[name][i] for name in ("temperature", "top_k", "top_p", "min_p"))
    )
    score = sampling.warp(logits_of(model, before)[None, -1:], law)[0, 0]
    keys = generation._keys(np.array([LAWS["seed"][i]]), np.array([0]))
    noise = sampling.shared_noise(
        sampling.streams(keys),
        SimpleNamespace(sampling=law),  # type: ignore[arg-type]
        jnp.array([[len(before)]]),
        len(score),
    )
    score = score + noise[0, 0]
    margin = float(abs(score[found[at]] - score[expected[at]]))
    print(f"{prompt!r}, token {at}: {found[at]} for {expected[at]}, margin {margin:.2e}")
    assert margin < 1e-4, f"token {at} of {prompt!r} is {found[at]}, not {expected[at]}"


# ------------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    "drafter",
    ["auto", *UNTRAINED, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
def test_a_text_depends_on_prompt_seed_and_law_alone(
    model: specjax.LanguageModel, alone: list[specjax.Generation], drafter: str, tmp_path: Path
) -> None:
    """Greedy and sampled rows, in one batch or in two, by any drafter."""
    options = presets.DEFAULTS
    if drafter in ("reference", "retrieval", "suffix"):
        tokens = [np.array(each.tokens[0], np.int32) for each in alone]
        fingerprint = corpora.fingerprint(model.checkpoints.tokenizer.get_vocab())
        corpora.save(corpora.corpus(tokens, 300, tokenizer=fingerprint), tmp_path / "corpus")
        options = presets.Options(corpus=str(tmp_path / "corpus"))
    for batch_size in (4, 3) if drafter == "lookup" else (4,):
        found = specjax.generate(
            model, PROMPTS, drafter, **LAWS, batch_size=batch_size, options=options
        )
        for i, prompt in enumerate(PROMPTS):
            assert_same(model, prompt, i, found.tokens[i], alone[i].tokens[0])
            if found.tokens[i] == alone[i].tokens[0]:
                assert found.texts[i] == alone[i].texts[0]
                assert found.finish_reasons[i] == alone[i].finish_reasons[0]
    assert found.statistics.num_drafted > 0


def test_a_drafter_of_ones_own(
    model: specjax.LanguageModel, alone: list[specjax.Generation]
) -> None:
    models = model.checkpoints
    drafts = models.drafts["draft"]
    built = model_drafter(drafts.model, grow.chain(2, grow.coupled()))  # type: ignore[arg-type]
    found = specjax.generate(model, PROMPTS, built, drafter_params=drafts.params, **LAWS)
    for i, prompt in enumerate(PROMPTS):
        assert_same(model, prompt, i, found.tokens[i], alone[i].tokens[0])
    spec = {"call": "specjax.drafters.lookup.lookup", "num_tokens": 2}
    assert model.decoder(spec)[0].proposal == lookup(2).proposal
    assert model.decoder("model", "rejection")[0].lossless
    assert not model.decoder("model", "rejection")[0].drafter_invariant
    # The same request is the same program; greedy rows have one of their own only where trees grow.
    assert model.decoder("lookup", is_greedy=True)[0] is model.decoder("lookup")[0]
    assert model.decoder("model", is_greedy=True)[0] is not model.decoder("model")[0]


def test_log_probabilities_are_those_of_a_teacher_forced_pass(
    model: specjax.LanguageModel,
) -> None:
    """Of the target's own law: before temperature and truncation, whoever drafted."""
    found = specjax.generate(model, PROMPTS, "lookup", **LAWS, logprobs=3)
    assert found.logprobs is not None
    for prompt, tokens, told in zip(PROMPTS, found.tokens, found.logprobs, strict=True):
        prefix = model.encode(prompt)
        whole = np.concatenate([prefix, tokens]).astype(np.int32)
        law = np.asarray(jax.nn.log_softmax(logits_of(model, whole)))[len(prefix) - 1 : -1]
        own = np.take_along_axis(law, np.array(tokens)[:, None], 1)[:, 0]
        np.testing.assert_allclose(told.tokens, own, atol=1e-4)
        assert told.top_ids.shape == told.top.shape == (len(tokens), 3)
        np.testing.assert_allclose(told.top, -np.sort(-law, 1)[:, :3], atol=1e-4)
        named = np.take_along_axis(law, told.top_ids, 1)
        np.testing.assert_allclose(told.top, named, atol=1e-4)
    assert specjax.generate(model, PROMPTS, "lookup", **LAWS).logprobs is None


@pytest.mark.slow
def test_log_probabilities_of_nothing_else(model: specjax.LanguageModel) -> None:
    only = specjax.generate(model, PROMPTS[0], None, logprobs=0, max_new_tokens=3).logprobs
    assert only is not None
    assert (only[0].tokens.shape, only[0].top.shape) == ((3,), (3, 0))


def test_samples_have_keys_of_their_own(model: specjax.LanguageModel) -> None:
    law: Any = {"temperature": 1.0, "max_new_tokens": 12}
    found = specjax.generate(model, PROMPTS[:2], "lookup", num_samples=2, seed=[5, 6], **law)
    assert len({tuple(tokens) for tokens in found.tokens}) == len(found.texts) == 4
    for seed, prompt in ((5, 0), (6, 1)):
        for sample in (0, 1):
            one = specjax.generate(
                model, PROMPTS[prompt], None, seed=seed, first_sample=sample, **law
            )
            assert one.tokens[0] == found.tokens[2 * prompt + sample]
    # One seed means one text, wherever it stands.
    many = specjax.generate(model, [PROMPTS[0], *PROMPTS[:3]], "lookup", seed=5, **law)
    assert many.tokens[0] == many.tokens[1] == found.tokens[0]


def test_tokens_are_prompts_too(model: specjax.LanguageModel) -> None:
    text = specjax.generate(model, PROMPTS[1], None, max_new_tokens=5)
    ids = model.encode(PROMPTS[1])
    for prompt in (ids, ids.tolist(), [ids.tolist()]):
        assert specjax.generate(model, prompt, None, max_new_tokens=5).tokens == text.tokens


def test_a_tokenizer_may_have_a_token_more(model: specjax.LanguageModel, tmp_path: Path) -> None:
    """As Gemma 3's has for images. Whoever writes it is told."""
    saved = tmp_path / "model"
    shutil.copytree(model.directory, saved)
    tokenizer = tokenizers.load(saved)
    tokenizer.add_special_tokens(["<image>"])
    tokenizers.save(tokenizer, saved)
    longer = specjax.load(saved)
    assert longer.encode("x").tolist() == model.encode("x").tolist()
    refused(lambda: longer.encode("x<image>"), "token ids .* to 300; need ids below 300")


# ------------------------------------------------------------------------------------ where it ends


def _inside(text: str) -> str:
    """Some characters from the middle of a text, that occur nowhere before."""
    for size in range(2, len(text)):
        for start in range(len(text) // 3, len(text) - size):
            found = text[start : start + size]
            if text.find(found) == start and "\ufffd" not in found:
                return found
    raise AssertionError(text)


def test_stop_strings_end_texts_wherever_they_lie(
    model: specjax.LanguageModel, alone: list[specjax.Generation]
) -> None:
    stop = [_inside(each.texts[0]) for each in alone[1:3]] + ["never written"]
    results = [
        specjax.generate(model, PROMPTS, drafter, **LAWS, stop=stop, steps_per_call=steps)
        for drafter, steps in (("ngram", 0), ("lookup", 0), ("lookup", 1), ("lookup", 100))
    ]
    for found in results:
        assert found[:5] == results[0][:5]
    decode = model.checkpoints.tokenizer.decode
    for i, whole in enumerate(alone):
        text, tokens = results[0].texts[i], results[0].tokens[i]
        met = [(whole.texts[0].find(each), each) for each in stop if each in whole.texts[0]]
        if not met:
            assert (text, tokens) == (whole.texts[0], whole.tokens[0])
            continue
        at, string = min(met)
        assert (results[0].finish_reasons[i], results[0].stop_reasons[i]) == ("stop", string)
        assert text == whole.texts[0][:at]
        # The last token is the one that completed the stop string.
        assert tokens == whole.tokens[0][: len(tokens)]
        assert string in decode(tokens)
        assert string not in decode(tokens[:-1])
    assert results[0].finish_reasons.count("stop") >= 2


def test_any_of_several_ends_ends_a_text(model: specjax.LanguageModel, tmp_path: Path) -> None:
    saved = tmp_path / "model"
    shutil.copytree(model.directory, saved)
    law: Any = {"max_new_tokens": 20, "temperature": 1.0, "seed": 2}
    tokens = specjax.generate(model, PROMPTS[1], None, **law).tokens[0]
    end = next(token for token in tokens[3:] if token not in tokens[:3])
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, end]}))
    found = specjax.generate(specjax.load(saved), PROMPTS[1], **law)
    assert found.tokens[0] == tokens[: tokens.index(end) + 1]
    assert (found.finish_reasons, found.stop_reasons) == (["stop"], [end])


def test_a_full_context_ends_a_text(model: specjax.LanguageModel) -> None:
    prompt = np.arange(CONTEXT - 3, dtype=np.int32) % 300
    found = specjax.generate(model, prompt, None, max_new_tokens=50)
    assert len(found.tokens[0]) <= 3
    assert found.finish_reasons == ["length" if found.tokens[0][-1] else "stop"]


def test_streams_what_it_returns(model: specjax.LanguageModel) -> None:
    """Random bytes too, of which characters are made; and the beginnings of stop strings."""
    pieces: dict[int, list[str]] = {i: [] for i in range(len(PROMPTS))}
    plain = specjax.generate(model, PROMPTS, "lookup", **LAWS)
    stop = [_inside(plain.texts[1])]
    found = specjax.generate(
        model, PROMPTS, "lookup", **LAWS, stop=stop, stream=lambda i, text: pieces[i].append(text)
    )
    assert ["".join(pieces[i]) for i in range(len(PROMPTS))] == found.texts
    assert found.texts[1] == plain.texts[1].split(stop[0])[0]
    assert all(piece for of in pieces.values() for piece in of)
    assert max(map(len, pieces.values())) > 2


def test_on_batch_is_told_each_batch(model: specjax.LanguageModel) -> None:
    told: list[tuple[int, list[str]]] = []
    found = specjax.generate(
        model,
        [*PROMPTS, *PROMPTS[:2]],
        "lookup",
        batch_size=4,
        on_batch=lambda first, batch: told.append((first, batch.texts)),
    )
    assert told == [(0, found.texts[:4]), (4, found.texts[4:])]
    assert found.texts[4:] == found.texts[:2]


# ----------------------------------------------------------------------------------- conversations


def test_conversations_go_through_the_template(
    model: specjax.LanguageModel, tmp_path: Path
) -> None:
    chat = tmp_path / "chat"
    shutil.copytree(model.directory, chat)
    (chat / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (chat / "tokenizer_config.json").write_text(json.dumps({"eos_token": tokenizers.END_OF_TEXT}))
    talker = specjax.load(chat)
    conversation = [
        {"role": "user", "content": "Hé?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "x"},
    ]
    end = tokenizers.END_OF_TEXT
    text = f"<user>Hé?{end}<assistant>Yes.{end}<user>x{end}<assistant>"
    found = specjax.generate(talker, conversation, None, max_new_tokens=6)
    several = specjax.generate(talker, [conversation], None, max_new_tokens=6)
    assert found.tokens == several.tokens
    assert found.tokens == specjax.generate(model, text, None, max_new_tokens=6).tokens
    assert 0 in talker.encode(conversation)  # the special token, not its characters
    shouted = talker.encode(conversation, {"eos_token": "!"})
    assert shouted.tolist() == model.encode(text.replace(end, "!")).tolist()
    refused(
        lambda: specjax.generate(model, conversation),
        r"target has no chat template but got 3 message\(s\); need a prompt of text",
    )


# ------------------------------------------------------------------------------------ what it takes


def test_a_similar_call_compiles_nothing(
    model: specjax.LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    first = specjax.generate(model, PROMPTS[:3], "ngram", max_new_tokens=20, logprobs=1)
    assert first.statistics.seconds_compile > 0
    longer = PROMPTS[1] + " other words"
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        second = specjax.generate(
            model,
            [longer, "y", PROMPTS[0], PROMPTS[1]],
            "ngram",
            max_new_tokens=[9, 10, 11, 30],
            temperature=0.0,
            seed=[4, 4, 4, 9],
            logprobs=1,
            stop=["never written"],
        )
    compiled = [
        r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage()
    ]
    assert compiled == []
    assert second.statistics.seconds_compile == 0
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        jax.jit(lambda x: x + 1)(np.ones(3))  # so the log does tell
    assert any("Finished XLA compilation" in r.getMessage() for r in caplog.records)


def test_statistics_add_up(model: specjax.LanguageModel) -> None:
    plain = specjax.generate(model, PROMPTS, None, **LAWS)
    s = plain.statistics
    assert s.num_tokens == s.num_passes == sum(map(len, plain.tokens))
    assert (s.num_drafted, s.acceptance_rate, s.tokens_per_pass) == (0, 0.0, 1.0)
    assert min(s.seconds_to_first_token, s.seconds) > 0
    # Every row's first token belongs to the first step.
    assert s.tokens_per_second == pytest.approx((s.num_tokens - len(PROMPTS)) / s.seconds)
    fast = specjax.generate(model, PROMPTS, "lookup", **LAWS).statistics
    assert fast.num_tokens == s.num_tokens
    assert fast.tokens_per_pass == pytest.approx(fast.num_tokens / fast.num_passes)
    accepted = fast.num_tokens - fast.num_passes
    assert fast.acceptance_rate == pytest.approx(accepted / fast.num_drafted)


# ------------------------------------------------------------------------------------- bad input


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("compiled before the input was checked")


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("x =" * CONTEXT, {}, rf"Prompt 1 of 1 has \d+ tokens; the context is {CONTEXT}"),
        (["x", ""], {}, "Prompt 1 of 1 is empty"),
        ([], {}, "list of prompts is empty"),
        ([[]], {}, "A prompt is empty"),
        ([300], {}, "token ids 300 to 300; need ids below 300"),
        ([[1.5]], {}, r"A prompt is \[1.5\]; need text, token ids or messages"),
        ("x", {"min_p": 1.5}, "min_p is 1.5; it must be from 0 to 1"),
        ("x", {"top_p": -0.5}, "top_p is -0.5; it must be from 0 to 1"),
        ("x", {"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        (["x", "y"], {"temperature": [1, 1, 1]}, r"shape \(3,\) for 2 row\(s\); need one number"),
        (["x", "y"], {"seed": [1]}, r"seed has shape \(1,\) for 2 prompt\(s\); need one number"),
        ("x", {"seed": -1}, "seed is -1; it must be from 0"),
        ("x", {"seed": 0.5}, "seed is 0.5; need whole numbers"),
        ("x", {"max_new_tokens": 0}, "max_new_tokens is 0; it must be from 1"),
        ("x", {"stop": ["a", ""]}, "Stop string 2 of 2 is empty"),
        ("x", {"stop": "end"}, "stop strings are the string 'end'; need a list"),
        ("x", {"logprobs": -1}, "logprobs is -1; it must be 0 to 300"),
        ("x", {"logprobs": 301}, "logprobs is 301; it must be 0 to 300"),
        ("x", {"num_samples": 0}, "num_samples is 0; it must be at least 1"),
        ("x", {"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ("x", {"steps_per_call": -1}, "steps_per_call is -1; it must be at least 0"),
        ("x", {"drafter": "guess"}, "drafter is 'guess'; need auto or one of"),
        ("x", {"drafter": "eagle"}, "drafter is 'eagle' but the draft holds one for 'model'"),
        ("x", {"drafter": "suffix"}, "drafter is 'suffix' but no corpus was given"),
        ("x", {"verifier": "hope"}, "'specjax.verifiers.hope.hope' names no function"),
        ("x", {"verifier": "block", "drafter": "model", "temperature": 1.0}, "proposes law"),
    ],
    ids=str,
)
def test_refuses(
    model: specjax.LanguageModel,
    given: Any,
    options: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "prefill", _never)
    if options.get("verifier") == "block":
        options = {**options, "options": presets.Options(choose="coupled")}
    refused(lambda: specjax.generate(model, given, **options), message)


def test_greedy_rows_may_have_truncations(model: specjax.LanguageModel) -> None:
    plain = specjax.generate(model, "x", max_new_tokens=4)
    cut = specjax.generate(model, "x", max_new_tokens=4, top_k=2, top_p=0.5, min_p=0.5)
    assert cut.tokens == plain.tokens


def test_load_refuses(tmp_path: Path) -> None:
    refused(lambda: specjax.load(""), "No target was given")
    refused(lambda: specjax.load(tmp_path / "nowhere"), "nowhere is not a directory")
    saved = Path(save_model(tmp_path / "model"))
    path = saved / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"architectures": ["MambaForCausalLM"]}))
    refused(lambda: specjax.load(saved), "MambaForCausalLM.*supported: LlamaForCausalLM, Mistral")
    path.write_text(json.dumps(raw | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    refused(lambda: specjax.load(saved), "quantization_config, 'gptq'; need weights in float32")


# --------------------------------------------------------------------------------- other families


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> specjax.LanguageModel:
    """Like Gemma 2, of windows shorter than a draft's tree is deep."""
    path = tmp_path_factory.mktemp("windowed")
    save_model(path / "llama", num_layers=2)
    config = dataclasses.replace(
        hf.load_config(path / "llama"),
        family="gemma2",
        windows=(3, 0),
        attention_scale=0.3,
        attention_softcap=4.0,
        logit_softcap=6.0,
    )
    params = jax.jit(transformer(config).init)(jax.random.key(0))
    hf.save(path / "model", config, jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, params))
    shutil.copy(path / "llama" / "tokenizer.json", path / "model")
    return specjax.load(path / "model")


@pytest.mark.parametrize(
    ("drafter", "options"),
    [
        ("lookup", presets.DEFAULTS),
        pytest.param("recycling", presets.DEFAULTS, marks=pytest.mark.slow),
        pytest.param("streaming", presets.DEFAULTS, marks=pytest.mark.slow),
        pytest.param(
            "layer_skip",
            presets.Options(layers=(0,), tree=(-1, 0, 0, 1, 1, 2)),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_windows_hide_the_same_from_every_draft(
    windowed: specjax.LanguageModel, drafter: str, options: presets.Options
) -> None:
    plain = specjax.generate(windowed, PROMPTS, None, **LAWS)
    found = specjax.generate(windowed, PROMPTS, drafter, **LAWS, options=options)
    for i, prompt in enumerate(PROMPTS):
        assert_same(windowed, prompt, i, found.tokens[i], plain.tokens[i])
    # And plain decoding's own choice is that of one pass over the whole text.
    whole = np.concatenate([windowed.encode(PROMPTS[0]), plain.tokens[0]])
    logits = logits_of(windowed, whole)[-len(plain.tokens[0]) - 1 : -1]
    assert jnp.argmax(logits, -1).tolist() == plain.tokens[0]


def test_attention_within_windows_is_not_told(windowed: specjax.LanguageModel) -> None:
    spec = {
        "call": "specjax.drafters.sparse.sparse",
        "target": "@target",
        "view": {
            "call": "specjax.drafters.sparse.snapkv",
            **{"budget": 4, "window": 4, "refresh": 8},
        },
        "build": "@build",
    }
    refused(lambda: windowed.decoder(spec), "pass a whole transformer without windows")
