"""``python -m cnn_jax.train``: train a network and print one line per epoch."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass

from cnn_jax import cli, sweep
from cnn_jax.config import DETERMINISTIC_OPS, Config
from cnn_jax.errors import UsageError
from cnn_jax.settings import Count, FilePath, Switch, setting


@dataclass(frozen=True, kw_only=True)
class TrainFlags(Config):
    """Train an image classifier, printing one line per epoch, and write checkpoints and a report to a run directory.

    Exit status: 0 on success, 1 on failure, 2 for invalid input, 3 if --target-accuracy was not reached; 130, 143 or
    129 if Ctrl-C, SIGTERM or SIGHUP stopped it, after saving a checkpoint once training has started.
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


def main(args: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    flags = parse(args)
    if flags.seeds is not None:
        return sweep.main(args)
    config = Config(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(Config)})
    if config.deterministic:
        # XLA reads its flags once, when jax initializes its devices.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC_OPS}"
    cli.initialize_jax()
    # Slow imports come after the flags are parsed.
    from cnn_jax.report.console import EpochPrinter
    from cnn_jax.report.tables import best_epoch
    from cnn_jax.runs.fit import StoppedError, fit, resume
    from cnn_jax.training.history import ran_out_of_patience, reached_target

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
            cli.say(stopped)
            return signals.exit_status
    best = best_epoch(run.history)
    split = "test" if best.validation_accuracy is None else "validation"
    cli.say(f"best epoch: {best.epoch} with a {split} accuracy of {best.selection_accuracy:.4f}; see report.html")
    cli.say(f"run directory: {run.workdir}")
    if ran_out_of_patience(config, run.history):
        cli.say(
            f"stopped after epoch {len(run.history) - 1}: no better validation accuracy in {config.patience} epochs"
        )
    if config.target_accuracy is not None and not reached_target(config, run.history):
        epochs = "1 epoch" if len(run.history) == 1 else f"{len(run.history)} epochs"
        cli.say(f"the accuracy did not reach {config.target_accuracy} in {epochs}")
        return 3
    return 0


def parse(args: Sequence[str]) -> TrainFlags:
    """Parse the command line, with defaults from ``--config`` or from the run to resume."""
    flags = cli.parse(TrainFlags, args, module="cnn_jax.train")
    if flags.resume and flags.workdir is None:
        raise UsageError("--resume needs --workdir, the directory of the run to resume")
    if flags.config is not None:
        defaults = Config.from_yaml(flags.config)
    elif flags.resume:
        from cnn_jax.runs.run import load_config

        defaults = load_config(flags.workdir)
    else:
        return flags
    return cli.parse(TrainFlags, args, module="cnn_jax.train", defaults=dataclasses.asdict(defaults))


if __name__ == "__main__":
    cli.start(main)
