"""Measure how time and memory grow with the data, the classes, epochs, devices, processes and networks of a sweep.

    python scripts/scaling.py --topics images classes --json scaling.json

Every row is measured in processes of its own, on made images of noise; figures of several processes are those of the
first. All times are in seconds but for those of an image. "start" is the time from the call of ``fit`` to the first
step, without "compile", that of compilation; "epoch" that of training for an epoch, and "between" that from its end to
the beginning of the next, both the median of the last ten; "end" that from the end of the last epoch until the report
is written. "cpu_us" is the processor time for an image from the first step to the end of the last epoch, with
evaluation and checkpoints: other programs have less influence on it. "memory_mb" is the most that the process used,
without the images, and "report_kb" the size of the page. "sums" is the number of sums over the devices in a step of the
compiled program, and "sums_kb" their size.
"""

import argparse
import json
import logging
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hlo import collectives

TOPICS = {
    "images": (1_000, 10_000, 100_000, 1_000_000, 10_000_000),
    "side": (28, 56, 112, 224),
    "classes": (10, 50, 100, 1_000, 10_000),
    "epochs": (1, 10, 100, 1_000),
    "devices": (1, 2, 4, 8),
    "processes": (1, 2, 4),
    "networks": (1, 2, 4, 8, 64),
}
"""The sizes of each topic; the other sizes are the smallest, or those in ``measure``."""

TIMES = ("start", "compile", "epoch", "us_per_image", "cpu_us", "between", "end")
COLUMNS = (*TIMES, "memory_mb", "report_kb", "sums", "sums_kb")


