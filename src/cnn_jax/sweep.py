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
from cnn_jax.settings import Count, FilePath, Range, Switch, setting


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
    search: Count | None = setting(
        "choose N combinations from values and ranges, such as --learning-rate 1e-4..1e-1, with Optuna, and end those "
        "early whose validation accuracy is below the median",
        default=None,
    )
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
    from cnn_jax.runs import search
    from cnn_jax.runs.space import Space
    from cnn_jax.runs.sweep import SweepStoppedError, create_sweep, train_sweep
    from cnn_jax.runs.sweep_directory import SweepDirectory

    if flags.resume:
        directory = SweepDirectory(Path(flags.workdir))
    elif flags.search is not None:
        directory = search.create_search(config, varied, flags.search, flags.workdir)
    else:
        directory = create_sweep(config, varied, flags.workdir)
    plan, results = directory.plan(), directory.results()
    is_search = isinstance(plan, Space)
    train = search.train_search if is_search else train_sweep
    with (
        SweepPrinter(results, plan.num_members, plan.config.epochs, as_lines=not flags.json) as printer,
        cli.StopSignals() as signals,
    ):
        try:
            train(directory, on_epoch=printer.epoch, on_result=printer.result, stop_requested=signals.received)
        except SweepStoppedError as stopped:
            cli.say(stopped)
            status = signals.exit_status
        else:
            status = 0
    directory.write_results(search.pictures(directory) if is_search else {})
    if status == 0:
        results = directory.results()
        print(
            json.dumps(report.as_json(results, plan.settings)) if flags.json else report.as_text(results, plan.settings)
        )
        cli.say(f"sweep directory: {directory.path}; see report.html")
        status = 0 if any(result.summary for result in results) else 1
    return status


def parse(args: Sequence[str]) -> tuple[SweepFlags, dict[str, tuple[Any, ...] | Range]]:
    """Parse the command line; return the settings, and the values or the range of those that vary."""
    flags, varied = cli.parse_several(SweepFlags, args, module="cnn_jax.sweep")
    if flags.resume:
        if flags.workdir is None:
            raise UsageError("--resume needs --workdir, the directory of the sweep to continue")
        own = ("config", "seeds", "search", *(field.name for field in dataclasses.fields(Config)))
        defaults = {field.name: field.default for field in dataclasses.fields(SweepFlags)}
        if given := [name for name in own if getattr(flags, name) != defaults[name] or name in varied]:
            raise UsageError(f"--resume continues with the settings of the sweep: leave out {cli.flag(given[0])}")
        return flags, {}
    if flags.config is not None:
        defaults = dataclasses.asdict(Config.from_yaml(flags.config))
        flags, varied = cli.parse_several(SweepFlags, args, module="cnn_jax.sweep", defaults=defaults)
    ranges = [name for name, values in varied.items() if isinstance(values, Range)]
    if flags.search is None and ranges:
        raise UsageError(f"{cli.flag(ranges[0])} {varied[ranges[0]]} is a range, which needs --search")
    if flags.search is not None and not varied:
        raise UsageError("--search needs a setting that varies, such as --learning-rate 1e-4..1e-1")
    if flags.seeds is not None:
        if flags.search is not None:
            raise UsageError("--search trains every combination with one seed: leave out --seeds")
        if "seed" in varied:
            raise UsageError("--seeds counts from a single --seed: give only one of them")
        varied["seed"] = tuple(range(flags.seed, flags.seed + flags.seeds))
    return flags, varied


if __name__ == "__main__":
    cli.start(main)
