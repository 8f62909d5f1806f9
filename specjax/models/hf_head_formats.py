"""How each project lays out its draft heads: names of tensors, shapes, config.json.

Medusa (arXiv 2401.10774) in its v0.1 and vLLM's form, Hydra (arXiv 2402.05109), EAGLE (arXiv
2401.15077), and EAGLE-3 (arXiv 2503.01840) in its own, ModelOpt's and speculators' form.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from specjax.models import hf, hf_config, hf_names
from specjax.models.eagle import EagleHead, eagle3_head, eagle_head, fused_layers
from specjax.models.hf import Stored
from specjax.models.hf_names import Shape
from specjax.models.hydra import HydraHeads, hydra_heads
from specjax.models.medusa import MedusaHeads, medusa_heads
from specjax.models.transformer import TransformerConfig
from specjax.types import Model

# Our parameter: its tensor's names, of which several hold the same, and its shape.
Table = dict[str, tuple[tuple[str, ...], Shape]]
Tensors = dict[str, Stored]


class Given(NamedTuple):
    """What a directory says of itself, and the target that it is for."""

    directory: Path
    raw: dict[str, Any]  # config.json
    stored: Tensors  # under the names that `save` gives them
    target: TransformerConfig | Model
    dtype: Any  # of activations


class Format(NamedTuple):
    """A kind of heads in its own project's form."""

    marks: str  # a pattern of names of tensors that no kind above has
    rename: Callable[[Tensors], Tensors]  # gives them the names that `save` gives them
    unused: tuple[str, ...]  # ends of names that may be there as well
    heads: Callable[[Given], Any]  # whose weights the tensors are
    table: Callable[[Any], Table]  # of heads
    to_json: Callable[[Any, np.dtype], dict[str, Any]]  # heads, dtype -> config.json
    file: str


# ----------------------------------------------------------------------------- Medusa


def _medusa_names(stored: Tensors) -> Tensors:
    """Drops prefixes and turns vLLM's names into v0.1's, where block l of head h is "h.l.linear".

    Its last module, counted like a block, is the head's unembedding if it has one.
    """
    found: Tensors = {}
    for name, where in stored.items():
        name = re.sub(r"^medusa_heads?\.", "", name)
        found[re.sub(r"^blocks\.(\d+)\.layers\.(\d+)\.", r"\1.\2.linear.", name)] = where
    num_layers = _count(found, r"0\.(\d+)\.linear\.")
    own = r"^lm_heads\.(\d+)\.weight$"
    return {re.sub(own, rf"\1.{num_layers}.weight", name): x for name, x in found.items()}


def _medusa_heads(given: Given) -> MedusaHeads:
    num_heads = _count(given.stored, r"(\d+)\.")
    num_layers = _count(given.stored, r"0\.(\d+)\.linear\.")
    unembedding = f"0.{num_layers}.weight"
    own = unembedding in given.stored
    _check_sizes(
        given,
        "Medusa",
        _rows(given, "0.0.linear.weight"),
        _rows(given, unembedding) if own else None,
    )
    sizes = (given.target.hidden_size, num_heads, num_layers, own)
    return medusa_heads(*sizes, given.target.vocab_size if own else 0, given.dtype)


def _medusa_table(heads: MedusaHeads) -> Table:
    width, table = heads.hidden_size, Table()
    for h in range(heads.num_heads):
        for l in range(heads.num_layers):
            ours, theirs = f"heads_{h}/blocks_{l}", f"{h}.{l}.linear"
            table[f"{ours}/weight"] = (f"{theirs}.weight",), (width, width)
            table[f"{ours}/bias"] = (f"{theirs}.bias",), (width,)
        if heads.own_unembedding:
            name = f"{h}.{heads.num_layers}.weight"
            table[f"heads_{h}/lm_head"] = (name,), (heads.vocab_size, width)
    return table


def _medusa_json(heads: MedusaHeads, dtype: np.dtype) -> dict[str, Any]:
    return {
        "model_type": "medusa",
        "medusa_num_heads": heads.num_heads,
        "medusa_num_layers": heads.num_layers,
        "hidden_size": heads.hidden_size,
        "torch_dtype": dtype.name,
    }


# ----------------------------------------------------------------------------- Hydra

_PREFIX = "prefix_embeding_layer."  # so spelled by Hydra


def _place(block: int, has_prefix: bool) -> int:
    """Hydra++ has a dropout before every module, which takes a number but has no tensors."""
    return 2 * block + 1 if has_prefix else block


