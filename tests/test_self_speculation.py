"""Drafts by the target itself: fewer layers, fewer slots, fewer bits, and which layers may go."""

import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from directories import ROOT, save_model
from ml_collections import ConfigDict

from configs.train import skip
from specjax import cache as caches
from specjax import calibration, engine, exactness, sampling, testing, theory
from specjax.build import build
from specjax.drafters import grow
from specjax.drafters.layer_skip import layer_skip
from specjax.drafters.none import none
from specjax.drafters.quantized import int8, quantized
from specjax.drafters.sparse import most_attended, snapkv, sparse, streaming
from specjax.kernels.linear import Int8, quantize
from specjax.laboratory import Pair, Parts, tabular_pair
from specjax.models import layers
from specjax.models.streaming import streaming as streaming_model
from specjax.models.transformer import TransformerConfig, transformer
from specjax.types import (
    Array,
    Block,
    Cache,
    Decoder,
    DecodeState,
    Drafter,
    Model,
    ModelOutput,
    Params,
    PyTree,
    Verifier,
)
from specjax.verifiers.match import match
from specjax.verifiers.rejection import rejection
from train import calibrate

assert ROOT.exists()  # `directories` has made the scripts importable

LAYERS, SLOTS, VOCAB = 3, 24, 11
CHAIN = grow.chain(3, grow.best())
SHAPE: dict[str, Any] = {"num_layers": LAYERS, "num_heads": 4, "num_kv_heads": 2}
TARGET, WEIGHTS = testing.tiny_model(VOCAB, scale=12.0, **SHAPE)
LENGTHS = np.array([20, 13, 7, 1])  # of the rows
B = len(LENGTHS)
TEXT = np.random.default_rng(0).integers(0, VOCAB, (B, SLOTS)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(SLOTS), TEXT.shape)
CAUSAL = np.broadcast_to(np.tril(np.ones((SLOTS, SLOTS), bool)), (B, SLOTS, SLOTS))
PARAMS = Params(WEIGHTS, ())
APPLY = jax.jit(TARGET.apply)


def whole_text(model: Model, weights: PyTree) -> ModelOutput:
    return jax.jit(model.apply)(weights, TEXT, POSITIONS, CAUSAL, model.init_cache(B, 0))[0]


def text_until(drafter: Drafter) -> tuple[Decoder, DecodeState]:
    """Rows of TEXT, LENGTHS of them, as prefill leaves them."""
    decoder = engine.decoder(TARGET, drafter, match())
    state = engine.prefill(
        *(decoder, PARAMS, jax.random.split(jax.random.key(0), B), sampling.sampling(B)),
        *(TEXT, LENGTHS, np.full(B, SLOTS), SLOTS),
    )
    return decoder, state


@pytest.fixture(scope="module")
def plain() -> DecodeState:
    """The same without a drafter's state."""
    return text_until(none())[1]


@pytest.fixture(scope="module")
def block() -> Block:
    """Keys and values of the whole texts, each token seeing all before it."""
    return APPLY(WEIGHTS, TEXT, POSITIONS, CAUSAL, TARGET.init_cache(B, 0))[1]


def greedy_chain(logits_of: Callable[[np.ndarray], Array]) -> np.ndarray:
    """The likeliest tokens [B, 4] after each text, root first; logits_of: [B, 4] -> [B, 4, V]."""
    tokens = np.zeros((B, 4), np.int32)
    tokens[:, 0] = TEXT[np.arange(B), LENGTHS - 1]
    for depth in range(3):
        tokens[:, depth + 1] = np.asarray(logits_of(tokens)[:, depth].argmax(-1))
    return tokens


