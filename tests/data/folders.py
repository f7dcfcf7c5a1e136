"""Folders of images for the tests, and datasets loaded from them."""

import io

import numpy as np
import pytest
from PIL import Image

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.errors import UsageError
from cnn_jax.files import user_cache


def put(root, name, image, **options):
    """Write an image, or bytes instead of one."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, bytes):
        path.write_bytes(image)
    else:
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def encoded(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def gray(value, size=(4, 3)):
    return np.full(size, value, np.uint8)


def put_split(root, counts, image=gray):
    """Write images of each class of each split; their first pixels are consecutive numbers."""
    number = 0
    for part, classes in counts.items():
        for name, count in classes.items():
            for index in range(count):
                put(root, f"{part}/{name}/{index:03}.png", image(number))
                number += 1


def load(root, **settings):
    return data.load(Config(dataset=f"folder:{root}", **settings))


def numbers(split):
    return split.images[:, 0, 0, 0].tolist()


def refusal(root, **settings):
    with pytest.raises(UsageError) as caught:
        load(root, **settings)
    message = str(caught.value)
    assert message.isprintable()
    return message


def cache_files():
    return sorted((user_cache() / "folders").iterdir())
