"""Random changes of training images, compared with numpy, scipy, Pillow and torch."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import stats

from cnn_jax.errors import UsageError
from cnn_jax.training.augment import Augment, Mixed
from cnn_jax.training.augment.arithmetic import random_below
from cnn_jax.training.augment.boxes import Boxes, crop_boxes, erasing_boxes, resize_boxes
from cnn_jax.training.augment.color import adjust_color
from cnn_jax.training.augment.geometry import alternating_flips, random_flips
from cnn_jax.training.augment.mixing import cutmix, symmetric_beta
from cnn_jax.training.augment.pipeline import draw
from cnn_jax.training.sharding import AXIS, BATCHES, data_parallel, make_mesh

EVERYTHING = Augment("random", 2, 0.3, 0.5, 0.4, 0.2, 1.0)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def make_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def make_uniform(count, numbers, seed=0):
    return np.random.default_rng(seed).random((count, numbers), np.float32)


def make_keys(count, seed=0):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))


def compiled(function, *arguments):
    """The result of a function, in numpy, with numbers as static arguments."""
    static = [place for place, argument in enumerate(arguments) if isinstance(argument, int | float)]
    return jax.tree.map(np.asarray, jax.jit(function, static_argnums=static)(*arguments))


def apply(setting, images, seed=0, epoch=0, labels=None):
    labels = np.arange(len(images), dtype=np.int32) if labels is None else labels
    keys = make_keys(len(images), seed)
    mixed = jax.jit(Augment.__call__, static_argnums=0)(setting, images, labels, keys, jnp.int32(epoch))
    assert [array.dtype for array in mixed] == [np.uint8, np.int32, np.float32]
    assert [array.shape for array in mixed] == [images.shape, labels.shape, labels.shape]
    return Mixed(*map(np.asarray, mixed))


def mirrored(images, results):
    """Which of the results are mirror images; the others are equal to the images."""
    flipped = (results == images[:, :, ::-1]).all((1, 2, 3))
    np.testing.assert_array_equal(results[~flipped], images[~flipped])
    return flipped


def test_off():
    setting = Augment()
    assert setting.is_identity
    assert not setting.mixes
    images = make_images(3, 8, 8, 1)
    program = jax.make_jaxpr(setting)(images, np.arange(3, dtype=np.int32), make_keys(3), jnp.int32(0))
    assert [str(equation.primitive) for equation in program.eqns] == ["broadcast_in_dim"]  # the weight
    result = apply(setting, images)
    np.testing.assert_array_equal(result.images, images)
    np.testing.assert_array_equal(result.other_labels, np.arange(3))
    np.testing.assert_array_equal(result.weight, 1)


@pytest.mark.parametrize("mixing", [{"mixup": 0.2}, {"cutmix": 1.0}])
def test_mixing_is_announced(mixing):
    assert Augment(**mixing).mixes
    assert not Augment(flip="random").mixes
    assert not Augment(flip="random").is_identity


@pytest.mark.parametrize(
    ("setting", "calls"), [(Augment("alternating"), 0), (Augment("random"), 1), (EVERYTHING, 1)], ids=str
)
def test_a_single_call_of_the_generator(setting, calls):
    """Each takes a second to compile."""
    images, labels = make_images(2, 8, 8, 3), np.arange(2, dtype=np.int32)
    program = str(jax.make_jaxpr(setting)(images, labels, make_keys(2), jnp.int32(0)))
    assert program.count("random_bits[") == calls


@pytest.mark.parametrize(("size", "channels"), [(5, 1), (5, 3), (1, 3)])
def test_everything_at_once(size, channels):
    images = make_images(size, 12, 10, channels)
    first, again, other = (apply(EVERYTHING, images, seed) for seed in (0, 0, 1))
    for array, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(array, same)
    assert (first.images != other.images).any()


def test_numbers_do_not_depend_on_other_operations():
    images = make_images(16, 8, 8, 1)
    flipped = mirrored(images, apply(Augment(flip="random"), images).images)
    setting = Augment(flip="random", mixup=0.5, random_erasing=0.5)
    uniform = draw(make_keys(16), setting.random_operations())
    np.testing.assert_array_equal(random_flips(uniform["flip"]), flipped)
    for name in uniform:
        alone = draw(make_keys(16), [name])
        np.testing.assert_array_equal(alone[name], uniform[name])
    assert len(np.unique(np.concatenate(list(uniform.values()), axis=1))) == sum(map(np.size, uniform.values()))


def test_parts_of_a_batch():
    images, labels, keys = make_images(8, 12, 10, 3), np.arange(8, dtype=np.int32), make_keys(8)
    function = jax.jit(EVERYTHING)
    whole = function(images, labels, keys, jnp.int32(0))
    parts = [function(images[part], labels[part], keys[part], jnp.int32(0)) for part in (slice(4), slice(4, 8))]
    jax.tree.map(lambda all_, *some: np.testing.assert_array_equal(all_, np.concatenate(some)), whole, *parts)


def test_on_several_devices_in_a_loop():
    images, labels = make_images(2, 4, 12, 10, 3), np.arange(8, dtype=np.int32).reshape(2, 4)
    keys = make_keys(4)

    def steps(images, labels, keys):
        start = EVERYTHING(images[0], labels[0], keys, jnp.int32(0))
        return jax.lax.fori_loop(1, 2, lambda step, _: EVERYTHING(images[step], labels[step], keys, step), start)

    shards = jax.sharding.PartitionSpec(AXIS)
    mapped = data_parallel(steps, make_mesh(), (BATCHES, BATCHES, shards), shards)
    result = jax.jit(mapped)(images, labels, keys)
    expected = jax.jit(EVERYTHING)(images[1], labels[1], keys, jnp.int32(1))
    jax.tree.map(np.testing.assert_array_equal, result, expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_random_flip(channels):
    images = make_images(400, 4, 5, channels)
    flips = np.stack([mirrored(images, apply(Augment(flip="random"), images, seed).images) for seed in range(2)])
    assert stats.binomtest(int(flips.sum()), flips.size).pvalue > 1e-3
    assert stats.binomtest(int((flips[0] != flips[1]).sum()), len(images)).pvalue > 1e-3


@pytest.mark.parametrize("channels", [1, 3])
def test_alternating_flip(channels):
    images = make_images(400, 4, 5, channels)
    flips = [mirrored(images, apply(Augment(flip="alternating"), images, epoch, epoch).images) for epoch in range(5)]
    assert stats.binomtest(int(flips[0].sum()), len(images)).pvalue > 1e-3
    for before, after in itertools.pairwise(flips):
        np.testing.assert_array_equal(after, ~before)


def test_alternating_flip_depends_on_each_pixel():
    images = np.zeros((28 * 28, 28, 28, 1), np.uint8)
    images.reshape(len(images), -1)[np.diag_indices(len(images))] = 255
    bits = np.asarray(alternating_flips(images, jnp.int32(0)))
    assert stats.binomtest(int(bits.sum()), len(images)).pvalue > 1e-3
    grays = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(-1, 1, 1, 1), (256, 28, 28, 1))
    assert 64 < int(alternating_flips(grays, jnp.int32(0)).sum()) < 192


@pytest.mark.parametrize(("pixels", "channels"), [(1, 1), (2, 3), (4, 1)])
def test_shift(pixels, channels):
    image = make_images(1, 7, 6, channels)
    count = 2000
    results = apply(Augment(shift=pixels), np.repeat(image, count, axis=0)).images
    padded = np.pad(image[0], ((pixels, pixels), (pixels, pixels), (0, 0)), mode="reflect")
    offsets = range(2 * pixels + 1)
    crops = np.stack([padded[top : top + 7, left : left + 6] for top in offsets for left in offsets])
    equal = (results[:, np.newaxis] == crops).all((2, 3, 4))
    np.testing.assert_array_equal(equal.sum(1), 1)
    frequencies = equal.sum(0)
    assert frequencies.all()
    assert stats.chisquare(frequencies).pvalue > 1e-3


def test_numbers_close_to_one():
    """The largest random number, times a count, may be rounded up."""
    largest = np.full((2, 2), np.nextafter(np.float32(1), np.float32(0)))
    counts = jnp.asarray([3, 2**24 - 1], jnp.int32)
    np.testing.assert_array_equal(random_below(largest[:, 0], counts), counts - 1)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 40)])
def test_crop_boxes(height, width):
    top, left, box_height, box_width = compiled(crop_boxes, make_uniform(5000, 22), height, width, 0.25)
    assert (box_height >= 1).all()
    assert (box_width >= 1).all()
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + box_height <= height).all()
    assert (left + box_width <= width).all()
    # Rounding changes a side by at most half a pixel.
    areas = [(box_height + end) * (box_width + end) / (height * width) for end in (0.5, -0.5)]
    assert (areas[0] >= 0.25).all()
    assert (areas[1] <= 1).all()
    assert ((box_width + 0.5) / (box_height - 0.5) >= 3 / 4).all()
    assert ((box_width - 0.5) / (box_height + 0.5) <= 4 / 3).all()
    area = box_height * box_width / (height * width)
    assert area.min() < 0.27
    assert area.max() > 0.9
    # Given a size, positions are uniform.
    room = height - box_height
    assert stats.chisquare(np.bincount(top[room == 5], minlength=6)).pvalue > 1e-3


def test_crop_boxes_have_torchvisions_distribution():
    """The loop of torchvision's ``RandomResizedCrop.get_params`` in numpy."""
    rng = np.random.default_rng(1)
    expected = []
    while len(expected) < 3000:
        area = 32 * 32 * rng.uniform(0.3, 1)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        width, height = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if width <= 32 and height <= 32:
            expected.append((height, width))
    boxes = compiled(crop_boxes, make_uniform(3000, 22), 32, 32, 0.3)
    for sides, values in zip((boxes.height, boxes.width), np.transpose(expected), strict=True):
        assert stats.ks_2samp(sides, values).pvalue > 1e-3


