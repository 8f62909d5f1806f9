"""Directories of draft heads to and from (heads, params), see `hf_head_formats`.

What a directory holds is told from the names of its tensors, for a head's config.json may be a
plain Llama's.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util
from jax.typing import DTypeLike

from specjax.models import hf, hf_config
from specjax.models.eagle import EagleHead
from specjax.models.hf import Stored
from specjax.models.hf_head_formats import FORMATS, Given
from specjax.models.hydra import HydraHeads
from specjax.models.medusa import MedusaHeads
from specjax.models.transformer import TransformerConfig
from specjax.types import Model, PyTree

Heads = MedusaHeads | HydraHeads | EagleHead


def kind(directory: str | Path) -> str:
    """What a directory holds: "medusa", "hydra", "eagle", "eagle3", or else "model".

    Raises:
        ValueError: no weights in it, or none that can be read.
    """
    return _kind(hf.headers(_files(hf.readable(directory))))


def stored_dtype(directory: str | Path) -> np.dtype | None:
    """The type of all weights in a directory of heads; None if they differ.

    Raises:
        ValueError: as `kind`.
    """
    return hf.common_dtype(hf.headers(_files(hf.readable(directory))))


def load(
    directory: str | Path,
    target: TransformerConfig | Model,
    dtype: DTypeLike | None = None,
    activations: DTypeLike = jnp.float32,
) -> tuple[Heads, PyTree]:
    """Reads a directory of heads. There are as many as are stored, whatever config.json says.

    An embedding in the directory is taken to be the target's.

    Args:
        directory: with config.json and safetensors.
        target: the model that they are for, or its config. A config tells what a directory leaves
            open: Hydra's prefix layer, EAGLE-3's layers, which of a model are its feature_layers.
        dtype: of parameters, float32 or bfloat16; None keeps what the file has, which must then be
            one of these.
        activations: their dtype, and that of caches.

    Raises:
        ValueError: no heads, pickles, a damaged file; an option that is not supported; another
            hidden size or vocabulary than the target's; a tensor that is missing, misshapen, of
            another type, or not part of the format.
    """
    directory = hf.readable(directory)
    stored = hf.headers(_files(directory))
    name = _kind(stored)
    if name == "model":
        raise ValueError(
            f"{directory} holds a tensor {next(iter(stored), None)} but no heads; need Medusa's, "
            "Hydra's or EAGLE's."
        )
    to = None if dtype is None else hf.float_dtype(dtype, "dtype")
    form = FORMATS[name]
    raw = hf_config.read_json(directory / hf_config.CONFIG)
    stored = form.rename(stored)
    heads = form.heads(Given(directory, raw, stored, target, activations))
    table = form.table(heads)
    has_bias = any(tensor.endswith(".bias") for tensor in stored)
    flat = {}
    for path, (names, shape) in table.items():
        if not has_bias and path.endswith("/bias"):
            flat[path] = jnp.zeros(shape, hf.common_dtype(stored) if to is None else to)
            continue
        for tensor in names:
            hf.check_tensor(directory, tensor, stored, shape, to)
        array = hf.read(stored[names[0]], to)
        for tensor in names[1:]:
            if not np.array_equal(array, hf.read(stored[tensor], to)):
                raise ValueError(
                    f"Tensors {names[0]} and {tensor} in {directory} differ; need the same, for "
                    f"{name} heads share these weights."
                )
        flat[path] = jax.device_put(array)
    used = {tensor for names, _ in table.values() for tensor in names}
    for tensor, where in stored.items():
        if tensor not in used and not tensor.endswith(form.unused):
            raise ValueError(
                f"{where.path} has a tensor {where.name}, which {name} heads do not use; "
                "need a directory without it."
            )
    return heads, traverse_util.unflatten_dict(flat, sep="/")


def save(
    directory: str | Path,
    heads: Heads,
    params: PyTree,
    dtype: DTypeLike = jnp.bfloat16,
    target_name: str = "",
) -> None:
    """Writes a directory that `load` reads, and programs that know the format.

    As by `hf.save`, it is swapped in last, and other files are carried over.

    Args:
        heads: of `medusa_heads`, `hydra_heads`, `eagle_head` or `eagle3_head`.
        params: what their `init` returns.
        dtype: float32 or bfloat16.
        target_name: of the model that they are for, for the record.

    Raises:
        ValueError: params that do not fit the heads, another dtype, a `directory` that is a file.
    """
    name = _name_of(heads)
    form, to = FORMATS[name], hf.float_dtype(dtype, "dtype")
    flat, table = traverse_util.flatten_dict(params, sep="/"), form.table(heads)
    tensors: dict[str, np.ndarray] = {}
    for path in [*table, *flat]:
        if path not in flat or path not in table:
            given, wanted = ("do not", "do") if path in table else ("do", "do not")
            raise ValueError(f"params {given} hold {path}; the {name} heads {wanted}.")
        names, shape = table[path]
        if flat[path].shape != shape:
            raise ValueError(f"Parameter {path} has shape {flat[path].shape}; need {shape}.")
        array = np.ascontiguousarray(np.asarray(flat[path]).astype(to, copy=False))
        tensors |= dict.fromkeys(names, array)
    if isinstance(heads, EagleHead) and heads.vocabulary is not None:
        ids = np.asarray(heads.vocabulary, np.int64)
        tensors["d2t"] = ids - np.arange(len(ids))  # offsets, not ids
        tensors["t2d"] = np.isin(np.arange(heads.config.vocab_size), ids)
    written = form.to_json(heads, to)
    if target_name:
        written["base_model_name_or_path"] = target_name

    def write(new: Path) -> None:
        hf_config.write_json(new / hf_config.CONFIG, written)
        safetensors.numpy.save_file(tensors, new / form.file, metadata={"format": "pt"})

    hf.replace_directory(directory, write)


def _kind(stored: Mapping[str, Stored]) -> str:
    for name, form in FORMATS.items():
        if any(re.match(form.marks, tensor) for tensor in stored):
            return name
    return "model"


def _name_of(heads: Heads) -> str:
    if isinstance(heads, EagleHead):
        return "eagle3" if heads.feature_layers else "eagle"
    return "hydra" if isinstance(heads, HydraHeads) else "medusa"


def _files(directory: Path) -> list[Path]:
    for name in hf.HEADS:
        if (directory / name).is_file():
            return [directory / name]
    pickles = sorted([*directory.glob("*.pt"), *directory.glob("*.bin")])
    if pickles and not any(directory.glob("*.safetensors*")):
        old = pickles[0]
        new = old.stem.replace("pytorch_model", "model") + ".safetensors"
        raise ValueError(
            f"{old} is a pickle; need {new}, in PyTorch: safetensors.torch.save_file({{k: x.clone()"
            f" for k, x in torch.load('{old.name}', weights_only=True).items()}}, '{new}')."
        )
    return hf.weight_files(directory)
