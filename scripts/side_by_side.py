"""Compare training networks of a sweep side by side, one on each device, with one after another on all devices.

    python scripts/side_by_side.py --config tutorial --epochs 2

As many networks as devices, with different seeds, are trained in both ways in turns. The output is the seconds of
training, without compilation and evaluation.
"""

import argparse
import dataclasses

from cnn_jax import cli
from cnn_jax.config import Config
from cnn_jax.data import load


def main() -> None:
    """Train in both ways, and print the times."""
    parser = argparse.ArgumentParser(description="Compare two ways of training several networks.")
    parser.add_argument("--config", default="tutorial", help="preset or YAML file (default: %(default)s)")
    parser.add_argument("--dataset", help="another dataset than that of the preset")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of each network (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="number of turns (default: %(default)s)")
    flags = parser.parse_args()
    cli.use_every_processor()
    import jax

    from cnn_jax.training.loop import Trainer
    from cnn_jax.training.members import MembersTrainer

    config = Config.from_yaml(flags.config)
    config = dataclasses.replace(config, epochs=flags.epochs, dataset=flags.dataset or config.dataset)
    dataset = load(config)
    seeds = range(jax.local_device_count())
    trainers = [Trainer(dataclasses.replace(config, seed=seed), dataset) for seed in seeds]
    together = MembersTrainer(trainers)
    together.compile([trainer.start() for trainer in trainers])
    trainers[0].compile()
    for _ in range(flags.repeats):
        records = [record for trainer in trainers for record, _ in trainer.epochs(trainer.start())]
        alone = sum(record.seconds for record in records)
        ends = together.epochs([trainer.start() for trainer in trainers])
        side_by_side = sum(progress.seconds for members in ends for progress in members)
        print(f"one after another: {alone:.2f} s side by side: {side_by_side:.2f} s ratio: {alone / side_by_side:.2f}")


if __name__ == "__main__":
    main()
