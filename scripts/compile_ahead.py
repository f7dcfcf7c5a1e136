"""Compile the programs of the presets for TPUs and GPUs that this machine does not have, and print what they cost.

    pip install -e '.[tpu]'
    python scripts/compile_ahead.py --targets v5e-1 v5e-8 --presets cpu fast --json ahead.json

For H100 targets, install '.[cuda]'. Every figure is the compiler's or calculated from the compiler's, none is measured:
"estimate" is XLA's own for one step of the program, with perfect overlap and no waiting for the host, and "peak" the
part of the chip's bfloat16 operations per second that it amounts to. XLA cannot estimate the time of every program. For
GPUs, it gives no time, operations and traffic. There, the table has the number of kernels, and of launches, each of
which takes the host some microseconds: XLA launches most kernels in groups, as CUDA graphs ("command buffers").

The program "train" takes a step, "evaluate" computes the logits of a batch of test images, and "export" is the exported
StableHLO program, for one image on one device. With "--members 1 16 64", so many networks of a sweep on each device are
compiled too.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

# Before jax is imported: the CPU traces, and libtpu does not look for a TPU.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}

import jax
from hlo import collectives, num_kernels, num_launches
from jax.experimental import topologies
from jax.sharding import Mesh

from cnn_jax import cli
from cnn_jax.config import Config
from cnn_jax.errors import CnnJaxError
from cnn_jax.formats import stablehlo
from cnn_jax.formats.network import Network
from cnn_jax.training.ahead import lower_evaluation, lower_members, lower_training
from cnn_jax.training.input import chunk_length, num_batches
from cnn_jax.training.loop import create_task
from cnn_jax.training.sharding import REPLICATED, make_mesh
from cnn_jax.training.task import SCALE, Normalize, Task

EXPORT_BATCH = 1
"""Number of images to classify with the exported program."""

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 } threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3350000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "12.9.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""XLA's description of the GPU (``GpuTargetConfigProto``)."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
        topology: the name of a topology that contains them.
        num_devices: how many of them are used.
        flops: the most bfloat16 operations per second of a device, dense, from its data sheet.
        memory: bytes of its memory.
    """

    topology: str
    num_devices: int
    flops: float
    memory: float

    @property
    def is_tpu(self) -> bool:
        """Whether the devices are TPUs, else GPUs."""
        return ":" in self.topology

    def mesh(self) -> Mesh:
        """The devices.

        Raises:
            CnnJaxError: the compiler for them is not installed.
        """
        package, extra = ("libtpu", "tpu") if self.is_tpu else ("jax_cuda12_plugin", "cuda")
        if importlib.util.find_spec(package) is None:
            raise CnnJaxError(f"{package} is not installed: pip install -e '.[{extra}]'")
        if self.is_tpu:
            topology = topologies.get_topology_desc(self.topology, "tpu")
        else:
            shape = {"topology": f"1x1x{self.num_devices}", "target_config": H100}
            topology = topologies.get_topology_desc(self.topology, "cuda", **shape)
        return make_mesh(topology.devices[: self.num_devices])


V5E, V6E, H100_SXM = (197e12, 16e9), (918e12, 32e9), (989e12, 80e9)
TARGETS = {
    "v5e-1": Target("v5e:2x2", 1, *V5E),
    "v5e-8": Target("v5e:2x4", 8, *V5E),
    "v5e-256": Target("v5e:16x16", 256, *V5E),
    "v6e-1": Target("v6e:2x2", 1, *V6E),
    "h100-1": Target("h100", 1, *H100_SXM),
    "h100-8": Target("h100", 8, *H100_SXM),
}

