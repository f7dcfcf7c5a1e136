import importlib.util
import io
import json
import sys

import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image
from tensorflow_datasets import features as kinds

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.data import tfds
from cnn_jax.data.statistics import mean_and_std
from cnn_jax.data.streamed import StreamedImages
from cnn_jax.errors import CnnJaxError, UsageError

CLASSIFIED = {
    "picture": kinds.Image(shape=(None, None, 3)),
    "kind": kinds.ClassLabel(names=["a", "b"]),
}


def load(name, directory, **settings):
    return tfds.load(name, directory, Config(**settings))


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def example(index, size=(5, 4), **others):
    pixels = np.full((*size, 3), index, np.uint8)
    pixels[0, 0] = 1, 2, 3
    return {"picture": png(pixels), "kind": index % 2, **others}


def builder_class(name, splits, features=None, supervised_keys=("picture", "kind")):
    """A dataset that can be prepared without TensorFlow, because its images are PNG files."""

    def info(self):
        return tensorflow_datasets.core.DatasetInfo(
            builder=self,
            features=tensorflow_datasets.features.FeaturesDict(features or CLASSIFIED),
            supervised_keys=supervised_keys,
        )

    def split_generators(self, download_manager):
        return {split: enumerate(examples) for split, examples in splits.items()}

    # _generate_examples is abstract, but not used here.
    members = {
        "VERSION": tensorflow_datasets.core.Version("1.0.0"),
        "__module__": __name__,
        "_info": info,
        "_split_generators": split_generators,
        "_generate_examples": lambda self: iter(()),
    }
    return type(name, (tensorflow_datasets.core.GeneratorBasedBuilder,), members)


def prepare(directory, splits, **options):
    """Prepare a dataset that is not registered, so that only its files are known."""
    tensorflow_datasets.disable_progress_bar()
    with tensorflow_datasets.core.registered.skip_registration():
        builder = builder_class("Shapes", splits, **options)(data_dir=directory)
    builder.download_and_prepare(file_format="array_record")
    return directory / "shapes" / "1.0.0"


@pytest.fixture
def tensorflow(monkeypatch):
    """Pretends that TensorFlow is installed, or that it is not."""

    def say(installed):
        find = importlib.util.find_spec

        def found(name, *rest):
            return (object() if installed else None) if name == "tensorflow" else find(name, *rest)

        monkeypatch.setattr(importlib.util, "find_spec", found)

    return say


def test_train_and_test(tmp_path, capfd, monkeypatch):
    examples = {"validation": [example(99)], "test": map(example, range(20, 23)), "train": map(example, range(10))}
    prepare(tmp_path, examples)
    capfd.readouterr()
    dataset = load("shapes", tmp_path)
    assert dataset.name == "tfds:shapes"
    assert dataset.class_names == ("a", "b")
    assert dataset.train.images.shape == (10, 5, 4, 3)
    assert dataset.train.images.dtype == np.uint8
    assert dataset.train.labels.dtype == np.int32
    assert sorted(indices(dataset.train)) == list(range(10))
    np.testing.assert_array_equal(dataset.train.labels, np.array(indices(dataset.train)) % 2)
    assert (dataset.train.images[:, 0, 0] == [1, 2, 3]).all()
    assert sorted(dataset.test.images[:, 1, 1, 0]) == [20, 21, 22]
    assert capfd.readouterr() == ("", "")


def indices(split):
    return split.images[:, 1, 1, 0].tolist()


