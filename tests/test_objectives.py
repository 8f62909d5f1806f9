"""Losses against formulas in float64, and the objectives of whole models built on them."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from ml_collections import ConfigDict

from specjax.models.transformer import TransformerConfig, forward, transformer
from specjax.objectives import Batch, losses
from specjax.objectives.distill import distill
from specjax.objectives.next_token import cross_entropy, next_token
from specjax.types import Model, PyTree

VOCAB_SIZE = 11

# ----------------------------------------------------------------------------- losses


def kl(log_a: np.ndarray, log_b: np.ndarray) -> float:
    return sum(np.exp(a) * (a - b) for a, b in zip(log_a, log_b, strict=True))


def overlap(log_p: np.ndarray, log_q: np.ndarray) -> float:
    return sum(min(np.exp(a), np.exp(b)) for a, b in zip(log_p, log_q, strict=True))


def jsd(log_p: np.ndarray, log_q: np.ndarray, beta: float) -> float:
    log_m = np.log(np.maximum(beta * np.exp(log_p) + (1 - beta) * np.exp(log_q), 1e-300))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def best_of(log_p: np.ndarray, k: int) -> list[int]:
    return sorted(range(len(log_p)), key=lambda i: -log_p[i])[:k]


def coarse(log_law: np.ndarray, kept: list[int]) -> np.ndarray:
    others = sum(np.exp(x) for i, x in enumerate(log_law) if i not in kept)
    return np.array([*log_law[kept], np.log(max(others, 1e-300))])


# (loss, its value at one position; `w` is exp(-sum min(p, q)), which has no gradient)
LOSSES: dict[str, tuple[losses.Loss, Callable]] = {
    "hard_ce": (losses.hard_ce(), lambda p, q, y, w: -q[y]),
    "forward_kl": (losses.forward_kl(), lambda p, q, y, w: kl(p, q)),
    "reverse_kl": (losses.reverse_kl(), lambda p, q, y, w: kl(q, np.maximum(p, -100))),
    "jsd": (losses.jsd(), lambda p, q, y, w: jsd(p, q, 0.5)),
    "jsd .1": (losses.jsd(0.1), lambda p, q, y, w: jsd(p, q, 0.1)),
    "total_variation": (losses.total_variation(), lambda p, q, y, w: 1 - overlap(p, q)),
    "lk_alpha": (losses.lk_alpha(), lambda p, q, y, w: -np.log(overlap(p, q))),
    "lk_lambda": (
        losses.lk_lambda(),
        lambda p, q, y, w: w * kl(p, q) + (1 - w) * (1 - overlap(p, q)),
    ),
    "lk_lambda 3": (
        losses.lk_lambda(decay=3, scale=0.5),
        lambda p, q, y, w: w**3 / 2 * kl(p, q) + (1 - w**3 / 2) * (1 - overlap(p, q)),
    ),
    "top_k_ce": (
        losses.top_k_ce(3),
        lambda p, q, y, w: -sum(np.exp(p[i]) * q[i] for i in best_of(p, 3)),
    ),
    "top_k_ce of all": (losses.top_k_ce(99), lambda p, q, y, w: -(np.exp(p) * q).sum()),
    "weighted": (
        losses.weighted(
            [
                ({"call": "specjax.objectives.losses.hard_ce"}, 0.1),
                (losses.total_variation(), 1.8),
            ]
        ),
        lambda p, q, y, w: 0.1 * -q[y] + 1.8 * (1 - overlap(p, q)),
    ),
    "top_k": (
        losses.top_k(losses.forward_kl(), 3),
        lambda p, q, y, w: kl(coarse(p, best_of(p, 3)), coarse(q, best_of(p, 3))),
    ),
    "top_k hard_ce": (
        losses.top_k(losses.hard_ce(), 3),
        lambda p, q, y, w: -coarse(q, best_of(p, 3))[[*best_of(p, 3), y].index(y)],
    ),
}


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def random_case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log p [N, V], logits of q [N, V], labels [N]."""
    draw = np.random.default_rng(0)
    log_p, logits = draw.normal(0, 2, (2, 12, VOCAB_SIZE))
    return log_softmax(log_p), logits, draw.integers(0, VOCAB_SIZE, 12)