PRESETS = ("tutorial", "cpu", "fast", "best", "finetune", "finetune-resnet34", "finetune-resnet50")
"""All presets, and those for other models, so that every model is compiled."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A preset for the data that it is for: Fashion-MNIST, or photographs."""

    name: str
    config: Config
    image_shape: tuple[int, int, int]
    num_train: int
    num_test: int
    num_classes: int

    @classmethod
    def of(cls, name: str) -> "Recipe":
        """Find a recipe by its name in ``PRESETS``."""
        preset, _, model = name.partition("-")
        config = Config.from_yaml(preset)
        if preset == "finetune":
            return cls(name, dataclasses.replace(config, model=model or config.model), (224, 224, 3), 1000, 200, 5)
        return cls(name, config, (28, 28, 1), 60_000, 10_000, 10)

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches in an epoch."""
        return num_batches(self.num_train, self.config.batch_size)

    @property
    def task(self) -> Task:
        """What is trained; the numbers that depend on the data are made up."""
        channels = self.image_shape[2]
        preprocess = Normalize((0.3,) * channels, (0.4,) * channels) if self.config.normalize else SCALE
        weights = (1.0,) * self.num_classes if self.config.class_weights == "balanced" else None
        options = {"steps_per_epoch": self.steps_per_epoch, "class_weights": weights}
        return create_task(self.config, self.num_classes, preprocess, **options)

    def programs(
        self, mesh: Mesh, members: Sequence[int] = ()
    ) -> Iterator[tuple[str, Callable[[], jax.stages.Lowered]]]:
        """The names of the programs, and functions that lower them.

        Args:
            mesh: the devices.
            members: numbers of networks of a sweep on each device.
        """
        common = {"mesh": mesh, "batch_size": self.config.batch_size}
        yield (
            "train",
            lambda: lower_training(self.task, self.image_shape, steps_per_epoch=self.steps_per_epoch, **common),
        )
        yield "evaluate", lambda: lower_evaluation(self.task, self.image_shape, num_images=self.num_test, **common)
        if mesh.size == 1:
            yield "export", lambda: self._lower_export(mesh)
        for number in members:
            yield f"train {number} members", partial(self._lower_members, mesh, number)

    def _lower_members(self, mesh: Mesh, number: int) -> jax.stages.Lowered:
        return lower_members(
            self.task,
            self.image_shape,
            mesh,
            num_members=number * mesh.size,
            num_examples=self.num_train,
            batch_size=self.config.batch_size,
            chunk_steps=chunk_length(self.steps_per_epoch, self.config.batch_size * math.prod(self.image_shape)),
        )

    def _lower_export(self, mesh: Mesh) -> jax.stages.Lowered:
        with jax.default_device(jax.devices("cpu")[0]):
            variables = jax.device_get(self.task.init(jax.random.key(0), self.image_shape).variables)
        classes = tuple(map(str, range(self.num_classes)))
        network = Network(self.config.model, self.task, self.image_shape, classes, variables.pop("params"), variables)
        exported = jax.export.deserialize(bytearray(stablehlo.to_bytes(network)))
        sharding = jax.sharding.NamedSharding(mesh, REPLICATED)
        images = jax.ShapeDtypeStruct((EXPORT_BATCH, *self.image_shape), np.uint8, sharding=sharding)
        return jax.jit(exported.call).lower(images)


def main() -> None:
    """Compile everything, and print a row for each program as soon as it is compiled."""
    flags = parse_arguments()
    rows = []
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for name in flags.targets:
        for row in compile_for(name, flags.presets, flags.members):
            print(f"| {' | '.join(cell(row) for cell in COLUMNS.values())} |", flush=True)
            rows.append(row)
            if flags.json:
                flags.json.write_text(json.dumps({"jax": jax.__version__, "programs": rows}, indent=1) + "\n")
    sys.exit(1 if any("error" in row for row in rows) else 0)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS), help="default: all")
    parser.add_argument("--members", nargs="+", type=int, default=(), metavar="N", help="networks of a sweep")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to this file")
    return parser.parse_args()


def compile_for(name: str, presets: list[str], members: Sequence[int] = ()) -> Iterator[dict[str, Any]]:
    """Compile the programs of presets for a target; what fails has the reason under ``error``."""
    target = TARGETS[name]
    try:
        mesh = target.mesh()
    except (CnnJaxError, RuntimeError) as error:
        yield {"target": name, "preset": "all", "program": "all", "error": _first_line(error)}
        return
    for recipe in map(Recipe.of, presets):
        for program, lower in recipe.programs(mesh, members):
            row = {"target": name, "preset": recipe.name, "program": program}
            steps = recipe.steps_per_epoch if program.startswith("train") else None
            try:
                yield row | measure(lower(), target, steps)
            except RuntimeError as error:  # XLA's, if the program does not fit the device
                yield row | {"error": _first_line(error)}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def measure(lowered: jax.stages.Lowered, target: Target, steps_per_epoch: int | None) -> dict[str, Any]:
    """Compile a program and collect the compiler's figures, all of one device.

    Args:
        lowered: the program.
        target: the devices it is for.
        steps_per_epoch: the number of steps in an epoch, of which the loop in a training program takes one at a time.
    """
    with tempfile.TemporaryDirectory() as dump:
        options = {} if target.is_tpu else {"compiler_options": {"xla_dump_to": dump}}
        began = time.perf_counter()
        compiled = lowered.compile(**options)
        seconds = time.perf_counter() - began
        thunks = "".join(path.read_text() for path in Path(dump).glob("*thunk_sequence_after_thunk_passes.txt"))
    text = compiled.as_text()
    # XLA counts the operations in a loop once.
    cost = compiled.cost_analysis() or {}
    flops, estimate = cost.get("flops"), cost.get("optimal_seconds", -1)
    if estimate < 0:  # so XLA marks operations whose time it cannot estimate
        estimate = None
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    used -= memory.alias_size_in_bytes
    return {
        "compile_seconds": seconds,
        "flops": flops,
        "bytes_accessed": cost.get("bytes accessed"),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "memory_fraction": used / target.memory,
        "collectives": [{"operation": operation, "bytes": size} for operation, size in collectives(text)],
        "convolutions": len(re.findall(r" convolution\(.*window=|__cudnn\$conv", text)),
        "host_transfers": len(re.findall(r" (?:infeed|outfeed|send|recv)\(|host_compute", text)),
        "kernels": None if target.is_tpu else num_kernels(text),
        "launches": num_launches(thunks),
        "estimated_seconds": estimate,
        "estimated_epoch_seconds": None if None in (estimate, steps_per_epoch) else estimate * steps_per_epoch,
        "peak_fraction": None if not estimate else flops / estimate / target.flops,
    }


def _amount(key: str, scale: float, digits: int = 1) -> Callable[[dict[str, Any]], str]:
    return lambda row: "" if row.get(key) is None else f"{row[key] * scale:,.{digits}f}"


def _collectives(row: dict[str, Any]) -> str:
    found = row.get("collectives", ())
    return f"{len(found)} ({sum(each['bytes'] for each in found) / 1e3:,.0f} kB)" if found else ""


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "target": lambda row: row["target"],
    "preset": lambda row: row["preset"],
    "program": lambda row: f"{row['program']}: {row['error']}" if "error" in row else row["program"],
    "compile (s)": _amount("compile_seconds", 1),
    "MFLOP": _amount("flops", 1e-6),
    "MB read and written": _amount("bytes_accessed", 1e-6),
    "arguments (MB)": _amount("argument_bytes", 1e-6),
    "temporaries (MB)": _amount("temporary_bytes", 1e-6),
    "collectives": _collectives,
    "kernels": lambda row: str(row.get("kernels") or ""),
    "launches": lambda row: "" if row.get("launches") is None else str(row["launches"]),
    "estimate (µs)": _amount("estimated_seconds", 1e6, 0),
    "epoch (s)": _amount("estimated_epoch_seconds", 1, 2),
    "peak (%)": _amount("peak_fraction", 100),
}
"""The columns of the table, all figures for one device and one step."""


if __name__ == "__main__":
    cli.start(lambda args: main())
