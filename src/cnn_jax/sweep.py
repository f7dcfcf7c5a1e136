"""``python -m cnn_jax.sweep``: train with several values of settings, with several seeds each, and compare them."""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn_jax import cli
from cnn_jax.config import DETERMINISTIC_OPS, Config
from cnn_jax.errors import UsageError
from cnn_jax.settings import Count, FilePath, Switch, setting


@dataclass(frozen=True, kw_only=True)
class SweepFlags(Config):
    """Train a network for every combination of settings, printing one line for each, and compare their results.

    Flags of settings take several values, such as --learning-rate 0.001 0.01. Every network has a run directory of its
    own in the directory of the sweep, which also has the results as a table (results.csv, results.json), a plot and a
    page (report.html). Several processes can work on a sweep: start the others with --resume.

    Exit status: 0 on success, also if the loss of some networks is not finite; 1 on failure, 2 for invalid input; 130,
    143 or 129 if Ctrl-C, SIGTERM or SIGHUP stopped it, after saving checkpoints.
    """

    config: FilePath | None = setting(
        "a YAML file or preset (tutorial, cpu, fast, best or finetune) with defaults for the other flags", default=None
    )
    seeds: Count | None = setting("train every combination with N seeds, counted from --seed", default=None)
    workdir: FilePath | None = setting(
        "the directory of the sweep (default: runs/sweep-<dataset>-<model>-<time>)", default=None, metavar="DIR"
    )
    resume: Switch = setting("continue the sweep in --workdir, or take part in it, with its settings", default=False)
    json: Switch = setting("print the results as one JSON object", default=False)


def main(args: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    flags, varied = parse(args)
    config = Config(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(Config)})
    if config.deterministic:
        # XLA reads its flags once, when jax initializes its devices.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC_OPS}"
    cli.initialize_jax()
    # Slow imports come after the flags are parsed.
    from cnn_jax.report import sweep as report
    from cnn_jax.report.console import SweepPrinter
    from cnn_jax.runs.sweep import SweepDirectory, SweepStoppedError, create_sweep, train_sweep

    directory = SweepDirectory(Path(flags.workdir)) if flags.resume else create_sweep(config, varied, flags.workdir)
    results, settings = directory.results(), directory.grid().settings
    with SweepPrinter(results, as_lines=not flags.json) as printer, cli.StopSignals() as signals:
        try:
            train_sweep(directory, on_epoch=printer.epoch, on_result=printer.result, stop_requested=signals.received)
        except SweepStoppedError as stopped:
            directory.write_results()
            cli.say(stopped)
            return signals.exit_status
    directory.write_results()
    results = directory.results()
    print(json.dumps(report.as_json(results, settings)) if flags.json else report.as_text(results, settings))
    cli.say(f"sweep directory: {directory.path}; see report.html")
    return 0 if any(result.summary for result in results) else 1


def parse(args: Sequence[str]) -> tuple[SweepFlags, dict[str, tuple[Any, ...]]]:
    """Parse the command line; return the settings, and the values of those that vary."""
    flags, varied = cli.parse_several(SweepFlags, args, module="cnn_jax.sweep")
    if flags.resume:
        if flags.workdir is None:
            raise UsageError("--resume needs --workdir, the directory of the sweep to continue")
        if given := [field.name for field in dataclasses.fields(Config) if getattr(flags, field.name) != field.default]:
            raise UsageError(f"--resume continues with the settings of the sweep: leave out {cli.flag(given[0])}")
        return flags, {}
    if flags.config is not None:
        defaults = dataclasses.asdict(Config.from_yaml(flags.config))
        flags, varied = cli.parse_several(SweepFlags, args, module="cnn_jax.sweep", defaults=defaults)
    if flags.seeds is not None:
        if "seed" in varied:
            raise UsageError("--seeds counts from a single --seed: give only one of them")
        varied["seed"] = tuple(range(flags.seed, flags.seed + flags.seeds))
    return flags, varied


if __name__ == "__main__":
    cli.start(main)
