"""Directories of heads: round trips, other projects' names, every error line."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from directories import save_model
from test_hf import CONFIG, assert_same, edit_json, edit_tensors, message, random_params

from specjax import checkpoints
from specjax.build import build
from specjax.drafters import grow
from specjax.kernels import native
from specjax.models import hf, hf_heads
from specjax.models.eagle import EagleHead, eagle3_head, eagle_head
from specjax.models.hydra import hydra_heads
from specjax.models.layers import RopeScaling
from specjax.models.medusa import medusa_heads
from specjax.models.transformer import transformer
from specjax.types import PyTree

TARGET = dataclasses.replace(CONFIG, num_layers=8, tie_embeddings=False)
V, E = TARGET.vocab_size, TARGET.hidden_size
ONE = dataclasses.replace(TARGET, num_layers=1)
IDS = np.array([0, 2, 3, 7, 10])

HEADS: dict[str, Any] = {
    "medusa": medusa_heads(E, num_heads=3),
    "medusa, own unembeddings": medusa_heads(
        E, 2, num_layers=2, own_unembedding=True, vocab_size=V
    ),
    "hydra": hydra_heads(E, num_heads=2),
    "hydra, deep": hydra_heads(E, 2, num_layers=3, own_unembedding=True, vocab_size=V),
    "hydra++": hydra_heads(E, 2, 2, prefix=ONE, own_unembedding=True, vocab_size=V),
    "eagle": eagle_head(ONE),
    "eagle, no bias": eagle_head(
        dataclasses.replace(ONE, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32)), bias=False
    ),
    "eagle3": eagle3_head(ONE, (2, 4, 5)),
    "eagle3, own unembedding": eagle3_head(ONE, (1, 3, 6), own_unembedding=True),
    "eagle3, ids": eagle3_head(ONE, (2, 4, 5), IDS),
}


def weights(heads: Any, dtype: Any = jnp.float32) -> PyTree:
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(heads.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype), shapes)


def assert_same_heads(found: Any, needed: Any) -> None:
    """All that is no function."""
    assert type(found) is type(needed)
    for name, value in needed._asdict().items():
        if not callable(value):
            np.testing.assert_equal(getattr(found, name), value, err_msg=name)


def saved(directory: Path, name: str) -> tuple[Path, Any, PyTree]:
    heads = HEADS[name]
    params = weights(heads)
    hf_heads.save(directory, heads, params, jnp.float32)
    return directory, heads, params


def rename(directory: Path, *rules: tuple[str, str]) -> None:
    """Gives the tensors the names of another project, in model.safetensors."""
    (file,) = directory.glob("*.safetensors")
    tensors = safetensors.numpy.load_file(file)
    file.unlink()
    for pattern, new in rules:
        tensors = {re.sub(pattern, new, name): x for name, x in tensors.items()}
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")


# ----------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", HEADS)
def test_round_trip(tmp_path: Path, name: str) -> None:
    for dtype in (jnp.float32, jnp.bfloat16):
        params = weights(HEADS[name], dtype)
        hf_heads.save(tmp_path, HEADS[name], params, dtype, target_name="someone/something")
        assert hf_heads.kind(tmp_path) == name.replace("+", "").split(",")[0]
        assert hf_heads.stored_dtype(tmp_path) == dtype
        heads, found = hf_heads.load(tmp_path, TARGET)
        assert_same_heads(heads, HEADS[name])
        assert_same(found, params)
        raw = json.loads((tmp_path / "config.json").read_text())
        assert raw["base_model_name_or_path"] == "someone/something"
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    assert_same(hf_heads.load(tmp_path, TARGET, jnp.float32)[1], wide)


def test_what_is_written(tmp_path: Path) -> None:
    """The very names and shapes of the formats."""

    def shapes(name: str) -> dict[str, tuple[int, ...]]:
        saved(tmp_path, name)
        (file,) = tmp_path.glob("*.safetensors")
        return {key: x.shape for key, x in safetensors.numpy.load_file(file).items()}

    attention = {
        "self_attn.o_proj.weight": (E, 24),
        "post_attention_layernorm.weight": (E,),
        "mlp.gate_proj.weight": (12, E),
        "mlp.up_proj.weight": (12, E),
        "mlp.down_proj.weight": (E, 12),
    }

    def inputs(width: int) -> dict[str, tuple[int, ...]]:
        return {
            f"self_attn.{x}_proj.weight": (n, width) for x, n in (("q", 24), ("k", 12), ("v", 12))
        }

    def under(prefix: str, tensors: dict) -> dict[str, tuple[int, ...]]:
        return {prefix + name: shape for name, shape in tensors.items()}

    assert shapes("medusa, own unembeddings") == {
        f"{h}.{name}": shape
        for h in range(2)
        for name, shape in {
            **{f"{l}.linear.weight": (E, E) for l in range(2)},
            **{f"{l}.linear.bias": (E,) for l in range(2)},
            "2.weight": (V, E),
        }.items()
    }
    mlp: dict[str, tuple[int, ...]] = {}
    for h in range(2):
        for block in ("0.linear", "0.res_connection"):
            place = f"hydra_mlp.{h}.{block}"
            mlp |= {f"{place}.weight": (E, (h + 2) * E), f"{place}.bias": (E,)}
        for l in (1, 2):
            place = f"hydra_mlp.{h}.{l}.linear"
            mlp |= {f"{place}.weight": (E, E), f"{place}.bias": (E,)}
        place = f"hydra_lm_head.{h}"
        mlp |= {f"{place}.weight": (V, E), f"{place}.bias": (V,)}
    assert shapes("hydra, deep") == mlp
    layer = {"input_layernorm.weight": (E,), **inputs(E), **attention}
    plus = shapes("hydra++")
    assert {name: x for name, x in plus.items() if name.startswith("prefix")} == {
        **under("prefix_embeding_layer.layers.0.", layer),
        "prefix_embeding_layer.norm.weight": (E,),
    }
    assert plus["hydra_mlp.1.1.linear.weight"] == (E, 3 * E)
    assert plus["hydra_mlp.1.3.linear.weight"] == (E, E)
    assert plus["hydra_lm_head.0.1.bias"] == (V,)
    assert shapes("eagle") == {
        "fc.weight": (E, 2 * E),
        "fc.bias": (E,),
        **under("layers.0.", {**inputs(E), **attention}),
    }
    norms = {"input_layernorm.weight": (E,), "hidden_norm.weight": (E,)}
    assert shapes("eagle3, ids") == {
        "fc.weight": (E, 3 * E),
        **under("midlayer.", {**norms, **inputs(2 * E), **attention}),
        "norm.weight": (E,),
        "lm_head.weight": (5, E),
        "d2t": (5,),
        "t2d": (V,),
    }
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(tensors["d2t"], [0, 1, 1, 4, 6])
    assert np.flatnonzero(tensors["t2d"]).tolist() == IDS.tolist()
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["draft_vocab_size"] == 5
    assert raw["vocab_size"] == V
    assert raw["num_hidden_layers"] == 1


def test_one_kind_replaces_another(tmp_path: Path) -> None:
    hf.save(tmp_path, CONFIG, random_params(CONFIG))
    assert hf_heads.kind(tmp_path) == "model"
    (tmp_path / "tokenizer.json").write_text("kept")
    saved(tmp_path, "medusa")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "medusa_lm_head.safetensors",
        "tokenizer.json",
    ]
    saved(tmp_path, "eagle")
    assert hf_heads.kind(tmp_path) == "eagle"
    hf.save(tmp_path, CONFIG, random_params(CONFIG))
    assert hf_heads.kind(tmp_path) == "model"
    assert not list(tmp_path.glob("medusa*"))


# ----------------------------------------------------------------------------- others' forms


def check(directory: Path, heads: Any, params: PyTree) -> None:
    found = hf_heads.load(directory, TARGET)
    assert_same_heads(found[0], heads)
    assert_same(found[1], params)


@pytest.mark.parametrize("prefix", ["", "medusa_heads."])
def test_medusa_of_vllm(tmp_path: Path, prefix: str) -> None:
    directory, heads, params = saved(tmp_path, "medusa, own unembeddings")
    rename(
        directory,
        (r"^(\d+)\.2\.weight", rf"{prefix}lm_heads.\1.weight"),
        (r"^(\d+)\.(\d+)\.linear", rf"{prefix}blocks.\1.layers.\2"),
    )
    edit_json(directory / "config.json", num_heads=2, num_hidden_layers=2)
    check(directory, heads, params)


def test_medusa_without_biases_or_unembeddings(tmp_path: Path) -> None:
    """As vLLM writes it by default; a matrix for all heads is the target's."""
    directory, heads, params = saved(tmp_path, "medusa")
    rename(directory, (r"^(\d+)\.(\d+)\.linear", r"blocks.\1.layers.\2"))

    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.endswith("bias")]:
            del tensors[name]
        tensors["lm_head.weight"] = np.zeros((V, E), np.float32)

    edit_tensors(directory / "model.safetensors", change)
    zero = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if path[-1].key == "bias" else x, params
    )
    check(directory, heads, zero)