def hard_case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tiny probabilities, tokens that the target rules out, a target without any doubt."""
    log_p, logits, labels = random_case()
    log_p[:6] = log_softmax(log_p[:6] * 15)  # down to e^-130
    log_p[4:, 2:5] = -np.inf
    log_p[8] = np.where(np.arange(VOCAB_SIZE) == 7, 0, -np.inf)
    logits[9:11] *= 12
    logits[10, 7] = -300
    return log_softmax(log_p), logits, np.where(labels == 7, 8, labels)


def draft_vocabulary_case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens that neither can draw."""
    log_p, logits, labels = random_case()
    log_p[:, 7:] = logits[:, 7:] = -np.inf
    return log_softmax(log_p), logits, labels % 7


@jax.jit
def all_losses(log_p: jax.Array, logits: jax.Array, labels: jax.Array) -> dict:
    """Values [N], and gradients [N, V] by the draft's logits, of every loss."""

    def total(logits: jax.Array, loss: losses.Loss) -> tuple[jax.Array, jax.Array]:
        values = loss(log_p, jax.nn.log_softmax(logits), labels)
        return values.sum(), values

    grad = jax.grad(total, has_aux=True)
    return {name: grad(logits, loss) for name, (loss, _) in LOSSES.items()}


def run(log_p: np.ndarray, logits: np.ndarray, labels: np.ndarray) -> dict:
    found = all_losses(jnp.float32(log_p), jnp.float32(logits), jnp.int32(labels))
    return jax.tree.map(np.asarray, found)


def values(
    name: str, log_p: np.ndarray, log_q: np.ndarray, labels: np.ndarray, w: list | None = None
) -> np.ndarray:
    log_p, log_q = np.maximum(log_p, -1e3), np.maximum(log_q, -1e3)  # for 0 log 0
    w = [np.exp(-overlap(*laws)) for laws in zip(log_p, log_q, strict=True)] if w is None else w
    one = LOSSES[name][1]
    return np.array([one(*x) for x in zip(log_p, log_q, labels, w, strict=True)])


@pytest.mark.parametrize("case", [random_case, hard_case, draft_vocabulary_case])
def test_losses_are_their_formulas(case: Callable) -> None:
    log_p, logits, labels = case()
    found = run(log_p, logits, labels)
    log_p, log_q = log_p.astype(np.float32).astype(float), log_softmax(logits)
    for name in LOSSES:
        expected = values(name, log_p, log_q, labels)
        np.testing.assert_allclose(found[name][1], expected, 2e-5, 2e-6, err_msg=name)
        assert np.isfinite(found[name][0]).all(), name


@pytest.mark.parametrize("case", [random_case, draft_vocabulary_case])
def test_gradients_are_the_formulas(case: Callable) -> None:
    """By central differences in float64. lk_lambda's weight stays what it is."""
    log_p, logits, labels = case()
    found = run(log_p, logits, labels)
    w = [np.exp(-overlap(*laws)) for laws in zip(log_p, log_softmax(logits), strict=True)]
    step = 1e-5 * np.eye(VOCAB_SIZE)
    for name in LOSSES:
        up, down = (
            np.stack([values(name, log_p, log_softmax(logits + d), labels, w) for d in sign * step])
            for sign in (1, -1)
        )
        expected = ((up - down) / 2e-5).T
        np.testing.assert_allclose(found[name][0], expected, 1e-3, 2e-5, err_msg=name)


def test_disjoint_laws_cost_much_but_not_all() -> None:
    log_p, logits = np.full((2, 12, VOCAB_SIZE), -np.inf)
    log_p[:, :2], logits[:, 2:4] = np.log(0.5), 0
    found = run(log_p, logits, np.zeros(12))
    nats = {name: value[0] for name, (_, value) in found.items()}
    assert nats["total_variation"] == 1
    assert nats["jsd"] == pytest.approx(np.log(2), rel=1e-6)
    for name in ("hard_ce", "forward_kl", "reverse_kl", "lk_alpha"):
        assert 97 < nats[name] < 101, name
    for name, (grad, _) in found.items():
        assert np.isfinite(grad).all(), name


DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "jsd .1", "total_variation", "lk_alpha")


def test_divergences_are_divergences() -> None:
    log_p, logits, labels = random_case()
    apart, back = run(log_p, logits, labels), run(log_softmax(logits), log_p, labels)
    none = run(log_p, log_p, labels)
    for name in DIVERGENCES:
        assert (apart[name][1] > 1e-3).all(), name
        np.testing.assert_allclose(none[name][1], 0, atol=2e-6, err_msg=name)
    for name in ("jsd", "total_variation", "lk_alpha"):
        np.testing.assert_allclose(apart[name][1], back[name][1], 1e-5, err_msg=name)


def test_coarser_laws_are_closer() -> None:
    log_p, logits, labels = random_case()
    log_q = log_softmax(logits)

    @jax.jit
    def coarser(*laws: jax.Array) -> dict:
        kept = (2, VOCAB_SIZE)
        return {x: [losses.top_k(LOSSES[x][0], k)(*laws) for k in kept] for x in DIVERGENCES}

    for name, (less, all_) in coarser(log_p, log_q, jnp.asarray(labels)).items():
        full = values(name, log_p, log_q, labels)
        assert (less <= full + 1e-5).all(), name
        assert full.sum() > less.sum() + 0.1, name
        np.testing.assert_allclose(all_, full, 1e-4, 2e-5, err_msg=name)


def test_a_cached_teacher_gives_coarse_laws() -> None:
    tokens, probs = np.array([[3, 0], [1, 2]]), np.array([[0.5, 0.25], [1.0, 0.0]])
    log_q = np.log(np.maximum([[0.1, 0.2, 0.3, 0.4], [0.0, 0.25, 0.75, 0.0]], 1e-300))
    pair = jax.jit(losses.coarse_pair)(tokens, probs, log_q, np.array([0, 3]))
    log_p, log_q_coarse, labels = pair
    np.testing.assert_allclose(np.exp(log_p), [[0.5, 0.25, 0.25], [1, 0, 0]], atol=1e-6)
    expected = [[0.4, 0.1, 0.5], [0.25, 0.75, 0]]
    np.testing.assert_allclose(np.exp(log_q_coarse), expected, atol=1e-6)
    assert np.isfinite(log_q_coarse).all()
    np.testing.assert_array_equal(labels, [1, 2])
    law = np.exp(losses.cached_law(tokens, probs, 4))
    np.testing.assert_allclose(law, [[0.25, 0, 0, 0.5], [0, 1, 0, 0]], atol=1e-6)


# ----------------------------------------------------------------------------- weights of positions


def test_weights_of_positions() -> None:
    log_q = jnp.log(jnp.asarray([[0.5, 0.2, 0.8], [1.0, 1.0, 1.0]]))

    def weights(weigh: losses.PositionWeights, *args: object) -> np.ndarray:
        return np.asarray(weigh(log_q, *args))

    np.testing.assert_array_equal(weights(losses.uniform()), np.ones((2, 3)))
    np.testing.assert_allclose(weights(losses.geometric()), [[1, 0.8, 0.64]] * 2, 1e-6)
    fading = [1, np.exp(-0.25), np.exp(-0.5)]
    np.testing.assert_allclose(weights(losses.exponential()), [fading] * 2, 1e-6)
    # s is .75, .6, .9 and its products .75, .45, .405.
    np.testing.assert_allclose(weights(losses.dpace()), [[1.605, 0.855, 0.405], [3, 2, 1]], 1e-6)
    # All of q, and nothing of it.
    np.testing.assert_allclose(weights(losses.dpace(0))[0], [0.68, 0.18, 0.08], 1e-6)
    np.testing.assert_allclose(weights(losses.dpace(1)), [[3, 2, 1]] * 2, 1e-6)
    np.testing.assert_array_equal(jax.grad(lambda x: losses.dpace()(x).sum())(log_q), 0)
    counts = jnp.asarray([[True, False, True], [False, True, False]])
    expected = [[0.75 + 0.675, 0.675, 0.675], [1, 1, 0]]
    np.testing.assert_allclose(weights(losses.dpace(), counts), expected, 1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: losses.jsd(1.0), "jsd has beta 1.0; need more than 0 and less than 1"),
        (lambda: losses.lk_lambda(decay=-1), "decay -1 and scale 1.0; need decay at least 0"),
        (lambda: losses.lk_lambda(scale=2), "need decay at least 0 and scale from 0 to 1"),
        (lambda: losses.top_k_ce(0), "top_k_ce has k 0; need at least 1"),
        (lambda: losses.top_k(losses.jsd(), 0), "top_k has k 0; need at least 1"),
        (lambda: losses.weighted([]), r"weighted has weights \[\]; need some"),
        (lambda: losses.weighted([(losses.jsd(), -1)]), r"weights \[-1\]; need some, none of them"),
        (lambda: losses.geometric(0), "geometric has decay 0; need more than 0"),
        (lambda: losses.exponential(-1), "exponential has gamma -1; need more than 0"),
        (lambda: losses.dpace(1.5), "dpace has a 1.5; need a number from 0 to 1"),
    ],
)
def test_ranges_are_checked(build: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# ----------------------------------------------------------------------------- objectives

MODEL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
    "tie_embeddings": False,
}
CONFIG = ConfigDict({"model": MODEL})


