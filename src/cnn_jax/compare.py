"""``python -m cnn_jax.compare RUN RUN...``: compare the settings and results of runs, with McNemar's test."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from cnn_jax import cli
from cnn_jax.errors import UsageError
from cnn_jax.settings import Checkpoint, FilePath, Name, Settings, Switch, setting


@dataclass(frozen=True, kw_only=True)
class CompareFlags(Settings):
    """Compare runs: what differs in their settings and results, and which test images only one of two gets right.

    Each network is evaluated on the test images of its run. McNemar's test is computed for every pair of runs that
    have test images in common.
    """

    runs: Annotated[tuple[FilePath, ...], Meta(description="paths")] = setting(
        "two or more run directories", metavar="RUN...", positional=True
    )
    checkpoint: Checkpoint = setting("the newest checkpoint or the one with the best accuracy", default="newest")
    dataset: Name | None = setting(
        "the dataset of the runs, if it is a folder that has moved (default: the runs' own)", default=None
    )
    data_dir: FilePath | None = setting("the directory of the datasets, if it has moved", default=None, metavar="DIR")
    json: Switch = setting("print the comparison as one JSON object", default=False)
    report: FilePath | None = setting(
        "also write the comparison as an HTML page, with learning curves", default=None, metavar="FILE"
    )


def main(args: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    flags = cli.parse(CompareFlags, args, module="cnn_jax.compare")
    if len(flags.runs) < 2:
        raise UsageError(f"only one run is named, {flags.runs[0]}: name the run directories to compare it with")
    cli.initialize_jax()
    # Slow imports come after the flags are parsed.
    from cnn_jax.report.comparison import as_text, save_page, to_json
    from cnn_jax.runs.results import load_results
    from cnn_jax.training.comparison import compare

    with cli.writing(flags.report) as report:  # first, so that a file that cannot be written is reported at once
        results = load_results(flags.runs, flags.checkpoint, dataset=flags.dataset, data_dir=flags.data_dir)
        comparison = compare(results)
        if report is not None:
            with cli.reporting(flags.report):
                save_page(report, comparison)
    if flags.json:
        print(json.dumps(to_json(comparison), allow_nan=False))
    else:
        print(as_text(comparison, shutil.get_terminal_size().columns if sys.stdout.isatty() else None), end="")
    return 0


if __name__ == "__main__":
    cli.start(main)
