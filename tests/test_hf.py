"""Hugging Face directories: round trips, every error line, interrupted saves."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers as hf_tokenizers
from directories import save_model
from flax import traverse_util

from specjax import checkpoints
from specjax.kernels import native
from specjax.models import hf
from specjax.models.families import FAMILIES
from specjax.models.layers import LinearRopeScaling, RopeScaling
from specjax.models.transformer import TransformerConfig, transformer
from specjax.types import PyTree

CONFIG = TransformerConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_position_embeddings=64,
    rope_theta=5000.0,
    norm_eps=1e-6,
)
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)
SCALED = dataclasses.replace(CONFIG, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32))
_GEMMA: dict[str, Any] = {"windows": (5, 0), "attention_scale": 20**-0.5}
OF_FAMILIES = {
    family: dataclasses.replace(CONFIG, family=family, **changes)
    for family, changes in {
        "llama": {"rope_scaling": LinearRopeScaling(4.0)},
        "mistral": {"windows": (5, 5), "tie_embeddings": False},
        "mixtral": {"num_experts": 4, "num_experts_per_token": 2},
        "qwen2": {"windows": (0, 5)},
        "qwen3": {"tie_embeddings": False},
        "qwen3_moe": {
            "num_experts": 4,
            "num_experts_per_token": 3,
            "renormalized_experts": False,
            "windows": (5, 5),
        },
        "gemma2": _GEMMA | {"attention_softcap": 5.0, "logit_softcap": 8.0},
        "gemma3_text": _GEMMA | {"local_rope_theta": 700.0, "rope_scaling": LinearRopeScaling(8.0)},
        "gpt2": {"num_kv_heads": 4, "head_dim": 2, "rope_theta": 1e4},  # it has no theta
    }.items()
}


@functools.cache
def random_params(config: TransformerConfig, dtype: Any = jnp.float32, seed: int = 0) -> PyTree:
    """The model's own tree of parameters, filled without compiling its `init`."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(transformer(config, dtype).init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)


def assert_same(found: PyTree, needed: PyTree) -> None:
    found, needed = (traverse_util.flatten_dict(x, sep="/") for x in (found, needed))
    assert found.keys() == needed.keys()
    for path, x in needed.items():
        assert found[path].dtype == x.dtype, path
        np.testing.assert_array_equal(found[path], x, err_msg=path)


def edit_json(path: Path, **changes: Any) -> None:
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (raw | changes).items() if v != "absent"}))