def _unembedding(head: int, has_prefix: bool) -> str:
    return f"hydra_lm_head.{head}.1" if has_prefix else f"hydra_lm_head.{head}"


def _hydra_names(stored: Tensors) -> Tensors:
    """Numbers modules as `save` does, whether or not there are dropouts."""
    block = r"^hydra_mlp\.(\d+)\.(\d+)\."
    places = sorted({int(m[2]) for m in (re.match(block, name) for name in stored) if m})
    has_prefix = any(name.startswith(_PREFIX) for name in stored)

    def placed(m: re.Match) -> str:
        return f"hydra_mlp.{m[1]}.{_place(places.index(int(m[2])), has_prefix)}."

    def own(m: re.Match) -> str:
        return f"{_unembedding(int(m[1]), has_prefix)}.{m[2]}"

    found: Tensors = {}
    for name, where in stored.items():
        name = re.sub(block, placed, name)
        found[re.sub(r"^hydra_lm_head\.(\d+)\.(?:\d+\.)?(weight|bias)$", own, name)] = where
    return found


def _hydra_heads(given: Given) -> HydraHeads:
    supported = {
        "hydra_head_arch": ("mlp", "prefix-mlp"),
        "grounded_heads": (True,),
        "hidden_state_offset": (0,),
    }
    _check_options(given, supported)
    has_prefix = any(name.startswith(_PREFIX) for name in given.stored)
    num_heads = _count(given.stored, r"hydra_mlp\.(\d+)\.")
    num_layers = len([n for n in given.stored if re.match(r"hydra_mlp\.0\.\d+\.linear\.weight", n)])
    unembedding = f"{_unembedding(0, has_prefix)}.weight"
    own = unembedding in given.stored
    _check_sizes(
        given,
        "Hydra",
        _rows(given, f"hydra_mlp.0.{_place(0, has_prefix)}.linear.weight"),
        _rows(given, unembedding) if own else None,
    )
    sizes = (given.target.hidden_size, num_heads, num_layers, _prefix(given), own)
    return hydra_heads(*sizes, given.target.vocab_size if own else 0, given.dtype)


def _prefix(given: Given) -> TransformerConfig | None:
    """The shape of Hydra++'s layer: ours say, in Hydra's own it is the target's."""
    if not any(name.startswith(_PREFIX) for name in given.stored):
        return None
    path, raw = given.directory / hf_config.CONFIG, given.raw.get("prefix_config")
    if isinstance(raw, dict):
        return hf_config.parse(raw, path)
    if isinstance(given.target, Model):
        raise ValueError(f"{path} has no prefix_config; need one, or the target's config.")
    return dataclasses.replace(
        given.target,
        num_layers=1,
        family="llama",
        windows=(),
        num_experts=0,
        attention_scale=None,
        attention_softcap=None,
    )


def _hydra_table(heads: HydraHeads) -> Table:
    width, table = heads.hidden_size, Table()

    def affine(ours: str, *theirs: str, shape: Shape) -> None:
        table[f"{ours}/weight"] = tuple(f"{name}.weight" for name in theirs), shape
        table[f"{ours}/bias"] = tuple(f"{name}.bias" for name in theirs), shape[:1]

    has_prefix = heads.prefix is not None
    for h in range(heads.num_heads):
        first, *others = (f"hydra_mlp.{h}.{_place(l, has_prefix)}" for l in range(heads.num_layers))
        ours, wide = f"heads_{h}", (width, (h + 2) * width)
        affine(f"{ours}/blocks_0", f"{first}.linear", shape=wide)
        affine(f"{ours}/res_connection", f"{first}.res_connection", shape=wide)
        if others:
            shared = (f"{block}.linear" for block in others)
            affine(f"{ours}/blocks_1", *shared, shape=(width, width))
        if heads.own_unembedding:
            shape = (heads.vocab_size, width)
            affine(f"{ours}/lm_head", _unembedding(h, has_prefix), shape=shape)
    if heads.prefix is not None:
        for path, tensor in hf_names.LLAMA.items():
            if path.startswith(("layers_{i}/", "norm/")):
                ours, theirs = (name.format(i=0) for name in (path, tensor.name))
                theirs = _PREFIX + theirs.removeprefix("model.")
                table[f"prefix/{ours}"] = (theirs,), tensor.shape(heads.prefix)
    return table