@pytest.mark.parametrize(
    ("height", "width", "box"), [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10)), (9, 8, (0, 0, 9, 8))]
)
def test_central_crop_if_none_fits(height, width, box):
    """All areas and ratios drawn are the largest, so that no rectangle fits."""
    uniform = np.full((2, 22), 0.999, np.float32)
    if width < height:
        uniform[:, 10:20] = 0
    boxes = compiled(crop_boxes, uniform, height, width, 0.9)
    np.testing.assert_array_equal(np.transpose(boxes), [box, box])


BOXES = Boxes(*np.array([(0, 0, 12, 10), (2, 3, 7, 5), (11, 9, 1, 1), (0, 5, 6, 5), (5, 0, 3, 10)], np.int32).T)


def resized(images):
    return compiled(resize_boxes, np.repeat(images, len(BOXES.top), axis=0), BOXES)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("antialias", [False, True])
def test_resizing_agrees_with_torch(channels, antialias):
    torch = pytest.importorskip("torch")
    image = make_images(1, 12, 10, channels)
    for (top, left, height, width), result in zip(np.transpose(BOXES), resized(image), strict=True):
        part = torch.tensor(np.moveaxis(image[:, top : top + height, left : left + width], 3, 1)).float()
        expected = torch.nn.functional.interpolate(part, (12, 10), mode="bilinear", antialias=antialias)
        assert np.abs(np.moveaxis(expected.numpy(), 1, 3)[0] - result).max() <= 0.5 + 1e-4