def uneven(seed: int) -> PyTree:
    """Weights of a model of `MODEL`'s shape, whose laws are uneven."""
    draw = np.random.default_rng(seed)
    shapes = jax.eval_shape(transformer(TransformerConfig(**MODEL)).init, jax.random.key(0))

    def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.float32(draw.normal(0, 0.5, x.shape) if x.ndim > 1 else np.ones(x.shape))

    return jax.tree.map(fill, shapes)


@functools.cache
def target() -> tuple[Model, PyTree]:
    return transformer(TransformerConfig(**MODEL)), uneven(1)


@functools.cache
def draft_params() -> PyTree:
    return uneven(2)


def batch() -> Batch:
    draw = np.random.default_rng(3)
    tokens = jnp.asarray(draw.integers(0, VOCAB_SIZE, (3, 9)), jnp.int32)
    weights = draw.choice([0, 1, 0.5], (3, 8)).astype(np.float32)
    assert len(np.unique(weights)) == 3
    return Batch(tokens, jnp.asarray(weights))


@functools.cache
def logits_of() -> Callable[[PyTree], jax.Array]:
    model, tokens = target()[0], batch().tokens[:, :-1]
    return jax.jit(lambda params: forward(model, params, tokens).logits)


def log_law(params: PyTree, temperature: float = 1.0) -> np.ndarray:
    return log_softmax(np.asarray(logits_of()(params), float) / temperature)


def average(x: np.ndarray, weights: np.ndarray) -> float:
    return (x * weights).sum() / weights.sum()


def test_next_token_is_cross_entropy() -> None:
    params, data = draft_params(), batch()
    labels = np.asarray(data.tokens)[:, 1:]
    nats = -np.take_along_axis(log_law(params), labels[..., None], 2)[..., 0]
    objective = next_token(CONFIG, None)
    loss, metrics = jax.jit(objective.loss)(params, (), data, jax.random.key(0))
    np.testing.assert_allclose(loss, average(nats, np.asarray(data.weights)), 1e-5)
    assert metrics == {"cross_entropy": loss}
    assert objective.drafter is None
    assert objective.student is not None
    np.testing.assert_allclose(cross_entropy(jnp.float32(log_law(params)), labels), nats, 1e-5)


