"""Medusa and Hydra: training aligns heads as drafting does, losses follow their formulas."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import uneven

from specjax import cache as caches
from specjax import engine, testing
from specjax.drafters import grow
from specjax.drafters.hydra import hydra as hydra_drafter
from specjax.drafters.medusa import medusa as medusa_drafter
from specjax.models import hf, hf_heads
from specjax.models.hydra import HydraHeads, hydra_heads
from specjax.models.medusa import MedusaHeads, medusa_heads
from specjax.models.transformer import TransformerConfig, forward, transformer
from specjax.objectives import Batch, Objective, eagle, hydra, losses, medusa
from specjax.sampling import sampling
from specjax.types import Array, DecodeState, Params, PyTree
from specjax.verifiers.match import match
from specjax.verifiers.rejection import rejection

VOCAB_SIZE, WIDTH = 7, 16
TARGET, TARGET_PARAMS = testing.tiny_model(VOCAB_SIZE, num_layers=1, scale=10.0)
PREFIX = {"intermediate_size": 24, "num_heads": 2, "num_kv_heads": 1, "head_dim": 6}
LAYER = TransformerConfig(vocab_size=VOCAB_SIZE, hidden_size=WIDTH, num_layers=1, **PREFIX)
SHAPE = {**PREFIX, "num_layers": 1, "vocab_size": VOCAB_SIZE, "hidden_size": WIDTH, "head_dim": 8}
SHAPE["tie_embeddings"] = False
MEDUSA = medusa_heads(WIDTH, 3, 2, own_unembedding=True, vocab_size=VOCAB_SIZE)
HYDRA = hydra_heads(WIDTH, 3, 2, LAYER, own_unembedding=True, vocab_size=VOCAB_SIZE)
GEOMETRIC = losses.geometric(0.8)
RATE = 0.02  # of plain gradient descent
WOR = grow.without_replacement()


_rng = np.random.default_rng(0)
BATCH = Batch(
    jnp.asarray(_rng.integers(0, VOCAB_SIZE, (4, 11)), jnp.int32),
    jnp.asarray(_rng.random((4, 10)) < 0.8, jnp.float32),
)

run_target = jax.jit(functools.partial(forward, TARGET))


# --------------------------------------------------------------------------------- the alignment

TREE = (-1, 0, 0, 1, 1, 2, 5)
PATHS = {1: (1,), 3: (1, 3), 5: (2, 5), 6: (2, 5, 6)}  # of some nodes, below the root


def predict_medusa(params: PyTree, features: Array, tokens: Array) -> Callable:
    del tokens
    return medusa.predictor(MEDUSA, params, TARGET, TARGET_PARAMS, features)


def predict_hydra(params: PyTree, features: Array, tokens: Array) -> Callable:
    return hydra.predictor(HYDRA, params, TARGET, TARGET_PARAMS, features, tokens)


def likeliest_with_its_law() -> grow.Choose:
    """Points, beside the law that they are the best of, for the test to see."""

    def draw(*arguments: Any) -> tuple[Array, Array]:
        tokens, _ = grow.best().draw(*arguments)
        logits = arguments[-2]
        return tokens, jnp.broadcast_to(logits[:, :, None], (*tokens.shape, logits.shape[-1]))

    return grow.Choose(draw, "general")


@pytest.mark.parametrize(
    ("heads", "build_drafter", "predictor"),
    [(MEDUSA, medusa_drafter, predict_medusa), (HYDRA, hydra_drafter, predict_hydra)],
    ids=["medusa", "hydra"],
)
def test_training_reads_what_drafting_reads(
    heads: Any, build_drafter: Callable, predictor: Callable
) -> None:
    """After steps that kept paths of a tree, against one pass over the text."""
    rows, slots, steps = 6, 24, 6
    params = Params(TARGET_PARAMS, uneven(heads))
    drafter = build_drafter(TARGET, heads, grow.static(TREE, likeliest_with_its_law()))
    decoder = engine.decoder(TARGET, drafter, match(), warp=lambda logits, sampling: logits)
    limit = np.full(rows, slots, np.int32)

    def texts(state: DecodeState) -> tuple[Array, Array, Array]:
        """The history and a path of the draft, the history's length, the last node's law."""
        context = state.context
        draft, _ = drafter.propose(params, state.rng_keys, state.drafter, context)
        long = jnp.pad(context.tokens, ((0, 0), (0, 3)))
        each = [
            caches.write(long, draft.tokens[:, np.array(p)], context.length, 0 * limit + len(p))
            for p in PATHS.values()
        ]
        return jnp.stack(each), context.length, draft.probs[:, np.array([*PATHS])]

    @jax.jit
    def run(rng_keys: Array) -> tuple[Array, Array, list[Array]]:
        first = jnp.arange(rows, dtype=jnp.int32)
        state = decoder.init(rng_keys, sampling(rows, 1.0), first, limit, slots)

        def step(state: DecodeState, _: None) -> Any:
            return decoder.step(params, state)[0], texts(state)

        _, (text, length, law) = jax.lax.scan(step, state, None, steps)
        tokens = text.reshape(-1, text.shape[-1])
        features = forward(TARGET, TARGET_PARAMS, tokens).features
        predict = predictor(params.drafter, features, tokens)
        laws = [jax.nn.softmax(predict(k)) for k in range(3)]
        return length, law, [x.reshape(*text.shape[:3], *x.shape[1:]) for x in laws]

    length, law, found = jax.tree.map(np.asarray, run(jax.random.split(jax.random.key(1), rows)))
    length, law = length[1:], law[1:]  # at first there is nothing to read
    assert (length[-1] > steps).sum() > 2, "no drafted token was ever kept"
    for i, path in enumerate(PATHS.values()):
        place = length[..., None, None] - 2 + len(path)
        expected = np.take_along_axis(found[len(path) - 1][1:, i], place, 2)  # [steps, B, 1, V]
        np.testing.assert_allclose(law[:, :, i], expected[:, :, 0], atol=2e-5)
    assert np.ptp(law, (0, 1)).max() > 0.3


@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_bfloat16_keeps_the_state(kind: str) -> None:
    """Features of fewer bits than the state's, and the other way round."""
    target = transformer(TransformerConfig(**SHAPE), jnp.bfloat16)
    heads: Any
    if kind == "medusa":
        heads = medusa_heads(WIDTH, 3, dtype=jnp.bfloat16)
        drafter = medusa_drafter(target, heads, grow.chain(3, WOR))
    else:
        heads = hydra_heads(WIDTH, 3, prefix=LAYER, dtype=jnp.bfloat16)
        drafter = hydra_drafter(target, heads, grow.chain(3, WOR))
    decoder = engine.decoder(target, drafter, rejection())
    params = jax.eval_shape(
        lambda key: Params(target.init(key), heads.init(key)), jax.random.key(0)
    )
    keys, one = jax.random.split(jax.random.key(0), 2), np.ones(2, np.int32)
    state = jax.eval_shape(lambda: decoder.init(keys, sampling(2, 1.0), one, 9 * one, 16))
    assert jax.eval_shape(decoder.step, params, state)[0] == state