def test_resizing_agrees_with_pillow():
    image = make_images(1, 12, 10, 3)
    for (top, left, height, width), result in zip(np.transpose(BOXES), resized(image), strict=True):
        part = Image.fromarray(image[0, top : top + height, left : left + width])
        expected = np.asarray(part.resize((10, 12), Image.Resampling.BILINEAR))
        assert np.abs(expected.astype(int) - result).max() <= 1  # Pillow also rounds after the first direction


def test_resizing_the_whole_image_changes_nothing():
    image = make_images(1, 12, 10, 3)
    np.testing.assert_array_equal(resized(image)[0], image[0])


def test_random_resized_crop_is_its_parts():
    images = make_images(6, 12, 10, 3)
    setting = Augment(random_resized_crop=0.2)
    uniform = draw(make_keys(6), setting.random_operations())["random_resized_crop"]
    expected = compiled(resize_boxes, images, compiled(crop_boxes, uniform, 12, 10, 0.2))
    result = apply(setting, images).images
    np.testing.assert_array_equal(result, expected)
    assert (result != images).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_random_erasing(channels):
    height, width, count = 20, 24, 3000
    images = make_images(1, height, width, channels)
    color = np.rint(images[0].mean((0, 1))).astype(np.uint8)
    images[0][(images[0] == color).all(-1)] ^= 128  # so that each erased pixel changes
    color = np.rint(images[0].mean((0, 1))).astype(np.uint8)
    assert not (images[0] == color).all(-1).any()
    results = apply(Augment(random_erasing=0.3), np.repeat(images, count, axis=0)).images
    changed = (results != images).any(-1)
    assert (results[changed] == color).all()
    erased = changed.any((1, 2))
    assert stats.binomtest(int(erased.sum()), count, 0.3).pvalue > 1e-3
    rows, columns = changed.any(2)[erased], changed.any(1)[erased]
    # Only a rectangle: all pixels in the rows and columns that have one, and these are without gaps.
    np.testing.assert_array_equal(changed[erased], rows[:, :, np.newaxis] & columns[:, np.newaxis])
    for lines in (rows, columns):
        assert (np.diff(np.pad(lines, ((0, 0), (1, 1))).astype(int), axis=1) == 1).sum(1).max() == 1
    box_height, box_width = rows.sum(1), columns.sum(1)
    assert ((box_height + 0.5) * (box_width + 0.5) >= 0.02 * height * width).all()
    assert ((box_height - 0.5) * (box_width - 0.5) <= 0.33 * height * width).all()
    assert ((box_height + 0.5) / (box_width - 0.5) >= 0.3).all()
    assert ((box_height - 0.5) / (box_width + 0.5) <= 3.3).all()
    area = box_height * box_width / (height * width)
    assert area.min() < 0.04
    assert area.max() > 0.3


