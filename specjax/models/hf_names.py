"""Where the parameters of each family lie in a Hugging Face checkpoint: a table for each."""

from collections.abc import Callable
from typing import NamedTuple

from specjax.models.families import FAMILIES
from specjax.models.transformer import TransformerConfig

Shape = tuple[int, ...]


class Tensor(NamedTuple):
    """Where a parameter lies. In its name `{i}` is the layer and `{x}` the expert."""

    name: str
    shape: Callable[[TransformerConfig], Shape]  # the parameter's; of `{x}`, one expert's
    transposed: bool = False  # stored [in, out]
    part: tuple[int, int] = (0, 1)  # the first of two numbers, of so many equal parts of the output


def _vocab_rows(c: TransformerConfig) -> Shape:
    return c.vocab_size, c.hidden_size


def _position_rows(c: TransformerConfig) -> Shape:
    return c.max_position_embeddings, c.hidden_size


def _width(c: TransformerConfig) -> Shape:
    return (c.hidden_size,)


def _head(c: TransformerConfig) -> Shape:
    return (c.head_dim,)


def _queries(c: TransformerConfig) -> Shape:
    return c.num_heads * c.head_dim, c.hidden_size


def _keys(c: TransformerConfig) -> Shape:
    return c.num_kv_heads * c.head_dim, c.hidden_size


def _out(c: TransformerConfig) -> Shape:
    return c.hidden_size, c.num_heads * c.head_dim


def _up(c: TransformerConfig) -> Shape:
    return c.intermediate_size, c.hidden_size


def _down(c: TransformerConfig) -> Shape:
    return c.hidden_size, c.intermediate_size


def _router(c: TransformerConfig) -> Shape:
    return c.num_experts, c.hidden_size


def _bias(of: Callable[[TransformerConfig], Shape]) -> Callable[[TransformerConfig], Shape]:
    return lambda c: of(c)[:1]


_HEAD = {"lm_head": Tensor("lm_head.weight", _vocab_rows)}
_ATTENTION, _MLP = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."
_PROJECTIONS = {"q_proj": _queries, "k_proj": _keys, "v_proj": _keys, "o_proj": _out}
_GATED = {"gate_proj": _up, "up_proj": _up, "down_proj": _down}


def _norm(path: str, name: str) -> dict[str, Tensor]:
    return {f"layers_{{i}}/{path}/weight": Tensor(f"model.layers.{{i}}.{name}.weight", _width)}


def _experts(router: str, experts: str, names: tuple[str, str, str]) -> dict[str, Tensor]:
    matrices = zip(_GATED.items(), names, strict=True)
    return {
        "layers_{i}/mlp/router": Tensor(router, _router),
        **{f"layers_{{i}}/mlp/{p}": Tensor(f"{experts}{n}.weight", of) for (p, of), n in matrices},
    }


LLAMA = {
    "embed_tokens": Tensor("model.embed_tokens.weight", _vocab_rows),
    **_norm("input_layernorm", "input_layernorm"),
    **{
        f"layers_{{i}}/self_attn/{p}": Tensor(f"{_ATTENTION}{p}.weight", of)
        for p, of in _PROJECTIONS.items()
    },
    **_norm("post_attention_layernorm", "post_attention_layernorm"),
    **{f"layers_{{i}}/mlp/{p}": Tensor(f"{_MLP}{p}.weight", of) for p, of in _GATED.items()},
    "norm/weight": Tensor("model.norm.weight", _width),
    **_HEAD,
}
_QKV_BIASES = {
    f"layers_{{i}}/self_attn/{p}_bias": Tensor(f"{_ATTENTION}{p}.bias", _bias(_PROJECTIONS[p]))
    for p in ("q_proj", "k_proj", "v_proj")
}
_QK_NORMS = {
    f"layers_{{i}}/self_attn/{p}/weight": Tensor(f"{_ATTENTION}{p}.weight", _head)
    for p in ("q_norm", "k_norm")
}
_FEED_FORWARD_NORMS = _norm("pre_feedforward_layernorm", "pre_feedforward_layernorm") | _norm(
    "post_feedforward_layernorm", "post_feedforward_layernorm"
)
_MIXTRAL = "model.layers.{i}.block_sparse_moe."