def main() -> None:
    """Measure every row, and print it as soon as it is measured."""
    flags = parse_arguments()
    rows = []
    print(f"| topic | size | {' | '.join(COLUMNS)} |\n|{' --- |' * (2 + len(COLUMNS))}")
    for topic in flags.topics:
        for size in flags.sizes or TOPICS[topic]:
            row = start_and_wait(topic, size)
            cells = (f"{row[name]:,.2f}".removesuffix(".00") if name in row else "" for name in COLUMNS)
            print(f"| {topic} | {size:,} | {' | '.join(cells)} |", flush=True)
            rows.append({"topic": topic, "size": size, **row})
            if flags.json:
                flags.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; a process that ``start_and_wait`` started prints its row and exits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topics", nargs="+", choices=TOPICS, default=list(TOPICS), help="default: all")
    parser.add_argument("--sizes", nargs="+", type=int, metavar="N", help="sizes instead of those of the topics")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to this file")
    parser.add_argument("--row", nargs=4, metavar=("TOPIC", "SIZE", "PROCESS", "PORT"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.row:
        print(json.dumps(measure(flags.row[0], *map(int, flags.row[1:]))))
        sys.exit()
    return flags


def start_and_wait(topic: str, size: int) -> dict[str, float]:
    """Measure a row in new processes; return what the first one says."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    num_devices = {"devices": size, "processes": 1}.get(topic, 2)
    command = [sys.executable, *(f"-W{option}" for option in sys.warnoptions), __file__, "--row", topic, str(size)]
    started = [
        subprocess.Popen(
            [*command, str(process), str(port)],
            env=os.environ | {"JAX_NUM_CPU_DEVICES": str(num_devices)},
            stdout=subprocess.PIPE,
        )
        for process in range(size if topic == "processes" else 1)
    ]
    try:
        outputs = [process.communicate()[0] for process in started]
    finally:
        for process in started:
            process.kill()  # without effect on those that have ended
    if any(process.returncode for process in started):
        sys.exit(f"error: the measurement of {size} {topic} failed")
    return json.loads(outputs[0].splitlines()[-1])


def measure(topic: str, size: int, process: int, port: int) -> dict[str, float]:
    """Measure a row in this process."""
    import jax

    from cnn_jax import Config

    logging.disable(logging.WARNING)  # that the network learns nothing from noise
    if topic == "processes":
        jax.distributed.initialize(f"localhost:{port}", size, process)
    sizes = {"images": 10_000, "side": 28, "classes": 10, "epochs": 2, "networks": 1}
    sizes |= {"images": {"epochs": 1}, "side": {"images": 500}, "epochs": {"images": 500}}.get(topic, {})
    sizes |= {topic: size}
    networks = sizes["networks"]
    dataset = noise(sizes["images"], sizes["side"], sizes["classes"])
    config = Config(dataset=dataset.name, epochs=sizes["epochs"])
    with tempfile.TemporaryDirectory() as directory:
        workdir = Path(directory) / "run"
        measured = train(config, dataset, workdir) if networks == 1 else train_sweep(config, dataset, workdir, networks)
    if process > 0:
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        **measured,
        **sums(config, dataset, networks),
        "us_per_image": 1e6 * measured["epoch"] / (len(dataset.train) * networks),
        "memory_mb": (peak - sum(split.images.nbytes for split in dataset.splits.values())) / 1e6,
    }


def noise(num_images: int, side: int, num_classes: int) -> Any:
    """A dataset of noise; as many test images as classes, but at least 1,000 small or 100 large ones."""
    import numpy as np

    from cnn_jax import Dataset

    rng = np.random.default_rng(0)

    def split(count: int) -> tuple[Any, Any]:
        images = rng.integers(0, 256, (count, side, side, 1), np.uint8)
        return images, np.arange(count, dtype=np.int32) % num_classes

    names = [str(label) for label in range(num_classes)]
    test = max(num_classes, 1000 if side == 28 else 100)
    return Dataset.from_arrays(split(max(num_images, num_classes)), split(test), class_names=names, name="noise")


def train(config: Any, dataset: Any, workdir: Path) -> dict[str, float]:
    """Train a network, and measure the parts; of several processes, only the first one does."""
    import numpy as np

    from cnn_jax import fit

    began, chunks, ends, epochs, processor = time.perf_counter(), [], [], [], []

    def on_chunk(report: Any) -> None:
        chunks.append(time.perf_counter())
        processor.append(time.process_time())

    def on_epoch(record: Any) -> None:
        ends.append(time.perf_counter())
        epochs.append(record.seconds)
        processor.append(time.process_time())

    fit(config, workdir, dataset=dataset, on_epoch=on_epoch, on_chunk=on_chunk)
    if not ends:
        return {}
    compiling = json.loads((workdir / "summary.json").read_text())["compile_seconds"]
    between = np.diff(ends) - epochs[1:]
    return {
        "start": chunks[0] - began - compiling,
        "compile": compiling,
        "epoch": float(np.median(epochs[-10:])),
        "cpu_us": 1e6 * (processor[-1] - processor[0]) / (len(epochs) * len(dataset.train)),
        "end": time.perf_counter() - ends[-1],
        "report_kb": (workdir / "report.html").stat().st_size / 1e3,
    } | ({"between": float(np.median(between[-10:]))} if len(epochs) > 1 else {})


def train_sweep(config: Any, dataset: Any, workdir: Path, num_networks: int) -> dict[str, float]:
    """Train several networks as a sweep, and measure an epoch of all of them."""
    from cnn_jax.runs import sweep

    records: list[Any] = []
    directory = sweep.create_sweep(config, {"seed": range(num_networks)}, workdir, dataset)
    sweep.train_sweep(directory, dataset=dataset, on_epoch=records.append)
    began = time.perf_counter()
    directory.write_results()
    return {
        "epoch": sum(record.seconds for record in records) / config.epochs,
        "end": time.perf_counter() - began,
        "report_kb": (workdir / "report.html").stat().st_size / 1e3,
    }


def sums(config: Any, dataset: Any, num_networks: int) -> dict[str, float]:
    """The sums over the devices in a step of the compiled program: their number, and the bytes of their results."""
    from cnn_jax.training.ahead import lower_members, lower_training
    from cnn_jax.training.input import num_batches
    from cnn_jax.training.loop import create_task_for
    from cnn_jax.training.sharding import make_mesh

    task, mesh = create_task_for(config, dataset), make_mesh()
    steps = num_batches(len(dataset.train), config.batch_size)
    shared = {"batch_size": config.batch_size}
    if num_networks == 1:
        lowered = lower_training(task, dataset.image_shape, mesh, steps_per_epoch=steps, **shared)
    else:
        shared |= {"num_members": mesh.size, "num_examples": len(dataset.train), "chunk_steps": steps}
        lowered = lower_members(task, dataset.image_shape, mesh, **shared)
    found = [size for operation, size in collectives(lowered.compile().as_text()) if operation == "all-reduce"]
    return {"sums": len(found), "sums_kb": sum(found) / 1e3}


if __name__ == "__main__":
    main()
