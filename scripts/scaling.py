"""Measure how time and memory grow with the number of images, their side, the classes, epochs, devices and networks.

    python scripts/scaling.py --topics images classes --json scaling.json

Every row is measured in a process of its own, on made images of noise. "start" is the time from the call of ``fit`` to
the first step, without compilation; "epoch" that of the last epoch; "end" that from the end of the last epoch until the
report is written. "memory" is the most that the process used, without the images.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOPICS = {
    "images": (1_000, 10_000, 100_000, 1_000_000),
    "side": (28, 56, 112, 224),
    "classes": (10, 100, 1_000, 10_000),
    "epochs": (1, 10, 100, 1_000),
    "devices": (1, 2, 4, 8),
    "networks": (1, 2, 4, 8),
}
"""The sizes of each topic; the other sizes are the smallest, or those in ``child``."""


def main() -> None:
    """Measure every row, and print it as soon as it is measured."""
    flags = parse_arguments()
    rows = []
    columns = ("start", "compile", "epoch", "us_per_image", "end", "memory_mb", "report_kb")
    print(f"| topic | size | {' | '.join(columns)} |\n|{' --- |' * (2 + len(columns))}")
    for topic in flags.topics:
        for size in flags.sizes or TOPICS[topic]:
            environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(size) if topic == "devices" else "2"}
            command = [sys.executable, __file__, "--row", topic, str(size)]
            output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
            row = json.loads(output.splitlines()[-1])
            print(f"| {topic} | {size:,} | {' | '.join(f'{row[name]:,.2f}' for name in columns)} |", flush=True)
            rows.append({"topic": topic, "size": size, **row})
    if flags.json:
        flags.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topics", nargs="+", choices=TOPICS, default=list(TOPICS), help="default: all")
    parser.add_argument("--sizes", nargs="+", type=int, metavar="N", help="sizes instead of those of the topics")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to this file")
    parser.add_argument("--row", nargs=2, metavar=("TOPIC", "SIZE"), help="measure one row in this process")
    flags = parser.parse_args()
    if flags.row:
        print(json.dumps(child(flags.row[0], int(flags.row[1]))))
        sys.exit()
    return flags


def child(topic: str, size: int) -> dict[str, float]:
    """Measure a row in this process; times in seconds."""
    from cnn_jax import Config

    sizes = {"images": 10_000, "side": 28, "classes": 10, "epochs": 2, "networks": 1} | {topic: size}
    if topic == "side":
        sizes["images"] = 500
    if topic == "epochs":
        sizes["images"] = 500
    dataset = noise(sizes["images"], sizes["side"], sizes["classes"])
    config = Config(dataset=dataset.name, epochs=sizes["epochs"], shuffle=False)
    image_bytes = sum(split.images.nbytes for split in dataset.splits.values())
    with tempfile.TemporaryDirectory() as directory:
        measured = train(config, dataset, Path(directory) / "run", sizes["networks"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return measured | {
        "us_per_image": 1e6 * measured["epoch"] / (sizes["images"] * sizes["networks"]),
        "memory_mb": (peak - image_bytes) / 1e6,
    }


def noise(num_images: int, side: int, num_classes: int) -> Any:
    """A dataset of noise; as many test images as classes, but at least 1,000."""
    import numpy as np

    from cnn_jax import Dataset

    rng = np.random.default_rng(0)

    def split(count: int) -> tuple[Any, Any]:
        images = rng.integers(0, 256, (count, side, side, 1), np.uint8)
        return images, np.arange(count) % num_classes

    names = [str(label) for label in range(num_classes)]
    test = max(num_classes, 1000 if side == 28 else 100)
    return Dataset.from_arrays(split(max(num_images, num_classes)), split(test), class_names=names, name="noise")


def train(config: Any, dataset: Any, workdir: Path, num_networks: int) -> dict[str, float]:
    """Train, and measure the parts; several networks as a sweep."""
    from cnn_jax import fit
    from cnn_jax.runs.sweep import create_sweep, train_sweep

    times = {"begin": time.perf_counter()}
    epochs: list[float] = []

    def on_epoch(record: Any) -> None:
        times["last"] = time.perf_counter()
        epochs.append(record.seconds)

    if num_networks > 1:
        directory = create_sweep(config, {"seed": range(num_networks)}, workdir, dataset)
        train_sweep(directory, dataset=dataset, on_epoch=on_epoch)
        directory.write_results()
        summary = {"compile_seconds": 0.0}
        epoch, page = sum(epochs) / config.epochs, directory.path / "report.html"
    else:
        on_chunk = lambda report: times.setdefault("first", time.perf_counter())  # noqa: E731
        fit(config, workdir, dataset=dataset, on_epoch=on_epoch, on_chunk=on_chunk)
        summary = json.loads((workdir / "summary.json").read_text())
        epoch, page = epochs[-1], workdir / "report.html"
    return {
        "start": times.get("first", times["begin"]) - times["begin"] - summary["compile_seconds"],
        "compile": summary["compile_seconds"],
        "epoch": epoch,
        "end": time.perf_counter() - times["last"],
        "report_kb": page.stat().st_size / 1e3,
    }


if __name__ == "__main__":
    main()
