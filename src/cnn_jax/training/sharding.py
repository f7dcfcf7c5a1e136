"""Data parallelism: every device holds the whole state and computes its part of every batch.

The gradient of a sum over examples is the sum of the gradients over the parts of the examples, so one sum over the
devices in each step is all they exchange. No other module knows how many devices there are.

On a CPU the devices are the processors, as many as ``JAX_NUM_CPU_DEVICES`` says. XLA gives many operations one
processor only, so two devices that compute half a batch each finish sooner than one that has both processors: for the
tutorial's network 1.4 times as fast with batches of 16 to 200, and no faster with 8 (two processors, jax 0.10).
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
"""The name of the mesh's only axis."""

REPLICATED = PartitionSpec()
BATCHES = PartitionSpec(None, AXIS)
"""The sharding of arrays ``[steps, batch, ...]``."""


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of some devices, by default of all those of this process."""
    return Mesh(np.array(jax.local_devices() if devices is None else devices), (AXIS,))


def padded(batch_size: int, mesh: Mesh) -> int:
    """The smallest multiple of the number of devices that is at least the batch size."""
    return -(-batch_size // mesh.size) * mesh.size


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """The arrays of a tree on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, REPLICATED))


def shard_batches(tree: Tree, mesh: Mesh) -> Tree:
    """Arrays ``[steps, batch, ...]`` with each device's part of the batches on that device."""
    return jax.device_put(tree, NamedSharding(mesh, BATCHES))


def data_parallel(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """``jax.shard_map`` of a function that calls ``sum_over_devices`` itself."""
    # Without jax's check of what is replicated, which would have every gradient summed on its own.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def device_index(axis_name: str | None) -> jax.Array:
    """The place of this device on the axis, an int32 scalar; 0 without an axis."""
    return jnp.int32(0) if axis_name is None else jax.lax.axis_index(axis_name)


def sum_over_devices(tree: Tree, axis_name: str | None) -> Tree:
    """The sum of each array over the devices, in one exchange for all arrays: every exchange is a wait."""
    if axis_name is None:
        return tree
    flat, unravel = ravel_pytree(tree)
    return unravel(jax.lax.psum(flat, axis_name))