def edit_tensors(path: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = dict(safetensors.numpy.load_file(path))
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def message(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The one line of the ValueError that a call raises."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call(*args, **kwargs)
    text = str(caught.value)
    assert text
    assert "\n" not in text
    return text


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    hf.save(tmp_path / "model", CONFIG, random_params(CONFIG))
    return tmp_path / "model"


# ----------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("config", [CONFIG, UNTIED, SCALED])
@pytest.mark.parametrize("max_shard_bytes", [None, 1, 1000])
def test_round_trip(
    tmp_path: Path, config: TransformerConfig, dtype: Any, max_shard_bytes: int | None
) -> None:
    params = random_params(config, dtype)
    hf.save(tmp_path, config, params, eos_ids=(3, 5), bos_id=0, max_shard_bytes=max_shard_bytes)
    found = hf.load(tmp_path)
    assert found.config == hf.load_config(tmp_path) == config
    assert (found.eos_ids, found.bos_id) == ((3, 5), 0)
    assert_same(found.params, params)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(found.params))
    if max_shard_bytes is not None:
        shards = sorted(tmp_path.glob("*.safetensors"))
        assert len(shards) > 1
        assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
        for shard in shards:
            tensors = safetensors.numpy.load_file(shard)
            assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= 1000


@pytest.mark.parametrize("max_shard_bytes", [None, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_of_every_family(
    tmp_path: Path, family: str, max_shard_bytes: int | None
) -> None:
    config = OF_FAMILIES[family]
    for own in (config, dataclasses.replace(config, tie_embeddings=not config.tie_embeddings)):
        params = random_params(own)
        hf.save(tmp_path, own, params, max_shard_bytes=max_shard_bytes)
        found = hf.load(tmp_path)
        assert found.config == hf.load_config(tmp_path) == own
        assert_same(found.params, params)


def test_every_expert_has_a_tensor_of_its_own(tmp_path: Path) -> None:
    config = OF_FAMILIES["mixtral"]
    params = random_params(config)
    hf.save(tmp_path, config, params)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    for name, path in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        stack = params["layers_1"]["mlp"][path]
        for i, x in enumerate(stack):
            stored = tensors[f"model.layers.1.block_sparse_moe.experts.{i}.{name}.weight"]
            np.testing.assert_array_equal(stored, x)
    last = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    edit_tensors(tmp_path / "model.safetensors", lambda t: t.pop(last))
    assert f"has no tensor {last}" in message(hf.load, tmp_path)


def test_names_and_buffers_of_gpt2(tmp_path: Path) -> None:
    """Older files have no first word and keep the causal mask."""
    config = OF_FAMILIES["gpt2"]
    params = random_params(config)
    hf.save(tmp_path, config, params)

    def older(t: dict[str, np.ndarray]) -> None:
        for name in list(t):
            t[name.removeprefix("transformer.")] = t.pop(name)
        for i in range(config.num_layers):
            t[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 64, 64), np.uint8))
            t[f"h.{i}.attn.masked_bias"] = np.full((), -1e4, np.float32)

    path = tmp_path / "model.safetensors"
    edit_tensors(path, older)
    assert "h.0.attn.c_attn.weight" in safetensors.numpy.load_file(path)
    assert_same(hf.load(tmp_path).params, params)
    edit_tensors(path, lambda t: t.update({"h.2.attn.c_attn.bias": np.ones(24, np.float32)}))
    text = message(hf.load, tmp_path)
    assert "has a tensor h.2.attn.c_attn.bias, which GPT2LMHeadModel does not use" in text


def test_converts_as_asked(tmp_path: Path) -> None:
    params = random_params(CONFIG)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    hf.save(tmp_path / "wide", CONFIG, params)
    assert_same(hf.load(tmp_path / "wide", "bfloat16").params, half)
    hf.save(tmp_path / "half", CONFIG, params, dtype=jnp.bfloat16)
    assert_same(hf.load(tmp_path / "half").params, half)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    assert_same(hf.load(tmp_path / "half", jnp.float32).params, wide)
    edit_tensors(
        tmp_path / "wide/model.safetensors",
        lambda t: t.update({name: x.astype(np.float16) for name, x in t.items()}),
    )
    assert "F16" in message(hf.load, tmp_path / "wide")
    assert hf.load(tmp_path / "wide", jnp.float32).params["embed_tokens"].dtype == jnp.float32


def test_single_file_becomes_shards_and_back(saved: Path) -> None:
    params = random_params(CONFIG, seed=1)
    hf.save(saved, CONFIG, params, max_shard_bytes=1000)
    assert not (saved / "model.safetensors").exists()
    assert_same(hf.load(saved).params, params)
    hf.save(saved, UNTIED, random_params(UNTIED))
    assert [p.name for p in saved.glob("model*")] == ["model.safetensors"]


def test_other_files_are_carried_over(saved: Path) -> None:
    (saved / "tokenizer.json").write_text("kept")
    (saved / "notes").mkdir()
    (saved / "notes" / "a.txt").write_text("kept too")
    hf.save(saved, CONFIG, random_params(CONFIG, seed=1))
    assert (saved / "tokenizer.json").read_text() == "kept"
    assert (saved / "notes" / "a.txt").read_text() == "kept too"
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_accepts_harmless_extra_tensors(saved: Path) -> None:
    def add(t: dict[str, np.ndarray]) -> None:
        t["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
        t["lm_head.weight"] = t["model.embed_tokens.weight"]

    edit_tensors(saved / "model.safetensors", add)
    assert_same(hf.load(saved).params, random_params(CONFIG))


# ----------------------------------------------------------------------------- config.json


def test_config_of_both_transformers_generations(saved: Path) -> None:
    llama3 = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    path = saved / "config.json"
    edit_json(path, rope_scaling={"type": "llama3", **llama3})
    assert hf.load_config(saved) == SCALED
    edit_json(path, rope_theta="absent", rope_scaling="absent")
    edit_json(path, rope_parameters={"rope_type": "llama3", "rope_theta": 5000.0, **llama3})
    assert hf.load_config(saved) == SCALED
    edit_json(path, rope_parameters={"rope_type": "default", "rope_theta": 5000})
    assert hf.load_config(saved) == CONFIG
    edit_json(path, rope_parameters="absent", rope_scaling=None)
    assert hf.load_config(saved).rope_theta == 10000.0


def test_defaults_of_an_old_config(saved: Path) -> None:
    absent = ("num_key_value_heads", "head_dim", "tie_word_embeddings", "architectures")
    edit_json(saved / "config.json", **dict.fromkeys(absent, "absent"))
    config = hf.load_config(saved)
    assert (config.num_kv_heads, config.head_dim, config.tie_embeddings) == (4, 2, False)


@pytest.mark.parametrize(
    ("generation", "config", "needed"),
    [
        (None, 7, (7,)),
        (None, [7, 8], (7, 8)),
        ({"eos_token_id": [1, 2]}, 7, (1, 2)),
        ({"eos_token_id": None}, 7, (7,)),
        ({}, None, ()),
    ],
)
def test_eos_ids(
    saved: Path, generation: dict[str, Any] | None, config: Any, needed: tuple[int, ...]
) -> None:
    (saved / "generation_config.json").unlink()
    if generation is not None:
        (saved / "generation_config.json").write_text(json.dumps(generation))
    edit_json(saved / "config.json", eos_token_id=config)
    assert hf.load(saved).eos_ids == needed
    assert hf.load(saved).bos_id is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["FalconForCausalLM"]}, ["FalconForCausalLM", "LlamaForCausalLM"]),
        ({"architectures": None, "model_type": "falcon"}, ["falcon", "LlamaForCausalLM"]),
        ({"architectures": "LlamaForCausalLM"}, ["architectures"]),
        ({"model_type": "mistral"}, ["model_type 'mistral'", "'llama' for LlamaForCausalLM"]),
        ({"attention_bias": True}, ["attention_bias", "True", "False"]),
        ({"mlp_bias": True}, ["mlp_bias", "True", "False"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "bits", "float16"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config, 'fp8'"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ["yarn", "llama3"]),
        ({"rope_scaling": {"rope_type": "llama3"}}, ["low_freq_factor", "None", "positive"]),
        ({"rope_scaling": 2.0}, ["rope_scaling", "2.0", "object"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5"]),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 1,
                    "original_max_position_embeddings": 32,
                }
            },
            ["high_freq_factor 1", "low_freq_factor 4"],
        ),
        ({"rope_theta": 0}, ["rope_theta", "0", "positive"]),
        ({"rms_norm_eps": "small"}, ["rms_norm_eps", "small", "positive"]),
        ({"hidden_size": "absent"}, ["hidden_size", "None", "positive integer"]),
        ({"vocab_size": -1}, ["vocab_size", "-1", "positive integer"]),
        ({"num_hidden_layers": 2.5}, ["num_hidden_layers", "2.5", "positive integer"]),
        ({"num_attention_heads": True}, ["num_attention_heads", "True", "positive integer"]),
        ({"num_attention_heads": 3, "head_dim": None}, ["hidden_size 8", "3 heads"]),
        ({"eos_token_id": "end"}, ["eos_token_id", "end", "integers"]),
    ],
)
def test_refuses_config(saved: Path, changes: dict[str, Any], words: list[str]) -> None:
    (saved / "generation_config.json").unlink()
    edit_json(saved / "config.json", **changes)
    text = message(hf.load, saved)
    assert all(word in text for word in [*words, str(saved)]), text


