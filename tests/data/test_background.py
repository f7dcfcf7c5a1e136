import numpy as np
import pytest

from cnn_jax.data import background


def picture(around, foreground):
    image = np.full((28, 28, 1), around, np.uint8)
    image[5:, 8:20] = foreground  # down to the lower border
    return image


@pytest.mark.parametrize(("around", "light"), [(0, False), (100, False), (140, True), (255, True)])
def test_a_light_background_is_recognised_by_the_border(around, light):
    assert background.is_light(picture(around, 255 - around)) is light


def test_color_channels_count_together():
    assert background.is_light(np.full((9, 9, 3), (0, 200, 255), np.uint8))


@pytest.mark.parametrize(("light_ones", "dark"), [(0, True), (9, True), (11, False), (100, False)])
def test_a_dataset_is_dark_if_nearly_all_images_are(light_ones, dark):
    images = np.stack([picture(255, 0)] * light_ones + [picture(0, 255)] * (100 - light_ones))
    assert background.is_dark(images) is dark


def test_a_sample_spread_over_the_dataset():
    images = np.zeros((10_000, 3, 3, 1), np.uint8)
    images[5000:] = 255
    assert background.is_dark(images[:5000])
    assert not background.is_dark(images)