# ------------------------------------------------------------------------------------ the formulas


def affine(x: np.ndarray, params: PyTree) -> np.ndarray:
    return x @ np.asarray(params["weight"], np.float64).T + np.asarray(params["bias"], np.float64)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def log_law(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def hard(p: np.ndarray, q: np.ndarray, label: int) -> float:
    del p
    return -q[label]


def expected_figures(
    target_params: PyTree,
    num_heads: int,
    logits_of: Callable,
    nats_of: Callable,
    weigh: Callable = GEOMETRIC,
) -> dict[str, float]:
    """An objective's loss and metrics, one position and one token at a time, in float64.

    Args:
        target_params: of the target that teaches.
        num_heads: K.
        logits_of: (k, row, t, embeddings [k + 1, E]) -> [V] of head k at position t.
        nats_of: (log_p [V], log_q [V], label) -> nats.
        weigh: the tokens of the draft that starts at a position.
    """
    log_p = log_law(np.asarray(run_target(target_params, BATCH.tokens[:, :-1]).logits, np.float64))
    tokens, weights = np.asarray(BATCH.tokens), np.asarray(BATCH.weights)
    embeddings = np.asarray(target_params["embed_tokens"], np.float64)[tokens]
    nats, kept, label_laws, counted = np.zeros((4, *weights.shape, num_heads))
    for b, t, k in np.ndindex(nats.shape):
        if t + 2 + k < tokens.shape[1]:
            label, p = tokens[b, t + 2 + k], log_p[b, t + 1 + k]
            q = log_law(logits_of(k, b, t, embeddings[b, t + 1 : t + 2 + k]))
            nats[b, t, k] = nats_of(p, q, label)
            kept[b, t, k] = np.exp(np.minimum(p, q)).sum()
            label_laws[b, t, k] = q[label]
            counted[b, t, k] = weights[b, t + 1 + k]
    share = np.asarray(weigh(jnp.asarray(label_laws, jnp.float32), jnp.asarray(counted > 0)))
    found = {
        "loss": sum(
            np.average((share * nats)[..., k], weights=counted[..., k]) for k in range(num_heads)
        )
    }
    for k in range(num_heads):
        found[f"acceptance_{k + 1}"] = np.average(kept[..., k], weights=counted[..., k])
    return found


def features_of(target_params: PyTree) -> np.ndarray:
    return np.asarray(run_target(target_params, BATCH.tokens[:, :-1]).features, np.float64)


class Run(NamedTuple):
    params: list[Any]  # before each step, and after the last
    losses: list[float]
    metrics: dict[str, Array]  # of the first step


def train(objective: Objective, params: PyTree, num_steps: int = 8) -> Run:
    """A few steps on one batch."""
    scale = objective.update_scale or (lambda step: 1.0)

    @jax.jit
    def step(params: PyTree, i: Array) -> tuple[PyTree, Array, Any]:
        compute = jax.value_and_grad(objective.loss, has_aux=True)
        (loss, metrics), gradient = compute(params, TARGET_PARAMS, BATCH, jax.random.key(0))

        def descend(scale: Array, params: PyTree, gradient: PyTree) -> PyTree:
            return jax.tree.map(lambda x, dx: x - RATE * scale * dx, params, gradient)

        return jax.tree.map(descend, scale(i), params, gradient), loss, metrics

    run = Run([params], [], {})
    for i in range(num_steps):
        params, loss, metrics = step(params, jnp.int32(i))
        run.params.append(params)
        run.losses.append(float(loss))
        run.metrics.update({} if i else metrics)
    return run


def changed(before: PyTree, after: PyTree) -> list[bool]:
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return [bool((np.asarray(x) != np.asarray(y)).any()) for x, y in pairs]


def check(run: Run, formula: dict[str, float]) -> None:
    """The first step's figures; and training lowers the loss."""
    np.testing.assert_allclose(run.losses[0], formula.pop("loss"), rtol=1e-4)
    for name, value in formula.items():
        np.testing.assert_allclose(run.metrics[name], value, rtol=1e-4)
        assert name.replace("acceptance", "agreement") in run.metrics
    assert run.losses[-1] < 0.9 * run.losses[0]


def test_medusa_learns_by_its_formula() -> None:
    params = uneven(MEDUSA)
    features = features_of(TARGET_PARAMS)

    def logits(k: int, b: int, t: int, path: np.ndarray) -> np.ndarray:
        del path
        head, x = params[f"heads_{k}"], features[b, t]
        for i in range(2):
            x = x + silu(affine(x, head[f"blocks_{i}"]))
        return np.asarray(head["lm_head"], np.float64) @ x

    config = {"num_heads": 3, "num_layers": 2, "own_unembedding": True}
    run = train(medusa.medusa({**config, "position_weights": losses.dpace()}, TARGET), params)
    check(run, expected_figures(TARGET_PARAMS, 3, logits, hard, losses.dpace()))
    assert all(changed(params, run.params[-1]))


def test_hydra_learns_by_its_formula(tmp_path: Path) -> None:
    """Hydra++: the target's law teaches; three blocks, two of which share weights."""
    heads = hydra_heads(WIDTH, 2, 3, LAYER)
    params = uneven(heads)
    rows, length = BATCH.weights.shape
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (rows, length, length))
    features = jnp.asarray(features_of(TARGET_PARAMS), jnp.float32)
    cache = heads.init_cache(rows, 0)
    look_back = jax.jit(heads.look_back)
    states = np.asarray(look_back(params, features, positions, causal, cache)[0], np.float64)

    def logits(k: int, b: int, t: int, path: np.ndarray) -> np.ndarray:
        head, x = params[f"heads_{k}"], np.concatenate([states[b, t], *path])
        x = affine(x, head["res_connection"]) + silu(affine(x, head["blocks_0"]))
        for _ in range(2):
            x = x + silu(affine(x, head["blocks_1"]))
        return np.asarray(TARGET_PARAMS["lm_head"], np.float64) @ x

    config = {"num_heads": 2, "num_layers": 3, "prefix": PREFIX, "loss": losses.forward_kl()}
    objective = hydra.hydra(config, TARGET)
    run = train(objective, params)
    check(
        run,
        expected_figures(TARGET_PARAMS, 2, logits, lambda p, q, label: (np.exp(p) * (p - q)).sum()),
    )
    assert all(changed(params, run.params[-1]))

    objective.export(str(tmp_path / "heads"), run.params[-1])
    found, exported = hf_heads.load(tmp_path / "heads", TransformerConfig(**SHAPE), jnp.float32)
    assert isinstance(found, HydraHeads)
    assert (found.num_heads, found.num_layers) == (2, 3)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-2), exported, run.params[-1])


