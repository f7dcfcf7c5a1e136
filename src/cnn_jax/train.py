"""``python -m cnn_jax.train``: train a network, a line an epoch on standard output."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, arg

from cnn_jax import cli
from cnn_jax.config import Config
from cnn_jax.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class TrainFlags(Config):
    """Train an image-classifying CNN: a line an epoch, and all that comes of it in a run directory.

    Exit status: 0 when done, 1 when something failed, 2 when what was given cannot be used, 3 when the epochs ran out
    before --target-accuracy was reached, 130, 143 or 129 when Ctrl-C, SIGTERM or SIGHUP stopped it, at a
    checkpoint.
    """

    config: Annotated[str | None, arg(metavar="PATH")] = None
    """Where the defaults of the other flags come from: a YAML file, or the bare name of a preset, tutorial."""

    workdir: Annotated[str | None, arg(metavar="DIR")] = None
    """The run directory; runs/<dataset>-<model>-<time> if not given."""

    resume: Annotated[bool, FlagCreatePairsOff] = False
    """Go on from the newest checkpoint in --workdir, by its settings where no flag is given."""


def main(args: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    flags = parse(args)
    config = Config(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(Config)})
    # What follows is slow to import, and of no use to somebody who mistyped a flag.
    from cnn_jax.report.console import EpochPrinter
    from cnn_jax.runs.fit import DETERMINISTIC_OPS, StoppedError, fit, reached_target

    if config.deterministic:
        # XLA reads its flags once, when jax first looks for devices.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC_OPS}"
    with EpochPrinter(config.epochs) as printer, cli.StopSignals() as signals:
        try:
            run = fit(
                config,
                flags.workdir,
                resume=flags.resume,
                on_epoch=printer.epoch,
                on_chunk=printer.chunk,
                stop_requested=signals.received,
            )
        except StoppedError as stopped:
            cli.say(stopped)
            return signals.exit_status
    cli.say(f"run directory: {run.workdir}")
    if config.target_accuracy is not None and not reached_target(config, run.history):
        cli.say(f"the test accuracy did not reach {config.target_accuracy} in {config.epochs} epochs")
        return 3
    return 0


def parse(args: Sequence[str]) -> TrainFlags:
    """The flags, with the defaults that ``--config`` or the run to go on with gives them."""
    flags = cli.parse(TrainFlags, args, module="cnn_jax.train")
    if flags.resume and flags.workdir is None:
        raise UsageError("--resume needs --workdir, the run directory to go on in")
    if flags.config is not None:
        defaults = Config.from_yaml(flags.config)
    elif flags.resume:
        from cnn_jax.runs.run import load_config

        defaults = load_config(flags.workdir)
    else:
        return flags
    return cli.parse(TrainFlags, args, module="cnn_jax.train", default=TrainFlags(**dataclasses.asdict(defaults)))


if __name__ == "__main__":
    cli.start(main)