_YARN = {"rope_type": "yarn", "factor": 2.0}


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("gpt2", {"activation_function": "relu"}, ["activation_function", "relu", "gelu_new"]),
        ("gpt2", {"scale_attn_weights": False}, ["scale_attn_weights", "False", "True"]),
        ("gpt2", {"n_embd": 9}, ["n_embd 9", "4 heads"]),
        ("gpt2", {"n_layer": "absent"}, ["n_layer", "None", "positive integer"]),
        ("gemma2", {"use_bidirectional_attention": True}, ["use_bidirectional_attention", "True"]),
        ("gemma2", {"hidden_activation": "gelu"}, ["'gelu'", "gelu_pytorch_tanh"]),
        ("gemma2", {"attn_logit_softcapping": -1}, ["attn_logit_softcapping", "-1", "positive"]),
        ("gemma2", {"layer_types": ["sliding_attention"]}, ["layer_types", "2 layers"]),
        (
            "gemma3_text",
            {"layer_types": ["sliding_attention", "chunked_attention"]},
            ["chunked_attention", "'full_attention'"],
        ),
        ("gemma3_text", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": _YARN}}, ["yarn", "default"]),
        ("gemma3_text", {"rope_parameters": {"full_attention": _YARN}}, ["yarn", "llama3"]),
        ("mistral", {"sliding_window": -1}, ["sliding_window", "-1", "positive integer"]),
        ("mistral", {"quantization_config": {"quant_method": "awq"}}, ["'awq'", "float16"]),
        ("mixtral", {"num_local_experts": 0}, ["num_local_experts", "0", "positive integer"]),
        ("qwen2", {"rope_scaling": _YARN}, ["yarn", "llama3"]),
        ("qwen2", {"attention_bias": True}, ["attention_bias", "True", "False"]),
        ("qwen3", {"model_type": "qwen2"}, ["'qwen2'", "'qwen3' for Qwen3ForCausalLM"]),
        ("qwen3_moe", {"mlp_only_layers": [1]}, ["mlp_only_layers", "[1]", "[]"]),
        ("qwen3_moe", {"decoder_sparse_step": 2}, ["decoder_sparse_step", "2", "1"]),
    ],
)
def test_refuses_config_of_a_family(
    tmp_path: Path, family: str, changes: dict[str, Any], words: list[str]
) -> None:
    hf.save(tmp_path, OF_FAMILIES[family], random_params(OF_FAMILIES[family]))
    edit_json(tmp_path / "config.json", **changes)
    text = message(hf.load_config, tmp_path)
    assert all(word in text for word in [*words, str(tmp_path)]), text