def test_as_many_medusa_heads_as_are_stored(tmp_path: Path) -> None:
    """The released config says 2 of 5."""
    directory, heads, params = saved(tmp_path, "medusa")
    edit_json(directory / "config.json", medusa_num_heads=2)
    check(directory, heads, params)


def test_hydra_with_and_without_dropouts(tmp_path: Path) -> None:
    directory, heads, params = saved(tmp_path, "hydra++")
    edit_json(directory / "config.json", prefix_config="absent")  # the target's, then
    edit_tensors(
        next(directory.glob("*.safetensors")),
        lambda t: t.update({"prefix_embeding_layer.embed_tokens.weight": np.zeros((V, E))}),
    )
    check(directory, heads, params)
    assert "prefix_config" in message(hf_heads.load, directory, transformer(TARGET))
    directory, heads, params = saved(tmp_path, "hydra, deep")
    for l in (2, 1, 0):
        rename(directory, (rf"^hydra_mlp\.(\d)\.{l}\.", rf"hydra_mlp.\1.{2 * l + 1}."))
    rename(directory, (r"hydra_lm_head\.(\d+)\.", r"hydra_lm_head.\1.1."))
    check(directory, heads, params)


def test_eagle_with_the_targets_matrices(tmp_path: Path) -> None:
    """As released, with an embedding; wrapped as vLLM does; loaded as half precision."""
    directory, heads, params = saved(tmp_path, "eagle")
    file = directory / "model.safetensors"
    edit_tensors(
        file,
        lambda t: t.update(
            {
                "embed_tokens.weight": np.zeros((V, E), np.float32),
                "lm_head.weight": np.zeros((V, E), np.float32),
                "layers.0.self_attn.rotary_emb.inv_freq": np.zeros(3, np.float32),
            }
        ),
    )
    check(directory, heads, params)
    raw = json.loads((directory / "config.json").read_text())
    wrapped = {"model_type": "eagle", "model": raw, "eagle_fc_bias": True}
    (directory / "config.json").write_text(json.dumps(wrapped))
    check(directory, heads, params)
    edit_tensors(file, lambda t: t.update({k: x.astype(np.float16) for k, x in t.items()}))
    assert "F16" in message(hf_heads.load, directory, TARGET)
    for x in jax.tree.leaves(hf_heads.load(directory, TARGET, jnp.bfloat16)[1]):
        assert x.dtype == jnp.bfloat16