@pytest.mark.parametrize(("probability", "rate"), [(1e-9, 0), (1.0, 1)])
def test_erasing_never_and_always(probability, rate):
    boxes = compiled(erasing_boxes, make_uniform(200, 23), 28, 28, probability)
    assert (boxes.height * boxes.width > 0).mean() == rate


def reference_jitter(image, brightness, contrast, saturation):
    """The formulas of torchvision.transforms.functional in float64, rounded once."""
    pixels = image.astype(np.float64)

    def gray():
        return pixels @ [0.299, 0.587, 0.114] if image.shape[-1] == 3 else pixels[..., 0]

    pixels = np.clip(brightness * pixels, 0, 255)
    pixels = np.clip(contrast * pixels + (1 - contrast) * gray().mean(), 0, 255)
    if image.shape[-1] == 3:
        pixels = np.clip(saturation * pixels + (1 - saturation) * gray()[..., np.newaxis], 0, 255)
    return pixels


FACTORS = np.array([(1, 1, 1), (0.5, 1, 1), (1, 0.3, 1), (1, 1, 0), (1.6, 1.5, 1.7), (0.6, 1.8, 0.4)], np.float32)


@pytest.mark.parametrize("channels", [1, 3])
def test_adjusting_color(channels):
    images = make_images(len(FACTORS), 6, 7, channels)
    results = compiled(adjust_color, images, *FACTORS.T)
    np.testing.assert_array_equal(results[0], images[0])
    for image, factors, result in zip(images, FACTORS, results, strict=True):
        assert np.abs(reference_jitter(image, *factors) - result).max() <= 0.5 + 1e-3