@pytest.mark.parametrize(
    ("family", "changes", "needed"),
    [
        ("mistral", {"sliding_window": None}, {"windows": ()}),
        ("mistral", {"sliding_window": "absent"}, {"windows": (4096,) * 7}),
        ("mixtral", {"sliding_window": "absent"}, {"windows": ()}),
        ("mixtral", {"rope_theta": "absent", "rms_norm_eps": "absent"}, {"rope_theta": 1e6}),
        ("qwen2", {"max_window_layers": 5}, {"windows": (0,) * 5 + (5,) * 2}),
        ("qwen2", {}, {"windows": ()}),  # all are among the first 28
        ("qwen2", {"max_window_layers": 5, "use_sliding_window": False}, {"windows": ()}),
        ("qwen3", {"head_dim": "absent"}, {"head_dim": 128}),
        ("qwen3_moe", {"norm_topk_prob": "absent"}, {"renormalized_experts": False}),
        ("qwen3_moe", {"head_dim": "absent"}, {"head_dim": 2}),
        ("gemma2", {}, {"windows": (5, 0, 5, 0, 5, 0, 5)}),
        ("gemma2", {"sliding_window": "absent"}, {"windows": (4096, 0) * 3 + (4096,)}),
        ("gemma2", {"attn_logit_softcapping": "absent"}, {"attention_softcap": 50.0}),
        ("gemma2", {"final_logit_softcapping": "absent"}, {"logit_softcap": 30.0}),
        ("gemma2", {"attn_logit_softcapping": None}, {"attention_softcap": None}),
        ("gemma2", {"query_pre_attn_scalar": "absent"}, {"attention_scale": 1 / 16}),
        ("gemma2", {"tie_word_embeddings": "absent"}, {"tie_embeddings": True}),
        ("gemma2", {"hidden_activation": None, "hidden_act": "gelu"}, {}),  # has another meaning
        ("gemma3_text", {}, {"windows": (5, 5, 5, 5, 5, 0, 5), "local_rope_theta": 700.0}),
        ("gemma3_text", {"sliding_window_pattern": 3}, {"windows": (5, 5, 0, 5, 5, 0, 5)}),
        ("gemma3_text", {"rope_local_base_freq": "absent"}, {"local_rope_theta": 1e4}),
        ("gemma3_text", {"rope_theta": "absent"}, {"rope_theta": 1e6}),
        ("gemma3_text", {"final_logit_softcapping": "absent"}, {"logit_softcap": None}),
        ("gpt2", {"n_inner": None}, {"intermediate_size": 32}),
        ("gpt2", {"n_positions": "absent"}, {"max_position_embeddings": 1024}),
        ("gpt2", {"tie_word_embeddings": "absent"}, {"tie_embeddings": True}),
    ],
)
def test_defaults_of_an_old_config_of_a_family(
    tmp_path: Path, family: str, changes: dict[str, Any], needed: dict[str, Any]
) -> None:
    """What transformers took where a key lacks, with 7 layers."""
    hf.save(tmp_path, OF_FAMILIES[family], random_params(OF_FAMILIES[family]))
    depth = "n_layer" if family == "gpt2" else "num_hidden_layers"
    edit_json(tmp_path / "config.json", **{depth: 7, "layer_types": "absent"} | changes)
    config = hf.load_config(tmp_path)
    assert {name: getattr(config, name) for name in needed} == needed


