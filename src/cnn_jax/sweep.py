"""``python -m cnn_jax.sweep``: train with several settings and seeds, and compare the results."""

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnn_jax import cli
from cnn_jax.config import Config
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.settings import Count, FilePath, Range, Switch, setting

if TYPE_CHECKING:
    from cnn_jax.runs.sweep_directory import SweepDirectory


@dataclass(frozen=True, kw_only=True)
class SweepFlags(Config):
    """Train a network for every combination of settings, printing one line for each, and compare their results.

    Flags of settings take several values, such as --learning-rate 0.001 0.01. Every network has a run directory of its
    own in the directory of the sweep, which also has the results as a table (results.csv, results.json), a plot and a
    page (report.html). Several processes can work on a sweep: start the others with --resume.

    Exit status: 0 on success, also if the loss of some networks is not finite; 1 on failure, 2 for invalid input, 3 if
    a network did not reach --target-accuracy; 130, 143 or 129 if Ctrl-C, SIGTERM or SIGHUP stopped it, after saving
    checkpoints.
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
    if flags.resume:
        from cnn_jax.runs.sweep_directory import SweepDirectory

        directory = SweepDirectory(Path(flags.workdir))
        config = directory.plan().config
    else:
        config = Config.of(flags)
    cli.initialize_jax(deterministic=config.deterministic)
    # Slow imports come after the flags are parsed.
    from cnn_jax.runs.fit import StoppedError
    from cnn_jax.runs.search import create_search
    from cnn_jax.runs.sweep import create_sweep

    if flags.search is not None:
        directory = create_search(config, varied, flags.search, flags.workdir)
    elif not flags.resume:
        directory = create_sweep(config, varied, flags.workdir)
    moved = _moved(flags, args) if flags.resume else {}
    cli.say(f"{directory.plan().num_members} networks in {directory.path}")
    with cli.StopSignals() as signals:
        try:
            seed = None if flags.resume else config.seed
            _train(directory, signals, seed=seed, as_lines=not flags.json, changes=moved)
        except StoppedError as stopped:
            _write_results(directory)
            cli.say(stopped)
            return signals.exit_status
        except CnnJaxError:
            with contextlib.suppress(CnnJaxError):
                _write_results(directory)
            raise
    _write_results(directory)
    return _print_results(directory, as_json=flags.json)


def _moved(flags: SweepFlags, args: Sequence[str]) -> dict[str, Any]:
    """The settings that were given to resume a sweep whose data has moved."""
    from cnn_jax.runs.sweep import MOVABLE

    given = cli.given(SweepFlags, args, module="cnn_jax.sweep")
    return {name: getattr(flags, name) for name in MOVABLE if name in given}


def _train(
    directory: "SweepDirectory",
    signals: cli.StopSignals,
    *,
    seed: int | None,
    as_lines: bool,
    changes: Mapping[str, Any],
) -> None:
    from cnn_jax.report.console import SweepPrinter
    from cnn_jax.runs.search import train_search
    from cnn_jax.runs.space import Space
    from cnn_jax.runs.sweep import train_sweep

    plan = directory.plan()
    train = partial(train_search, seed=seed) if isinstance(plan, Space) else train_sweep
    with SweepPrinter(directory.results(), plan.num_members, plan.config.epochs, as_lines=as_lines) as printer:
        listeners = {
            "on_epoch": printer.epoch,
            "on_result": printer.result,
            "stop_requested": signals.received,
        }
        train(directory, **listeners, **changes)


def _write_results(directory: "SweepDirectory") -> None:
    from cnn_jax.runs.search import pictures
    from cnn_jax.runs.space import Space

    directory.write_results(pictures(directory) if isinstance(directory.plan(), Space) else {})


def _print_results(directory: "SweepDirectory", *, as_json: bool) -> int:
    """Print the results; return the exit status."""
    from cnn_jax.report import sweep as report

    results, settings = directory.results(), directory.plan().settings
    print(json.dumps(report.as_json(results, settings)) if as_json else report.as_text(results, settings))
    cli.say(f"sweep directory: {directory.path}; see report.html")
    if unfinished := sum(not result.is_done for result in results):
        cli.say(f"other processes are training {unfinished} of the networks")
    finished = [result for result in results if result.summary]
    if not finished:
        return 1
    return 0 if all(result.reached_target for result in finished) else 3


def parse(args: Sequence[str]) -> tuple[SweepFlags, dict[str, tuple[Any, ...] | Range]]:
    """Parse the command line; return the settings, and the values or the range of those that vary."""
    flags, varied = cli.parse_several(SweepFlags, args, module="cnn_jax.sweep")
    if flags.resume:
        if flags.workdir is None:
            raise UsageError("--resume needs --workdir, the directory of the sweep to continue")
        own = {"resume", "workdir", "json", "dataset", "data_dir", "cache_limit", "skip_unreadable"}
        if given := cli.given(SweepFlags, args, module="cnn_jax.sweep") - own:
            raise UsageError(f"--resume continues with the settings of the sweep: leave out {cli.flag(min(given))}")
        if varied:
            raise UsageError(f"{cli.flag(min(varied))} takes one value with --resume")
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
            raise UsageError("give one --seed with --seeds, or several without it")
        varied["seed"] = tuple(range(flags.seed, flags.seed + flags.seeds))
    return flags, varied


if __name__ == "__main__":
    cli.start(main)