def naive_chain(apply: Callable, seen: Callable[[int, int], bool], block: Block) -> np.ndarray:
    """The same through masks over whole texts; seen: (position, earlier one) -> is it visible."""
    positions = LENGTHS[:, None] - 1 + np.arange(4)
    sees = np.zeros((B, 4, SLOTS + 4), bool)
    for row in range(B):
        for i, here in enumerate(positions[row]):
            for j in range(LENGTHS[row] - 1):
                sees[row, i, j] = seen(here, j)
            for j in range(i + 1):
                sees[row, i, SLOTS + j] = seen(here, positions[row, j])
    empty = Cache(
        *(tuple(x[:, :, :0] for x in xs) for xs in (block.keys, block.values)),
        jnp.zeros([B], jnp.int32),
    )
    return greedy_chain(lambda tokens: apply(tokens, positions, sees, empty, block)[0].logits)


def target_apply(*arguments: Any) -> tuple[ModelOutput, Block]:
    return APPLY(WEIGHTS, *arguments)


def proposed(drafter: Drafter, state: DecodeState, believed: PyTree) -> np.ndarray:
    draft, _ = jax.jit(drafter.propose)(PARAMS, state.rng_keys, believed, state.context)
    return np.asarray(draft.tokens)


def everything(here: int, earlier: int) -> bool:
    del here, earlier
    return True


# ------------------------------------------------------------------------------- exact, whatever q


def blurred(model: Model) -> Model:
    """The same model, less sure of itself."""

    def apply(*arguments: Any) -> tuple[ModelOutput, Block]:
        output, block = model.apply(*arguments)
        return output.replace(logits=output.logits * 0.4), block

    return model._replace(apply=apply)


@pytest.mark.parametrize(
    ("drafter", "rule"),
    [
        ("sparse", rejection),
        pytest.param("quantized", rejection, marks=pytest.mark.slow),
        pytest.param("sparse", match, marks=pytest.mark.slow),
        pytest.param("quantized", match, marks=pytest.mark.slow),
    ],
)
def test_enumeration(drafter: str, rule: Callable[[], Verifier]) -> None:
    tree = grow.static((-1, 0, 0, 1), grow.without_replacement())

    def factory(pair: Pair) -> Parts:
        if drafter == "sparse":
            return Parts(sparse(blurred(pair.target), streaming(1, 2), tree), (), rule())
        return Parts(quantized(pair.target, tree), int8(pair.draft_params), rule())

    check = exactness.enumeration(factory, tabular_pair())
    assert check.passed, check.verdict
    assert check.figures["expected_tokens"][0] > 1.2


