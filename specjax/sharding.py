"""How a train state and its batches lie on many devices: one mesh, one rule by names and ranks.

The rows of a batch are split over `data` and `fsdp`, matrices over `fsdp` and `tensor`. A step is
`jax.jit` with these shardings of what goes in and comes out; XLA adds the communication. `gathered`
tells it to bring together a matrix's shares over `fsdp` where they are read (arXiv 1910.02054):
left alone it would rather bring together the rows, which takes several times the memory.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from specjax.types import Array, PyTree

AXES = ("data", "fsdp", "tensor")

# Their inputs are split over `tensor`, as the outputs of the matrices before them are: between the
# two nothing moves (arXiv 1909.08053). All other matrices, embeddings [V, E] too, have it the
# other way round.
_ROW_PARALLEL = ("o_proj", "down_proj")


def mesh(shape: Mapping[str, int]) -> Mesh:
    """The mesh of all three axes; those not named are 1, and one may be -1, all devices left.

    Args:
        shape: such as {"data": -1} or {"data": 2, "fsdp": 2, "tensor": 2}. Where it takes fewer
            devices than there are, the first ones are used.

    Raises:
        ValueError: an axis of another name or an impossible size, devices that do not come out.
    """
    given = {name: int(shape[name]) for name in shape}
    text = " x ".join(f"{name}={size}" for name, size in given.items())
    for name in given:
        if name not in AXES:
            raise ValueError(f"Mesh {text} has an axis {name!r}; need some of {', '.join(AXES)}.")
    if (
        any(size < 1 and size != -1 for size in given.values())
        or list(given.values()).count(-1) > 1
    ):
        raise ValueError(f"Mesh {text} has no such sizes; need 1 or more, at most one being -1.")
    there = jax.device_count()
    taken = math.prod(size for size in given.values() if size > 0)
    if there % taken:
        raise ValueError(
            f"Mesh {text} takes {taken} devices, which do not divide the {there} there."
        )
    sizes = [there // taken if given.get(name) == -1 else given.get(name, 1) for name in AXES]
    devices = jax.devices()[: math.prod(sizes)]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_batch(mesh: Mesh, batch_size: int, num_microbatches: int = 1) -> None:
    """Every device must get as many rows of every microbatch.

    Raises:
        ValueError: they do not come out.
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (devices * num_microbatches):
        parts = f" in {num_microbatches} microbatches" if num_microbatches > 1 else ""
        raise ValueError(
            f"Batch {batch_size}{parts} does not divide over data x fsdp = {devices} devices; need "
            f"a multiple of {devices * num_microbatches}."
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all devices that do not share them; of arrays [B, ...]."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def state_sharding(mesh: Mesh, abstract_state: PyTree) -> PyTree:
    """A sharding for every array of a state, whose names and ranks say which.

    Matrices are [out, in]. Of `o_proj` and `down_proj` out lies over `fsdp` and in over `tensor`,
    of all others out over `tensor` and in over `fsdp`; embeddings and unembeddings are [V, E]. An
    axis that does not divide a dimension is not used for it. All that is no matrix is on every
    device. An optimizer's moments have their parameters' names and lie where these lie.

    Args:
        mesh: see `mesh`.
        abstract_state: arrays or what `jax.eval_shape` gives: parameters alone or a train state.
    """

    def place(path: tuple, x: Array) -> NamedSharding:
        if len(x.shape) != 2:
            return NamedSharding(mesh, P())
        name = jax.tree_util.keystr(path)
        is_row_parallel = any(row in name for row in _ROW_PARALLEL)
        axes = ("fsdp", "tensor") if is_row_parallel else ("tensor", "fsdp")
        fits = (size % mesh.shape[axis] == 0 for axis, size in zip(axes, x.shape, strict=True))
        return NamedSharding(
            mesh, P(*(a if ok else None for a, ok in zip(axes, fits, strict=True)))
        )

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def gathered(mesh: Mesh, params: PyTree, dtype: Any = jnp.float32) -> PyTree:
    """Parameters as a pass reads them: in its type, shares over `fsdp` together.

    Those over `tensor` stay apart. Types change first: fewer bytes move.
    """

    def together(x: Array, place: NamedSharding) -> Array:
        here = NamedSharding(mesh, P(*(a if a == "tensor" else None for a in place.spec)))
        return jax.lax.with_sharding_constraint(x.astype(dtype), here)

    return jax.tree.map(together, params, state_sharding(mesh, params))


def value_and_grad(mesh: Mesh, loss: Callable, dtype: Any = jnp.float32) -> Callable:
    """`jax.value_and_grad(loss, has_aux=True)` on a mesh.

    Args:
        mesh: see `mesh`.
        loss: (params, target_params, batch, rng_key) -> (scalar, metrics); is given both trees of
            parameters as `gathered` makes them.
        dtype: of a pass.

    Returns:
        (params, target_params, batch, rng_key) -> ((scalar, metrics), grads), for parameters that
        lie as `state_sharding` says; each gradient has its parameter's type and place.
    """

    def whole(params: PyTree, target_params: PyTree, batch: Any, rng_key: Array) -> Any:
        both = (gathered(mesh, tree, dtype) for tree in (params, target_params))
        return loss(*both, batch, rng_key)

    gradient = jax.value_and_grad(whole, has_aux=True)

    def found(params: PyTree, target_params: PyTree, batch: Any, rng_key: Array) -> Any:
        value, grads = gradient(params, target_params, batch, rng_key)
        return value, jax.lax.with_sharding_constraint(grads, state_sharding(mesh, grads))

    return found
