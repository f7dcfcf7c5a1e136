"""The dataset that needs no download: scikit-learn's handwritten digits."""

import numpy as np

from cnn_jax.data.dataset import Dataset, Split

SIZE = 28
"""Height and width of the enlarged images, those of Fashion-MNIST."""

MAX_INTENSITY = 16
"""Largest pixel value in the stored images."""


def load() -> Dataset:
    """The 1,797 digits of 8x8 pixels, enlarged to 28x28: 1,437 for training and 360 for testing.

    Source: "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository,
    https://doi.org/10.24432/C50P49), as ``sklearn.datasets.load_digits`` provides it. It has no official split; this
    one is ``train_test_split(..., test_size=0.2, random_state=0, stratify=labels)``, whatever the split seed.

    Returns:
        images uint8 ``[N, 28, 28, 1]``, 0 for paper and 255 for ink; labels int32 ``[N]``.
    """
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    stored = load_digits()
    gray = np.round(stored.images * (255 / MAX_INTENSITY)).astype(np.uint8)
    enlarged = [Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for image in gray]
    images = np.stack([np.asarray(image) for image in enlarged])[..., np.newaxis]
    labels = stored.target.astype(np.int32)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, random_state=0, stratify=labels
    )
    train, test = Split(train_images, train_labels), Split(test_images, test_labels)
    return Dataset("digits", train, test, tuple(str(name) for name in stored.target_names))
