"""``python -m cnn_jax.predict RUN PATH...``: what a trained network takes images for."""

import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from cnn_jax import cli
from cnn_jax.errors import UsageError, printable
from cnn_jax.training.batches import MAX_IMAGES, batch_size_for

if TYPE_CHECKING:
    import numpy as np

    from cnn_jax.runs.run import Run

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Of the files in a folder that are taken for images; a file that is named may have any."""

logger = logging.getLogger("cnn_jax")


@dataclass(frozen=True, kw_only=True)
class PredictFlags:
    """Classify images: a line for each, with the most probable classes and their probabilities.

    The images are prepared as those the network was trained on: brought to their size and colours, and to values from
    0 to 1.
    """

    run: Annotated[str, Positional, arg(metavar="RUN")]
    """The run directory that training made."""

    paths: Annotated[tuple[str, ...], Positional, arg(metavar="PATH")]
    """Image files (PNG, JPEG, WebP, BMP), folders of them, or - for a list of files on standard input."""

    top_k: int = 3
    """Classes to name for an image, the most probable first."""

    json: Annotated[bool, FlagCreatePairsOff] = False
    """Print a JSON object a line."""

    invert: Literal["auto", "yes", "no"] = "auto"
    """Exchange light and dark; auto does it for an image on a light ground where the network learned on dark ones."""

    checkpoint: Literal["newest", "best"] = "newest"
    """The newest checkpoint, or the one of the best test accuracy."""

    skip_unreadable: Annotated[bool, FlagCreatePairsOff] = False
    """Pass over files that cannot be read as images, and say how many they are."""


def main(args: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    flags = cli.parse(PredictFlags, args, module="cnn_jax.predict")
    if not flags.paths:
        raise UsageError("no images are given: name files, folders, or - for a list on standard input")
    if flags.top_k < 1:
        raise UsageError(f"--top-k must be above zero, not {flags.top_k}")
    # What follows is slow to import, and of no use to somebody who mistyped a flag.
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
    """The files that the command line means, in its order; those of a folder sorted."""
    for path in paths:
        if path == "-":
            yield from (Path(line.rstrip("\n")) for line in sys.stdin if line.strip())
        elif Path(path).is_dir():
            files = sorted(
                file for file in Path(path).rglob("[!.]*") if file.suffix.lower() in SUFFIXES and file.is_file()
            )
            if not files:
                raise UsageError(f"there are no images in {path}: it has no files named {', '.join(SUFFIXES)}")
            yield from files
        else:
            yield Path(path)


def _classify(run: "Run", files: Iterator[Path], flags: PredictFlags) -> Iterator[tuple[Path, "np.ndarray"]]:
    """Each file with the probabilities of the classes."""
    import numpy as np

    from cnn_jax.data.image import quiet

    # The largest batch: the number of files is known only at their end.
    batch_size = batch_size_for(run.image_shape, MAX_IMAGES)
    errors: list[UsageError] = []

    def read(path: Path) -> "np.ndarray | UsageError":
        try:
            return run.prepare(path, flags.invert)
        except UsageError as error:
            return error

    with quiet(), ThreadPoolExecutor() as threads:  # Pillow leaves Python to the others while it decodes
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
        logger.warning("left out %d that cannot be read as images, the first: %s", len(errors), errors[0])


if __name__ == "__main__":
    cli.start(main)