def test_eagle3_of_modelopt_and_speculators(tmp_path: Path) -> None:
    directory, heads, params = saved(tmp_path, "eagle3, own unembedding")
    rename(directory, (r"^midlayer\.", "layers.0."))
    assert hf_heads.kind(directory) == "eagle3"
    check(directory, heads, params)
    path, layers = directory / "config.json", "eagle_aux_hidden_state_layer_ids"
    raw = json.loads(path.read_text())
    # ModelOpt counts the layers whose output is read.
    after = {"eagle_config": {layers: [0, 2, 5], "use_aux_hidden_state": True}, layers: "absent"}
    edit_json(path, **after)
    check(directory, heads, params)
    speculators = {
        "speculators_model_type": "eagle3",
        "architectures": ["Eagle3Speculator"],
        "transformer_layer_config": {k: x for k, x in raw.items() if k not in (layers, "bias")},
        "norm_before_residual": False,
        layers: [1, 3, 6],
    }
    path.write_text(json.dumps(speculators))
    check(directory, heads, params)
    edit_json(path, norm_before_residual=True)
    assert "norm_before_residual to True" in message(hf_heads.load, directory, TARGET)
    # Where nothing is said: 2, L // 2, L - 3, of a model those that it gives.
    edit_json(path, norm_before_residual=False, **{layers: "absent"})
    for target, expected in (
        (TARGET, (2, 4, 5)),
        (transformer(TARGET, feature_layers=(1, 3, 6)), (1, 3, 6)),
    ):
        found, _ = hf_heads.load(directory, target)
        assert isinstance(found, EagleHead)
        assert found.feature_layers == expected


