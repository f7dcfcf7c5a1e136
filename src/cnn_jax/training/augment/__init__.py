"""Random changes of the training images, on the device."""

from cnn_jax.training.augment.pipeline import Augment, Mixed

__all__ = ["Augment", "Mixed"]
