import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.data import Dataset
from cnn_jax.errors import UsageError

IMAGES = np.arange(5 * 4 * 3 * 2, dtype=np.uint8).reshape(5, 4, 3, 2)
LABELS = np.array([0, 1, 1, 0, 2])


def test_from_arrays():
    dataset = Dataset.from_arrays(train=(IMAGES, LABELS), test=(IMAGES[:2], LABELS[:2].astype(np.uint8)))
    assert dataset.name == "arrays"
    assert dataset.class_names == ("0", "1", "2")
    assert dataset.image_shape == (4, 3, 2)
    assert dataset.validation is None
    assert list(dataset.splits) == ["train", "test"]
    assert dataset.train.images is IMAGES
    for split in dataset.splits.values():
        assert split.labels.dtype == np.int32
    np.testing.assert_array_equal(dataset.train.labels, LABELS)


def test_from_arrays_with_everything():
    dataset = Dataset.from_arrays(
        (IMAGES[..., 0], LABELS.tolist()),
        (jnp.asarray(IMAGES[:2, ..., :1]), jnp.asarray(LABELS[:2])),
        validation=(IMAGES[:3, ..., 0], LABELS[:3]),
        class_names=["a", "b", "c", "d"],
        name="mine",
    )
    assert (dataset.name, dataset.class_names) == ("mine", ("a", "b", "c", "d"))
    assert list(dataset.splits) == ["train", "validation", "test"]
    assert [len(split) for split in dataset.splits.values()] == [5, 3, 2]
    assert {split.images.shape[1:] for split in dataset.splits.values()} == {(4, 3, 1)}
    np.testing.assert_array_equal(dataset.train.images[..., 0], IMAGES[..., 0])


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"train": (IMAGES / 255, LABELS)}, "train images must be uint8, from 0 to 255, not float64"),
        ({"test": (IMAGES[0, 0], LABELS)}, "test images must have shape [N, H, W, C] or [N, H, W], not [3, 2]"),
        ({"train": (IMAGES, LABELS / 2)}, "train labels must be integers, not float64"),
        ({"train": (IMAGES, LABELS > 0)}, "train labels must be integers, not bool"),
        ({"test": (IMAGES, LABELS[1:])}, "test labels must have shape [5], one for each image, not [4]"),
        (
            {"test": (IMAGES, np.eye(5, 3, dtype=int))},
            "test labels must have shape [5], one for each image, not [5, 3]",
        ),
        ({"validation": (IMAGES[:0], LABELS[:0])}, "validation images must not be empty, but have shape [0, 4, 3, 2]"),
        ({"train": (IMAGES[:, :0], LABELS)}, "train images must not be empty, but have shape [5, 0, 3, 2]"),
        ({"train": (IMAGES, LABELS - 1)}, "train labels must be counted from 0, but range from -1 to 1"),
        ({"train": (IMAGES, LABELS + 2**40)}, "train labels must be counted from 0, but range from "),
        ({"class_names": ("a", "b")}, "train labels must be below 2, the number of classes, not 2"),
        (
            {"test": (IMAGES[:, :2], LABELS)},
            "test images must have the shape of the train images, (4, 3, 2), not (2, 3, 2)",
        ),
        (
            {"test": (IMAGES[..., 0], LABELS)},
            "test images must have the shape of the train images, (4, 3, 2), not (4, 3, 1)",
        ),
        ({"train": IMAGES}, "train must be a pair of arrays, images and labels"),
        ({"test": (IMAGES,)}, "test must be a pair of arrays, images and labels"),
        ({"test": 3}, "test must be a pair of arrays, images and labels"),
    ],
)
def test_unsuitable_arrays(change, wrong):
    good = {"train": (IMAGES, LABELS), "test": (IMAGES, LABELS)}
    with pytest.raises(UsageError) as caught:
        Dataset.from_arrays(**good | change)
    assert str(caught.value).startswith(wrong)
    assert "\n" not in str(caught.value)