def test_medusa2_trains_the_heads_first(tmp_path: Path) -> None:
    config = {
        "num_heads": 2,
        "model": SHAPE,
        "heads_weight": 0.3,
        "backbone_loss": losses.weighted([(losses.hard_ce(), 1.0), (losses.forward_kl(), 0.5)]),
        "warmup_steps": 3,
        "backbone_scale": 0.5,
    }
    objective = medusa.medusa2(config, TARGET)
    started = objective.init(jax.random.key(0), TARGET_PARAMS)
    assert not any(changed(started["target"], TARGET_PARAMS))
    moved = jax.tree.map(lambda x: 1.2 * x, TARGET_PARAMS)
    run = train(objective, {**started, "target": moved})

    # L_LM against the original target and the text, new heads repeat the moved target's law.
    features, (original, law) = (
        features_of(moved),
        (
            log_law(np.asarray(run_target(x, BATCH.tokens[:, :-1]).logits, np.float64))
            for x in (TARGET_PARAMS, moved)
        ),
    )
    labels = np.asarray(BATCH.tokens)[:, 1:, None]
    nats = -np.take_along_axis(law, labels, 2)[..., 0]
    nats += 0.5 * (np.exp(original) * (original - law)).sum(-1)
    backbone = np.average(nats, weights=np.asarray(BATCH.weights))
    unembedding = np.asarray(moved["lm_head"], np.float64)
    formula = expected_figures(
        moved,
        2,
        lambda k, b, t, path: unembedding @ features[b, t],
        hard,
    )
    np.testing.assert_allclose(run.metrics["backbone_loss"], backbone, rtol=1e-4)
    np.testing.assert_allclose(run.metrics["heads_loss"], formula["loss"], rtol=1e-4)
    check(run, {**formula, "loss": backbone + 0.3 * formula["loss"]})

    assert objective.update_scale is not None
    scales = [objective.update_scale(step)["target"] for step in range(5)]
    np.testing.assert_array_equal(scales, [0, 0, 0, 0.5, 0.5])
    for i, (before, after) in enumerate(itertools.pairwise(run.params)):
        assert any(changed(before["heads"], after["heads"]))
        assert any(changed(before["target"], after["target"])) == (i >= 3)
    decoded = objective.params(run.params[-1], TARGET_PARAMS)
    assert decoded.target is run.params[-1]["target"]
    assert decoded.drafter is run.params[-1]["heads"]

    for _ in range(2):  # a second export replaces the first
        objective.export(str(tmp_path / "pair"), run.params[-1], (0,), None)
    exported = hf.load(tmp_path / "pair", jnp.float32)
    assert exported.config == TransformerConfig(**SHAPE)
    heads, params = hf_heads.load(tmp_path / "pair" / "heads", exported.config, jnp.float32)
    assert isinstance(heads, MedusaHeads)
    assert heads.num_heads == 2
    for found, expected in (
        (exported.params, run.params[-1]["target"]),
        (params, run.params[-1]["heads"]),
    ):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-2), found, expected)


