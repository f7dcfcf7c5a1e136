"""How many images per second are read and trained on: decoded whenever they are used, and memory-mapped.

    python scripts/streaming.py --images 20000 --side 32
    python scripts/streaming.py --images 2000 --side 256 --model small

JPEG files of random, smooth images are made in a temporary directory. Both ways take turns, epoch by epoch, in one
process, so that they share the machine's fluctuations. The output is a Markdown table of medians. Reading gathers the
batches of an epoch and does nothing else; in training, both need the same processors on a CPU.
"""

import argparse
import dataclasses
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from cnn_jax import cli
from cnn_jax.config import Config
from cnn_jax.data import Dataset, load
from cnn_jax.processors import num_processors


def main() -> None:
    """Make the images, measure, and print the table."""
    flags = parse_arguments()
    cli.use_every_processor()
    logging.getLogger("cnn_jax").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as directory:
        os.environ["XDG_CACHE_HOME"] = str(Path(directory) / "cache")
        photos = Path(directory) / "photos"
        make_images(photos, flags.images, flags.side)
        config = Config(dataset=f"folder:{photos}", model=flags.model, batch_size=flags.batch_size)
        began = time.perf_counter()
        streamed = load(dataclasses.replace(config, cache_limit=0))
        first_pass = flags.images / (time.perf_counter() - began)
        datasets = {"decoded whenever used": streamed, "memory-mapped": load(config)}
        reading = in_turns({name: Reader(config, dataset) for name, dataset in datasets.items()}, flags.rounds)
        training = in_turns({name: Learner(config, dataset) for name, dataset in datasets.items()}, flags.rounds)
    processors = num_processors()
    print(f"{flags.images:,} JPEG files of {flags.side}x{flags.side} pixels, {processors} processors, {flags.model}")
    print("| images per second | first reading | reading | per processor | training | waiting for images |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in datasets:
        read, (trained, waiting) = reading[name][0], training[name]
        first = f"{first_pass:,.0f}" if name == "decoded whenever used" else ""
        print(f"| {name} | {first} | {read:,.0f} | {read / processors:,.0f} | {trained:,.0f} | {waiting:.1%} |")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="number of images, of two classes")
    parser.add_argument("--side", type=int, default=256, help="their height and width in pixels")
    parser.add_argument("--model", default="small", help="the network that is trained")
    parser.add_argument("--batch-size", type=int, default=32, help="examples per step")
    parser.add_argument("--rounds", type=int, default=3, help="number of epochs that are measured each way")
    return parser.parse_args()


def make_images(root: Path, count: int, side: int) -> None:
    """Write JPEG files in the folders of two classes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = root / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)


class Reader:
    """Reads the batches of an epoch at each call."""

    def __init__(self, config: Config, dataset: Dataset) -> None:
        from cnn_jax.training.input import ArraySource
        from cnn_jax.training.sharding import make_mesh

        self._examples = len(dataset.train)
        options = {"batch_size": config.batch_size, "seed": 0, "shuffle": True, "mesh": make_mesh()}
        self._source = ArraySource(dataset.train, **options)
        self._epoch = 0

    def __call__(self) -> tuple[float, float]:
        """Images per second, and the share of waiting, which is all of it."""
        began, source = time.perf_counter(), self._source
        for start in range(0, source.steps_per_epoch, source.chunk_steps):
            chunk = source.chunk(self._epoch, start, min(start + source.chunk_steps, source.steps_per_epoch))
            chunk.batches.images.block_until_ready()
        self._epoch += 1
        return self._examples / (time.perf_counter() - began), 1.0


class Learner:
    """Trains for an epoch at each call."""

    def __init__(self, config: Config, dataset: Dataset) -> None:
        from cnn_jax.training.loop import Trainer

        trainer = Trainer(dataclasses.replace(config, epochs=1000), dataset)
        trainer.compile()
        self._epochs = trainer.epochs(trainer.start())

    def __call__(self) -> tuple[float, float]:
        """Images per second, and the share of the time in which the devices waited for images."""
        record, _ = next(self._epochs)
        return record.images_per_second, record.input_wait_seconds / record.seconds


def in_turns(contenders: dict, rounds: int) -> dict[str, tuple[float, float]]:
    """The medians of what the contenders return, after one round that is not counted."""
    results = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, contender in contenders.items():
            results[name].append(contender())
    return {name: tuple(map(statistics.median, zip(*values[1:], strict=True))) for name, values in results.items()}


if __name__ == "__main__":
    main()
