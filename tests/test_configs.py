"""Every config builds, and every one that decodes does so with tiny models."""

import importlib.util
import io
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from directories import ROOT, save_model
from ml_collections import ConfigDict
from texts import context_of

from decode import benchmark, drafting, generate, profile, verification
from specjax import checkpoints, engine, sampling, trees
from specjax.build import build
from specjax.data import tokenizers
from specjax.drafters import corpus
from specjax.drafters.recycling import recycling
from specjax.models import hf_heads
from specjax.models.eagle import eagle3_head
from specjax.models.hydra import hydra_heads
from specjax.models.medusa import medusa_heads
from specjax.models.tabular import tabular
from specjax.models.transformer import TransformerConfig, transformer
from specjax.types import (
    Decoder,
    DecodeState,
    Draft,
    Drafter,
    ModelOutput,
    Params,
    Verdict,
    Verifier,
)
from specjax.verifiers.block import block
from specjax.verifiers.match import match
from specjax.verifiers.rejection import rejection

CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.py"))
TINY = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_layers": 1}
TINY |= {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}

SHAPE = TransformerConfig(**{**TINY, "vocab_size": 300})  # of `save_model`'s layers
HEADS: dict[str, Any] = {
    "medusa": medusa_heads(SHAPE.hidden_size, num_heads=4),
    "hydra": hydra_heads(SHAPE.hidden_size, num_heads=4, prefix=SHAPE),
    "eagle3": eagle3_head(SHAPE, (0, 0, 0)),
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("config", ROOT / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    path = tmp_path_factory.mktemp("checkpoints")
    target = save_model(path / "target")
    for name, heads in HEADS.items():
        hf_heads.save(path / name, heads, heads.init(jax.random.key(2)))
    return target, save_model(path / "draft", seed=1)


def shrink_drafter(drafter: ConfigDict) -> None:
    build = drafter
    while "build" in build:  # a drafter's, and what `merged` joins
        build = build.build
    if isinstance(build.get("parents"), tuple):
        build.parents = (-1, 0, 0, 1)
    elif "num_tokens" in build:
        build.num_tokens = 2


def shrink(c: ConfigDict, directories: tuple[str, str], output: Path) -> ConfigDict:
    """The config's methods on tiny models, tiny trees and next to no text."""
    for method in c.methods.values():
        if "drafter" in method:
            shrink_drafter(method.drafter)
    drafts = {name: directories[1] for name in c.drafts if name not in HEADS}
    drafts |= {name: str(Path(directories[0]).parent / name) for name in HEADS}
    c.update(target=directories[0], drafts=drafts, output=str(output))
    c.update(num_prompts=2, prompt_length=16, max_new_tokens=10, repeats=1)
    return c


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_loads_and_says_how_to_run_it(name: str) -> None:
    module = load(name)
    c = module.get_config()
    assert isinstance(c, ConfigDict)
    assert "    python " in (module.__doc__ or "")


def test_demo(directories: tuple[str, str], tmp_path: Path) -> None:
    c = shrink(load("configs/bench/demo.py").get_config(), directories, tmp_path)
    pair = ("coupled chain", "sampled chain")
    c.comparisons = (pair,)
    c.methods["coupled chain"].formula = "coupled_acceptance"
    # One of each kind runs, all can be built.
    models = checkpoints.load(c.target, c.drafts)
    given = checkpoints.given(models.target, models.drafts)
    for name, method in list(c.methods.items()):
        assert build(method.drafter, **given)
        if name not in ("none", *pair):
            del c.methods[name]
    records = benchmark.run(c)
    wanted = [(n, t) for t in c.temperatures for n, m in c.methods.items() if t in m.temperatures]
    assert [(r["method"], r["temperature"]) for r in records] == wanted
    for record in records:
        assert record["tokens"] > 0
        assert record["seconds"] > 0
        assert record["tokens_per_second"] > 0
        assert 1 <= record["mat"] <= record["depth"] + 1
        assert record["accepted_per_step"] == pytest.approx(record["mat"] - 1)
        assert record["lossless"]
        told = record["temperature"] == 0 or record["verifier"] == "match"
        assert record["identical"] is (True if told else None)
        if record["method"] == "none":
            assert record["speedup"] == record["mat"] == 1
            assert record["acceptance_rate"] is None
        assert ("mat_over" in record) == ("first_token" in record) == (record["method"] == pair[0])
    assert json.loads((tmp_path / "results.json").read_text()) == records
    page = (tmp_path / "results.md").read_text()
    assert page.count("\n| ") == len(records) + 8, "three tables, two of them of one row"
    assert page.count("| coupled chain |") == 3
    assert (tmp_path / "results.png").stat().st_size > 1000


@pytest.mark.slow
def test_predicted(directories: tuple[str, str], tmp_path: Path) -> None:
    c = shrink(load("configs/bench/predicted.py").get_config(), directories, tmp_path)
    for name in set(c.methods) - {"none", "lookup"}:
        del c.methods[name]
    c.methods.lookup.temperatures = (0.0,)
    c.update(costs=0.001, temperatures=(0.0,))
    plain, lookup = benchmark.run(c)
    assert plain["predicted"] == plain["of_predicted"] == 1
    assert lookup["predicted"] == pytest.approx(
        lookup["mat"] / (max(lookup["draft_cost"], 0) + lookup["verify_cost"])
    )
    assert lookup["of_predicted"] == lookup["speedup"] / lookup["predicted"]
    assert all(value > 0 for value in lookup["milliseconds"].values())
    assert (tmp_path / "results.md").read_text().count("| lookup |") == 2


def test_cpu_kernels(tmp_path: Path) -> None:
    """Passes, decoding and products; with `transformers` where it is."""
    c = load("configs/bench/cpu_kernels.py").get_config()
    for shape in c.models.values():
        assert jax.eval_shape(transformer(TransformerConfig(**shape)).init, jax.random.key(0))
    c.models = {"tiny": TINY}
    c.variants = {name: c.variants[name].to_dict() for name in ("int8", "float32 by XLA")}
    c.update(output=str(tmp_path), context_length=8, max_length=32, max_new_tokens=4)
    c.update(num_tokens=(1, 2), at_most=(1.0, 1.1), products=((2, 16, 24),))
    c.update(repeats=1, seconds=0.001)
    if importlib.util.find_spec("torch") is None:
        with pytest.raises(ValueError, match=r"specjax\[parity\]"):
            benchmark.main(c)
        c.transformers = ()
    benchmark.main(c)
    records = json.loads((tmp_path / "results.json").read_text())
    assert all(r["milliseconds"] > 0 for r in records)
    passes = [(r["variant"], r["num_tokens"]) for r in records if r["what"] == "pass"]
    assert passes == [(variant, n) for variant in c.variants for n in (1, 2)]
    peers = len(c.transformers)
    assert sum(r["what"] == "decoding" for r in records) == 2 + peers
    assert sum(r["what"] == "product" for r in records) == 2 + peers
    page = (tmp_path / "results.md").read_text()
    assert all(page.count(f"| {variant} |") == 2 for variant in c.variants)
    assert (tmp_path / "results.png").stat().st_size > 1000
    odd = {**c.variants["int8"], "cache": "int8"}
    for wrong in (
        *({"max_length": 8}, {"at_most": (1.0,)}, {"repeats": 0}),
        {"variants": {"odd": odd}},
    ):
        with pytest.raises(ValueError, match="need"):
            benchmark.main(ConfigDict({**c.to_dict(), **wrong}))


def test_verifiers(directories: tuple[str, str], tmp_path: Path) -> None:
    """`test_demo` runs what this one adds to the demo; here all methods can be built."""
    c = shrink(load("configs/bench/verifiers.py").get_config(), directories, tmp_path)
    target = draft = transformer(TransformerConfig(**TINY))
    for method in c.methods.values():
        drafter, verifier = build(method.drafter, draft=draft), build(method.verifier)
        assert engine.decoder(target, drafter, verifier).lossless
    assert {name for pair in c.comparisons for name in pair} | {"none"} == set(c.methods)


Strategies = tuple[ConfigDict, dict[str, tuple[Decoder, Params]]]


@pytest.fixture(scope="module")
def strategies(
    directories: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Strategies:
    """The config, and what it makes of tiny models."""
    path = tmp_path_factory.mktemp("strategies")
    c = shrink(load("configs/bench/strategies.py").get_config(), directories, path)
    documents = [np.arange(i, i + 40, dtype=np.int32) for i in range(5)]
    of_tokenizer = corpus.fingerprint(tokenizers.load(c.target).get_vocab())
    corpus.save(corpus.corpus(documents, 300, tokenizer=of_tokenizer), path / "corpus")
    c.methods["layer skip"].drafter.layers = (0,)
    c.methods["streaming"].drafter.view.update(num_sinks=1, window=8)
    c.methods["SnapKV"].drafter.view.update(budget=8, window=4)
    models = checkpoints.load(c.target, c.drafts)
    given = checkpoints.given(models.target, models.drafts)
    found = {}
    for name, method in c.methods.items():
        if "decoder" in method:
            decoder = build(method.decoder, **given, eos_ids=models.eos_ids)
        else:
            decoder = engine.decoder(
                models.target, build(method.drafter, **given), build(method.verifier, **given)
            )
        weights, spec = method.get("weights"), method.get("drafter", method.get("decoder"))
        if isinstance(weights, ConfigDict) and weights.call == "train.corpus.made":
            weights.update(target=c.target, output=str(path / "corpus"))
        found[name] = (
            decoder,
            checkpoints.params(models.target_params, models.drafts, spec, weights, models.target),
        )
    return c, found


def test_strategies(strategies: Strategies) -> None:
    """All can be built, as the fixture did; two sizes of batches."""
    c = strategies[0]
    assert set(c.methods) == set(strategies[1])
    for name in set(c.methods) - {"none"}:
        del c.methods[name]
    c.update(batch_sizes=(1, 2), costs=0.0)
    records = benchmark.run(c)
    assert [(r["batch_size"], r["temperature"]) for r in records] == [
        *((1, 0.0), (1, 1.0), (2, 0.0), (2, 1.0))
    ]
    assert all(r["identical"] for r in records)
    page = (Path(c.output) / "results.md").read_text()
    assert page.count("| none |") == 4
    assert "| B |" in page


@pytest.mark.slow
def test_a_switch_is_measured(directories: tuple[str, str], tmp_path: Path) -> None:
    """Its passes cannot be told apart."""
    c = shrink(load("configs/bench/strategies.py").get_config(), directories, tmp_path)
    for name in set(c.methods) - {"none", "switch"}:
        del c.methods[name]
    c.update(batch_sizes=(2,), costs=0.001)
    records = benchmark.run(c)
    assert all(r["identical"] for r in records)
    assert all(("verify_cost" in r) == (r["method"] == "none") for r in records)
    assert (tmp_path / "results.md").read_text().count("| switch |") == 2


@pytest.mark.slow
def test_every_strategy_steps(strategies: Strategies) -> None:
    for name, (decoder, params) in strategies[1].items():
        keys, ones = jax.random.split(jax.random.key(0), 2), np.ones(2, np.int32)
        state = jax.eval_shape(
            lambda d=decoder, k=keys, x=ones: d.init(k, sampling.sampling(2), x, 9 * x, 64)
        )
        assert jax.eval_shape(decoder.step, params, state)[0] == state, name


def test_draft_free(tmp_path: Path) -> None:
    c = load("configs/bench/draft_free.py").get_config()
    assert set(c.methods) == set(load("configs/bench/strategies.py").DRAFT_FREE)
    c.target.update(TINY)
    c.update(output=str(tmp_path), repeats=1, seconds=0.001, prompt_length=8, max_length=64)
    c.methods = {"suffix": c.methods["suffix"]}
    c.methods["suffix"].weights.update(vocab_size=TINY["vocab_size"], num_tokens=2000)
    (record,) = drafting.run(c)
    assert record["num_nodes"] == 7
    assert record["step_microseconds"] > 0
    assert all(map(math.isfinite, (record[x] for x in ("microseconds", "share", "share_of_own"))))
    assert (tmp_path / "results.md").read_text().count("\n| ") == 3
    for wrong in ({"repeats": 0}, {"prompt_length": 33}, {"methods": {}}):
        with pytest.raises(ValueError, match="need"):
            drafting.run(ConfigDict({**c.to_dict(), **wrong}))


def test_a_twin_drafts_the_same_tree_for_nothing() -> None:
    """Whose tokens, like any, change no text under `match`."""
    target = tabular(6)
    params = Params(target.init(jax.random.key(0)), ())
    real = recycling(target, [-1, 0, 0, 1], k=2)
    texts = {}

    def decoded(name: str, drafter: Drafter) -> DecodeState:
        state = engine.decode(
            engine.decoder(target, drafter, match()),
            params,
            jax.random.split(jax.random.key(1), 2),
            sampling.sampling(2, 1.0),
            jnp.ones((2, 3), jnp.int32),
            jnp.full(2, 3),
            jnp.full(2, 20),
            24,
        )
        texts[name] = np.asarray(state.context.tokens)
        return state

    state = decoded("real", real)
    draft, _ = real.propose(params, state.rng_keys, state.drafter, state.context)
    twin = drafting.for_nothing(real, draft)
    decoded("twin", twin)
    np.testing.assert_array_equal(texts["twin"], texts["real"])
    free, _ = twin.propose(params, state.rng_keys, (), state.context)
    np.testing.assert_array_equal(free.parents, draft.parents)
    assert free.depth == draft.depth
    assert (free.tokens == free.tokens[:, :1]).all()


def test_verification(tmp_path: Path) -> None:
    c = load("configs/bench/verification.py").get_config()
    for case in c.cases.values():
        proposal = build(c.proposals[case.proposal]).proposal
        assert set(proposal.laws) & set(build(case.verifier).laws)
    assert {case.proposal for case in c.cases.values()} == set(c.proposals)
    c.target.update(TINY)
    c.update(output=str(tmp_path), repeats=1, seconds=0.001, num_drafts=1, max_length=256)
    c.cases = {name: c.cases[name] for name in ("match, greedy", "rejection, chain")}
    records = verification.run(c)
    assert [r["case"] for r in records] == list(c.cases)
    assert all(r["microseconds"] > 0 and 1 <= r["tokens"] <= 6 for r in records)
    assert json.loads((tmp_path / "results.json").read_text()) == records
    assert (tmp_path / "results.md").read_text().count("\n| ") == len(records) + 2
    assert (tmp_path / "results.png").stat().st_size > 1000


def test_transformers(directories: tuple[str, str], tmp_path: Path) -> None:
    c = shrink(load("configs/bench/transformers.py").get_config(), directories, tmp_path)
    if importlib.util.find_spec("torch") is None:
        with pytest.raises(ValueError, match=r"specjax\[parity\]"):
            benchmark.run(c)
        return
    records = benchmark.run(c)
    assert sum(r["method"].startswith("transformers") for r in records) == 3
    assert all(r["identical"] for r in records)


def test_llama_30m() -> None:
    c = load("configs/bench/llama_30m.py").get_config()
    shapes = (c.target, c.drafts.draft)
    target, draft = (transformer(TransformerConfig(**shape)) for shape in shapes)
    for case in c.cases.values():
        drafter, verifier = build(case.drafter, draft=draft), build(case.verifier)
        assert engine.decoder(target, drafter, verifier).lossless


@pytest.mark.slow
def test_profile(tmp_path: Path) -> None:
    c = load("configs/bench/llama_30m.py").get_config()
    c.target.update(TINY)
    c.drafts.draft.update(TINY)
    c.update(output=str(tmp_path), repeats=1, seconds=0.01, max_length=256, prompt_length=8)
    c.cases = {"sampled": c.cases.sampled}
    shrink_drafter(c.cases.sampled.drafter)
    (record,) = profile.run(c)
    assert all(value > 0 for value in record["milliseconds"].values())
    assert record["overhead"] > 0
    assert "target and drafter" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(("rule", "reads"), [(match, False), (rejection, True), (block, True)])
def test_a_law_costs_where_it_is_read(rule: Callable[[], Verifier], reads: bool) -> None:
    draft = trees.chain(jnp.array([[0, 1, 2]]), probs=jnp.full((1, 3, 4), 0.25))
    scored = jnp.zeros((1, 3, 4))
    keys = sampling.streams(jax.random.split(jax.random.key(0), 1))
    given = (Params(()), keys, context_of([[0]]))

    def verify(draft: Draft) -> Verdict:
        return rule().verify(*given, draft, ModelOutput(scored, scored), scored)

    assert profile.reads_law(verify, draft) == reads
    assert not profile.reads_law(verify, replace(draft, probs=None))


def test_generate(
    directories: tuple[str, str],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    c = load("configs/generate.py").get_config()
    c.update(target=directories[0], max_new_tokens=8)
    monkeypatch.setattr(sys, "stdin", io.StringIO("def f("))
    generate.main(c)
    assert "8 tokens" in capsys.readouterr().err