@pytest.mark.parametrize(
    ("place", "enhance"), [(0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)]
)
@pytest.mark.parametrize("factor", [0.0, 0.4, 1.7])
def test_adjusting_color_agrees_with_pillow(place, enhance, factor):
    image = make_images(1, 16, 16, 3)
    factors = np.ones((3, 1), np.float32)
    factors[place] = factor
    result = compiled(adjust_color, image, *factors)[0]
    expected = np.asarray(enhance(Image.fromarray(image[0])).enhance(factor))
    # Pillow also rounds gray values and their mean.
    assert np.abs(expected.astype(int) - result).max() <= 1


def test_random_color_factors():
    images = np.full((2000, 1, 1, 1), 100, np.uint8)  # a single pixel has no contrast and no saturation
    results = apply(Augment(color_jitter=0.4), images).images.reshape(-1)
    assert stats.kstest(results / 100, stats.uniform(0.6, 0.8).cdf).pvalue > 1e-3
    black = apply(Augment(color_jitter=3.0), images).images
    assert black.min() < 10  # at least 0


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 1.0, 4.0, 200.0])
def test_symmetric_beta(alpha):
    numbers = compiled(symmetric_beta, make_uniform(5000, 2), alpha)
    assert ((numbers >= 0) & (numbers <= 1)).all()
    # Near 0 and 1, float32 rounds: with alpha=0.05, a fifth of the numbers to 0 and a fifth to 1.
    edges = np.linspace(0, 1, 101)
    expected = np.diff(stats.beta(alpha, alpha).cdf(edges)) * len(numbers)
    observed = np.histogram(numbers, edges)[0]
    common = expected > 5
    np.testing.assert_allclose(observed[~common].sum(), expected[~common].sum(), atol=30)
    scale = observed[common].sum() / expected[common].sum()
    assert stats.chisquare(observed[common], expected[common] * scale).pvalue > 1e-3
    if alpha >= 0.2:
        assert stats.kstest(numbers, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_symmetric_beta_of_extreme_numbers():
    extremes = np.array([(0, 0), (0, 0.25), (0.5, 0.25), (np.nextafter(np.float32(1), np.float32(0)), 0.5)], np.float32)
    for alpha in (0.01, 1.0, 100.0):
        assert np.isfinite(symmetric_beta(extremes, alpha)).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [6, 7])
