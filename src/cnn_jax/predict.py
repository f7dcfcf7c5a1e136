"""``python -m cnn_jax.predict RUN PATH...``: classify images with a trained network."""

import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from cnn_jax import cli
from cnn_jax.errors import UsageError, printable
from cnn_jax.settings import Checkpoint, Count, FilePath, Settings, Switch, choice, setting

if TYPE_CHECKING:
    import numpy as np

    from cnn_jax.runs.run import Run

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".heic", ".heif")
"""The suffixes of image files in folders; files named on the command line may have any."""

logger = logging.getLogger("cnn_jax")

Invert = choice("auto", "yes", "no")


@dataclass(frozen=True, kw_only=True)
class PredictFlags(Settings):
    """Classify images, printing one line per image with the most probable classes and their probabilities.

    The images are converted like the training images: to the same size, with the run's --fit, and to the same color
    channels.
    """

    run: FilePath = setting("the run directory", metavar="RUN", positional=True)
    paths: Annotated[tuple[FilePath, ...], Meta(description="paths")] = setting(
        "image files (PNG, JPEG, WebP, BMP, GIF, HEIC), folders of them, or - to read a list of files from standard "
        "input",
        metavar="PATH...",
        positional=True,
    )
    top_k: Count = setting("the number of classes per image", default=3)
    json: Switch = setting("print one JSON object per line", default=False)
    invert: Invert = setting(
        "invert light and dark; auto does so for images on a light background if the training images had a dark one",
        default="auto",
    )
    checkpoint: Checkpoint = setting("the newest checkpoint or the one with the best accuracy", default="newest")
    skip_unreadable: Switch = setting("skip files that cannot be read as images, and print how many", default=False)


def main(args: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    flags = cli.parse(PredictFlags, args, module="cnn_jax.predict")
    cli.initialize_jax()
    # Slow imports come after the flags are parsed.
    from cnn_jax.runs.run import load_run

    run = load_run(flags.run, flags.checkpoint)
    for path, probabilities in _classify(run, _files(flags.paths), flags):
        best = [(run.class_names[i], float(probabilities[i])) for i in (-probabilities).argsort()[: flags.top_k]]
        if flags.json:
            print(json.dumps({"path": str(path), "classes": [{"name": n, "probability": p} for n, p in best]}))
        else:
            print(printable(f"{path}: {', '.join(f'{name} {probability:.4f}' for name, probability in best)}"))
    return 0


def _files(paths: Iterable[str]) -> Iterator[Path]:
    """Yield the files named on the command line, and those in folders in sorted order."""
    for path in paths:
        if path == "-":
            names = (line.rstrip("\n") for line in sys.stdin if line.strip())  # read as they come
            first = next(names, None)
            if first is None:
                raise UsageError("no file names on standard input: write one on each line")
            yield from map(Path, chain([first], names))
        elif Path(path).is_dir():
            files = sorted(
                file for file in Path(path).rglob("[!.]*") if file.suffix.lower() in SUFFIXES and file.is_file()
            )
            if not files:
                raise UsageError(f"no images in {path}: expected files named *{', *'.join(SUFFIXES)}")
            yield from files
        else:
            yield Path(path)


def _classify(run: "Run", files: Iterator[Path], flags: PredictFlags) -> Iterator[tuple[Path, "np.ndarray"]]:
    """Yield each file with its class probabilities."""
    import numpy as np

    from cnn_jax.data.image import quiet
    from cnn_jax.training.evaluation import MAX_BATCH, batch_size_for

    # The largest batch, because the number of files is not known in advance.
    batch_size = batch_size_for(run.image_shape, MAX_BATCH)
    errors: list[UsageError] = []

    def read(path: Path) -> "np.ndarray | UsageError":
        try:
            return run.prepare(path, flags.invert)
        except UsageError as error:
            return error

    with quiet(), ThreadPoolExecutor() as threads:  # Pillow releases the GIL while decoding
        while batch := list(islice(files, batch_size)):
            images = list(zip(batch, threads.map(read, batch), strict=True))
            readable = [(path, image) for path, image in images if not isinstance(image, UsageError)]
            errors += [image for _, image in images if isinstance(image, UsageError)]
            if readable:
                paths, arrays = zip(*readable, strict=True)
                yield from zip(paths, run.predict(np.stack(arrays)), strict=True)
            if errors and not flags.skip_unreadable:
                raise errors[0]
    if errors:
        logger.warning("skipped %d file(s) that cannot be read as images; the first: %s", len(errors), errors[0])


if __name__ == "__main__":
    cli.start(main)
