"""EAGLE's heads: what training unrolls is what drafting does, losses follow their formulas."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from specjax import engine, sampling, testing
from specjax.drafters import grow
from specjax.drafters.eagle import eagle as eagle_drafter
from specjax.models import hf_heads
from specjax.models.eagle import EagleHead, eagle3_head, eagle_head, fused_layers
from specjax.models.transformer import TransformerConfig, forward
from specjax.objectives import Batch
from specjax.objectives.eagle import eagle, eagle3, hass, smooth_l1, unroll
from specjax.types import Array, Params, PyTree
from specjax.verifiers.rejection import rejection

VOCAB_SIZE, WIDTH, DEPTH = 11, 16, 3
TARGET, TARGET_PARAMS = testing.tiny_model(
    VOCAB_SIZE, num_layers=2, scale=12.0, feature_layers=(0, 1)
)
forward_of = jax.jit(lambda params, tokens: forward(TARGET, params, tokens))
SHAPE = {"intermediate_size": 24, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
LAYER = TransformerConfig(vocab_size=VOCAB_SIZE, hidden_size=WIDTH, num_layers=1, **SHAPE)
HEADS = {
    "eagle": eagle_head(LAYER),
    "eagle3": eagle3_head(LAYER, (0, 1)),
    "eagle3 of six tokens": eagle3_head(LAYER, (0, 1), vocabulary=np.array([0, 2, 3, 5, 7, 10])),
}


def uneven(head: EagleHead, seed: int = 5) -> PyTree:
    params = jax.jit(head.init)(jax.random.key(seed))
    return jax.tree.map(lambda x: 20 * x if x.ndim > 1 else x + 0.1, params)


@pytest.mark.parametrize(
    "name", [pytest.param("eagle", marks=pytest.mark.slow), "eagle3 of six tokens"]
)
def test_training_unrolls_what_drafting_does(name: str) -> None:
    """Laws of a drafted chain against those of `unroll` over the text that it continues."""
    head = HEADS[name]
    params = uneven(head)
    drafter = eagle_drafter(TARGET, head, grow.chain(DEPTH, grow.without_replacement()))
    decoder = engine.decoder(TARGET, drafter, rejection())
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, VOCAB_SIZE, (3, 7)).astype(np.int32)
    length = np.array([7, 4, 2], np.int32)
    both = Params(TARGET_PARAMS, params)
    state = engine.prefill(
        *(decoder, both, jax.random.split(jax.random.key(1), 3), sampling.sampling(3, 1.0)),
        *(jnp.asarray(prompt), jnp.asarray(length), jnp.full([3], 20), 20),
    )
    draft, _ = jax.jit(drafter.propose)(both, state.rng_keys, state.drafter, state.context)

    @jax.jit
    def laws(text: Array) -> Array:
        features = forward(TARGET, TARGET_PARAMS, text[:, :-1]).features
        hidden = head.fuse(params, TARGET, features)
        embeddings = TARGET.embed(TARGET_PARAMS, text[:, 1:])
        steps = unroll(head, params, hidden, embeddings, DEPTH)
        logits = [head.unembed(params, TARGET, TARGET_PARAMS, step.hidden) for step in steps]
        return jax.nn.softmax(jnp.stack(logits, 1))  # [B, DEPTH, N, V]

    for row in range(3):
        drafted = np.asarray(draft.tokens[row, 1:])
        text = np.concatenate([prompt[row, : length[row]], drafted])
        found = np.asarray(laws(jnp.asarray(text)[None]))[0]
        for s in range(DEPTH):
            place = length[row] - 2 + s
            np.testing.assert_allclose(draft.probs[row, s + 1], found[s, place], atol=2e-5)
    assert np.ptp(np.asarray(draft.probs[:, 1:]).max(-1)) > 0.05


def batch_of(seed: int = 0, rows: int = 4, length: int = 12) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(0, VOCAB_SIZE, (rows, length + 1)), jnp.int32)
    weights = jnp.asarray(rng.random((rows, length)) < 0.8, jnp.float32)
    return Batch(tokens, weights)


def law(logits: Array) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def test_losses_match_their_formulas() -> None:
    """EAGLE-1 and EAGLE-3 on a batch with tokens that do not count, position by position."""
    batch = batch_of()
    weights = np.asarray(batch.weights)[:, 1:]
    output = forward_of(TARGET_PARAMS, batch.tokens[:, :-1])
    p = law(output.logits)[:, 1:]
    embeddings = TARGET.embed(TARGET_PARAMS, batch.tokens[:, 1:-1])

    rng_key = jax.random.key(0)
    objective = eagle({"head": SHAPE, "noise": 0.0}, TARGET)
    params = uneven(HEADS["eagle"])
    loss, metrics = jax.jit(objective.loss)(params, TARGET_PARAMS, batch, rng_key)
    (step,) = unroll(HEADS["eagle"], params, output.features[:, :-1, :WIDTH], embeddings, 1)
    q = law(TARGET.unembed(TARGET_PARAMS, step.hidden))
    d = np.abs(np.asarray(step.hidden - output.features[:, 1:, :WIDTH], np.float64))
    huber = np.where(d < 1, d**2 / 2, d - 0.5).mean(-1)
    kl = (p * np.log(p / q)).sum(-1)
    expected = ((huber + 0.1 * kl) * weights).sum() / weights.sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    overlap = (np.minimum(p, q).sum(-1) * weights).sum() / weights.sum()
    np.testing.assert_allclose(metrics["acceptance_1"], overlap, rtol=1e-4)
    noisy = jax.jit(eagle({"head": SHAPE}, TARGET).loss)(params, TARGET_PARAMS, batch, rng_key)[0]
    assert abs(noisy - loss) > 1e-3 * loss

    head, num_steps = HEADS["eagle3"], 2
    objective = eagle3({"head": SHAPE, "num_steps": num_steps, "remat": True}, TARGET)
    params = uneven(head)
    loss, _ = jax.jit(objective.loss)(params, TARGET_PARAMS, batch, jax.random.key(0))
    total = 0.0
    fused = head.fuse(params, TARGET, output.features[:, :-1])
    for s, step in enumerate(unroll(head, params, fused, embeddings, num_steps)):
        q = law(head.unembed(params, TARGET, TARGET_PARAMS, step.hidden))
        here = weights * (np.arange(weights.shape[1]) >= s)
        total += 0.8**s * ((p * np.log(p / q)).sum(-1) * here).sum() / here.sum()
    np.testing.assert_allclose(loss, total, rtol=1e-4)


@pytest.mark.slow
def test_a_draft_vocabulary_learns_the_law_of_its_tokens() -> None:
    ids = HEADS["eagle3 of six tokens"].vocabulary
    config = {"head": SHAPE, "num_steps": 1, "vocabulary": ids}
    objective = eagle3(config, TARGET)
    params = objective.init(jax.random.key(0), TARGET_PARAMS)
    rows = TARGET_PARAMS["lm_head"][ids]
    np.testing.assert_allclose(params["lm_head"], rows, rtol=1e-5)
    batch = batch_of()
    loss, metrics = jax.jit(objective.loss)(params, TARGET_PARAMS, batch, jax.random.key(0))
    head = HEADS["eagle3 of six tokens"]
    output = forward_of(TARGET_PARAMS, batch.tokens[:, :-1])
    p = law(output.logits)[:, 1:]
    embeddings = TARGET.embed(TARGET_PARAMS, batch.tokens[:, 1:-1])
    (step,) = unroll(
        head, params, head.fuse(params, TARGET, output.features[:, :-1]), embeddings, 1
    )
    q = law(head.logits(params, TARGET, TARGET_PARAMS, step.hidden))
    weights = np.asarray(batch.weights)[:, 1:]
    inside = p[..., ids] / p[..., ids].sum(-1, keepdims=True)
    counted = weights * np.isin(p.argmax(-1), ids)
    assert 0 < counted.sum() < weights.sum()
    expected = ((inside * np.log(inside / q)).sum(-1) * counted).sum() / counted.sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    # What the target says outside cannot be accepted.
    overlap = (np.minimum(p[..., ids], q).sum(-1) * weights).sum() / weights.sum()
    np.testing.assert_allclose(metrics["acceptance_1"], overlap, rtol=1e-4)


@pytest.mark.slow
def test_hass_falls_and_reports_every_step() -> None:
    import optax

    objective = hass({"head": SHAPE, "num_steps": 2}, TARGET)
    params = objective.init(jax.random.key(0), TARGET_PARAMS)
    optimizer, batch = optax.adam(3e-3), batch_of()
    state = optimizer.init(params)

    @jax.jit
    def step(params: PyTree, state: PyTree) -> tuple:
        grad = jax.value_and_grad(objective.loss, has_aux=True)
        (loss, metrics), grads = grad(params, TARGET_PARAMS, batch, jax.random.key(0))
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss, metrics

    losses = []
    for _ in range(30):
        params, state, loss, metrics = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    assert {"acceptance_1", "acceptance_2", "law_loss", "feature_loss"} <= set(metrics)


def test_smooth_l1() -> None:
    x = jnp.array([[0.0, 0.5, -3.0]])
    np.testing.assert_allclose(smooth_l1(x, jnp.zeros_like(x)), [(0 + 0.125 + 2.5) / 3], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: eagle({"head": {**SHAPE, "hidden_size": 8}}, TARGET), "hidden size 8 .*target 16"),
        (lambda: eagle({"head": SHAPE}, None), "eagle has no target; set config.target"),
        (lambda: eagle({"heads": SHAPE}, TARGET), "eagle has no option 'heads'; it has head"),
        (lambda: eagle({"head": {"depth": 1}}, TARGET), r"head of eagle has \['depth'\]"),
        (lambda: eagle3({"head": SHAPE, "num_steps": 0}, TARGET), "num_steps of eagle3 is 0"),
        (lambda: eagle3({"head": SHAPE, "feature_weight": 1.0}, TARGET), "no feature of the"),
        (
            lambda: eagle3({"head": SHAPE}, testing.tiny_model(VOCAB_SIZE)[0]),
            r"feature_layers \(\); need at least one",
        ),
        (
            lambda: eagle3_head(LAYER, (2, 4), vocabulary=np.array([3, 2])),
            "needs ascending ids below",
        ),
        (
            lambda: eagle3_head(LAYER, (2, 4), vocabulary=np.array([3, 11])),
            "needs ascending ids below",
        ),
        (
            lambda: eagle_drafter(
                testing.tiny_model(VOCAB_SIZE)[0], HEADS["eagle3"], grow.chain(2, grow.best())
            ),
            r"reads layers \(0, 1\) of its target, which gives \(\)",
        ),
        (lambda: fused_layers(5), "A target of 5 layers has no low, middle and high"),
    ],
)
def test_errors_hold_both_facts(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_fused_layers_are_low_middle_and_high() -> None:
    assert fused_layers(32) == (2, 16, 29)
    assert fused_layers(9) == (2, 4, 6)


# ---------------------------------------------------------- the formats' own arithmetic, in numpy


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + LAYER.norm_eps) * weight


def attention(x: np.ndarray, w: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Causal grouped-query attention of one sequence [N, in], halves of a head rotated."""
    n, size = len(x), LAYER.head_dim
    angle = np.arange(n)[:, None] / LAYER.rope_theta ** (np.arange(0, size, 2) / size)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def heads(part: str) -> np.ndarray:
        return (x @ w[f"{name}.self_attn.{part}_proj.weight"].T).reshape(n, -1, size)

    def rotated(y: np.ndarray) -> np.ndarray:
        a, b = np.split(y, 2, -1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    q, k, v = rotated(heads("q")), rotated(heads("k")), heads("v")
    k, v = (np.repeat(y, q.shape[1] // y.shape[1], 1) for y in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / size**0.5
    scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
    mixed = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = mixed / mixed.sum(-1, keepdims=True)
    out = np.einsum("hqk,khd->qhd", mixed, v).reshape(n, -1)
    return out @ w[f"{name}.self_attn.o_proj.weight"].T


def feed_forward(x: np.ndarray, w: dict[str, np.ndarray], name: str) -> np.ndarray:
    gate, up, down = (w[f"{name}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
    inner = x @ gate.T
    return (inner / (1 + np.exp(-inner)) * (x @ up.T)) @ down.T


@pytest.mark.parametrize("name", HEADS)
def test_a_stored_head_means_what_its_format_says(name: str, tmp_path: Path) -> None:
    """The tensors of a directory, by their published names, against the head that wrote them."""
    head, rng = HEADS[name], np.random.default_rng(3)
    params = uneven(head)
    hf_heads.save(tmp_path / "head", head, params, dtype=jnp.float32)
    stored = safetensors.numpy.load_file(tmp_path / "head" / "model.safetensors")
    w = {key: np.asarray(x, np.float64) for key, x in stored.items()}
    n = 5
    features = rng.normal(size=(n, 3 * WIDTH))
    e = rng.normal(size=(n, WIDTH))
    lm_head = np.asarray(TARGET_PARAMS["lm_head"], np.float64)
    if name == "eagle":
        x = np.concatenate([e, features[:, :WIDTH]], 1) @ w["fc.weight"].T + w["fc.bias"]
        x = x + attention(x, w, "layers.0")
        y = rms_norm(x, w["layers.0.post_attention_layernorm.weight"])
        expected = (x + feed_forward(y, w, "layers.0")) @ lm_head.T
    else:
        g = features[:, WIDTH:] @ w["fc.weight"].T
        normed = rms_norm(e, w["midlayer.input_layernorm.weight"])
        both = np.concatenate([normed, rms_norm(g, w["midlayer.hidden_norm.weight"])], 1)
        x = g + attention(both, w, "midlayer")
        y = rms_norm(x, w["midlayer.post_attention_layernorm.weight"])
        hidden = rms_norm(x + feed_forward(y, w, "midlayer"), w["norm.weight"])
        expected = hidden @ w.get("lm_head.weight", lm_head).T
    if head.vocabulary is not None:
        ids = np.arange(len(stored["d2t"])) + stored["d2t"]
        np.testing.assert_array_equal(np.flatnonzero(stored["t2d"]), ids)
        everywhere = np.full((n, VOCAB_SIZE), -np.inf)
        everywhere[:, ids] = expected
        expected = everywhere

    @jax.jit
    def logits(features: Array, embeddings: Array) -> Array:
        hidden = head.fuse(params, TARGET, features)
        (step,) = unroll(head, params, hidden, embeddings, 1)
        return head.unembed(params, TARGET, TARGET_PARAMS, step.hidden)

    found = logits(jnp.float32(features)[None], jnp.float32(e)[None])[0]
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
