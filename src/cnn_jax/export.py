"""``python -m cnn_jax.export RUN --format stablehlo``: write a trained network in a format for other programs."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cnn_jax import cli
from cnn_jax.errors import printable
from cnn_jax.formats import FILE_NAMES
from cnn_jax.settings import Checkpoint, FilePath, Settings, choice, setting

ExportFormat = choice(*FILE_NAMES)


@dataclass(frozen=True, kw_only=True)
class ExportFlags(Settings):
    """Export a trained network, after verifying the exported file on test images.

    Formats: stablehlo is a program that jax runs on any device, onnx a model, safetensors and pytorch are weights.
    """

    run: FilePath = setting("the run directory", metavar="RUN", positional=True)
    format: ExportFormat = setting("the format to write (required)")
    output: FilePath | None = setting(
        "the file to write (default: model.stablehlo, model.onnx, model.safetensors or pytorch.safetensors in the run "
        "directory)",
        default=None,
    )
    checkpoint: Checkpoint = setting("the newest checkpoint or the one with the best accuracy", default="newest")
    data_dir: FilePath | None = setting("the directory of the dataset, if it has moved", default=None, metavar="DIR")


def main(args: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    flags = cli.parse(ExportFlags, args, module="cnn_jax.export")
    cli.initialize_jax()
    # Slow imports come after the flags are parsed.
    from cnn_jax.runs.run import load_run

    run = load_run(flags.run, flags.checkpoint)
    if flags.data_dir is not None:
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, data_dir=flags.data_dir))
    path = run.workdir / FILE_NAMES[flags.format] if flags.output is None else Path(flags.output)
    print(f"{printable(path)}: {run.export(path, flags.format)}")
    return 0


if __name__ == "__main__":
    cli.start(main)
