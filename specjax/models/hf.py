"""Hugging Face directories to and from (config, params), by the tables of `hf_names`."""

import contextlib
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import tokenizers
from flax import traverse_util
from jax.typing import DTypeLike

from specjax.models import hf_config, hf_names
from specjax.models.hf_names import Shape
from specjax.models.transformer import TransformerConfig
from specjax.types import Array, PyTree

_KINDS = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"},
    "BOOL": "bool",
}
_ALIGNMENT = 64  # bytes; JAX on CPU copies what is not aligned so
_HUGE = 2**21  # bytes of a huge page
_PIECE = 2**18  # values converted at a time, few enough to stay in the processor's cache
_INTEGERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARDS = "model-*-of-*.safetensors"
HEADS = ("medusa_lm_head.safetensors", "hydra_lm_head.safetensors")  # see hf_heads
_OWN_FILES = (hf_config.CONFIG, hf_config.GENERATION, _WEIGHTS, _INDEX, _SHARDS, *HEADS)


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
    path = readable(directory) / hf_config.CONFIG
    return hf_config.parse(hf_config.read_json(path), path)


def stored_dtype(directory: str | Path) -> np.dtype | None:
    """The type of all weights in a directory; None if they differ.

    Raises:
        ValueError: as `load`.
    """
    return common_dtype(headers(weight_files(readable(directory))))


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
    directory = readable(directory)
    raw = hf_config.read_json(directory / hf_config.CONFIG)
    config = hf_config.parse(raw, directory / hf_config.CONFIG)
    kind = None if dtype is None else float_dtype(dtype, "dtype")
    stored = _check_tensors(directory, config, kind)
    flat = {
        path: _parameter(tensor, config, stored, kind)
        for path, tensor in hf_names.tensors(config).items()
    }
    if config.tie_embeddings and "lm_head.weight" in stored:
        embedding = np.asarray(flat["embed_tokens"]).reshape(-1)
        for place, piece in _pieces(stored["lm_head.weight"]):
            if np.array_equal(piece.astype(embedding.dtype), embedding[place]):
                continue
            raise ValueError(
                f"{directory} has an lm_head.weight that differs from its embedding, but "
                f"{hf_config.CONFIG} says tie_word_embeddings; need equal ones, or false there."
            )
    eos_ids, bos_id = hf_config.special_ids(directory, raw)
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
    if max_shard_bytes is not None and max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; need a positive number.")
    tensors = _named(config, params, dtype)
    kind = next(iter(tensors.values())).dtype

    def write(new: Path) -> None:
        written = hf_config.to_json(config, kind, eos_ids, bos_id)
        hf_config.write_json(new / hf_config.CONFIG, written)
        hf_config.write_json(new / hf_config.GENERATION, hf_config.ids_to_json(eos_ids, bos_id))
        _write_weights(new, tensors, max_shard_bytes)

    replace_directory(directory, write)


def check_same_vocabulary(target_directory: str | Path, draft_directory: str | Path) -> None:
    """Checks that a token id means the same to both models.

    Vocabulary sizes are compared, and the tokens themselves where both have a tokenizer.json.

    Raises:
        ValueError: they differ, or a directory cannot be read.
    """
    directories = (readable(target_directory), readable(draft_directory))
    sizes = [load_config(d).vocab_size for d in directories]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{target_directory} has a vocabulary of {sizes[0]} and {draft_directory} one of "
            f"{sizes[1]}; a draft needs its target's."
        )
    check_same_tokens(*directories)


def check_same_tokens(target_directory: str | Path, draft_directory: str | Path) -> None:
    """Compares the tokens themselves, where both directories have a tokenizer.json.

    Raises:
        ValueError: they differ, or a file cannot be read.
    """
    files = [readable(d) / "tokenizer.json" for d in (target_directory, draft_directory)]
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


# ----------------------------------------------------------------------------- weights


class Stored(NamedTuple):
    """A tensor in a file, known by the file's header alone."""

    name: str
    path: Path
    shape: Shape
    kind: str  # safetensors' name of its type
    start: int  # of its bytes in the file


