"""``python -m cnn_jax.export RUN --format stablehlo``: a trained network in a form that other programs read."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from cnn_jax import cli
from cnn_jax.errors import printable
from cnn_jax.formats import FILE_NAMES, Format


@dataclass(frozen=True, kw_only=True)
class ExportFlags:
    """Write a run's network in another form, once what was written is verified on test images of its data set."""

    run: Annotated[str, Positional, arg(metavar="RUN")]
    """The run directory that training made."""

    format: Format
    """stablehlo: a program for jax on any device; onnx: a model; safetensors, pytorch: the weights."""

    output: Annotated[str | None, arg(metavar="PATH")] = None
    """The file to write; else model.stablehlo, model.onnx, model.safetensors or pytorch.safetensors in the run."""

    checkpoint: Literal["newest", "best"] = "newest"
    """The newest checkpoint, or the one of the best test accuracy."""

    data_dir: Annotated[str | None, arg(metavar="DIR")] = None
    """Where the data set lies now, if elsewhere than in training."""


def main(args: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    flags = cli.parse(ExportFlags, args, module="cnn_jax.export")
    # What follows is slow to import, and of no use to somebody who mistyped a flag.
    from cnn_jax.runs.run import load_run

    run = load_run(flags.run, flags.checkpoint)
    if flags.data_dir is not None:
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, data_dir=flags.data_dir))
    path = run.workdir / FILE_NAMES[flags.format] if flags.output is None else Path(flags.output)
    print(f"{printable(path)}: {run.export(path, flags.format)}")
    return 0


if __name__ == "__main__":
    cli.start(main)