@pytest.mark.parametrize("settings", [{}, {"validation_fraction": 0.2, "split_seed": 1}])
@pytest.mark.parametrize("test", [range(0), range(20, 26)])
def test_images_that_are_kept_and_decoded_whenever_they_are_used(tmp_path, own_cache, settings, test):
    splits = {"train": map(example, range(20))} | ({"test": map(example, test)} if test else {})
    prepare(tmp_path, splits)
    kept, again = (load("shapes", tmp_path, **settings) for _ in range(2))
    streamed = load("shapes", tmp_path, cache_limit=0, **settings)
    for name, split in kept.splits.items():
        assert type(split.images) is type(again.splits[name].images) is np.ndarray
        assert isinstance(streamed.splits[name].images, StreamedImages)
        np.testing.assert_array_equal(split.images, np.asarray(streamed.splits[name].images))
        np.testing.assert_array_equal(split.labels, streamed.splits[name].labels)
        np.testing.assert_array_equal(split.labels, np.array(indices(split)) % 2)
    assert kept.sha256 == again.sha256 == streamed.sha256
    assert mean_and_std(kept.train.images) == mean_and_std(streamed.train.images)


def test_kept_images_are_not_decoded_again(tmp_path, own_cache, monkeypatch):
    prepare(tmp_path, {"train": map(example, range(20))})
    expected = load("shapes", tmp_path)
    monkeypatch.setattr(kinds.Image, "decode_example_np", None)
    assert load("shapes", tmp_path).sha256 == expected.sha256


def test_its_own_validation_split(tmp_path):
    prepare(
        tmp_path,
        {
            "train": map(example, range(10)),
            "validation": map(example, range(20, 22)),
            "test": map(example, range(30, 33)),
        },
    )
    dataset = load("shapes", tmp_path)
    assert {name: sorted(indices(split)) for name, split in dataset.splits.items()} == {
        "train": list(range(10)),
        "validation": [20, 21],
        "test": [30, 31, 32],
    }
    config = Config(dataset="tfds:shapes", data_dir=str(tmp_path), validation_fraction=0.5)
    with pytest.raises(UsageError, match=r"^tfds:shapes has its own validation split: leave out validation_fraction$"):
        data.load(config)


def test_a_validation_split_is_never_the_test_split(tmp_path):
    prepare(tmp_path, {"train": map(example, range(20)), "validation": map(example, range(20, 22))})
    dataset = load("shapes", tmp_path)
    assert sorted(indices(dataset.validation)) == [20, 21]
    assert sorted(indices(dataset.train) + indices(dataset.test)) == list(range(20))
    assert np.bincount(dataset.test.labels).tolist() == [2, 2]
    assert indices(load("shapes", tmp_path).test) == indices(dataset.test)
    assert indices(load("shapes", tmp_path, split_seed=1).test) != indices(dataset.test)


def test_a_fifth_is_held_out_if_there_is_only_train(tmp_path):
    prepare(tmp_path, {"train": map(example, range(20))})
    first, second = (load("shapes", tmp_path) for _ in range(2))
    assert np.bincount(first.test.labels).tolist() == [2, 2]
    assert np.bincount(first.train.labels).tolist() == [8, 8]
    assert sorted(indices(first.train) + indices(first.test)) == list(range(20))
    np.testing.assert_array_equal(first.test.images, second.test.images)


def test_features_found_without_supervised_keys(tmp_path):
    features = CLASSIFIED | {"caption": kinds.Text()}
    examples = [example(index, caption="text") for index in range(10)]
    prepare(tmp_path, {"train": examples}, features=features, supervised_keys=None)
    assert len(load("shapes", tmp_path).train) == 8


def test_features_chosen_by_supervised_keys(tmp_path):
    features = {"color": kinds.ClassLabel(num_classes=9)} | CLASSIFIED
    prepare(tmp_path, {"train": [example(index, color=7) for index in range(10)]}, features=features)
    dataset = load("shapes", tmp_path)
    assert dataset.class_names == ("a", "b")
    assert sorted(dataset.test.labels) == [0, 1]


