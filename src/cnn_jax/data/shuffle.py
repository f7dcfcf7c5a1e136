"""The order in which an epoch visits the examples: a pure function of the seed and the epoch."""

import numpy as np


def epoch_order(num_examples: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Indices of all the examples in the order of one epoch.

    Args:
        num_examples: how many there are.
        seed: the run's.
        epoch: counted from 0.
        shuffle: a permutation drawn from ``(seed, epoch)``; without it the order in which they are stored.

    Returns:
        int32 ``[num_examples]``, each index once.
    """
    indices = np.arange(num_examples, dtype=np.int32)
    return np.random.default_rng((seed, epoch)).permutation(indices) if shuffle else indices
