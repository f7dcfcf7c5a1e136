"""Random changes of the training images.

All of them run on the device, inside the compiled step. The random numbers of an image come from a key of its own, so
that they do not depend on how a batch is divided among devices. Each operation is a pure function of images and of
numbers between 0 and 1: a single call of the generator draws those for all operations, as each call takes XLA's CPU
compiler about a second.
"""

from cnn_jax.training.augment.pipeline import Augment, Mixed

__all__ = ["Augment", "Mixed"]