def _hydra_json(heads: HydraHeads, dtype: np.dtype) -> dict[str, Any]:
    found = {
        "model_type": "hydra",
        "hydra_num_heads": heads.num_heads,
        "hydra_num_layers": heads.num_layers,
        "hydra_head_arch": "mlp" if heads.prefix is None else "prefix-mlp",
        "grounded_heads": True,
        "hidden_state_offset": 0,
        "hidden_size": heads.hidden_size,
        "torch_dtype": dtype.name,
    }
    if heads.prefix is not None:
        found["prefix_config"] = hf_config.to_json(heads.prefix, dtype, (), None)
    return found


# ----------------------------------------------------------------------------- EAGLE

_LAYERS = "eagle_aux_hidden_state_layer_ids"


def _eagle_names(stored: Tensors) -> Tensors:
    return {name.removeprefix("model."): where for name, where in stored.items()}


def _eagle3_names(stored: Tensors) -> Tensors:
    """ModelOpt and speculators call the one layer by its number."""
    named = _eagle_names(stored)
    return {re.sub(r"^layers\.0\.", "midlayer.", name): where for name, where in named.items()}


def _eagle_head(given: Given) -> EagleHead:
    return eagle_head(_eagle_config(given, "EAGLE"), "fc.bias" in given.stored, given.dtype)


def _eagle3_head(given: Given) -> EagleHead:
    # Variants of EAGLE-3 in speculators' form, and an embedding trained away from the target's.
    names = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    off: tuple = (False, None, [])
    _check_options(given, dict.fromkeys((*names, "embed_requires_grad"), off))
    own = "lm_head.weight" in given.stored
    vocabulary = _vocabulary(given)
    if own and vocabulary is None:
        rows = _rows(given, "lm_head.weight")
        _check_sizes(given, "EAGLE-3", given.target.hidden_size, rows)
    config = _eagle_config(given, "EAGLE-3")
    return eagle3_head(config, _feature_layers(given), vocabulary, own, given.dtype)


def _eagle_config(given: Given, name: str) -> TransformerConfig:
    """A Llama's of one layer, which vLLM and speculators wrap."""
    raw, path = given.raw, given.directory / hf_config.CONFIG
    for wrapper in ("transformer_layer_config", "model"):
        raw = raw[wrapper] if isinstance(raw.get(wrapper), dict) else raw
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    config = hf_config.parse({**raw, **llama}, path)
    if config.num_layers != 1:
        raise ValueError(f"{path} gives {config.num_layers} layers; {name} heads have 1.")
    _check_sizes(given, name, config.hidden_size, config.vocab_size)
    return dataclasses.replace(config, tie_embeddings=False)


def _feature_layers(given: Given) -> tuple[int, ...]:
    """Ours are layers before which a residual is read; `eagle_config` counts those after which."""
    found, after = given.raw.get(_LAYERS), 0
    own = given.raw.get("eagle_config")
    if found is None and isinstance(own, dict):
        found, after = own.get(_LAYERS), 1
    target = given.target
    if found is None:
        if isinstance(target, Model):
            return target.feature_layers
        return fused_layers(target.num_layers)
    most = np.inf if isinstance(target, Model) else target.num_layers
    if not isinstance(found, list) or not all(
        isinstance(i, int) and 0 <= i + after < most for i in found
    ):
        raise ValueError(
            f"{given.directory} reads layers {found} of a target of {most}, counted by what comes "
            f"{'after' if after else 'before'} them; need ids from 0 to {most - 1 - after}."
        )
    return tuple(i + after for i in found)


def _vocabulary(given: Given) -> np.ndarray | None:
    """The target's ids of what an EAGLE-3 head drafts; None for all of them, in order."""
    stored, size = given.stored, given.target.vocab_size
    if "d2t" not in stored:
        return None
    offsets = hf.read(stored["d2t"])
    ids = np.arange(len(offsets)) + offsets
    if ids.min() < 0 or ids.max() >= size or (np.diff(ids) <= 0).any():
        raise ValueError(
            f"{stored['d2t'].path} drafts ids {ids.min()} to {ids.max()} of a target of {size} "
            "tokens; need ascending ones below its size."
        )
    if "t2d" in stored and not np.array_equal(np.flatnonzero(hf.read(stored["t2d"])), ids):
        raise ValueError(f"{stored['d2t'].path} has a t2d that marks other ids than its d2t.")
    return None if len(ids) == size else ids