def test_mixup(channels, size):
    images = make_images(size, 5, 4, channels)
    labels = np.arange(10, 10 + size, dtype=np.int32)
    result = apply(Augment(mixup=1.0), images, labels=labels)
    partner = [1, 0, 3, 2, 5, 4, 6][:size]
    np.testing.assert_array_equal(result.other_labels, labels[partner])
    weight = result.weight.astype(np.float64).reshape(-1, 1, 1, 1)
    expected = weight * images + (1 - weight) * images[partner]
    assert np.abs(expected - result.images).max() <= 0.5 + 1e-4
    np.testing.assert_array_equal(result.weight[0:6:2], result.weight[1:6:2])


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_weights(alpha):
    weight = apply(Augment(mixup=alpha), np.zeros((4000, 1, 1, 1), np.uint8)).weight
    assert stats.kstest(weight[::2], stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def kept_fraction(image, other, result):
    """The fraction of the image's pixels in the result, whose other pixels are a rectangle of the other image."""
    kept = (result == image).all(-1)
    cut = ~kept
    np.testing.assert_array_equal(result[cut], other[cut])
    np.testing.assert_array_equal(cut, cut.any(1, keepdims=True) & cut.any(0, keepdims=True))
    for lines in (cut.any(0), cut.any(1)):
        assert (np.diff(np.pad(lines, 1).astype(int)) == 1).sum() <= 1
    return np.float32(kept.mean())


@pytest.mark.parametrize("channels", [1, 3])
def test_cutmix(channels):
    size = 401
    images = make_images(size, 9, 14, channels)
    images[::2] |= 1  # so that pixels of partners differ
    images[1::2] &= 254
    result = apply(Augment(cutmix=1.0), images)
    partner = np.minimum(np.arange(size) ^ 1, size - 1)
    np.testing.assert_array_equal(result.other_labels, partner)
    for index in range(size - 1):
        kept = kept_fraction(images[index], images[partner[index]], result.images[index])
        np.testing.assert_allclose(result.weight[index], kept, rtol=1e-6)
    np.testing.assert_array_equal(result.images[-1], images[-1])
    assert len(np.unique(result.weight)) > 30


def test_cutmix_has_the_papers_distribution():
    """``rand_bbox`` of the paper's code in numpy."""
    rng = np.random.default_rng(2)
    ratio = np.sqrt(1 - rng.beta(0.7, 0.7, 3000))
    cut = []
    for size in (20, 30):
        center, half = rng.integers(0, size, 3000), (size * ratio).astype(int) // 2
        cut.append(np.minimum(center + half, size) - np.maximum(center - half, 0))
    expected = 1 - cut[0] * cut[1] / 600
    images = np.zeros((3000, 20, 30, 1), np.uint8)
    weight = compiled(cutmix, images, images, make_uniform(3000, 4), 0.7)[1]
    assert stats.ks_2samp(weight, expected).pvalue > 1e-3


def test_mixup_or_cutmix():
    images = np.zeros((2000, 4, 4, 1), np.uint8)
    images[1::2] = 255
    result = apply(Augment(mixup=50.0, cutmix=1.0), images)
    cut = np.isin(result.images, (0, 255)).all((1, 2, 3))  # weights of mixup are close to 1/2
    np.testing.assert_array_equal(cut[::2], cut[1::2])
    assert stats.binomtest(int(cut[::2].sum()), 1000).pvalue > 1e-3
    mean = result.weight * images[:, 0, 0, 0] + (1 - result.weight) * (255 - images[:, 0, 0, 0])
    assert np.abs(result.images.mean((1, 2, 3)) - mean).max() <= 0.5 + 1e-3


@pytest.mark.parametrize(
    ("setting", "shape", "message"),
    [
        (Augment(shift=8), (9, 8, 1), "cannot shift images of 9x8 pixels by 8: set --shift to at most 7"),
        (Augment(shift=-1), (8, 8, 1), "shift must be at least 0, got -1"),
        (Augment(flip="rnadom"), (8, 8, 1), "unknown flip 'rnadom'"),
        (Augment(random_resized_crop=0.0), (8, 8, 1), "random_resized_crop must be more than 0 and at most 1, got 0"),
        (Augment(random_erasing=1.5), (8, 8, 1), "random_erasing must be from 0 to 1, got 1.5"),
        (Augment(color_jitter=math.nan), (8, 8, 1), "color_jitter must be a number of at least 0, got nan"),
        (Augment(color_jitter=0.1), (8, 8, 4), "color_jitter needs images with 1 or 3 channels, not 4"),
        (Augment(mixup=-0.1), (8, 8, 1), "mixup must be a number of at least 0, got -0.1"),
        (Augment(cutmix=math.inf), (8, 8, 1), "cutmix must be a number of at least 0, got inf"),
    ],
    ids=str,
)
def test_impossible_settings(setting, shape, message):
    images = jax.ShapeDtypeStruct((2, *shape), jnp.uint8)
    labels = jax.ShapeDtypeStruct((2,), jnp.int32)
    with pytest.raises(UsageError) as error:
        jax.eval_shape(setting, images, labels, make_keys(2), jnp.int32(0))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_largest_shift():
    assert apply(Augment(shift=6), make_images(2, 7, 8, 1)).images.shape == (2, 7, 8, 1)
