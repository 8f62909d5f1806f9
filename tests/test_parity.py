"""The same files give the same logits here and in transformers, whichever way tokens are fed.

`golden/` holds tiny models as transformers saved them and what it says of them; with transformers
installed the same is asked of models that are made anew.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from directories import ROOT
from ml_collections import ConfigDict

from configs.bench import parity as config
from decode import parity
from specjax.kernels import native
from specjax.models import hf
from specjax.models.families import FAMILIES
from specjax.types import Array, Cache

GOLDEN = ROOT / "tests" / "golden"
CONFIG = config.get_config()
TOLERANCE = CONFIG.tolerance
WITH_WINDOWS = ("mistral", "qwen2_window", "gemma2", "gemma3", "gemma3_linear_rope")


class Golden(NamedTuple):
    """A model of a directory, and what transformers says of it."""

    name: str
    found: hf.Checkpoint
    expected: parity.Expected


SLOW = ("llama_ungrouped", "qwen2_window", "gemma3_linear_rope")  # others stand for these


def grouped(names: Any) -> list[Any]:
    """So that a worker compiles all that a model needs."""
    slow = {True: [pytest.mark.slow], False: []}
    return [
        pytest.param(name, marks=[pytest.mark.xdist_group(name), *slow[name in SLOW]])
        for name in names
    ]


@pytest.fixture(scope="module", params=grouped(CONFIG.variants))
def golden(request: pytest.FixtureRequest) -> Golden:
    directory = GOLDEN / request.param
    return Golden(request.param, hf.load(directory), parity.read_expected(directory))


@pytest.fixture(scope="module")
def one_by_one(golden: Golden) -> tuple[Array, Cache]:
    return parity.cached(golden.found.config, golden.found.params, golden.expected.tokens)


def required() -> None:
    """Skips what cannot be asked here."""
    for library in ("torch", "transformers"):
        pytest.importorskip(library, reason="compares with transformers, which needs torch")


# ------------------------------------------------------------------------------------- golden files


def test_every_family_is_there() -> None:
    assert {path.name for path in GOLDEN.iterdir() if path.is_dir()} == set(CONFIG.variants)
    assert {hf.load_config(GOLDEN / name).family for name in CONFIG.variants} == set(FAMILIES)
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*")) < parity.MOST_BYTES
    assert set(json.loads((GOLDEN / parity.VERSIONS).read_text())) > {"torch", "transformers"}


def test_logits_differ_by_more_than_the_tolerance(golden: Golden) -> None:
    found, expected = golden.found, golden.expected
    assert expected.logits.std() > 1.0
    assert (found.eos_ids, found.bos_id) == ((2, 3), 1)
    windows = [w for w in found.config.windows if w]
    assert all(w < min(expected.prefix) for w in windows), "some of the prefix is out of sight"
    assert bool(windows) == (golden.name in WITH_WINDOWS)


def test_uncached(golden: Golden) -> None:
    found, expected = golden.found, golden.expected
    logits = parity.uncached(found.config, found.params, expected.tokens)
    assert parity.largest(logits, expected.logits) < TOLERANCE


def test_token_by_token(golden: Golden, one_by_one: tuple[Array, Cache]) -> None:
    assert parity.largest(one_by_one[0], golden.expected.logits) < TOLERANCE


def test_tree(golden: Golden, one_by_one: tuple[Array, Cache]) -> None:
    """A node fed at once or level by level sees its path alone, after a ragged prefix."""
    found, expected = golden.found, golden.expected
    at_once, by_level = parity.tree(found.config, found.params, one_by_one[1], expected)
    assert parity.largest(at_once, expected.node_logits) < TOLERANCE
    assert parity.largest(by_level, expected.node_logits) < TOLERANCE


# It has all that attention can be asked for.
@pytest.mark.parametrize("golden", grouped(["gemma2"]), indirect=True)
def test_tree_without_kernels(golden: Golden, one_by_one: tuple[Array, Cache]) -> None:
    with native.disabled():
        test_tree(golden, one_by_one)


def test_bfloat16(golden: Golden) -> None:
    record = parity.differences_in_bfloat16(golden.found, golden.expected)
    told: dict[str, Any] = dict.fromkeys((*parity.FULL, "saved"), 0.0)
    told["experts"] = golden.found.config.num_experts
    assert not parity.beyond(CONFIG, told | record), record
    assert record["bfloat16"] > 0.01, "nothing was rounded"


@pytest.mark.parametrize("golden", grouped(["mixtral", "gemma2"]), indirect=True)
def test_weights_in_bfloat16(golden: Golden) -> None:
    record = parity.differences_by_weights(golden.found, golden.expected)
    assert max(record.values()) < TOLERANCE, record


def test_saved_and_loaded(golden: Golden, tmp_path: Path) -> None:
    parity.save(tmp_path, golden.found)
    back = hf.load(tmp_path)
    assert back._replace(params=None) == golden.found._replace(params=None)
    assert jax.tree.structure(back.params) == jax.tree.structure(golden.found.params)
    jax.tree.map(np.testing.assert_array_equal, back.params, golden.found.params)


# ------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("name", grouped(CONFIG.variants))
def test_made_anew(name: str, tmp_path: Path) -> None:
    required()
    record = parity.measure(CONFIG, name, tmp_path)
    assert not parity.beyond(CONFIG, record), record
    assert record["standard_deviation"] > 1.0


@pytest.mark.parametrize("max_shard_bytes", [None, 10_000])
def test_transformers_reads_what_is_saved(
    golden: Golden, tmp_path: Path, max_shard_bytes: int | None
) -> None:
    required()
    parity.save(tmp_path, golden.found, max_shard_bytes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_bytes is not None)
    theirs, info = parity.load(tmp_path, "auto")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert str(theirs.dtype) == "torch.float32"
    own, _ = parity.load(GOLDEN / golden.name)
    tokens = golden.expected.tokens
    found, needed = (parity.torch_logits(model, tokens) for model in (theirs, own))
    np.testing.assert_array_equal(found, needed)
    assert theirs.generation_config.eos_token_id == [2, 3]
    assert theirs.generation_config.bos_token_id == 1


def test_bfloat16_both_ways(golden: Golden, tmp_path: Path) -> None:
    required()
    params = golden.found.params
    hf.save(tmp_path / "ours", golden.found.config, params, dtype=jnp.bfloat16)
    theirs, _ = parity.load(tmp_path / "ours", "auto")
    assert str(theirs.dtype) == "torch.bfloat16"
    theirs.save_pretrained(tmp_path / "theirs")
    same = jax.tree.map(
        lambda x, y: x.dtype == jnp.bfloat16 and bool((x == y.astype(x.dtype)).all()),
        hf.load(tmp_path / "theirs").params,
        params,
    )
    assert all(jax.tree.leaves(same))


# --------------------------------------------------------------------------------------- the script


def one_variant(tmp_path: Path, name: str = "gpt2") -> ConfigDict:
    c = config.get_config()
    c.variants = {name: c.variants[name].to_dict()}
    c.output = str(tmp_path / "results")
    return c


def test_it_writes_what_it_finds(tmp_path: Path) -> None:
    required()
    c = one_variant(tmp_path)
    c.golden = str(tmp_path / "golden")
    parity.main(c)
    results = json.loads((tmp_path / "results/results.json").read_text())
    assert [record["variant"] for record in results["records"]] == ["gpt2"]
    page = (tmp_path / "results/results.md").read_text()
    assert page.count("\n| gpt2 | n_inner 40 |") == 1
    assert all(f"{name} {version}" in page for name, version in results["versions"].items())
    assert (tmp_path / "results/results.png").stat().st_size > 1000
    made = {path.name for path in (tmp_path / "golden/gpt2").iterdir()}
    assert made == {path.name for path in (GOLDEN / "gpt2").iterdir()}
    c.tolerance = 1e-9
    with pytest.raises(SystemExit, match="beyond its tolerance: gpt2: uncached; gpt2: cached"):
        parity.main(c)


def test_golden_files_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    required()
    c = one_variant(tmp_path)
    c.golden = str(tmp_path / "golden")
    monkeypatch.setattr(parity, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"Golden files take \d+ bytes; need at most 1000"):
        parity.main(c)
    assert not (tmp_path / "golden").exists()


def test_it_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = one_variant(tmp_path)
    c.prefix = (20, 22)
    with pytest.raises(ValueError, match=r"num_tokens 24; with the tree they need .* 1 and 26"):
        parity.main(c)
    c = one_variant(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"pip install 'specjax\[parity\]'"):
        parity.main(c)
    c.variants = {}
    with pytest.raises(ValueError, match="no variants"):
        parity.main(c)