WHOLE = {
    "all layers": layer_skip(TARGET, range(LAYERS), CHAIN),
    "streaming all slots": sparse(TARGET, streaming(2, SLOTS - 2), CHAIN),
    "snapkv all slots": sparse(TARGET, snapkv(SLOTS - 3, 3, 4), CHAIN),
}


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x != "all layers")) for x in WHOLE]
)
def test_the_whole_target_is_its_own_perfect_draft(name: str) -> None:
    """Four tokens a pass at temperature 0, up to the end."""
    decoder, state = text_until(WHOLE[name])
    done = engine.advance(decoder, PARAMS, state, SLOTS)
    assert (done.context.length == SLOTS).all()
    np.testing.assert_array_equal(done.num_steps, -(-(SLOTS - LENGTHS) // 4))


def test_views_of_everything_are_the_whole_target(plain: DecodeState, block: Block) -> None:
    expected = naive_chain(target_apply, everything, block)
    for drafter in WHOLE.values():
        drafts = proposed(drafter, plain, drafter.init(B, SLOTS))
        np.testing.assert_array_equal(drafts, expected)


# ------------------------------------------------------------------------------------- fewer layers


def smaller(which: Sequence[int]) -> tuple[Model, PyTree]:
    """A model built of nothing but these layers."""
    config = TransformerConfig(VOCAB, 16, 24, len(which), 4, 2, 8, tie_embeddings=False)
    names = {f"layers_{i}": f"layers_{layer}" for i, layer in enumerate(which)}
    others = {name: x for name, x in WEIGHTS.items() if not name.startswith("layers_")}
    return transformer(config), others | {name: WEIGHTS[of] for name, of in names.items()}


def test_some_layers_are_a_smaller_model() -> None:
    assert TARGET.stack is not None
    for which in ((0, 2), range(1)):
        part, (model, weights) = TARGET.stack.only(which), smaller(which)
        assert len(part.init_cache(1, 4).keys) == len(which)
        np.testing.assert_array_equal(
            whole_text(part, WEIGHTS).logits, whole_text(model, weights).logits
        )


def test_layer_skip_drafts_over_the_targets_own_history(plain: DecodeState, block: Block) -> None:
    which = (0, 2)
    model, weights = smaller(which)
    keys, values = (tuple(x[i] for i in which) for x in (block.keys, block.values))
    apply = jax.jit(functools.partial(model.apply, weights))
    expected = naive_chain(apply, everything, Block(keys, values, block.positions))
    drafts = proposed(layer_skip(TARGET, which, CHAIN), plain, ())
    np.testing.assert_array_equal(drafts, expected)
    assert (drafts != naive_chain(target_apply, everything, block)).any()


def test_gates_are_layers() -> None:
    stack = TARGET.stack
    assert stack is not None
    gated = jax.jit(stack.gated)
    for which in ((0, 1, 2), (0, 2)):
        gates = np.isin(np.arange(LAYERS), which)
        empty = TARGET.init_cache(B, 0)
        output, _ = gated(gates, WEIGHTS, TEXT, POSITIONS, CAUSAL, empty)
        expected = whole_text(stack.only(which), WEIGHTS).logits
        np.testing.assert_allclose(output.logits, expected, atol=1e-5)
    assert gated._cache_size() == 1


# -------------------------------------------------------------------------------------- fewer slots


@pytest.mark.parametrize(("num_sinks", "window"), [(2, 4), (0, 3)])
def test_streaming_sees_sinks_and_a_window(
    num_sinks: int, window: int, plain: DecodeState, block: Block
) -> None:
    def seen(here: int, earlier: int) -> bool:
        return earlier < num_sinks or here - earlier <= window

    expected = naive_chain(target_apply, seen, block)
    drafts = proposed(sparse(TARGET, streaming(num_sinks, window), CHAIN), plain, ())
    np.testing.assert_array_equal(drafts, expected)
    assert (expected != naive_chain(target_apply, everything, block)).any()


def test_a_streaming_model_does_not_care_how_a_text_is_cut() -> None:
    """All at once without a cache, and in chunks through one: law 6 for whoever drafts with it."""
    model = streaming_model(TARGET, 2, 4)
    apply = jax.jit(model.apply)
    at = np.arange(SLOTS)
    sees = CAUSAL & ((at < 2) | (at[:, None] - at <= 4))
    masked, _ = APPLY(WEIGHTS, TEXT, POSITIONS, sees, TARGET.init_cache(B, 0))
    np.testing.assert_allclose(whole_text(model, WEIGHTS).logits, masked.logits, atol=1e-4)
    cache, start = model.init_cache(B, SLOTS), 0
    for width in (1, 8, 1, 8, 6):
        here = slice(start, start + width)
        output, block = apply(
            WEIGHTS, TEXT[:, here], POSITIONS[:, here], CAUSAL[:, :width, :width], cache
        )
        np.testing.assert_allclose(output.logits, masked.logits[:, here], atol=1e-4)
        path = jnp.broadcast_to(jnp.arange(width), (B, width))
        cache, start = caches.commit(cache, block, path, jnp.full([B], width)), start + width


def naive_attention(tokens: np.ndarray) -> np.ndarray:
    """Attention [L, heads, N, N] of a text [N], each token over all before it and itself."""
    x = np.asarray(WEIGHTS["embed_tokens"], np.float64)[tokens]
    n = len(tokens)
    angle = np.arange(n)[:, None] * layers.rope_frequencies(8, 10000.0, None)

    def norm(x: np.ndarray, of: PyTree) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * np.asarray(of["weight"])

    def heads(x: np.ndarray, w: Array) -> np.ndarray:
        return (x @ np.asarray(w).T).reshape(n, -1, 8).swapaxes(0, 1)  # [heads, N, 8]

    def rotated(x: np.ndarray) -> np.ndarray:
        a, b = x[..., :4], x[..., 4:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    found = []
    for i in range(LAYERS):
        of = WEIGHTS[f"layers_{i}"]
        h, a = norm(x, of["input_layernorm"]), of["self_attn"]
        q, k, v = rotated(heads(h, a["q_proj"])), heads(h, a["k_proj"]), heads(h, a["v_proj"])
        k, v = np.repeat(rotated(k), 2, 0), np.repeat(v, 2, 0)
        score = np.where(np.tril(np.ones((n, n), bool)), q @ k.swapaxes(1, 2) / 8**0.5, -np.inf)
        weight = np.exp(score - score.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        found.append(weight)
        x = x + (weight @ v).swapaxes(0, 1).reshape(n, -1) @ np.asarray(a["o_proj"]).T
        h, m = norm(x, of["post_attention_layernorm"]), of["mlp"]
        gate = h @ np.asarray(m["gate_proj"]).T
        up = h @ np.asarray(m["up_proj"]).T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ np.asarray(m["down_proj"]).T
    return np.stack(found)


BUDGET, WINDOW, REFRESH, POOL = 4, 3, 5, 3


def naive_slots(tokens: np.ndarray) -> np.ndarray:
    """[L, K, C] for a text whose last token is pending."""
    cached = (len(tokens) - 1) // REFRESH * REFRESH
    start = max(cached - WINDOW, 0)
    slots = np.tile(np.arange(BUDGET), (LAYERS, 2, 1))
    if start <= BUDGET:
        return slots
    weight = naive_attention(tokens[:cached])[:, :, start:].sum(2)  # [L, heads, cached]
    weight = weight.reshape(LAYERS, 2, 2, cached).sum(2)
    weight[..., start:] = 0
    for layer in range(LAYERS):
        for head in range(2):
            w = weight[layer, head]
            pooled = [max(w[max(i - POOL // 2, 0) : i + POOL // 2 + 1]) for i in range(start)]
            best = np.argsort(-np.array(pooled), kind="stable")[:BUDGET]
            slots[layer, head] = np.sort(best)
    return slots


SNAPKV = sparse(TARGET, snapkv(BUDGET, WINDOW, REFRESH, POOL), CHAIN)


@pytest.fixture(scope="module")
def chosen() -> tuple[Decoder, DecodeState]:
    return text_until(SNAPKV)


def test_snapkv_chooses_what_the_latest_tokens_attend_to(
    chosen: tuple[Decoder, DecodeState],
) -> None:
    believed = chosen[1].drafter
    expected = [naive_slots(text[:n]) for text, n in zip(TEXT, LENGTHS, strict=True)]
    np.testing.assert_array_equal(believed.slots, expected)
    np.testing.assert_array_equal(believed.num_cached, [15, 10, 5, 0])
    assert len({x.tobytes() for x in expected[0].reshape(-1, BUDGET)}) > 2, "heads differ"
    assert (expected[2] == np.arange(BUDGET)).all(), "too short to choose"


def test_snapkv_drafts_over_its_slots_and_the_latest(
    chosen: tuple[Decoder, DecodeState], block: Block
) -> None:
    """Every head over its own slots, picked by hand."""
    slots = np.asarray(chosen[1].drafter.slots)
    most = BUDGET + WINDOW
    keys, values = (np.zeros((LAYERS, B, 2, most, 8), np.float32) for _ in range(2))
    length = np.minimum(LENGTHS - 1, most)
    for row, cached in enumerate(LENGTHS - 1):
        for layer in range(LAYERS):
            for head in range(2):
                if cached <= most:
                    seen = list(range(cached))
                else:
                    seen = [*slots[row, layer, head], *range(cached - WINDOW, cached)]
                assert len(set(seen)) == length[row]
                for to, of in ((keys, block.keys), (values, block.values)):
                    to[layer, row, head, : len(seen)] = np.asarray(of[layer])[row, head, seen]
    view = Cache(tuple(keys), tuple(values), length)
    positions = LENGTHS[:, None] - 1 + np.arange(4)

    def logits(tokens: np.ndarray) -> Array:
        return target_apply(tokens, positions, CAUSAL[:, :4, :4], view)[0].logits

    expected = greedy_chain(logits)
    np.testing.assert_array_equal(proposed(SNAPKV, chosen[1], chosen[1].drafter), expected)
    assert (expected != naive_chain(target_apply, everything, block)).any()


def test_snapkv_forgets_what_it_chose_on_a_void_text(chosen: tuple[Decoder, DecodeState]) -> None:
    """As inside a cascade: history turns out to be shorter, and then another one."""
    decoder, state = chosen
    force = jax.jit(decoder.force)
    void_text, other = ((TEXT[:, :8] + i) % VOCAB for i in (1, 2))
    void = force(PARAMS, state, void_text, np.full(B, 3))
    moved = np.asarray(void.drafter.num_cached > state.drafter.num_cached)
    assert moved.tolist() == [True, True, False, False]
    context = state.context.replace(
        cache=caches.truncate(void.context.cache, jnp.asarray(LENGTHS - 1))
    )
    for count in (1, 3, 8):
        again = force(PARAMS, void.replace(context=context), other, np.full(B, count))
        expected = force(PARAMS, state, other, np.full(B, count))
        for x, y in zip(*map(jax.tree.leaves, (again.drafter, expected.drafter)), strict=True):
            if count == 1:  # whoever has not come back to where slots were chosen
                x, y = x[1:], y[1:]
            np.testing.assert_array_equal(x, y)


def test_pooling_takes_neighbours_along() -> None:
    weight = jnp.array([0.1, 0.0, 0.0, 0.0, 0.9, 0.0, 0.0, 0.3]).reshape(1, 1, 1, 8)
    for length, pool, expected in ((8, 1, [0, 4, 7]), (8, 3, [3, 4, 5]), (2, 1, [0, 1, 2])):
        found = most_attended(weight, jnp.array([length]), 3, pool)
        assert found.reshape(-1).tolist() == expected


# --------------------------------------------------------------------------------------- fewer bits


def test_int8_is_close_and_reads_its_tables() -> None:
    copy = int8(WEIGHTS)
    leaves = jax.tree.leaves(copy, is_leaf=lambda x: isinstance(x, Int8))
    assert all(isinstance(x, Int8) or x.ndim == 1 for x in leaves)
    exact = np.asarray(whole_text(TARGET, WEIGHTS).logits)
    close = np.asarray(whole_text(TARGET, copy).logits)
    assert 0 < abs(close - exact).max() < 0.15 * exact.std()
    assert (close.argmax(-1) == exact.argmax(-1)).mean() > 0.95
    table = WEIGHTS["embed_tokens"]
    for tokens in (TEXT[:1, :3], TEXT):  # few and many
        rows = layers.embed(quantize(table), jnp.asarray(tokens))
        step = abs(table).max(-1)[tokens] / 127
        assert (abs(rows - table[tokens]).max(-1) <= 0.51 * step).all()


@pytest.mark.slow
def test_quantized_is_nearly_always_accepted() -> None:
    drafter = quantized(TARGET, CHAIN)
    decoder = engine.decoder(TARGET, drafter, match())
    params = Params(WEIGHTS, int8(WEIGHTS))
    b = 32
    prompt = np.random.default_rng(1).integers(0, VOCAB, (b, 4)).astype(np.int32)
    state = engine.decode(
        *(decoder, params, jax.random.split(jax.random.key(1), b), sampling.sampling(b)),
        *(prompt, np.full(b, 4), np.full(b, 20), 20),
    )
    assert state.num_steps.sum() < 1.25 * b * 4  # 16 tokens, at best four a step


# -------------------------------------------------------------------------------- which layers stay

USELESS = (1, 3, 4)


def planted() -> tuple[Model, PyTree]:
    """Six layers, three of which add nothing to the residual."""
    model, weights = testing.tiny_model(VOCAB, num_layers=6, scale=12.0)
    for i in USELESS:
        of = weights[f"layers_{i}"]
        of["self_attn"]["o_proj"] *= 0
        of["mlp"]["down_proj"] *= 0
    return model, weights


@pytest.fixture(scope="module")
def measured() -> tuple[Callable[[Sequence[int]], float], list[int]]:
    model, weights = planted()
    assert model.stack is not None
    traces: list[int] = []
    stack = model.stack

    def gated(*arguments: Any) -> Any:
        traces.append(1)
        return stack.gated(*arguments)

    counted = model._replace(stack=stack._replace(gated=gated))
    return calibration.agreement(counted, weights, TEXT, 12, num_drafted=4), traces


def test_calibration_finds_layers_that_do_nothing(measured: tuple[Callable, list[int]]) -> None:
    measure, traces = measured
    tries = list(calibration.draft_and_verify(measure, 6, num_drafted=4, num_random=8))
    assert len(tries) == len({t.layers for t in tries}) <= 2**6 - 2
    best = max(tries, key=lambda t: t.score)
    assert best.layers == (0, 2, 5)
    assert best.agreement == 1
    assert best.score == pytest.approx(theory.chain_speedup(1, 4, 1 / 2))
    # Guided, it comes there sooner than by chance.
    assert tries.index(best) < 31

    tries = list(calibration.swift(measure, 6, skip_ratio=0.5, guided_every=3))
    assert tries[-1] == ((0, 2, 5), 1.0, 1.0), "ends where that is enough"
    assert all({0, 5} < set(t.layers) and len(t.layers) == 3 for t in tries)
    tries = list(calibration.swift(measure, 6, skip_ratio=0.5, enough=1.1))
    assert len(tries) == 4, "all there are"
    tries = list(calibration.swift(measure, 6, skip_ratio=0.35, enough=1.1, patience=1))
    assert tries[-1].score <= tries[-2].score
    assert len(traces) == 2, "the whole model and one program for all sets"


@pytest.mark.slow
def test_agreement_is_that_of_layer_skip(measured: tuple[Callable, list[int]]) -> None:
    """Chains of four from every fourth token, over the whole model's keys and values."""
    model, weights = planted()
    assert model.stack is not None
    empty = model.init_cache(B, 0)
    output, block = jax.jit(model.apply)(weights, TEXT, POSITIONS, CAUSAL, empty)
    wanted = np.asarray(output.logits.argmax(-1))
    for which in ((2, 5), (0, 2, 4)):
        apply, agree = jax.jit(model.stack.only(which).apply), []
        of_part = [tuple(x[i] for i in which) for x in (block.keys, block.values)]
        for root in range(SLOTS - 12, SLOTS, 4):
            here = slice(root, root + 4)
            cache = Cache(*of_part, jnp.full([B], root))
            drafted, _ = apply(weights, TEXT[:, here], POSITIONS[:, here], CAUSAL[:, :4, :4], cache)
            agree.append(np.asarray(drafted.logits.argmax(-1)) == wanted[:, here])
        assert measured[0](which) == pytest.approx(np.mean(agree))
        assert 0 < np.mean(agree) < 1
    assert measured[0](tuple(range(6))) == 1


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("calibrate") / "target", num_layers=4)


def calibration_config(directory: str, output: Path, **options: Any) -> ConfigDict:
    c = skip.get_config()
    c.update(target=directory, output=str(output), num_texts=2)
    c.sources = (str(ROOT / "specjax" / "types.py"), str(ROOT / "specjax" / "trees.py"))
    for method in c.methods.values():
        method.update(prompt_length=24, max_new_tokens=16, window=12)
    c.update_from_flattened_dict(options)
    return c


@pytest.mark.parametrize(
    ("method", "tries"),
    [("swift", 1), pytest.param("draft_and_verify", 14, marks=pytest.mark.slow)],
)
def test_calibrate_writes_layers_that_layer_skip_reads(
    directory: str, tmp_path: Path, method: str, tries: int
) -> None:
    path = tmp_path / "new" / "layers.json"
    options = {"methods.swift.search.skip_ratio": 0.5}
    calibrate.main(calibration_config(directory, path, method=method, **options))
    found = json.loads(path.read_text())
    assert found["method"] == method
    assert 0 <= found["agreement"] <= 1
    assert found["tries"] == tries
    assert found["text"]["num_texts"] == 2
    spec = {
        "call": "specjax.drafters.layer_skip.layer_skip",
        "target": "@target",
        "layers": {"call": "specjax.calibration.layers", "path": str(path)},
        "build": "@build",
    }
    model, _ = testing.tiny_model(VOCAB, num_layers=4)
    assert build(spec, target=model, build=CHAIN).proposal == CHAIN.proposal
    assert [x.name for x in path.parent.iterdir()] == ["layers.json"]


# ----------------------------------------------------------------------------------------- refusals

TABULAR = tabular_pair().target


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: layer_skip(TARGET, (), CHAIN), ("Layers ()", "0 to 2")),
        (lambda: layer_skip(TARGET, (0, 3), CHAIN), ("Layers (0, 3)", "0 to 2")),
        (lambda: layer_skip(TARGET, (-1, 0), CHAIN), ("Layers (-1, 0)", "0 to 2")),
        (lambda: layer_skip(TARGET, (1, 0), CHAIN), ("Layers (1, 0)", "in order")),
        (lambda: layer_skip(TABULAR, (0,), CHAIN), ("layers (0,)", "whole transformer")),
        (lambda: streaming(-1, 2), ("num_sinks=-1, window=2", "0 and 1")),
        (lambda: streaming(1, 0), ("num_sinks=1, window=0", "0 and 1")),
        (lambda: streaming_model(TARGET, 0, 0), ("num_sinks=0, window=0", "0 and 1")),
        (lambda: snapkv(0, 1, 1), ("budget=0", "at least 1")),
        (lambda: snapkv(1, 1, 1, pool=2), ("pool=2", "odd")),
        (lambda: sparse(TABULAR, snapkv(4, 1, 1), CHAIN), ("4 slots", "streaming()")),
        (
            lambda: sparse(TARGET, streaming(4, 6), CHAIN).init(1, 9),
            ("10 slots", "only 9"),
        ),
        (lambda: sparse(TARGET, snapkv(4, 6, 1), CHAIN).init(1, 9), ("10 slots", "only 9")),
        (lambda: calibration.agreement(TABULAR, (), TEXT, 4, 4), ("without layers",)),
        (lambda: calibration.agreement(TARGET, (), TEXT, 25, 4), ("window of 25 of 24",)),
        (lambda: calibration.agreement(TARGET, (), TEXT, 4, 0), ("chains of 0",)),
        (lambda: list(calibration.swift(len, 9, skip_ratio=0.9)), ("0.9", "8 of 9", "1 to 7")),
        (lambda: list(calibration.swift(len, 9, skip_ratio=0.01)), ("0.01", "0 of 9")),
        (lambda: list(calibration.swift(len, 9, guided_every=0)), ("guided_every is 0",)),
        (lambda: list(calibration.draft_and_verify(len, 1, 4)), ("1 layer", "2")),
        (lambda: list(calibration.draft_and_verify(len, 9, 4, num_tries=0)), ("num_tries is 0",)),
        (lambda: calibration.layers("nowhere.json"), ("nowhere.json", "train/calibrate.py")),
    ],
)
def test_refusals(make: Callable[[], Any], says: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(says[0])) as refused:
        make()
    assert "\n" not in str(refused.value)
    assert all(text in str(refused.value) for text in says), refused.value


def test_calibrate_refuses(directory: str, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"method": "luck"}, "method is 'luck'; need one of draft_and_verify, swift"),
        ({"output": str(tmp_path)}, "is a directory"),
        ({"num_texts": 0}, "0 texts"),
        ({"sources": (str(tmp_path / "none"),)}, "does not exist"),
        ({"methods.swift.prompt_length": 300, "method": "swift"}, "300 tokens"),
        ({"methods.draft_and_verify.window": 99}, "window of 99 of 40"),
    ]
    for options, says in wrong:
        c = calibration_config(directory, tmp_path / "never.json")
        c.update_from_flattened_dict(options)
        with pytest.raises(ValueError, match=says):
            calibrate.main(c)
    assert list(tmp_path.iterdir()) == []
