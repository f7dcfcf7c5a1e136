"""The order of the examples in an epoch: a pure function of the seed and the epoch."""

import numpy as np


def epoch_order(num_examples: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Indices of all examples, in the order in which an epoch visits them.

    Args:
        num_examples: the number of examples.
        seed: the run's seed.
        epoch: the epoch, counted from 0.
        shuffle: whether to return a permutation drawn from ``(seed, epoch)`` instead of the stored order.

    Returns:
        int32 ``[num_examples]``, each index once.
    """
    indices = np.arange(num_examples, dtype=np.int32)
    return np.random.default_rng((seed, epoch)).permutation(indices) if shuffle else indices