@pytest.mark.parametrize("own", [False, True])
def test_new_heads_predict_what_the_target_did(own: bool) -> None:
    """Every head starts as the identity under the target's unembedding."""
    options = {"num_heads": 2, "own_unembedding": own}
    parallel = medusa_heads(WIDTH, 2, 1, own, VOCAB_SIZE)
    sequential = hydra_heads(WIDTH, 2, 1, None, own, VOCAB_SIZE)
    feature = np.random.default_rng(0).standard_normal((3, WIDTH), np.float32)

    @jax.jit
    def logits(key: Array) -> tuple[Array, ...]:
        params = medusa.medusa(options, TARGET).init(key, TARGET_PARAMS)
        hidden = parallel.hidden(params, feature)
        found = parallel.unembed(params, TARGET, TARGET_PARAMS, hidden)
        params = hydra.hydra(options, TARGET).init(key, TARGET_PARAMS)
        hidden = sequential.hidden(params, 1, np.concatenate([feature, 1 + feature, -feature], -1))
        last = sequential.unembed(params, 1, TARGET, TARGET_PARAMS, hidden)
        return found[:, 0], found[:, 1], last

    for found in logits(jax.random.key(1)):
        expected = feature @ np.asarray(TARGET_PARAMS["lm_head"]).T
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("make", [medusa.medusa, medusa.medusa2, hydra.hydra, eagle.eagle])
def test_exports_can_be_started_from(make: Callable, tmp_path: Path) -> None:
    options: dict[str, Any] = {"head": PREFIX} if make is eagle.eagle else {"num_heads": 2}
    options |= {"model": SHAPE} if make is medusa.medusa2 else {}
    directory, key = str(tmp_path / "heads"), jax.random.key(0)
    objective = make(options, TARGET)
    first = jax.jit(objective.init)(key, TARGET_PARAMS)
    objective.export(directory, first, (0,), None)
    if make is medusa.medusa2:
        directory, first = directory + "/heads", first["heads"]
    again = make({**options, "initial": directory}, TARGET).init(key, TARGET_PARAMS)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), first)
    jax.tree.map(np.testing.assert_array_equal, again.get("heads", again), rounded)
    other = {"head": {**PREFIX, "head_dim": 8}} if "head" in options else {"num_heads": 3}
    with pytest.raises(ValueError, match=r"from which they start, has .*; need the same"):
        make({**options, **other, "initial": directory}, TARGET).init(key, TARGET_PARAMS)


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: medusa_drafter(TARGET, MEDUSA, grow.chain(4, WOR)),
            "Tree has depth 4 but medusa has 3 heads; pass a tree of depth at most 3",
        ),
        (
            lambda: hydra_drafter(TARGET, HYDRA, grow.chain(4, WOR)),
            "Tree has depth 4 but hydra has 3 heads; pass a tree of depth at most 3",
        ),
        (
            lambda: medusa_drafter(TARGET, medusa_heads(8), grow.chain(2, WOR)),
            "The medusa heads have hidden size 8 but the target 16; they must be the same",
        ),
        (
            lambda: hydra_drafter(
                TARGET, hydra_heads(WIDTH, 4, 1, None, True, 9), grow.chain(2, WOR)
            ),
            "The hydra heads predict 9 tokens but the target has 7; they must be the same",
        ),
        (lambda: medusa_heads(WIDTH, 0), "Medusa heads have num_heads=0 and num_layers=1"),
        (lambda: medusa_heads(WIDTH, own_unembedding=True), "have vocab_size=0"),
        (
            lambda: hydra_heads(8, prefix=LAYER),
            "The Hydra prefix has 1 layers of hidden size 16; it must have 1 of the target's 8",
        ),
        (lambda: medusa.medusa({}, None), "Objective medusa has no target"),
        (lambda: medusa.medusa({"joint": 1}, TARGET), "medusa has no option 'joint'"),
        (lambda: medusa.medusa({"temperature": 0}, TARGET), "temperature of medusa is 0"),
        (lambda: medusa.medusa2({"model": {}}, TARGET), "Option model of medusa2 has"),
        (
            lambda: medusa.medusa2({"model": {**SHAPE, "vocab_size": 9}}, TARGET),
            "has 9 tokens and hidden size 16, the target 7 and 16",
        ),
        (lambda: hydra.hydra({"prefix": {"depth": 1}}, TARGET), "Option prefix of hydra has"),
    ],
)
def test_errors_are_one_clear_line(build: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)
