"""Data parallelism: every device has a copy of the state and computes its part of every batch.

The devices communicate once per step, to sum the gradients of their parts, and for the statistics of each batch
normalization. Other modules do not depend on the number of devices.

The devices may belong to several processes, on several machines, after ``jax.distributed.initialize``. Then all
processes make the same calls in the same order, and each supplies the data of its own devices.

On a CPU, ``JAX_NUM_CPU_DEVICES`` sets the number of devices; the commands use one device per processor. XLA runs many
operations on a single processor, so two devices with half a batch each are faster than one device with both processors:
for the model ``cnn``, 1.4 times as fast with batches of 16 to 200, and no faster with batches of 8 (two processors, jax
0.10).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")

AXIS = "data"
"""The name of the mesh axis."""

REPLICATED = PartitionSpec()
"""The sharding of arrays that every device has a copy of."""

BATCHES = PartitionSpec(None, AXIS)
"""The sharding of arrays ``[steps, batch, ...]``."""

MEMBERS = PartitionSpec(AXIS)
"""The sharding of arrays ``[members, ...]``."""


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Create a mesh of devices, by default of all devices of all processes; those of a process are next to each other.

    TPUs are not numbered by process.
    """
    devices = jax.devices() if devices is None else devices
    return Mesh(np.array(sorted(devices, key=lambda device: device.process_index)), (AXIS,))


def process_indices(mesh: Mesh) -> list[int]:
    """The indices of the processes whose devices are in the mesh, in ascending order."""
    return sorted({device.process_index for device in mesh.devices.flat})


def padded(batch_size: int, mesh: Mesh) -> int:
    """Round a batch size up to a multiple of the number of devices."""
    return -(-batch_size // mesh.size) * mesh.size


def local_part(batch_size: int, mesh: Mesh) -> slice:
    """The part of a batch that the devices of this process compute; the batch size is a result of ``padded``."""
    indices = _local_indices(mesh)
    size = batch_size // mesh.size
    return slice(indices[0] * size, (indices[-1] + 1) * size)


def _local_indices(mesh: Mesh) -> list[int]:
    """The positions in the mesh of the devices of this process."""
    process = jax.process_index()
    return [index for index, device in enumerate(mesh.devices.flat) if device.process_index == process]


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Copy the arrays of a tree to every device of the mesh; they are the same in all processes."""
    sharding = NamedSharding(mesh, REPLICATED)
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def copy(leaf: jax.Array | np.ndarray) -> jax.Array:
        if getattr(leaf, "sharding", None) == sharding:
            return leaf
        # jax.device_put would make all processes compare the arrays.
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf)

    return jax.tree.map(copy, tree)


def shard_batches(tree: Tree, mesh: Mesh) -> Tree:
    """Shard arrays ``[steps, batch, ...]`` over the batch axis, given the ``local_part`` of the batch."""
    sharding = NamedSharding(mesh, BATCHES)
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def shard(part: np.ndarray) -> jax.Array:
        batch_size = part.shape[1] // len(_local_indices(mesh)) * mesh.size
        shape = (len(part), batch_size, *part.shape[2:])
        return jax.make_array_from_process_local_data(sharding, part, shape)

    return jax.tree.map(shard, tree)


def to_host(tree: Tree) -> Tree:
    """Copy the arrays of a tree, sharded over the devices of any processes, to the memory of every process."""
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def sum_over_processes(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Start to sum an array over the processes of a mesh, all of which have to call this.

    Returns:
        The sum, replicated. It is computed after the programs that the devices are executing, and reading it waits.
    """
    first = _local_indices(mesh)[0]

    def row(index: tuple[slice, ...]) -> np.ndarray:
        return (array if (index[0].start or 0) == first else np.zeros_like(array))[np.newaxis]

    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return _sum_rows(jax.make_array_from_callback((mesh.size, *array.shape), sharding, row), mesh=mesh)


@partial(jax.jit, static_argnames="mesh")
def _sum_rows(rows: jax.Array, *, mesh: Mesh) -> jax.Array:
    total = rows.sum(axis=0, dtype=rows.dtype)
    return jax.lax.with_sharding_constraint(total, NamedSharding(mesh, REPLICATED))


def shard_members(tree: Tree, mesh: Mesh) -> Tree:
    """Shard arrays ``[members, ...]`` over their first axis."""
    return jax.device_put(tree, NamedSharding(mesh, MEMBERS))


def data_parallel(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Apply ``jax.shard_map`` to a function that calls ``sum_over_devices`` itself."""
    # With check_vma, jax would insert a separate psum for every gradient.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def device_index(axis_name: str | None) -> jax.Array:
    """Index of this device along the axis, an int32 scalar; 0 if the axis is None."""
    return jnp.int32(0) if axis_name is None else jax.lax.axis_index(axis_name)


def sum_over_devices(tree: Tree, axis_name: str | None) -> Tree:
    """Sum each array over the devices, as float32 in a single collective, to pay its latency only once."""
    if axis_name is None:
        return tree
    flat, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree))
    sums = unravel(jax.lax.psum(flat, axis_name))
    return jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), sums, tree)