def _gpt2(path: str, name: str, of: Callable, part: tuple[int, int] = (0, 1)) -> dict[str, Tensor]:
    """A matrix, stored [in, out], and its bias."""
    path, name = f"layers_{{i}}/{path}", f"transformer.h.{{i}}.{name}"
    return {
        path: Tensor(f"{name}.weight", of, True, part),
        f"{path}_bias": Tensor(f"{name}.bias", _bias(of), False, part),
    }


def _layer_norm(path: str, name: str) -> dict[str, Tensor]:
    return {f"{path}/{x}": Tensor(f"transformer.{name}.{x}", _width) for x in ("weight", "bias")}


_TABLES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA
    | _experts(f"{_MIXTRAL}gate.weight", f"{_MIXTRAL}experts.{{x}}.", ("w1", "w3", "w2")),
    "qwen2": LLAMA | _QKV_BIASES,
    "qwen3": LLAMA | _QK_NORMS,
    "qwen3_moe": LLAMA
    | _QK_NORMS
    | _experts(
        f"{_MLP}gate.weight", f"{_MLP}experts.{{x}}.", ("gate_proj", "up_proj", "down_proj")
    ),
    "gemma2": LLAMA | _FEED_FORWARD_NORMS,
    "gemma3_text": LLAMA | _FEED_FORWARD_NORMS | _QK_NORMS,
    "gpt2": {
        "embed_tokens": Tensor("transformer.wte.weight", _vocab_rows),
        "embed_positions": Tensor("transformer.wpe.weight", _position_rows),
        **_layer_norm("layers_{i}/input_layernorm", "h.{i}.ln_1"),
        **_gpt2("self_attn/q_proj", "attn.c_attn", _queries, (0, 3)),
        **_gpt2("self_attn/k_proj", "attn.c_attn", _keys, (1, 3)),
        **_gpt2("self_attn/v_proj", "attn.c_attn", _keys, (2, 3)),
        **_gpt2("self_attn/o_proj", "attn.c_proj", _out),
        **_layer_norm("layers_{i}/post_attention_layernorm", "h.{i}.ln_2"),
        **_gpt2("mlp/up_proj", "mlp.c_fc", _up),
        **_gpt2("mlp/down_proj", "mlp.c_proj", _down),
        **_layer_norm("norm", "ln_f"),
        **_HEAD,
    },
}
# Of a checkpoint's tensors that are no parameters.
IGNORED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")

assert _TABLES.keys() == FAMILIES.keys()


def tensors(config: TransformerConfig) -> dict[str, Tensor]:
    """The place of every parameter by its path, `{i}` filled in."""
    found = {}
    for path, tensor in _TABLES[config.family].items():
        if path == "lm_head" and config.tie_embeddings:
            continue
        for i in range(config.num_layers if "{i}" in path else 1):
            name = tensor.name.replace("{i}", str(i))
            found[path.replace("{i}", str(i))] = tensor._replace(name=name)
    return found


def names(tensor: Tensor, config: TransformerConfig) -> list[str]:
    """The tensors that a parameter lies in: one, or one for each expert."""
    if "{x}" not in tensor.name:
        return [tensor.name]
    return [tensor.name.replace("{x}", str(x)) for x in range(config.num_experts)]


def stored_shape(tensor: Tensor, config: TransformerConfig) -> Shape:
    """Of each of these, all parts of it together."""
    outputs, *inputs = tensor.shape(config)
    shape = outputs * tensor.part[1], *inputs
    return shape[::-1] if tensor.transposed else shape


def shape(tensor: Tensor, config: TransformerConfig) -> Shape:
    """The parameter's."""
    experts = (config.num_experts,) if "{x}" in tensor.name else ()
    return *experts, *tensor.shape(config)


def canonical(name: str, config: TransformerConfig) -> str:
    """A tensor's name as the tables have it: GPT-2's are often without their first word."""
    bare = config.family == "gpt2" and not name.startswith(("transformer.", "lm_head"))
    return f"transformer.{name}" if bare else name
