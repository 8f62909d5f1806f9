"""config.json and generation_config.json: a model's shape and its special ids."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specjax.models.layers import LinearRopeScaling, RopeScaling
from specjax.models.transformer import TransformerConfig

CONFIG, GENERATION = "config.json", "generation_config.json"

# By model_type, which is also what `TransformerConfig.family` is called.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_GEMMAS = ("gemma2", "gemma3_text")
_QWENS = ("qwen2", "qwen3", "qwen3_moe")

# Options that change the result and that the transformer has no equivalent of, with what it does.
_FIXED: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "use_bidirectional_attention": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_FIXED_OF_GEMMA = _FIXED | {"hidden_act": "gelu_pytorch_tanh"}
_FIXED_OF_GPT2 = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
_SLIDING, _FULL = "sliding_attention", "full_attention"  # members of layer_types


def architecture(config: TransformerConfig) -> str:
    """What transformers calls a config's family."""
    return ARCHITECTURES[config.family]


def parse(raw: dict[str, Any], path: Path) -> TransformerConfig:
    """The shape that the contents `raw` of the config.json at `path` state."""
    family = _family(raw, path)
    if raw.get("quantization_config"):
        method = raw["quantization_config"]
        method = method.get("quant_method", method) if isinstance(method, dict) else method
        raise ValueError(
            f"{path} states a quantization_config, {method!r}; need weights in float32, bfloat16 "
            "or float16."
        )
    if family == "gpt2":
        return _gpt2(raw, path)
    # Gemma's hidden_activation goes before its hidden_act, an older key of another meaning.
    is_gemma = family in _GEMMAS
    if is_gemma:
        raw = raw | {"hidden_act": raw.get("hidden_activation") or "gelu_pytorch_tanh"}
    _check_fixed(raw, path, _FIXED_OF_GEMMA if is_gemma else _FIXED)

    def size(key: str, default: int | None = None) -> int:
        return _positive_int(raw, key, path, default)

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    head_dim = {"qwen3": 128, "gemma2": 256, "gemma3_text": 256}.get(family, hidden // heads)
    if raw.get("head_dim") is None and head_dim * heads != hidden and head_dim == hidden // heads:
        raise ValueError(
            f"{path} gives hidden_size {hidden} and {heads} heads without head_dim; "
            "the first must be a multiple of the second."
        )
    theta, scaling = _parse_rope(raw, path, 1e6 if family in ("gemma3_text", "mixtral") else 1e4)
    numbers: dict[str, Any] = {}
    inner = "intermediate_size"
    if family == "gemma3_text":
        numbers["local_rope_theta"] = _local_theta(raw, path)
    if is_gemma:
        numbers["attention_scale"] = _positive(raw, "query_pre_attn_scalar", path, 256) ** -0.5
        caps = (50.0, 30.0) if family == "gemma2" else (None, None)
        numbers["attention_softcap"] = _optional(raw, "attn_logit_softcapping", path, caps[0])
        numbers["logit_softcap"] = _optional(raw, "final_logit_softcapping", path, caps[1])
    if family in ("mixtral", "qwen3_moe"):
        key = "num_experts" if raw.get("num_experts") is not None else "num_local_experts"
        numbers["num_experts"] = size(key, 8 if family == "mixtral" else 128)
        numbers["num_experts_per_token"] = size(
            "num_experts_per_tok", 2 if family == "mixtral" else 8
        )
        if family == "qwen3_moe":
            inner = "moe_intermediate_size"
            numbers["renormalized_experts"] = bool(raw.get("norm_topk_prob", False))
    layers = size("num_hidden_layers")
    return TransformerConfig(
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size(inner),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", head_dim),
        max_position_embeddings=size("max_position_embeddings", 2048),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_positive(raw, "rms_norm_eps", path, 1e-5 if family == "mixtral" else 1e-6),
        tie_embeddings=bool(raw.get("tie_word_embeddings", is_gemma)),
        family=family,
        windows=_windows(raw, path, family, layers),
        **numbers,
    )


def _family(raw: dict[str, Any], path: Path) -> str:
    architectures, kind = raw.get("architectures"), raw.get("model_type")
    if not architectures and kind in ARCHITECTURES:
        return str(kind)
    family = {a: f for f, a in ARCHITECTURES.items()}.get(
        architectures[0] if isinstance(architectures, list) and architectures else ""
    )
    if family is None:
        stated = architectures or f"none and model_type {kind!r}"
        raise ValueError(
            f"{path} states architectures {stated}; supported: {', '.join(ARCHITECTURES.values())}."
        )
    if kind not in (None, family):
        raise ValueError(
            f"{path} has model_type {kind!r}; need {family!r} for {ARCHITECTURES[family]}."
        )
    return family


def _gpt2(raw: dict[str, Any], path: Path) -> TransformerConfig:
    _check_fixed(raw, path, _FIXED_OF_GPT2)
    width, heads = _positive_int(raw, "n_embd", path), _positive_int(raw, "n_head", path)
    if width % heads:
        raise ValueError(
            f"{path} gives n_embd {width} and {heads} heads; the first must be a multiple of the "
            "second."
        )
    return TransformerConfig(
        vocab_size=_positive_int(raw, "vocab_size", path),
        hidden_size=width,
        intermediate_size=_positive_int(raw, "n_inner", path, 4 * width),
        num_layers=_positive_int(raw, "n_layer", path),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=_positive_int(raw, "n_positions", path, 1024),
        norm_eps=_positive(raw, "layer_norm_epsilon", path, 1e-5),
        tie_embeddings=bool(raw.get("tie_word_embeddings", True)),
        family="gpt2",
    )


def _windows(raw: dict[str, Any], path: Path, family: str, num_layers: int) -> tuple[int, ...]:
    """Of each layer, as `TransformerConfig` has them."""
    if family in _QWENS and not raw.get("use_sliding_window", False):
        return ()
    default = None if family == "mixtral" else 4096
    if family == "llama" or raw.get("sliding_window", default) is None:
        return ()
    window = _positive_int(raw, "sliding_window", path, default)
    # Elsewhere transformers does not read the key.
    kinds = raw.get("layer_types") if family in ("qwen2", "qwen3", *_GEMMAS) else None
    if kinds is None:
        kinds = _layer_types(raw, path, family, num_layers)
    if not isinstance(kinds, list) or len(kinds) != num_layers or {*kinds} - {_SLIDING, _FULL}:
        raise ValueError(
            f"{path} gives layer_types as {kinds!r:.80}; need {_SLIDING!r} or {_FULL!r} for each "
            f"of {num_layers} layers."
        )
    return tuple(window if kind == _SLIDING else 0 for kind in kinds) if _SLIDING in kinds else ()


def _layer_types(raw: dict[str, Any], path: Path, family: str, num_layers: int) -> list[str]:
    """What the family does where its config does not say."""
    first, period = 0, 0
    if family in ("qwen2", "qwen3"):
        first = raw.get("max_window_layers", 28)
    elif family == "gemma2":
        period = 2
    elif family == "gemma3_text":
        old = raw.get("_sliding_window_pattern", 6)
        period = _positive_int(raw, "sliding_window_pattern", path, old)
    full = (i < first or (period and (i + 1) % period == 0) for i in range(num_layers))
    return [_FULL if is_full else _SLIDING for is_full in full]


def _parse_rope(
    raw: dict[str, Any], path: Path, default: float
) -> tuple[float, RopeScaling | LinearRopeScaling | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or top-level keys (4)."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = raw.get(key) or {}
        if not isinstance(value, dict):
            raise ValueError(f"{path} gives {key} as {value!r}; it needs to be an object.")
        rope |= value.get(_FULL) or value
    _check_fixed(rope, path, _FIXED)
    theta = _positive(rope, "rope_theta", path, _positive(raw, "rope_theta", path, default))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearRopeScaling(_positive(rope, "factor", path))
    if kind != "llama3":
        raise ValueError(
            f"{path} has rope_type {kind!r}; supported: 'default', 'linear', 'llama3'."
        )
    low = _positive(rope, "low_freq_factor", path)
    high = _positive(rope, "high_freq_factor", path)
    if high <= low:
        raise ValueError(
            f"{path} gives high_freq_factor {high} and low_freq_factor {low}; "
            "the first must be the larger."
        )
    original = _positive_int(rope, "original_max_position_embeddings", path)
    return theta, RopeScaling(_positive(rope, "factor", path), low, high, original)


def _local_theta(raw: dict[str, Any], path: Path) -> float:
    """Of Gemma 3's layers with a window."""
    both = raw.get("rope_parameters") or {}
    local = both.get(_SLIDING) or {} if isinstance(both, dict) else {}
    _check_fixed(local, path, {"rope_type": "default"})
    return _positive(
        local, "rope_theta", path, _positive(raw, "rope_local_base_freq", path, 10000.0)
    )


def _check_fixed(raw: dict[str, Any], path: Path, fixed: dict[str, Any]) -> None:
    for key, needed in fixed.items():
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


def _optional(raw: dict[str, Any], key: str, path: Path, default: float | None) -> float | None:
    """A number, or null where there is none."""
    return None if raw.get(key, default) is None else _positive(raw, key, path, default)


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
    return {
        "architectures": [architecture(config)],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        **(_gpt2_json(config) if config.family == "gpt2" else _sizes_json(config)),
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype.name,
        **ids_to_json(eos_ids, bos_id),
    }


def _gpt2_json(config: TransformerConfig) -> dict[str, Any]:
    return {
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_position_embeddings,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new",
    }


def _sizes_json(config: TransformerConfig) -> dict[str, Any]:
    family, scaling = config.family, config.rope_scaling
    kind = "linear" if isinstance(scaling, LinearRopeScaling) else "llama3"
    experts = family == "qwen3_moe"
    found: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "moe_intermediate_size" if experts else "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else {"rope_type": kind, **scaling._asdict()},
        "rms_norm_eps": config.norm_eps,
        "attention_bias": False,
    }
    if family in _GEMMAS:
        found |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": _whole((config.attention_scale or 1.0) ** -2),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logit_softcap,
        }
    else:
        found |= {"hidden_act": "silu", "mlp_bias": False}
    if family == "gemma3_text":
        found["rope_local_base_freq"] = config.local_rope_theta
    if config.num_experts:
        found |= {
            "num_experts" if experts else "num_local_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_token,
        }
    if experts:
        found["norm_topk_prob"] = config.renormalized_experts
    if family == "llama":
        return found
    window = max(config.windows, default=0)
    found["sliding_window"] = window or None
    if family in _QWENS:
        found["use_sliding_window"] = bool(window)
    if family not in ("mistral", "mixtral") and window:
        found["layer_types"] = [_SLIDING if w else _FULL for w in config.windows]
    return found


def _whole(x: float) -> float:
    """Transformers wants a whole number where it is one."""
    return round(x) if abs(x - round(x)) < 1e-6 * x else x


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
