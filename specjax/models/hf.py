"""Hugging Face directories to and from (config, params), by one table of names per family."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import tokenizers
from flax import traverse_util
from jax.typing import DTypeLike

from specjax.models.layers import RopeScaling
from specjax.models.transformer import TransformerConfig
from specjax.types import PyTree

Shape = tuple[int, ...]


def _vocab_rows(c: TransformerConfig) -> Shape:
    return c.vocab_size, c.hidden_size


def _norm(c: TransformerConfig) -> Shape:
    return (c.hidden_size,)


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


# Our parameter: its tensor's name, its shape. `{i}` is the layer.
LLAMA: dict[str, tuple[str, Callable[[TransformerConfig], Shape]]] = {
    "embed_tokens": ("model.embed_tokens.weight", _vocab_rows),
    "layers_{i}/input_layernorm/weight": ("model.layers.{i}.input_layernorm.weight", _norm),
    "layers_{i}/self_attn/q_proj": ("model.layers.{i}.self_attn.q_proj.weight", _queries),
    "layers_{i}/self_attn/k_proj": ("model.layers.{i}.self_attn.k_proj.weight", _keys),
    "layers_{i}/self_attn/v_proj": ("model.layers.{i}.self_attn.v_proj.weight", _keys),
    "layers_{i}/self_attn/o_proj": ("model.layers.{i}.self_attn.o_proj.weight", _out),
    "layers_{i}/post_attention_layernorm/weight": (
        "model.layers.{i}.post_attention_layernorm.weight",
        _norm,
    ),
    "layers_{i}/mlp/gate_proj": ("model.layers.{i}.mlp.gate_proj.weight", _up),
    "layers_{i}/mlp/up_proj": ("model.layers.{i}.mlp.up_proj.weight", _up),
    "layers_{i}/mlp/down_proj": ("model.layers.{i}.mlp.down_proj.weight", _down),
    "norm/weight": ("model.norm.weight", _norm),
    "lm_head": ("lm_head.weight", _vocab_rows),
}

SUPPORTED = {"LlamaForCausalLM": LLAMA}

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OWN_FILES = (_CONFIG, _GENERATION, _WEIGHTS, _INDEX, "model-*-of-*.safetensors")

# Options that change the result and that the transformer has no equivalent of, with what it does.
_FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}


class Checkpoint(NamedTuple):
    """A model as a directory holds it."""

    config: TransformerConfig
    params: PyTree  # what `transformer(config).init` returns: nested dicts of jax arrays
    eos_ids: tuple[int, ...]  # any of them ends a text; may be empty
    bos_id: int | None


def load_config(directory: str | Path) -> TransformerConfig:
    """Reads `directory`/config.json, in the form of transformers 4 or 5.

    Raises:
        ValueError: no directory, no config.json, not JSON; an architecture or option that is not
            supported; a size that is missing or not a positive integer.
    """
    path = _readable(directory) / _CONFIG
    return _parse_config(_read_json(path), path)


def load(directory: str | Path, dtype: DTypeLike | None = None) -> Checkpoint:
    """Reads config, weights and special ids, tensor by tensor.

    The arrays are placed on JAX's default device; memory peaks at the model and one tensor.

    Args:
        directory: with config.json and either model.safetensors or
            model.safetensors.index.json and its shards; generation_config.json is optional.
        dtype: float32 or bfloat16; None keeps what the file has, which must then be one of these.

    Raises:
        ValueError: as `load_config`; a file that is missing or damaged; a tensor that is missing,
            misshapen, of another type, or not part of the architecture.
    """
    directory = _readable(directory)
    raw = _read_json(directory / _CONFIG)
    config = _parse_config(raw, directory / _CONFIG)
    kind = None if dtype is None else _float_dtype(dtype, "dtype")
    file_of = _check_tensors(directory, config, kind)
    flat = {}
    for path, (name, _) in _tensors(config).items():
        with _open(file_of[name]) as file:  # closed after each tensor, which unmaps its pages
            tensor = file.get_tensor(name)
        flat[path] = jnp.asarray(tensor if kind is None else tensor.astype(kind))
    if config.tie_embeddings and "lm_head.weight" in file_of:
        with _open(file_of["lm_head.weight"]) as file:
            head = file.get_tensor("lm_head.weight")
        if not np.array_equal(head.astype(flat["embed_tokens"].dtype), flat["embed_tokens"]):
            raise ValueError(
                f"{directory} has an lm_head.weight that differs from its embedding, but "
                f"{_CONFIG} says tie_word_embeddings; need equal ones, or false there."
            )
    eos_ids, bos_id = _special_ids(directory, raw)
    return Checkpoint(config, traverse_util.unflatten_dict(flat, sep="/"), eos_ids, bos_id)


def save(
    directory: str | Path,
    config: TransformerConfig,
    params: PyTree,
    dtype: DTypeLike | None = None,
    eos_ids: Sequence[int] = (),
    bos_id: int | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes a directory that `load` and transformers read.

    Everything is written beside `directory` and swapped in last, so an interrupted save leaves
    the previous checkpoint loadable. Files of the previous checkpoint that `save` does not write,
    such as tokenizer.json, are carried over. One process may save to a directory at a time.

    Args:
        config: the shape of `params`.
        params: what `transformer(config).init` returns.
        dtype: float32 or bfloat16; None keeps that of each parameter.
        eos_ids, bos_id: see `Checkpoint`.
        max_shard_bytes: splits larger models into shards of at most this many bytes, but at least
            one tensor each, with an index. None writes one file.

    Raises:
        ValueError: params that do not fit the config, another dtype, a limit that is not
            positive, a `directory` that is a file.
    """
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; need a directory or a free name.")
    if max_shard_bytes is not None and max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; need a positive number.")
    tensors = _named(config, params, dtype)
    new, previous = _sibling(directory, "saving"), _sibling(directory, "previous")
    if previous.exists() and not directory.exists():
        previous.rename(directory)  # an earlier save died between its two renames
    for leftover in (new, previous):
        if leftover.exists():
            shutil.rmtree(leftover)
    new.mkdir(parents=True)
    try:
        if directory.exists():
            _carry_over(directory, new)
        _write_json(new / _CONFIG, _config_json(config, tensors, eos_ids, bos_id))
        _write_json(new / _GENERATION, _ids_json(eos_ids, bos_id))
        _write_weights(new, tensors, max_shard_bytes)
        _swap(new, directory, previous)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def check_same_vocabulary(target_directory: str | Path, draft_directory: str | Path) -> None:
    """Checks that a token id means the same to both models.

    Vocabulary sizes are compared, and the tokens themselves where both have a tokenizer.json.

    Raises:
        ValueError: they differ, or a directory cannot be read.
    """
    directories = (_readable(target_directory), _readable(draft_directory))
    sizes = [load_config(d).vocab_size for d in directories]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{target_directory} has a vocabulary of {sizes[0]} and {draft_directory} one of "
            f"{sizes[1]}; a draft needs its target's."
        )
    files = [d / "tokenizer.json" for d in directories]
    if not all(file.is_file() for file in files):
        return
    token_of = [{i: token for token, i in _vocabulary(file).items()} for file in files]
    for i in sorted(token_of[0].keys() | token_of[1].keys()):
        target, draft = (tokens.get(i) for tokens in token_of)
        if target != draft:
            raise ValueError(
                f"Token {i} is {target!r} in {files[0]} and {draft!r} in {files[1]}; "
                "a draft needs its target's vocabulary."
            )