def test_distill_is_its_formula_at_every_offset() -> None:
    """Drafts of three tokens begin anywhere; weights leave some out; a temperature of 2."""
    data, params, (model, target_params) = batch(), draft_params(), target()
    decay = {"call": "specjax.objectives.losses.geometric", "decay": 0.5}
    config = {"position_weights": decay, "draft_length": 3, "temperature": 2.0}
    loss = jax.jit(distill({**CONFIG, **config}, model).loss)
    log_p, log_q = log_law(target_params, 2.0), log_law(params, 2.0)
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    weights = np.asarray(data.weights)
    place = (np.arange(8) + np.arange(3)[:, None]) % 3
    expected = np.array([average(divergence, weights * 0.5**x) for x in place])
    assert np.ptp(expected) > 0.01
    offsets = set()
    for seed in range(8):
        nats, metrics = loss(params, target_params, data, jax.random.key(seed))
        offset = np.abs(expected - nats).argmin()
        np.testing.assert_allclose(nats, expected[offset], 1e-4)
        offsets.add(int(offset))
    assert offsets == {0, 1, 2}
    labels = np.asarray(data.tokens)[:, 1:, None]
    nats = -np.take_along_axis(log_law(params), labels, 2)[..., 0]
    same = log_p.argmax(-1) == log_q.argmax(-1)
    accepted = np.minimum(np.exp(log_p), np.exp(log_q)).sum(-1)
    for name, value in {
        "kl": divergence,
        "cross_entropy": nats,
        "acceptance_1": accepted,
        "agreement_1": same,
    }.items():
        np.testing.assert_allclose(metrics[name], average(value, weights), 1e-4, err_msg=name)


def test_dpace_sees_whole_drafts() -> None:
    """Against a loop over drafts; tokens left out neither end nor lengthen them."""
    data, params, (model, target_params) = batch(), draft_params(), target()
    names = {"loss": "hard_ce", "position_weights": "dpace"}
    config = {k: {"call": f"specjax.objectives.losses.{v}"} for k, v in names.items()}
    loss = jax.jit(distill({**CONFIG, **config, "draft_length": 4}, model).loss)
    weights, labels = np.asarray(data.weights), np.asarray(data.tokens)[:, 1:, None]
    log_q = np.take_along_axis(log_law(params), labels, 2)[..., 0]

    def expected(before: int) -> float:
        share = np.zeros((3, 8))
        for b in range(3):
            for start in range(-before, 8, 4):
                draft = [t for t in range(start, start + 4) if 0 <= t < 8 and weights[b, t] > 0]
                prefix = np.cumprod(0.5 * np.exp(log_q[b, draft]) + 0.5)
                for place, t in enumerate(draft):
                    share[b, t] = prefix[place:].sum()
        return average(-log_q, weights * share)

    values = [expected(before) for before in range(4)]
    for seed in range(4):
        nats, _ = loss(params, target_params, data, jax.random.key(seed))
        assert np.abs(np.asarray(values) / nats - 1).min() < 1e-4


def teacher(k: int) -> dict[str, jax.Array]:
    """What the target says of `batch()`, cached with k tokens."""
    probs, tokens = lax.top_k(jnp.exp(jnp.float32(log_law(target()[1]))), k)
    return {"teacher_tokens": tokens, "teacher_probs": probs}


def test_a_cached_teacher_needs_no_target() -> None:
    data, params, (model, target_params) = batch(), draft_params(), target()
    loss = jax.jit(distill(CONFIG, model).loss)
    log_p, log_q = log_law(target_params), log_law(params)
    labels, weights = np.asarray(data.tokens)[:, 1:], np.asarray(data.weights)
    for k in (VOCAB_SIZE, 3):
        # No weights of a target are there to run it.
        nats, metrics = loss(params, (), data.replace(**teacher(k)), jax.random.key(0))
        laws = [x.reshape(-1, VOCAB_SIZE) for x in (log_p, log_q)]
        coarse_kl = values("top_k" if k == 3 else "forward_kl", *laws, labels.reshape(-1))
        np.testing.assert_allclose(nats, average(coarse_kl, weights.reshape(-1)), 1e-4)
        kept = log_p >= np.sort(log_p)[..., [-k]]
        expected = {
            "cross_entropy": -np.take_along_axis(log_q, labels[..., None], 2)[..., 0],
            "acceptance_1": (np.exp(np.minimum(log_p, log_q)) * kept).sum(-1),
            "agreement_1": log_p.argmax(-1) == log_q.argmax(-1),
        }
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], average(value, weights), 1e-4, err_msg=name)

    warm = distill({**CONFIG, "temperature": 2.0}, model)
    with pytest.raises(ValueError, match=r"distill is 2\.0 but a cached teacher's is 1"):
        jax.eval_shape(warm.loss, params, (), data.replace(**teacher(3)), jax.random.key(0))


