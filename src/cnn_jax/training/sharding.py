"""The devices that train together: each holds everything, and computes its part of every batch.

Data parallelism: the gradient of a sum over examples is the sum of the gradients over the parts of the examples, so one
sum over the devices a step is all they have to tell each other. The only room that knows there are several devices.

On a CPU the devices are the processors, as many as ``JAX_NUM_CPU_DEVICES`` says. XLA gives many operations one
processor only, so two devices that compute half a batch each finish sooner than one that has both processors: for the
lesson's network 1.4 times as fast with batches of 16 to 200, and no faster with 8 (two processors, jax 0.10).
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")

MIN_PART = 16
"""Examples of a batch for which another device is taken."""

_DEVICES = "devices"

SAME = PartitionSpec()
"""Of a result: every device has the same."""


def make_mesh(batch_size: int) -> Mesh:
    """As many of the devices as share a batch evenly, with at least ``MIN_PART`` examples for each; at least one."""
    devices = jax.local_devices()
    counts = (n for n in range(1, len(devices) + 1) if batch_size % n == 0 and batch_size // n >= MIN_PART)
    return Mesh(np.array(devices[: max(counts, default=1)]), (_DEVICES,))


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """The arrays of a tree on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, SAME))


def on_every_device(function: Callable[..., Any], mesh: Mesh, results: Any = SAME) -> Callable[..., Any]:
    """The function as every device of the mesh calls it, all with the same arguments.

    Args:
        function: may call ``part_of_batch`` and ``sum_over_devices``.
        mesh: the devices.
        results: ``SAME`` or ``parts_along(axis)``, or a tree of these for a tree of results.
    """
    # jax does not check what is said to be the same: its check would have every gradient summed on its own.
    return jax.shard_map(function, mesh=mesh, in_specs=SAME, out_specs=results, check_vma=False)


def parts_along(axis: int) -> PartitionSpec:
    """Of a result: every device has a part, and along an axis they follow each other."""
    return PartitionSpec(*[None] * axis, _DEVICES)


def part_of_batch(mesh: Mesh, batch_size: int) -> tuple[jax.Array, int]:
    """Where in a batch this device's part begins, and its size."""
    size = batch_size // mesh.size
    return jax.lax.axis_index(_DEVICES) * size, size


def sum_over_devices(tree: Tree) -> Tree:
    """The sum of each array over the devices, in one exchange for all: every one of them costs a wait."""
    flat, unravel = ravel_pytree(tree)
    return unravel(jax.lax.psum(flat, _DEVICES))