def test_eagle3_of_all_tokens_needs_no_ids(tmp_path: Path) -> None:
    directory, heads, params = saved(tmp_path, "eagle3, own unembedding")
    every = {"d2t": np.zeros(V, np.int64), "t2d": np.ones(V, bool)}
    edit_tensors(directory / "model.safetensors", lambda t: t.update(every))
    check(directory, heads, params)


# ----------------------------------------------------------------------------- what is wrong


def without(name: str) -> Callable[[dict], Any]:
    return lambda tensors: tensors.pop(name)


def with_tensor(name: str, *shape: int) -> Callable[[dict], Any]:
    return lambda tensors: tensors.update({name: np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("medusa", without("1.0.linear.weight"), r"no tensor 1.0.linear.weight; need .*\(8, 8\)"),
        ("medusa", without("1.0.linear.bias"), r"no tensor 1.0.linear.bias"),
        ("medusa", with_tensor("0.0.linear.weight", 8, 9), r"has shape \(8, 9\); need \(8, 8\)"),
        ("medusa", with_tensor("0.0.linear.weight", 7, 7), "hidden size 7, but the target's is 8"),
        ("medusa, own unembeddings", with_tensor("0.2.weight", 9, 8), "vocabulary 9, .* is 11"),
        ("medusa", with_tensor("token_map", 3), "tensor token_map, which medusa heads do not use"),
        (
            "hydra, deep",
            with_tensor("hydra_mlp.1.2.linear.bias", 8),
            r"1\.1\..* and .*1\.2\..*diff",
        ),
        ("hydra, deep", with_tensor("hydra_lm_head.0.weight", 9, 8), "vocabulary 9, .* is 11"),
        ("hydra", with_tensor("hydra_mlp.0.0.linear.weight", 7, 7), "hidden size 7, .* is 8"),
        ("eagle", without("fc.weight"), "holds a tensor .* but no heads"),
        ("eagle", with_tensor("layers.0.self_attn.q_proj.bias", 24), "do not use"),
        ("eagle3", without("midlayer.mlp.up_proj.weight"), "no tensor midlayer.mlp.up_proj"),
        ("eagle3", with_tensor("fc.weight", 8, 16), r"\(8, 16\); need \(8, 24\)"),
        ("eagle3", with_tensor("lm_head.weight", 9, 8), "vocabulary 9, .* is 11"),
        ("eagle3, ids", without("lm_head.weight"), r"no tensor lm_head.weight; need .*\(5, 8\)"),
        ("eagle3, ids", with_tensor("lm_head.weight", 4, 8), r"\(4, 8\); need \(5, 8\)"),
        ("eagle3, ids", lambda t: t.update(d2t=4 - np.arange(5)), "ids 4 to 4 .* 11 tokens"),
        ("eagle3, ids", lambda t: t.update(d2t=np.arange(5) + 7), "ids 7 to 15 .* 11 tokens"),
        ("eagle3, ids", lambda t: t.update(t2d=np.ones(V, bool)), "marks other ids"),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, name: str, change: Callable[[dict], Any], expected: str
) -> None:
    saved(tmp_path, name)
    edit_tensors(next(tmp_path.glob("*.safetensors")), change)
    assert re.search(expected, message(hf_heads.load, tmp_path, TARGET))


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("hydra", {"hydra_head_arch": "cross-attn"}, "hydra_head_arch to 'cross-attn'; supported"),
        ("hydra", {"grounded_heads": False}, "grounded_heads to False"),
        ("hydra", {"hidden_state_offset": 1}, "hidden_state_offset to 1"),
        ("eagle", {"num_hidden_layers": 2}, "gives 2 layers; EAGLE heads have 1"),
        ("eagle", {"hidden_size": 9}, "hidden size 9, but the target's is 8"),
        ("eagle", {"vocab_size": 12}, "vocabulary 12, but the target's is 11"),
        ("eagle", {"hidden_act": "gelu"}, "hidden_act"),
        ("eagle3", {"embed_requires_grad": True}, "embed_requires_grad to True"),
        ("eagle3", {"fc_norm": [True]}, "fc_norm"),
        (
            "eagle3",
            {"eagle_aux_hidden_state_layer_ids": [2, 4, 8]},
            r"layers \[2, 4, 8\] of a target of 8.* 0 to 7",
        ),
    ],
)
def test_configs_that_do_not_fit(
    tmp_path: Path, name: str, changes: dict[str, Any], expected: str
) -> None:
    saved(tmp_path, name)
    edit_json(tmp_path / "config.json", **changes)
    assert re.search(expected, message(hf_heads.load, tmp_path, TARGET))