def test_every_loss_falls() -> None:
    """One program for all: which loss it is, is an argument."""
    data, (model, target_params) = batch(), target()
    optimizer = optax.sgd(0.1)
    kinds = [name for name in LOSSES if name.split()[0] == name]

    @jax.jit
    def fit(which: jax.Array, params: PyTree) -> jax.Array:
        def choose(log_p: jax.Array, log_q: jax.Array, labels: jax.Array) -> jax.Array:
            branches = [LOSSES[name][0] for name in kinds]
            return lax.switch(which, branches, log_p, log_q, labels)

        objective = distill({**CONFIG, "loss": choose}, model)

        def step(state: tuple, rng_key: jax.Array) -> tuple[tuple, jax.Array]:
            params, opt_state = state
            gradient = jax.value_and_grad(objective.loss, has_aux=True)
            (loss, _), grads = gradient(params, target_params, data, rng_key)
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), loss

        start = (params, optimizer.init(params))
        return lax.scan(step, start, jax.random.split(jax.random.key(0), 30))[1]

    for which, name in enumerate(kinds):
        curve = np.asarray(fit(jnp.int32(which), draft_params()))
        assert curve[-1] < 0.6 * curve[0], name


def test_bfloat16_activations_and_weights() -> None:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), draft_params())
    objective = distill({**CONFIG, "dtype": "bfloat16"}, target()[0])
    data = batch().replace(**teacher(VOCAB_SIZE))
    loss, metrics = jax.jit(objective.loss)(params, (), data, jax.random.key(0))
    log_p, log_q = (log_law(x) for x in (target()[1], draft_params()))
    exact = average((np.exp(log_p) * (log_p - log_q)).sum(-1), np.asarray(data.weights))
    assert {x.dtype for x in (loss, *metrics.values())} == {jnp.dtype(jnp.float32)}
    assert objective.student is not None
    assert objective.student.init_cache(1, 1).keys[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(loss, exact, 0.05)
    fresh = jax.eval_shape(objective.init, jax.random.key(0), ())
    assert {x.dtype for x in jax.tree.leaves(fresh)} == {jnp.dtype(jnp.float32)}


def test_exports_can_be_started_from(tmp_path: Path) -> None:
    params, model, key = draft_params(), target()[0], jax.random.key(0)
    directory = str(tmp_path / "draft")
    objective = distill(CONFIG, model)
    objective.export(directory, params, (1,), 2)
    assert objective.drafter is not None
    assert objective.drafter.proposal == ("chain", 5, 4)
    assert objective.student is not None
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    config = {"model": {"vocab_size": VOCAB_SIZE}, "initial": directory}
    for again in (distill(config, model), next_token(config)):
        found = again.init(key, ())
        jax.tree.map(np.testing.assert_array_equal, found, rounded)
        assert jax.tree.leaves(found)[0].dtype == jnp.float32
    with pytest.raises(ValueError, match=r"has hidden_size 8 but .* it starts, 16; they must"):
        next_token({"model": {**MODEL, "hidden_size": 8}, "initial": directory})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"los": 1}, "Objective distill has no option 'los'; it has model, loss"),
        ({"model": {**MODEL, "vocab_size": 12}}, "a vocabulary of 12 but the target one of 11"),
        ({"model": {"depth": 3}}, r"The model of distill has \['depth'\]: .*unexpected keyword"),
        ({"model": {}}, r"The model of distill has \[\]: .*missing"),
        ({"temperature": 0.0}, "temperature of distill is 0.0; need more than 0"),
        ({"draft_length": 0}, "draft_length of distill is 0; need at least 1"),
        ({"dtype": "int8"}, "dtype of distill is int8; need float32 or bfloat16"),
        ({"initial": "/nowhere"}, "/nowhere is not a directory"),
    ],
)
def test_errors_are_one_clear_line(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        distill({**CONFIG, **change}, target()[0])
    assert "\n" not in str(error.value)


def test_distill_needs_a_target() -> None:
    with pytest.raises(ValueError, match="distill has no target; set"):
        distill(CONFIG, None)
    with pytest.raises(ValueError, match="next_token has no option 'loss'; it has model"):
        next_token({"loss": 1})