def test_a_model_must_make_sense() -> None:
    for changes, words in (
        ({"family": "falcon"}, ["'falcon'", "llama"]),
        ({"windows": (5,)}, ["1 windows for 2 layers"]),
        ({"num_experts": 4, "num_experts_per_token": 5}, ["5 of 4 experts", "1 to all"]),
    ):
        text = message(transformer, dataclasses.replace(CONFIG, **changes))
        assert all(word in text for word in words), text


# ----------------------------------------------------------------------------- damaged directories


def test_missing_files(saved: Path, tmp_path: Path) -> None:
    for call in (hf.load, hf.load_config):
        assert "nowhere is not a directory" in message(call, tmp_path / "nowhere")
        assert "is not a directory" in message(call, saved / "config.json")
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert "empty has no config.json" in message(call, tmp_path / "empty")
    (saved / "model.safetensors").unlink()
    assert "model.safetensors.index.json" in message(hf.load, saved)


@pytest.mark.parametrize("text", ["", "{", '{"a": 1,}', "\x00", "[1]"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_bad_json(saved: Path, name: str, text: str) -> None:
    (saved / name).write_text(text)
    found = message(hf.load, saved)
    assert str(saved / name) in found
    assert "JSON object" in found


def test_bad_encoding(saved: Path) -> None:
    (saved / "config.json").write_bytes(b'{"a": "\xff"}')
    assert "config.json is not valid JSON" in message(hf.load_config, saved)


def test_missing_tensor(saved: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(saved / "model.safetensors", lambda t: t.pop(name))
    text = message(hf.load, saved)
    assert f"has no tensor {name}" in text
    assert "(12, 8)" in text


def test_misshapen_tensor(saved: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    edit_tensors(saved / "model.safetensors", lambda t: t.update({name: t[name][:-1].copy()}))
    text = message(hf.load, saved)
    assert all(word in text for word in (name, "(11, 8)", "(12, 8)", "model.safetensors")), text


def test_tensor_of_another_type(saved: Path) -> None:
    name = "model.norm.weight"
    edit_tensors(saved / "model.safetensors", lambda t: t.update({name: t[name].astype(np.int32)}))
    text = message(hf.load, saved, jnp.float32)
    assert all(word in text for word in (name, "I32", "F32")), text


def test_unexpected_tensor(saved: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(saved / "model.safetensors", lambda t: t.update({name: np.zeros(24, np.float32)}))
    text = message(hf.load, saved)
    assert name in text
    assert "LlamaForCausalLM" in text


def test_untied_head_under_a_tied_config(tmp_path: Path) -> None:
    hf.save(tmp_path, UNTIED, random_params(UNTIED))
    edit_json(tmp_path / "config.json", tie_word_embeddings=True)
    text = message(hf.load, tmp_path)
    assert "lm_head.weight" in text
    assert "tie_word_embeddings" in text


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-3], lambda b: b[:5], lambda b: b"", lambda b: b"version https://lfs " * 9],
)
def test_damaged_weights(saved: Path, damage: Callable[[bytes], bytes]) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    text = message(hf.load, saved)
    assert str(path) in text
    assert "complete safetensors file" in text


def test_damaged_shards(saved: Path) -> None:
    hf.save(saved, CONFIG, random_params(CONFIG), max_shard_bytes=1000)
    shard = sorted(saved.glob("*.safetensors"))[1]
    shard.rename(saved / "elsewhere")
    text = message(hf.load, saved)
    assert shard.name in text
    assert "model.safetensors.index.json" in text
    (saved / "elsewhere").rename(shard)
    edit_tensors(shard, lambda t: t.popitem())
    assert "has no tensor" in message(hf.load, saved)
    edit_json(saved / "model.safetensors.index.json", weight_map=[1])
    assert "weight_map" in message(hf.load, saved)


# ----------------------------------------------------------------------------- save


def test_save_refuses(tmp_path: Path) -> None:
    params = random_params(CONFIG)
    path = tmp_path / "model"
    assert "lm_head" in message(hf.save, path, UNTIED, params)
    assert "lm_head" in message(hf.save, path, CONFIG, random_params(UNTIED))
    wider = dataclasses.replace(CONFIG, vocab_size=12)
    text = message(hf.save, path, wider, params)
    assert all(word in text for word in ("embed_tokens", "(11, 8)", "(12, 8)")), text
    assert "int8" in message(hf.save, path, CONFIG, params, "int8")
    assert "float33" in message(hf.save, path, CONFIG, params, "float33")
    half = jax.tree.map(lambda x: x.astype(jnp.float16), params)
    assert "float16" in message(hf.save, path, CONFIG, half)
    assert "-1" in message(hf.save, path, CONFIG, params, max_shard_bytes=-1)
    assert not list(tmp_path.iterdir())
    path.write_text("a file")
    assert "is a file" in message(hf.save, path, CONFIG, params)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_interrupted_write_leaves_the_previous(
    saved: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write, calls = safetensors.numpy.save_file, []

    def fail_at_third(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise error
        write(*args, **kwargs)

    monkeypatch.setattr(safetensors.numpy, "save_file", fail_at_third)
    with pytest.raises(type(error)):
        hf.save(saved, CONFIG, random_params(CONFIG, seed=1), max_shard_bytes=1000)
    assert_same(hf.load(saved).params, random_params(CONFIG))
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("step", [1, 2])
def test_interrupted_swap_leaves_the_previous(
    saved: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    rename, calls = Path.rename, []

    def fail(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == step:
            raise OSError("refused")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="refused"):
        hf.save(saved, CONFIG, random_params(CONFIG, seed=1))
    assert_same(hf.load(saved).params, random_params(CONFIG))
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_killed_between_its_two_renames(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(new: Path, directory: Path, previous: Path) -> None:
        directory.rename(previous)
        raise OSError("killed")

    (saved / "tokenizer.json").write_text("kept")
    with monkeypatch.context() as patch:
        patch.setattr(hf, "_swap", die)
        patch.setattr(hf.shutil, "rmtree", lambda *args, **kwargs: None)  # the dead tidy nothing
        with pytest.raises(OSError, match="killed"):
            hf.save(saved, CONFIG, random_params(CONFIG, seed=1))
    assert not saved.exists()
    assert_same(hf.load(saved).params, random_params(CONFIG))
    hf.save(saved, CONFIG, random_params(CONFIG, seed=2))
    assert_same(hf.load(saved).params, random_params(CONFIG, seed=2))
    assert (saved / "tokenizer.json").read_text() == "kept"
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


# ----------------------------------------------------------------------------- vocabularies


def write_tokenizer(directory: Path, *tokens: str) -> None:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = hf_tokenizers.models.WordLevel(vocabulary, unk_token=tokens[0])
    hf_tokenizers.Tokenizer(model).save(str(directory / "tokenizer.json"))


def test_same_vocabulary(saved: Path, tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    hf.save(draft, CONFIG, random_params(CONFIG, seed=1))
    hf.check_same_vocabulary(saved, draft)
    write_tokenizer(saved, "a", "b", "c")
    hf.check_same_vocabulary(saved, draft)
    write_tokenizer(draft, "a", "b", "c")
    hf.check_same_vocabulary(saved, draft)
    write_tokenizer(draft, "a", "c", "b")
    text = message(hf.check_same_vocabulary, saved, draft)
    assert all(word in text for word in ("Token 1", "'b'", "'c'")), text
    write_tokenizer(draft, "a", "b")
    text = message(hf.check_same_vocabulary, saved, draft)
    assert all(word in text for word in ("Token 2", "'c'", "None")), text
    (draft / "tokenizer.json").write_text("{")
    assert "tokenizer.json cannot be read" in message(hf.check_same_vocabulary, saved, draft)
    wider = dataclasses.replace(CONFIG, vocab_size=12)
    hf.save(draft, wider, random_params(wider))
    text = message(hf.check_same_vocabulary, saved, draft)
    assert all(word in text for word in ("11", "12")), text


def test_auto_keeps_what_the_kernels_read(tmp_path: Path) -> None:
    """Matrices stay bfloat16 on CPU; every value is that of float32."""
    full = Path(save_model(tmp_path / "float32"))
    half = tmp_path / "bfloat16"
    shutil.copytree(full, half)
    found = hf.load(full)
    hf.save(half, found.config, found.params, jnp.bfloat16, found.eos_ids, found.bos_id)
    assert hf.stored_dtype(full) == jnp.float32
    assert hf.stored_dtype(half) == jnp.bfloat16
    params = checkpoints.load(half).target_params
    with native.disabled():
        without = checkpoints.load(half).target_params
    expected = checkpoints.load(half, dtype="float32").target_params
    kinds = {x.ndim: x.dtype for x in jax.tree.leaves(params)}
    assert kinds == {1: jnp.float32, 2: jnp.bfloat16 if native.available() else jnp.float32}
    assert {x.dtype for x in jax.tree.leaves((without, expected))} == {jnp.dtype("float32")}
    for x, *same in zip(*map(jax.tree.leaves, (expected, params, without)), strict=True):
        for y in same:
            np.testing.assert_array_equal(x, y.astype(jnp.float32))
    kept = checkpoints.load(full).target_params
    assert {x.dtype for x in jax.tree.leaves(kept)} == {jnp.dtype("float32")}


def test_a_cache_has_its_own_dtype(tmp_path: Path) -> None:
    saved = save_model(tmp_path / "model")
    for given, kind in (("auto", jnp.float32), ("bfloat16", jnp.bfloat16)):
        models = checkpoints.load(saved, saved, "float32", given)
        draft: Any = models.drafts["draft"].model
        for model in (models.target, draft):
            assert model.init_cache(1, 4).keys[0].dtype == kind
    for wrong in ({"dtype": "int8"}, {"cache_dtype": "float16"}):
        with pytest.raises(ValueError, match="need one of auto, float32, bfloat16"):
            checkpoints.load(saved, **wrong)