def headers(files: Sequence[Path]) -> dict[str, Stored]:
    """Every tensor in the files by name."""
    found = {}
    for path in files:
        with _open(path), path.open("rb") as file:  # the library looks whether it is whole
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for name, of in header.items():
            if name != "__metadata__":
                start = 8 + size + of["data_offsets"][0]
                found[name] = Stored(name, path, tuple(of["shape"]), of["dtype"], start)
    return found


def common_dtype(stored: Mapping[str, Stored]) -> np.dtype | None:
    """The type of all floating-point tensors; None if they differ."""
    kinds = {_KINDS.get(tensor.kind) for tensor in stored.values() if tensor.kind not in _INTEGERS}
    name = kinds.pop() if len(kinds) == 1 else None
    return None if name is None else jnp.dtype(name)


def check_tensor(
    where: Path, name: str, stored: Mapping[str, Stored], shape: Shape, kind: np.dtype | None
) -> None:
    """Whether a tensor is there, has a shape and can be read as `kind`; None is as it is.

    Raises:
        ValueError: it is not.
    """
    kinds = ("F32", "BF16") if kind is None else ("F32", "BF16", "F16", "F64")
    if name not in stored:
        raise ValueError(f"{where} has no tensor {name}; need one of shape {shape}.")
    found = stored[name]
    if found.shape != shape:
        raise ValueError(
            f"Tensor {found.name} in {found.path} has shape {found.shape}; need {shape}."
        )
    if found.kind not in kinds:
        raise ValueError(
            f"Tensor {found.name} in {found.path} is {found.kind}; need {' or '.join(kinds)}"
            + (", or a dtype to convert it to." if found.kind in ("F16", "F64") else ".")
        )


def read(stored: Stored, kind: np.dtype | None = None) -> np.ndarray:
    """The tensor, in memory that JAX on CPU can take over as it is.

    Raises:
        ValueError: the file ended early.
    """
    x = _memory(stored.shape, _kind(stored) if kind is None else kind)
    _fill(x, stored)
    return x


def _kind(stored: Stored) -> np.dtype:
    return jnp.dtype(_KINDS[stored.kind])


def _memory(shape: Shape, kind: np.dtype) -> np.ndarray:
    """An array to be filled.

    NumPy asks for huge pages from 4 MiB on. An array that begins with one has no small pages before
    its first, each of which the system would have to hand out for itself: with 1B parameters in
    bfloat16 that is a sixth of the time. What lies before the array is never touched and takes no
    memory; its last page may take a part of one.
    """
    size = math.prod(shape) * kind.itemsize
    alignment = _HUGE if size >= 2 * _HUGE else _ALIGNMENT
    memory = np.empty(size + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + size].view(kind).reshape(shape)


def _fill(x: np.ndarray, stored: Stored) -> None:
    """Reads a tensor straight into a contiguous array, or through a small one that converts it."""
    flat = x.reshape(-1)
    if x.dtype == _kind(stored):
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.start)
            _read_into(flat, file)
        return
    for place, piece in _pieces(stored):
        flat[place] = piece


def _pieces(stored: Stored) -> Iterator[tuple[slice, np.ndarray]]:
    """The tensor's values and their places, some at a time, all in the same memory."""
    size = math.prod(stored.shape)
    memory = np.empty(min(size, _PIECE), _kind(stored))
    with stored.path.open("rb", buffering=0) as file:
        file.seek(stored.start)
        for start in range(0, size, _PIECE):
            piece = memory[: size - start]
            _read_into(piece, file)
            yield slice(start, start + len(piece)), piece


def _read_into(x: np.ndarray, file: io.FileIO) -> None:
    view, done = x.view(np.uint8).data, 0
    while done < len(view):  # a call reads 2 GiB at most
        count = file.readinto(view[done:])
        if not count:
            raise ValueError(f"{file.name} ended early; need a complete safetensors file.")
        done += count


