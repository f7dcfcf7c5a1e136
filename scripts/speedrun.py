"""Train a recipe with several seeds: how accurate it is, and how long it takes.

    python scripts/speedrun.py --config cpu --target 0.93 --seeds 5 --pytorch
    python scripts/speedrun.py --config cpu --model-depth 6 --model-width 24 --epochs 12 --target 0.94

The rules:

- The recipe is a preset or a config file. Every seed trains all of its epochs, and determines the initial weights, the
  order of the images and their augmentation. No run is left out.
- The clock runs from the first step of an epoch to the end of its last one, and includes choosing, copying and
  augmenting the batches. It is stopped while programs are compiled, which is reported beside it, while the data is read
  from disk, and while the network is evaluated.
- The accuracy is that of the last epoch on the test images, with the recipe's test-time augmentation. The target is
  reached if the mean over the seeds reaches it.

With ``--pytorch``, the same network and recipe (``scripts/pytorch_recipe.py``) are trained in PyTorch too, after each
seed of cnn_jax, so that changes of the machine's speed affect both.

The output is a Markdown table with means and standard deviations.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmark import machine, timed

from cnn_jax import cli, train
from cnn_jax.config import Config
from cnn_jax.data import Dataset, load
from cnn_jax.errors import UsageError
from cnn_jax.settings import show

NOT_FOLLOWED = frozenset(
    {"init_from", "freeze", "validation_fraction", "patience", "target_accuracy", "seed"}
    | {"deterministic", "checkpoint_every", "tensorboard"}
)
"""Settings that the rules, or the absence of a run directory, leave no place for."""


class Result(NamedTuple):
    """The outcome of one seed.

    Attributes:
        accuracy: fraction of the test images correctly classified.
        train_seconds: the clock.
        compile_seconds: time to compile, or to warm up.
    """

    accuracy: float
    train_seconds: float
    compile_seconds: float


def train_in_cnn_jax(config: Config, dataset: Dataset) -> Result:
    """Train a recipe with the training loop of the command."""
    from cnn_jax.training.loop import Trainer

    trainer = Trainer(config, dataset)
    compile_seconds = trainer.compile()
    records = [record for record, _ in trainer.epochs(trainer.start())]
    return Result(records[-1].test_accuracy, sum(record.seconds for record in records), compile_seconds)


def train_in_pytorch(config: Config, dataset: Dataset) -> Result:
    """Train the same recipe in PyTorch."""
    import pytorch_recipe

    recipe = pytorch_recipe.Recipe(config, dataset)
    warm_up_seconds = timed(recipe.warm_up)
    train_seconds = sum(recipe.train_epoch(epoch) for epoch in range(config.epochs))
    return Result(recipe.test_accuracy(), train_seconds, warm_up_seconds)


def main(args: Sequence[str]) -> int:
    """Train all seeds and print the table."""
    flags, settings = parse_arguments(args)
    cli.use_every_processor()
    config = read_recipe(["--config", flags.config, *settings], NOT_FOLLOWED)
    dataset = load(config)
    contenders: dict[str, Callable[[Config, Dataset], Result]] = {"cnn_jax": train_in_cnn_jax}
    if flags.pytorch:
        import pytorch_recipe  # noqa: F401 (before minutes of training, if PyTorch is not installed)

        contenders["PyTorch"] = train_in_pytorch
    results: dict[str, list[Result]] = {name: [] for name in contenders}
    with cli.writing(flags.json) as file:
        for seed in range(flags.first_seed, flags.first_seed + flags.seeds):
            for name, train_recipe in contenders.items():
                result = train_recipe(dataclasses.replace(config, seed=seed), dataset)
                results[name].append(result)
                cli.say(f"seed: {seed} {name}: accuracy: {result.accuracy:.4f} seconds: {result.train_seconds:.1f}")
        summary = {
            "recipe": " ".join([flags.config, *settings]),
            "data": dataset.name,
            "target": flags.target,
            **machine(),
            "results": {name: [result._asdict() for result in list_] for name, list_ in results.items()},
        }
        print_table(summary, results)
        if file is not None:
            file.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return 0


def parse_arguments(args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; return the flags of this script, and those of the training command."""
    parser = argparse.ArgumentParser(
        description="Train a recipe with several seeds; print its accuracy and time. Other flags, such as --dataset or "
        "--epochs, are those of python -m cnn_jax.train.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", default="cpu", help="preset or YAML file (default: %(default)s)")
    parser.add_argument("--target", type=float, help="the mean accuracy to reach")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first one (default: %(default)s)")
    parser.add_argument("--pytorch", action="store_true", help="also train the recipe in PyTorch")
    parser.add_argument("--json", help="file to write the results to")
    flags, settings = parse_known(parser, args)
    if flags.seeds < 1:
        parser.error("--seeds must be at least 1")
    return flags, settings


def read_recipe(words: Sequence[str], not_followed: frozenset[str]) -> Config:
    """The config that flags of the training command describe.

    Args:
        words: the command line.
        not_followed: the names of settings that have to have their defaults.

    Raises:
        UsageError: also for flags of the training command that are not settings of a run.
    """
    flags, default = train.parse(words), train.TrainFlags()
    not_followed |= vars(default).keys() - vars(Config()).keys() - {"config"}
    for name, value in vars(default).items():
        if name in not_followed and getattr(flags, name) != value:
            raise UsageError(
                f"this script needs the default of {cli.flag(name)}, {'none' if value is None else show(value)}"
            )
    return Config.of(flags)


def parse_known(parser: argparse.ArgumentParser, args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of a script, also if they are spelled with underscores, and the arguments that it does not have."""
    return parser.parse_known_args([cli.flag(arg) if arg.startswith("--") else arg for arg in args])


def print_table(summary: dict, results: dict[str, list[Result]]) -> None:
    """Print the results as a Markdown table."""
    target = summary["target"]
    print(f"{summary['recipe']} on {summary['data']}; {summary['processors']} processors, {summary['device']}\n")
    print("| | seeds | accuracy | seconds | compile, s |" + (f" {target:g} reached |" if target else ""))
    print("| --- | --- | --- | --- | --- |" + (" --- |" if target else ""))
    for name, rows in results.items():
        accuracies, seconds, compiling = zip(*rows, strict=True)
        reached = "yes" if target and statistics.mean(accuracies) >= target else "no"
        cells = [name, str(len(rows)), spread(accuracies, 4), spread(seconds, 1), f"{statistics.mean(compiling):.1f}"]
        print(f"| {' | '.join([*cells, reached] if target else cells)} |")


def spread(values: tuple[float, ...], digits: int) -> str:
    """The mean and, of several values, the standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    sys.exit(cli.run(main))