# ----------------------------------------------------------------------------- config.json


def _parse_config(raw: dict[str, Any], path: Path) -> TransformerConfig:
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


def _special_ids(directory: Path, raw: dict[str, Any]) -> tuple[tuple[int, ...], int | None]:
    """End and begin ids; generation_config.json goes before config.json, as in transformers."""
    path = directory / _GENERATION
    generation = _read_json(path) if path.is_file() else {}

    def ids(key: str) -> tuple[int, ...]:
        value = generation.get(key)
        if value is None:
            value = raw.get(key)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in values):
            raise ValueError(f"{directory} gives {key} as {value!r}; need integers.")
        return tuple(values)

    return ids("eos_token_id"), next(iter(ids("bos_token_id")), None)


def _config_json(
    config: TransformerConfig,
    tensors: dict[str, np.ndarray],
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
        "torch_dtype": tensors["model.embed_tokens.weight"].dtype.name,
        **_ids_json(eos_ids, bos_id),
    }


def _ids_json(eos_ids: Sequence[int], bos_id: int | None) -> dict[str, Any]:
    eos = [int(i) for i in eos_ids]
    return {
        "bos_token_id": None if bos_id is None else int(bos_id),
        "eos_token_id": eos if len(eos) > 1 else next(iter(eos), None),
    }


# ----------------------------------------------------------------------------- weights


def _tensors(config: TransformerConfig) -> dict[str, tuple[str, Shape]]:
    """Every parameter's path, with its tensor's name and shape."""
    tensors = {}
    for path, (name, shape) in LLAMA.items():
        if path == "lm_head" and config.tie_embeddings:
            continue
        for i in range(config.num_layers if "{i}" in path else 1):
            tensors[path.format(i=i)] = (name.format(i=i), shape(config))
    return tensors


