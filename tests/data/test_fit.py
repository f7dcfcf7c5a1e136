"""Images whose aspect ratio is not that of the requested size: padded, cropped or stretched."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.data import folder
from cnn_jax.data.image import read_image
from cnn_jax.runs import evaluation_data
from cnn_jax.runs.run import Run

FITS = ("pad", "crop", "stretch")
A, B, C, D = 10, 20, 30, 200


def encoded(image, **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, "PNG", **options)
    return buffer.getvalue()


def read(content, size, fit, channels=1):
    pixels = read_image(io.BytesIO(content), size, channels, fit)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (*size, channels)
    return pixels


# The median of the borders of these images is A.
@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((2, 4), [[A, A, A, B], [A, A, A, C]]),  # fits already
        ((4, 4), [[A] * 4, [A, A, A, B], [A, A, A, C], [A] * 4]),
        ((2, 8), [[A] * 5 + [B] + [A] * 2, [A] * 5 + [C] + [A] * 2]),
        ((3, 4), [[A, A, A, B], [A, A, A, C], [A] * 4]),
    ],
)
def test_pad(size, expected):
    content = encoded(np.array([[A, A, A, B], [A, A, A, C]], np.uint8))
    assert read(content, size, "pad")[..., 0].tolist() == expected


def test_the_padding_is_the_median_of_the_border_in_each_channel():
    image = np.full((3, 5, 3), [1, 2, 3], np.uint8)
    image[1, 1:4] = 255  # not on the border
    image[0, :3] = [200, 100, 0]  # less than half of it
    padded = read(encoded(image), (5, 5), "pad", channels=3)
    np.testing.assert_array_equal(padded[[0, 4]], np.full((2, 5, 3), [1, 2, 3]))
    np.testing.assert_array_equal(padded[1:4], image)


def test_crop_and_stretch():
    image = np.array([[A, B, B, D], [A, B, B, D]], np.uint8)
    assert read(encoded(image), (2, 2), "crop")[..., 0].tolist() == [[B, B], [B, B]]
    doubled = np.repeat(image, 8, axis=0)
    for row in read(encoded(doubled), (2, 4), "stretch")[..., 0].tolist():
        assert row == [A, B, B, D]


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (31, 17), (9, 40), (25, 25)])
@pytest.mark.parametrize("size", [(12, 12), (8, 21), (50, 40)])
def test_as_pillow_does(shape, size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8))
    content, size_of_pillow = encoded(image), size[::-1]
    np.testing.assert_array_equal(read(content, size, "crop", 3), ImageOps.fit(image, size_of_pillow))
    np.testing.assert_array_equal(read(content, size, "stretch", 3), image.resize(size_of_pillow))
    inside = np.asarray(ImageOps.contain(image, size_of_pillow))
    border = np.concatenate([inside[0], inside[-1], inside[1:-1, 0], inside[1:-1, -1]])
    color = tuple(np.median(border, axis=0).astype(int).tolist())
    np.testing.assert_array_equal(read(content, size, "pad", 3), ImageOps.pad(image, size_of_pillow, color=color))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_fit_applies_to_the_image_as_it_is_shown(fit, orientation):
    stored = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 11), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = encoded(stored, exif=exif)
    upright = encoded(ImageOps.exif_transpose(Image.open(io.BytesIO(turned))))
    np.testing.assert_allclose(read(turned, (8, 8), fit), read(upright, (8, 8), fit), atol=1)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(1, 3000), (3000, 1)])
def test_narrow_images(fit, shape):
    np.testing.assert_array_equal(read(encoded(np.full(shape, 7, np.uint8)), (6, 8), fit), np.full((6, 8, 1), 7))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder of images of 2x4 pixels, split into train and test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for index, name in enumerate(("train/a", "train/b", "test/a", "test/b")):
        directory = tmp_path / "images" / name
        directory.mkdir(parents=True)
        (directory / "0.png").write_bytes(encoded(np.array([[A, A, A, B + index], [A, A, A, C]], np.uint8)))
    return tmp_path / "images"


def test_each_fit_is_cached_for_itself(root, monkeypatch):
    config = Config(dataset=f"folder:{root}", image_size=(4, 4))
    decoded = []
    monkeypatch.setattr(folder, "read_image", lambda file, *args: decoded.append(args[2]) or read_image(file, *args))
    for _ in range(2):
        for fit in FITS:
            images = data.load(dataclasses.replace(config, fit=fit)).test.images
            for path, image in zip(sorted(root.glob("test/*/*.png")), images, strict=True):
                np.testing.assert_array_equal(image, read(path.read_bytes(), (4, 4), fit))
    assert decoded == [fit for fit in FITS for _ in range(4)]


def test_fit_does_not_matter_without_a_size(root, monkeypatch):
    expected = data.load(Config(dataset=f"folder:{root}")).sha256
    monkeypatch.delattr(folder, "read_image")  # the cached images are used
    assert data.load(Config(dataset=f"folder:{root}", fit="crop")).sha256 == expected


def make_run(**changes):
    """A run without a network, for preparing images only."""
    fields = dict.fromkeys(field.name for field in dataclasses.fields(Run))
    return Run(**fields | {"image_shape": (8, 8, 1), "dark_background": False} | changes)


@pytest.mark.parametrize("fit", FITS)
def test_prediction_and_evaluation_use_the_fit_of_the_run(root, fit):
    config = Config(dataset=f"folder:{root}", image_size=(8, 8), fit=fit)
    own = data.load(config)
    run, images = make_run(config=config, class_names=own.class_names), own.test.images
    for path, image in zip(sorted(root.glob("test/*/*.png")), images, strict=True):
        np.testing.assert_array_equal(run.prepare(path), image)
    _, dataset = evaluation_data.load(run, f"folder:{root / 'test'}")
    np.testing.assert_array_equal(dataset.test.images, images)


@pytest.mark.parametrize("paper", [255, 0])
def test_padding_continues_a_dark_background(tmp_path, paper):
    """For a network of MNIST's kind, ink on paper is inverted and light on dark is not, whatever the aspect ratio."""
    drawing = np.full((4, 8), paper, np.uint8)
    drawing[1:3, 3:5] = 255 - paper
    (tmp_path / "drawing.png").write_bytes(encoded(drawing))
    expected = np.zeros((8, 8), np.uint8)
    expected[3:5, 3:5] = 255
    run = make_run(config=Config(dataset="mnist"), dark_background=True)
    np.testing.assert_array_equal(run.prepare(tmp_path / "drawing.png")[..., 0], expected)