def test_directories_that_hold_no_heads(tmp_path: Path) -> None:
    assert "not a directory" in message(hf_heads.kind, tmp_path / "nowhere")
    assert "no weights" in message(hf_heads.kind, tmp_path)
    for old, new in (("medusa_lm_head", "medusa_lm_head"), ("pytorch_model", "model")):
        pickle = tmp_path / (f"{old}.bin" if old == "pytorch_model" else f"{old}.pt")
        pickle.write_bytes(b"")
        text = message(hf_heads.kind, tmp_path)
        assert f"{pickle.name} is a pickle; need {new}.safetensors" in text
        assert "weights_only=True" in text
        pickle.unlink()
    hf.save(tmp_path, CONFIG, random_params(CONFIG))
    assert "but no heads" in message(hf_heads.load, tmp_path, TARGET)
    saved(tmp_path, "medusa")
    (tmp_path / "config.json").unlink()
    assert "config.json" in message(hf_heads.load, tmp_path, TARGET)


def test_save_refuses(tmp_path: Path) -> None:
    heads = HEADS["medusa"]
    params = weights(heads)
    for wrong, expected in (
        ({**params, "more": jnp.zeros(1)}, "params do hold more; the medusa heads do not"),
        ({"heads_0": params["heads_0"]}, "params do not hold heads_1/"),
        (jax.tree.map(lambda x: x[:3], params), r"has shape \(3, 8\); need \(8, 8\)"),
    ):
        assert re.search(expected, message(hf_heads.save, tmp_path / "new", heads, wrong))
    assert "int8" in message(hf_heads.save, tmp_path / "new", heads, params, "int8")
    (tmp_path / "file").write_text("")
    assert "is a file" in message(hf_heads.save, tmp_path / "file", heads, params)
    assert not (tmp_path / "new").exists()


# ----------------------------------------------------------------------------- several at once


def test_a_target_with_several_drafts(tmp_path: Path) -> None:
    target = save_model(tmp_path / "target", num_layers=3)
    shape = hf.load_config(target)
    layer = dataclasses.replace(shape, num_layers=1)
    heads: dict[str, Any] = {
        "medusa": medusa_heads(16),
        "hydra": hydra_heads(16, prefix=dataclasses.replace(layer, max_position_embeddings=99)),
        "low": eagle3_head(layer, (1,)),
        "both": eagle3_head(layer, (2, 0)),
    }
    directories = {"model": save_model(tmp_path / "model", seed=1), "no": ""}
    for name, functions in heads.items():
        hf_heads.save(tmp_path / name, functions, weights(functions))
        directories[name] = str(tmp_path / name)
    models = checkpoints.load(target, directories, cache_dtype="bfloat16")
    assert set(models.drafts) == {"model", *heads}
    assert models.context == 99
    assert models.target.feature_layers == (0, 1, 2)
    spec: dict[str, Any] = {
        "call": "specjax.drafters.eagle.eagle",
        "target": "@target",
        "head": "@both",
        "build": grow.dynamic(6, 2, 3),
    }
    given = checkpoints.given(models.target, models.drafts)
    drafter = build(spec, **given)
    state = jax.eval_shape(lambda: drafter.init(1, 8))
    assert state.cache.keys[0].dtype == jnp.bfloat16
    prefix: Any = models.drafts["hydra"].model
    assert jax.eval_shape(lambda: prefix.init_cache(1, 8)).keys[0].dtype == jnp.bfloat16
    params = checkpoints.params(models.target_params, models.drafts, spec)
    assert params.target is models.target_params
    assert params.drafter is models.drafts["both"].params
    for name, functions in heads.items():
        found = models.drafts[name].params
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights(functions))
        assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), found, rounded))
        kinds = {x.ndim: x.dtype for x in jax.tree.leaves(found)}
        assert kinds == {1: jnp.float32, 2: jnp.bfloat16 if native.available() else jnp.float32}
    spec["other"] = "@low"
    for wrong, expected in (
        (lambda: checkpoints.params((), models.drafts, spec), "@low and @both"),
        (lambda: checkpoints.load(target, {"target": target}), "called 'target'"),
        (lambda: checkpoints.load(target, tmp_path / "nowhere"), "nowhere is not a directory"),
    ):
        assert expected in message(wrong)
    (tmp_path / "both" / "tokenizer.json").write_text("{}")
    assert "cannot be read" in message(checkpoints.load, target, {"both": tmp_path / "both"})
