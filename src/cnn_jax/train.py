"""``python -m cnn_jax.train``: train a network and print one line per epoch."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cnn_jax import cli, sweep
from cnn_jax.config import Config
from cnn_jax.errors import UsageError
from cnn_jax.settings import Address, Count, FilePath, Index, Switch, setting

if TYPE_CHECKING:
    from cnn_jax.runs.run import Run


@dataclass(frozen=True, kw_only=True)
class TrainFlags(Config):
    """Train an image classifier, printing one line per epoch, and write checkpoints and a report to a run directory.

    Exit status: 0 on success, 1 on failure, 2 for invalid input, 3 if --target-accuracy was not reached; 130, 143 or
    129 if Ctrl-C, SIGTERM or SIGHUP stopped it, after saving a checkpoint once training has started.

    With --distributed, processes on several machines train one network. Start the same command on all of them.
    """

    config: FilePath | None = setting(
        "a YAML file or preset (tutorial, cpu, fast, best or finetune) with defaults for the other flags", default=None
    )
    workdir: FilePath | None = setting(
        "the run directory (default: runs/<dataset>-<model>-<time>)", default=None, metavar="DIR"
    )
    seeds: Count | None = setting(
        "train with N seeds, counted from --seed, and print the mean and standard deviation of the accuracy; short for "
        "python -m cnn_jax.sweep",
        default=None,
    )
    resume: Switch = setting("continue the run in --workdir from its newest checkpoint and settings", default=False)
    distributed: Switch = setting(
        "train together with other processes, found by themselves on TPU pods, SLURM, Open MPI and Kubernetes",
        default=False,
    )
    coordinator: Address | None = setting(
        "with --distributed elsewhere: where the process with index 0 listens, the same for all", default=None
    )
    num_processes: Count | None = setting("with --distributed elsewhere: the number of processes", default=None)
    process_index: Index | None = setting(
        "with --distributed elsewhere: the index of this process, counted from 0", default=None
    )


def main(args: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    flags = parse(args)
    if flags.seeds is not None:
        return sweep.main(args)
    config = Config.of(flags)
    # Slow imports come after the flags are parsed.
    if flags.distributed:
        from cnn_jax import aborts
        from cnn_jax.runs import processes

        aborts.end_in_one_line()
        processes.initialize(flags.coordinator, flags.num_processes, flags.process_index)
    cli.initialize_jax(deterministic=config.deterministic)
    if flags.distributed:
        with cli.discarding_output():  # of Gloo, which connects the processes when they first communicate
            processes.meet()
    import jax

    from cnn_jax.report.console import EpochPrinter
    from cnn_jax.runs.fit import StoppedError, fit, resume

    is_first = jax.process_index() == 0
    if not is_first:
        logging.getLogger("cnn_jax").setLevel(logging.ERROR)
    with EpochPrinter(config.epochs) as printer, cli.StopSignals() as signals:
        try:
            listeners = {
                "on_epoch": printer.epoch,
                "on_chunk": printer.chunk,
                "stop_requested": signals.received,
            }
            if flags.resume:
                run = resume(flags.workdir, **listeners, **dataclasses.asdict(config))
            else:
                run = fit(config, flags.workdir, **listeners)
        except StoppedError as stopped:
            if is_first:
                cli.say(stopped)
            return signals.exit_status
    if is_first:
        _say_results(config, run)
    return 3 if _missed_target(config, run) else 0


def _say_results(config: Config, run: "Run") -> None:
    from cnn_jax.report.tables import best_epoch
    from cnn_jax.training.history import ran_out_of_patience

    best = best_epoch(run.history)
    split = "test" if best.validation_accuracy is None else "validation"
    cli.say(f"best epoch: {best.epoch} with a {split} accuracy of {best.selection_accuracy:.4f}; see report.html")
    cli.say(f"run directory: {run.workdir}")
    if ran_out_of_patience(config, run.history):
        cli.say(
            f"stopped after epoch {len(run.history) - 1}: no better validation accuracy in {config.patience} epochs"
        )
    if _missed_target(config, run):
        epochs = "1 epoch" if len(run.history) == 1 else f"{len(run.history)} epochs"
        cli.say(f"the accuracy did not reach {config.target_accuracy} in {epochs}")


def _missed_target(config: Config, run: "Run") -> bool:
    from cnn_jax.training.history import reached_target

    return config.target_accuracy is not None and not reached_target(config, run.history)


def parse(args: Sequence[str]) -> TrainFlags:
    """Parse the command line, with defaults from ``--config`` or from the run to resume."""
    flags = cli.parse(TrainFlags, args, module="cnn_jax.train")
    if flags.resume and flags.workdir is None:
        raise UsageError("--resume needs --workdir, the directory of the run to resume")
    _check_distributed(flags)
    if flags.config is not None:
        defaults = Config.from_yaml(flags.config)
    elif flags.resume:
        from cnn_jax.runs.run import load_config

        defaults = load_config(flags.workdir)
    else:
        return flags
    return cli.parse(TrainFlags, args, module="cnn_jax.train", defaults=dataclasses.asdict(defaults))


def _check_distributed(flags: TrainFlags) -> None:
    if flags.distributed and flags.seeds is not None:
        raise UsageError(
            "--seeds does not train with other processes: leave out --distributed, or start a run per seed"
        )
    given = [name for name in ("coordinator", "num_processes", "process_index") if getattr(flags, name) is not None]
    if given and not flags.distributed:
        raise UsageError(f"--{given[0].replace('_', '-')} is for several processes: add --distributed, or leave it out")
    if {"num_processes", "process_index"} <= set(given) and flags.process_index >= flags.num_processes:
        raise UsageError(
            f"--process-index {flags.process_index} must be below --num-processes {flags.num_processes}: they are "
            "counted from 0"
        )


if __name__ == "__main__":
    cli.start(main)
