"""Data parallelism: every device has a copy of the state and computes its part of every batch.

The devices communicate once per step, to sum the gradients of their parts, and for the statistics of each batch
normalization. Other modules do not depend on the number of devices.

On a CPU, ``JAX_NUM_CPU_DEVICES`` sets the number of devices; the commands use one device per processor. XLA runs many
operations on a single processor, so two devices with half a batch each are faster than one device with both processors:
for the model ``cnn``, 1.4 times as fast with batches of 16 to 200, and no faster with batches of 8 (two processors, jax
0.10).
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
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
    """Create a mesh of devices, by default of all local devices."""
    return Mesh(np.array(jax.local_devices() if devices is None else devices), (AXIS,))


def padded(batch_size: int, mesh: Mesh) -> int:
    """Round a batch size up to a multiple of the number of devices."""
    return -(-batch_size // mesh.size) * mesh.size


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Copy the arrays of a tree to every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, REPLICATED))


def shard_batches(tree: Tree, mesh: Mesh) -> Tree:
    """Shard arrays ``[steps, batch, ...]`` over the batch axis."""
    return jax.device_put(tree, NamedSharding(mesh, BATCHES))


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