def _parameter(
    tensor: hf_names.Tensor,
    config: TransformerConfig,
    stored: Mapping[str, Stored],
    kind: np.dtype | None,
) -> Array:
    """A parameter put together from what is stored, as an array of JAX's."""
    names = hf_names.names(tensor, config)
    x = _memory(hf_names.shape(tensor, config), kind or _kind(stored[names[0]]))
    i, count = tensor.part
    for name, own in zip(names, x if "{x}" in tensor.name else [x], strict=True):
        if count == 1 and not tensor.transposed:
            _fill(own, stored[name])
            continue
        whole = read(stored[name])
        whole = whole.T if tensor.transposed else whole
        own[...] = whole[i * len(whole) // count : (i + 1) * len(whole) // count]
    return jax.device_put(x)


def _check_tensors(
    directory: Path, config: TransformerConfig, kind: np.dtype | None
) -> dict[str, Stored]:
    """Every tensor by its name in the tables, from the files' headers alone."""
    stored = {
        hf_names.canonical(name, config): tensor
        for name, tensor in headers(weight_files(directory)).items()
    }
    needed = set()
    if config.tie_embeddings:  # it may be there all the same
        needed.add("lm_head.weight")
        if "lm_head.weight" in stored:
            shape = (config.vocab_size, config.hidden_size)
            check_tensor(directory, "lm_head.weight", stored, shape, kind)
    for tensor in hf_names.tensors(config).values():
        for name in hf_names.names(tensor, config):
            check_tensor(directory, name, stored, hf_names.stored_shape(tensor, config), kind)
            needed.add(name)
    for name, found in stored.items():
        if name not in needed and not name.endswith(hf_names.IGNORED):
            raise ValueError(
                f"{found.path} has a tensor {found.name}, which "
                f"{hf_config.architecture(config)} does not use; need a checkpoint without it."
            )
    return stored


def weight_files(directory: Path) -> list[Path]:
    """The file of a model's weights, or its shards.

    Raises:
        ValueError: there are none, or not all of them.
    """
    if (directory / _WEIGHTS).is_file():
        return [directory / _WEIGHTS]
    index = directory / _INDEX
    if not index.is_file():
        raise ValueError(f"{directory} has no weights; need {_WEIGHTS} or {_INDEX}.")
    weight_map = hf_config.read_json(index).get("weight_map")
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
    needed = hf_names.tensors(config)
    for path in [*needed, *flat]:
        if path not in flat or path not in needed:
            given, wanted = ("does not", "does") if path in needed else ("does", "does not")
            raise ValueError(f"params {given} hold {path}; the config's model {wanted}.")
        shape = hf_names.shape(needed[path], config)
        if flat[path].shape != shape:
            raise ValueError(f"Parameter {path} has shape {flat[path].shape}; need {shape}.")
    kinds = {p: float_dtype(x.dtype if dtype is None else dtype, p) for p, x in flat.items()}
    parts: dict[str, list[np.ndarray]] = {}
    for path, tensor in needed.items():
        x = np.asarray(flat[path]).astype(kinds[path], copy=False)
        for name, own in zip(
            hf_names.names(tensor, config), x if "{x}" in tensor.name else [x], strict=True
        ):
            parts.setdefault(name, []).append(own.T if tensor.transposed else own)
    # Those of one tensor come in their order; outputs are its last axis, as biases' only one is.
    return {
        name: np.ascontiguousarray(own[0] if len(own) == 1 else np.concatenate(own, -1))
        for name, own in parts.items()
    }


def float_dtype(dtype: DTypeLike, what: str) -> np.dtype:
    """A dtype that weights may have.

    Raises:
        ValueError: another one.
    """
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
        hf_config.write_json(directory / _INDEX, index)
    for file, shard in zip(names, shards, strict=True):
        # transformers 4 refuses a file that does not name its framework.
        safetensors.numpy.save_file(shard, directory / file, metadata={"format": "pt"})


# ----------------------------------------------------------------------------- files


def readable(directory: str | Path) -> Path:
    """The directory, or its previous version where a save died between its two renames."""
    previous = _sibling(Path(directory).resolve(), "previous")
    for path in (Path(directory), previous):
        if path.is_dir():
            return path
    raise ValueError(
        f"{directory} is not a directory; need one with {hf_config.CONFIG} and {_WEIGHTS}."
    )


def replace_directory(directory: str | Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a new directory beside this one and swaps it in last.

    An interruption leaves the previous one readable. Its other files are carried over. One process
    may write a directory at a time.

    Raises:
        ValueError: `directory` is a file.
    """
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; need a directory or a free name.")
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
        write(new)
        _swap(new, directory, previous)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


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
