"""The data set that needs no download: scikit-learn's handwritten digits."""

import numpy as np

from cnn_jax.data.dataset import Dataset
from cnn_jax.data.splits import hold_out

SIZE = 28
BRIGHTEST = 16


def load() -> Dataset:
    """The 1,797 digits of 8x8 pixels, enlarged to Fashion-MNIST's 28x28, in 1,437 for training and 360 for testing.

    Source: "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine Learning
    Repository, https://doi.org/10.24432/C50P49), as ``sklearn.datasets.load_digits`` ships it.

    Returns:
        images uint8 ``[N, 28, 28, 1]``, 0 for paper and 255 for the heaviest ink; labels int32 ``[N]``.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    stored = load_digits()
    grey = np.round(stored.images * (255 / BRIGHTEST)).astype(np.uint8)
    enlarged = [Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for image in grey]
    images = np.stack([np.asarray(image) for image in enlarged])[..., np.newaxis]
    train, test = hold_out(images, stored.target.astype(np.int32))
    return Dataset("digits", train, test, tuple(str(name) for name in stored.target_names))