@pytest.mark.parametrize(
    ("features", "supervised_keys", "extra"),
    [
        (
            {
                "kind": kinds.ClassLabel(num_classes=2),
                "text": kinds.Text(),
            },
            ("text", "kind"),
            "text",
        ),
        (CLASSIFIED | {"other": kinds.ClassLabel(num_classes=9)}, None, "other"),
        (
            CLASSIFIED | {"picture": kinds.Image(shape=(None, None, 1), dtype=np.uint16)},
            None,
            "kind",
        ),
        (
            {"picture": kinds.Image(), "text": kinds.Text()},
            ("picture", "text"),
            "text",
        ),
    ],
)
def test_not_one_image_with_one_class(tmp_path, features, supervised_keys, extra):
    whole = example(1) | {extra: "text" if extra == "text" else 1}
    examples = [{key: whole[key] for key in features}]
    prepare(tmp_path, {"train": examples}, features=features, supervised_keys=supervised_keys)
    with pytest.raises(UsageError, match="tfds:shapes is not a dataset of 8-bit images with one class each"):
        load("shapes", tmp_path)


@pytest.mark.parametrize(
    ("splits", "wrong"),
    [
        ({"train": [example(0), example(1, (5, 5))]}, r"train split of tfds:shapes has images of different shapes"),
        ({"train": [example(0)], "test": [example(1) | {"kind": -1}]}, "test split of .* without a label"),
        ({"train": [example(0), {"picture": b"no image", "kind": 0}]}, "train split of .* cannot be read"),
        ({"unsupervised": [example(0)]}, "has no train split, only unsupervised"),
        ({"train": [example(0), example(1)]}, "too few different images to hold a test split out"),
    ],
)
def test_unsuitable_datasets(tmp_path, splits, wrong):
    prepare(tmp_path, splits)
    with pytest.raises(UsageError, match=wrong) as caught:
        load("shapes", tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_records(tmp_path):
    folder = prepare(tmp_path, {"train": map(example, range(10))})
    records = next(folder.glob("*train*"))
    content = bytearray(records.read_bytes())
    content[100:120] = bytes(20)
    records.write_bytes(content)
    with pytest.raises(UsageError, match=r"train split of tfds:shapes cannot be read: .*; prepare it again"):
        load("shapes", tmp_path)


def test_another_file_format(tmp_path):
    info = prepare(tmp_path, {"train": map(example, range(10))}) / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UsageError, match=f"in {info.parent} has the format tfrecord, not array_record: prepare it"):
        load("shapes", tmp_path)


def test_not_prepared_and_no_tensorflow(tmp_path, tensorflow, capfd, caplog):
    tensorflow(False)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[tfds\]'") as caught:
        load("cifar10", tmp_path)
    assert str(tmp_path / "cifar10") in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_prepared_if_necessary(tmp_path, tensorflow, monkeypatch, capfd):
    tensorflow(True)
    builder_class("ShapesPreparedAtNeed", {"train": map(example, range(10))})
    dataset = load("shapes_prepared_at_need", tmp_path)
    assert len(dataset.train) == 8
    assert list((tmp_path / "shapes_prepared_at_need" / "1.0.0").glob("*.array_record*"))
    out, err = capfd.readouterr()
    assert out == ""
    assert "examples/s" not in err