def _eagle_table(heads: EagleHead) -> Table:
    c, width = heads.config, heads.config.hidden_size
    is_third = bool(heads.feature_layers)
    layer = "midlayer" if is_third else "layers_0"
    table: Table = {}
    for path, tensor in hf_names.LLAMA.items():
        _, inside, part = path.partition("layers_{i}/")
        if inside and (is_third or part != "input_layernorm/weight"):
            rows, *columns = tensor.shape(c)
            if is_third and part in ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"):
                columns = [2 * width]
            theirs = part.removesuffix("/weight").replace("/", ".") + ".weight"
            theirs = f"{layer.replace('_', '.')}.{theirs}"
            table[f"{layer}/{part}"] = (theirs,), (rows, *columns)
    read = len(heads.feature_layers) if is_third else 2
    table["fc/weight"] = ("fc.weight",), (width, read * width)
    if heads.bias:
        table["fc/bias"] = ("fc.bias",), (width,)
    if is_third:
        table["midlayer/hidden_norm/weight"] = ("midlayer.hidden_norm.weight",), (width,)
        table["norm/weight"] = ("norm.weight",), (width,)
    if heads.own_unembedding:
        rows = c.vocab_size if heads.vocabulary is None else len(heads.vocabulary)
        table["lm_head"] = ("lm_head.weight",), (rows, width)
    return table


def _eagle_json(heads: EagleHead, dtype: np.dtype) -> dict[str, Any]:
    config = dataclasses.replace(heads.config, tie_embeddings=False)
    return {**hf_config.to_json(config, dtype, (), None), "bias": heads.bias}


def _eagle3_json(heads: EagleHead, dtype: np.dtype) -> dict[str, Any]:
    size = heads.config.vocab_size
    config = dataclasses.replace(heads.config, tie_embeddings=False)
    return {
        **hf_config.to_json(config, dtype, (), None),
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": size if heads.vocabulary is None else len(heads.vocabulary),
        _LAYERS: list(heads.feature_layers),
    }


def _count(names: Mapping[str, Any], pattern: str) -> int:
    """One more than the largest number that the pattern finds at the beginning of a name."""
    found = (re.match(pattern, name) for name in names)
    return 1 + max((int(m[1]) for m in found if m), default=-1)


def _rows(given: Given, name: str) -> int:
    if name not in given.stored or not given.stored[name].shape:
        raise ValueError(f"{given.directory} has no matrix {name}; need one.")
    return given.stored[name].shape[0]


def _check_sizes(given: Given, name: str, hidden_size: int, vocab_size: int | None) -> None:
    target = given.target
    for what, found, needed in (
        ("hidden size", hidden_size, target.hidden_size),
        ("vocabulary", vocab_size, target.vocab_size),
    ):
        if found is not None and found != needed:
            raise ValueError(
                f"{given.directory} holds {name} heads of {what} {found}, but the target's is "
                f"{needed}; they must be the same."
            )


def _check_options(given: Given, supported: Mapping[str, tuple]) -> None:
    for key, values in supported.items():
        value = given.raw.get(key, values[0])
        if value not in values:
            raise ValueError(
                f"{given.directory / hf_config.CONFIG} sets {key} to {value!r}; supported: "
                f"{', '.join(map(repr, values))}."
            )


# ----------------------------------------------------------------------------- all of them

# Which one a directory holds is tried in this order.
_DERIVED = ("embed_tokens.weight", "rotary_emb.inv_freq")
FORMATS = {
    "medusa": Format(
        r"(medusa_heads?\.)?(\d+\.\d+\.linear|blocks\.\d+\.layers\.\d+)\.weight$",
        _medusa_names,
        ("lm_head.weight",),  # vLLM's copy of the target's
        _medusa_heads,
        _medusa_table,
        _medusa_json,
        hf.HEADS[0],
    ),
    "hydra": Format(
        r"hydra_mlp\.",
        _hydra_names,
        _DERIVED,
        _hydra_heads,
        _hydra_table,
        _hydra_json,
        hf.HEADS[1],
    ),
    "eagle3": Format(
        r"(model\.)?(midlayer|layers\.0)\.hidden_norm\.",
        _eagle3_names,
        (*_DERIVED, "d2t", "t2d"),
        _eagle3_head,
        _eagle_table,
        _eagle3_json,
        "model.safetensors",
    ),
    "eagle": Format(
        r"(model\.)?fc\.weight$",
        _eagle_names,
        (*_DERIVED, "lm_head.weight"),  # a copy of the target's
        _eagle_head,
        _eagle_table,
        _eagle_json,
        "model.safetensors",
    ),
}
