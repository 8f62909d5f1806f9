"""How far logits are from transformers' on the same files, for every family of models.

    pip install -e '.[parity]'
    python decode/parity.py --config=configs/bench/parity.py

About 2 minutes on two CPU cores. In float32 no logit differs by 1e-4 from what transformers has,
whichever way tokens are fed, and what is saved here gives it the very same logits. Golden files of
the tests are made by --config.golden=tests/golden.
"""

from typing import Any

from ml_collections import ConfigDict

# Models of a few thousand weights, whose logits differ by far more than the tolerance.
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-3,  # large enough to show
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,  # some families' defaults lie beyond the vocabulary
}
_SIZES_OF_GPT2 = {
    "n_embd": SIZES["hidden_size"],
    "n_layer": SIZES["num_hidden_layers"],
    "n_head": SIZES["num_attention_heads"],
    "n_positions": SIZES["max_position_embeddings"],
    "layer_norm_epsilon": SIZES["rms_norm_eps"],
    **{name: SIZES[name] for name in ("vocab_size", "initializer_range")},
    **{name: SIZES[name] for name in ("bos_token_id", "eos_token_id")},
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,  # a third of num_tokens
}
_LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
_GEMMA = {"query_pre_attn_scalar": 20, "head_dim": 8}
_GEMMA3 = {**_GEMMA, "num_hidden_layers": 7, "sliding_window": 7}  # the sixth sees everything


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.output = "runs/parity"
    c.golden = ""  # a directory for models, tokens and what transformers says of them
    c.num_tokens = 24
    c.prefix = (20, 9)  # how many of them a tree follows; a row for each
    c.parents = (-1, 0, 0, 0, 1, 1, 3, 4, 6)  # of its nodes, breadth first
    c.tolerance = 1e-4  # of float32, absolute
    c.bfloat16_tolerance = 2.5  # of bfloat16, times transformers' own distance from its float32
    c.seed = 0
    # Of transformers' configs, by model_type; the windows are shorter than the prefixes, some than
    # the tree is deep.
    c.variants = ConfigDict(sort_keys=False)

    def add(name: str, family: str, sizes: dict[str, Any] = SIZES, **options: Any) -> None:
        c.variants[name] = {"family": family, "sizes": sizes, "options": options}

    add("llama", "llama", tie_word_embeddings=True)
    add("llama_ungrouped", "llama", num_key_value_heads=4)
    add("llama_llama3_rope", "llama", rope_parameters=_LLAMA3)
    add("llama_linear_rope", "llama", rope_parameters=_LINEAR, head_dim=10)
    add("mistral", "mistral", sliding_window=7, head_dim=8)
    add("mixtral", "mixtral", num_local_experts=6, num_experts_per_tok=2)
    add("qwen2", "qwen2", tie_word_embeddings=True)
    add("qwen2_window", "qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=1)
    add("qwen3", "qwen3", head_dim=8)
    # Mixtral's shares of experts always sum to 1.
    experts = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
    add("qwen3_moe", "qwen3_moe", head_dim=8, norm_topk_prob=False, **experts)
    caps = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0}
    add("gemma2", "gemma2", sliding_window=3, **_GEMMA, **caps)
    add("gemma3", "gemma3_text", **_GEMMA3)
    # Stretches the layers without a window only.
    add(
        "gemma3_linear_rope",
        "gemma3_text",
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        **_GEMMA3,
    )
    add("gpt2", "gpt2", _SIZES_OF_GPT2, n_inner=40)
    return c