def _check_tensors(
    directory: Path, config: TransformerConfig, kind: np.dtype | None
) -> dict[str, Path]:
    """The file of every tensor, from the files' headers alone."""
    file_of: dict[str, Path] = {}
    shapes: dict[str, Shape] = {}
    kinds: dict[str, str] = {}
    for path in _weight_files(directory):
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                file_of[name], kinds[name] = path, part.get_dtype()
                shapes[name] = tuple(part.get_shape())
    readable = ("F32", "BF16") if kind is None else ("F32", "BF16", "F16", "F64")
    needed = dict(_tensors(config).values())
    for name, shape in needed.items():
        if name not in file_of:
            raise ValueError(f"{directory} has no tensor {name}; need one of shape {shape}.")
        if shapes[name] != shape:
            raise ValueError(
                f"Tensor {name} in {file_of[name]} has shape {shapes[name]}; need {shape}."
            )
        if kinds[name] not in readable:
            raise ValueError(
                f"Tensor {name} in {file_of[name]} is {kinds[name]}; need {' or '.join(readable)}"
                + (", or a dtype to convert it to." if kinds[name] in ("F16", "F64") else ".")
            )
    for name in file_of:
        duplicate = name == "lm_head.weight" and config.tie_embeddings
        if name not in needed and not duplicate and not name.endswith("rotary_emb.inv_freq"):
            raise ValueError(
                f"{file_of[name]} has a tensor {name}, which LlamaForCausalLM does not use; "
                "need a checkpoint without it."
            )
    return file_of


def _weight_files(directory: Path) -> list[Path]:
    if (directory / _WEIGHTS).is_file():
        return [directory / _WEIGHTS]
    index = directory / _INDEX
    if not index.is_file():
        raise ValueError(f"{directory} has no weights; need {_WEIGHTS} or {_INDEX}.")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise ValueError(f"{index} has no weight_map; need one from tensors to files.")
    files = [directory / shard for shard in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{directory} has no shard {file.name}; {_INDEX} needs it.")
    return files


def _named(
    config: TransformerConfig, params: PyTree, dtype: DTypeLike | None
) -> dict[str, np.ndarray]:
    """The parameters under their tensors' names, checked and converted."""
    flat = traverse_util.flatten_dict(params, sep="/")
    needed = _tensors(config)
    for path in [*needed, *flat]:
        if path not in flat or path not in needed:
            given, wanted = ("does not", "does") if path in needed else ("does", "does not")
            raise ValueError(f"params {given} hold {path}; the config's model {wanted}.")
        if flat[path].shape != needed[path][1]:
            raise ValueError(
                f"Parameter {path} has shape {flat[path].shape}; need {needed[path][1]}."
            )
    kinds = {p: _float_dtype(x.dtype if dtype is None else dtype, p) for p, x in flat.items()}
    return {
        name: np.ascontiguousarray(np.asarray(flat[path]).astype(kinds[path], copy=False))
        for path, (name, _) in needed.items()
    }


def _float_dtype(dtype: DTypeLike, what: str) -> np.dtype:
    try:
        kind = jnp.dtype(dtype)
    except TypeError:
        kind = None
    if kind not in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
        raise ValueError(f"{what} is {dtype}; need float32 or bfloat16.")
    return kind


def _write_weights(
    directory: Path, tensors: dict[str, np.ndarray], max_shard_bytes: int | None
) -> None:
    shards: list[dict[str, np.ndarray]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if max_shard_bytes is not None and shards[-1] and used + tensor.nbytes > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    names = [_WEIGHTS]
    if len(shards) > 1:
        n = len(shards)
        names = [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
        weight_map = {name: file for file, s in zip(names, shards, strict=True) for name in s}
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(directory / _INDEX, index)
    for file, shard in zip(names, shards, strict=True):
        # transformers 4 refuses a file that does not name its framework.
        safetensors.numpy.save_file(shard, directory / file, metadata={"format": "pt"})


# ----------------------------------------------------------------------------- files


def _readable(directory: str | Path) -> Path:
    """The directory, or its previous version where a save died between its two renames."""
    previous = _sibling(Path(directory).resolve(), "previous")
    for path in (Path(directory), previous):
        if path.is_dir():
            return path
    raise ValueError(f"{directory} is not a directory; need one with {_CONFIG} and {_WEIGHTS}.")


def _sibling(directory: Path, role: str) -> Path:
    return directory.with_name(f".{directory.name}.{role}")


def _swap(new: Path, directory: Path, previous: Path) -> None:
    """Gives `new` the name `directory`; whatever interrupts this, one of the two has it."""
    if not directory.exists():
        new.rename(directory)
        return
    try:
        directory.rename(previous)
        new.rename(directory)
    except BaseException:
        if not directory.exists():
            previous.rename(directory)
        raise
    shutil.rmtree(previous)


def _carry_over(directory: Path, new: Path) -> None:
    for path in directory.iterdir():
        if any(path.match(pattern) for pattern in _OWN_FILES):
            continue
        if path.is_dir():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}; need one.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); need a JSON object.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; need a JSON object.")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, "numpy") as file:
            yield file
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); need a complete safetensors file."
        ) from error


def _vocabulary(path: Path) -> dict[str, int]:
    try:
        return tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises this very class
        raise ValueError(f"{path} cannot be read ({error}); need a tokenizer.json.") from error
