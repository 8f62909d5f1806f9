"""config.json and generation_config.json: a model's shape and its special ids."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specjax.models.layers import RopeScaling
from specjax.models.transformer import TransformerConfig

CONFIG, GENERATION = "config.json", "generation_config.json"
SUPPORTED = ("LlamaForCausalLM",)

# Options that change the result and that the transformer has no equivalent of, with what it does.
_FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}


def parse(raw: dict[str, Any], path: Path) -> TransformerConfig:
    """The shape that the contents `raw` of the config.json at `path` state."""
    architectures = raw.get("architectures")
    if not architectures and raw.get("model_type") == "llama":
        architectures = ["LlamaForCausalLM"]
    if not isinstance(architectures, list) or architectures[:1] not in [[a] for a in SUPPORTED]:
        stated = architectures or f"none and model_type {raw.get('model_type')!r}"
        raise ValueError(
            f"{path} states architectures {stated}; supported: {', '.join(SUPPORTED)}."
        )
    if raw.get("model_type", "llama") != "llama":
        raise ValueError(f"{path} has model_type {raw['model_type']!r}; need 'llama'.")
    _check_fixed(raw, path)

    def size(key: str, default: int | None = None) -> int:
        return _positive_int(raw, key, path, default)

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    if raw.get("head_dim") is None and hidden % heads:
        raise ValueError(
            f"{path} gives hidden_size {hidden} and {heads} heads without head_dim; "
            "the first must be a multiple of the second."
        )
    theta, scaling = _parse_rope(raw, path)
    return TransformerConfig(
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", hidden // heads),
        max_position_embeddings=size("max_position_embeddings", 2048),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=_positive(raw, "rms_norm_eps", path, 1e-6),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
    )


def _parse_rope(raw: dict[str, Any], path: Path) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or top-level keys (4)."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = raw.get(key) or {}
        if not isinstance(value, dict):
            raise ValueError(f"{path} gives {key} as {value!r}; it needs to be an object.")
        rope |= value
    _check_fixed(rope, path)
    theta = _positive(rope, "rope_theta", path, _positive(raw, "rope_theta", path, 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"{path} has rope_type {kind!r}; supported: 'default', 'llama3'.")
    low = _positive(rope, "low_freq_factor", path)
    high = _positive(rope, "high_freq_factor", path)
    if high <= low:
        raise ValueError(
            f"{path} gives high_freq_factor {high} and low_freq_factor {low}; "
            "the first must be the larger."
        )
    original = _positive_int(rope, "original_max_position_embeddings", path)
    return theta, RopeScaling(_positive(rope, "factor", path), low, high, original)


def _check_fixed(raw: dict[str, Any], path: Path) -> None:
    for key, needed in _FIXED.items():
        value = raw.get(key)
        if value is not None and value != needed:
            raise ValueError(f"{path} sets {key} to {value!r}; only {needed!r} is supported.")


def _positive(raw: dict[str, Any], key: str, path: Path, default: float | None = None) -> float:
    value = raw.get(key)
    if value is None:
        value = default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"{path} gives {key} as {value!r}; it needs to be a positive number.")
    return float(value)


def _positive_int(raw: dict[str, Any], key: str, path: Path, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{path} gives {key} as {value!r}; it needs to be a positive integer.")
    return value


def special_ids(directory: Path, raw: dict[str, Any]) -> tuple[tuple[int, ...], int | None]:
    """End and begin ids; generation_config.json goes before config.json, as in transformers."""
    path = directory / GENERATION
    generation = read_json(path) if path.is_file() else {}

    def ids(key: str) -> tuple[int, ...]:
        value = generation.get(key)
        if value is None:
            value = raw.get(key)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in values):
            raise ValueError(f"{directory} gives {key} as {value!r}; need integers.")
        return tuple(values)

    return ids("eos_token_id"), next(iter(ids("bos_token_id")), None)


def to_json(
    config: TransformerConfig,
    dtype: np.dtype,
    eos_ids: Sequence[int],
    bos_id: int | None,
) -> dict[str, Any]:
    """In transformers 4's form, which 5 converts as it reads."""
    scaling = config.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else {"rope_type": "llama3", **scaling._asdict()},
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype.name,
        **ids_to_json(eos_ids, bos_id),
    }


def ids_to_json(eos_ids: Sequence[int], bos_id: int | None) -> dict[str, Any]:
    eos = [int(i) for i in eos_ids]
    return {
        "bos_token_id": None if bos_id is None else int(bos_id),
        "eos_token_id": eos if len(eos) > 1 else next(iter(eos), None),
    }


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}; need one.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); need a JSON object.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; need a JSON object.")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