def test_preparation_that_fails(tmp_path, tensorflow):
    tensorflow(True)

    def broken():
        yield example(0)
        raise RuntimeError("the archive is\nbroken")

    builder_class("ShapesThatFail", {"train": broken()})
    with pytest.raises(CnnJaxError, match=r"tfds:shapes_that_fail cannot be prepared: .*the archive is") as caught:
        load("shapes_that_fail", tmp_path)
    assert caught.value.exit_status == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("cifer10", "has no dataset 'cifer10'; did you mean 'cifar10'?"),
        ("emnist/lettrs", "tfds:emnist/lettrs cannot be used: BuilderConfig lettrs not found"),
        ("cifar10:0.0.1", "Dataset cifar10 cannot be loaded at version 0.0.1, only"),
        ("coco", "tfds:coco "),  # requires TensorFlow to be looked up
        ("imdb_reviews", "tfds:imdb_reviews is not a dataset of 8-bit images with one class each"),
    ],
)
def test_unsuitable_names(tmp_path, name, wrong, capfd):
    with pytest.raises(UsageError) as caught:
        load(name, tmp_path)
    assert wrong in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().out == ""


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """The name of a feature in a module that can be imported, but must not be."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "foreign_features.py").write_text("Feature = None")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield "foreign_features.Feature"
    sys.modules.pop("foreign_features", None)


IMAGE = "tensorflow_datasets.core.features.image_feature.Image"
DICT = "tensorflow_datasets.core.features.features_dict.FeaturesDict"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content, foreign: content.replace(IMAGE, foreign),
        lambda content, foreign: content.replace(DICT, foreign),
        lambda content, foreign: content.replace(f'"pythonClassName": "{IMAGE}"', f'"python_class_name": "{foreign}"'),
        lambda content, foreign: json.dumps({"type": foreign, "content": {}}),
        lambda content, foreign: json.dumps({"type": DICT, "content": {"x": {"type": foreign, "content": {}}}}),
        lambda content, foreign: json.dumps(
            {"pythonClassName": DICT, "jsonFeature": {"json": json.dumps({"x": {"type": foreign, "content": {}}})}}
        ),
    ],
)
@pytest.mark.parametrize("name", ["shapes", "shapes:1.0.0", "Shapes"])
def test_features_of_other_modules_are_not_imported(tmp_path, foreign, spoil, name):
    features = prepare(tmp_path / "data", {"train": map(example, range(10))}) / "features.json"
    content = features.read_text()
    features.write_text(spoil(content, foreign))
    assert features.read_text() != content
    with pytest.raises(UsageError) as caught:
        load(name, tmp_path / "data")
    assert str(caught.value).startswith(
        f"{features} names 'foreign_features.Feature', which is not a feature of tensorflow-datasets"
    )
    assert "foreign_features" not in sys.modules


def test_features_in_other_directories(tmp_path, foreign):
    folder = prepare(tmp_path / "data", {"train": map(example, range(10))})
    features = folder / "features.json"
    features.write_text(features.read_text().replace(IMAGE, foreign))
    folder.rename(tmp_path / "1.0.0")
    (tmp_path / "data" / "shapes" / "1.0.0").symlink_to(tmp_path / "1.0.0")
    with pytest.raises(UsageError, match=r"names 'foreign_features\.Feature'"):
        load("shapes", tmp_path / "data")
    (tmp_path / "data" / "shapes" / "1.0.0").unlink()
    (tmp_path / "data" / "shapes" / ".config").mkdir()
    (tmp_path / "data" / "shapes" / ".config" / "metadata.json").write_text('{"default_config_name": "../.."}')
    with pytest.raises(UsageError, match=r"'../..' is not the name of a config; prepare it again"):
        load("shapes", tmp_path / "data")
    assert "foreign_features" not in sys.modules


def test_the_module_of_a_dataset_is_not_imported(tmp_path, foreign):
    info = prepare(tmp_path / "data", {"train": map(example, range(10))}) / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"moduleName": "foreign_features"}))
    assert len(load("shapes", tmp_path / "data").train) == 8
    assert "foreign_features" not in sys.modules


@pytest.mark.parametrize("content", ["", "[", "[" * 100_000, "\xff", '{"a": ' * 50_000])
def test_features_that_cannot_be_read(tmp_path, content):
    features = prepare(tmp_path, {"train": map(example, range(10))}) / "features.json"
    features.write_bytes(content.encode("latin-1"))
    with pytest.raises(UsageError) as caught:
        load("shapes", tmp_path)
    assert str(caught.value).startswith("tfds:shapes cannot be ")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "name",
    ["../shapes", "/etc/passwd", "shapes/../../etc", "huggingface:shapes", "shapes/data_dir=elsewhere", "", "a\n"],
)
def test_malformed_names(tmp_path, name):
    with pytest.raises(UsageError, match="is not of the form tfds:NAME, tfds:NAME/CONFIG or tfds:NAME:VERSION"):
        load(name, tmp_path)
