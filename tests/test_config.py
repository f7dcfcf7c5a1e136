import dataclasses
import re

import pytest

from cnn_jax.config import (
    MAY_CHANGE,
    PRESETS,
    AugmentationConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from cnn_jax.errors import UsageError
from cnn_jax.settings import InvalidSettingError
from cnn_jax.training.loop import create_task


def test_round_trip_through_yaml(tmp_path):
    config = Config(
        epochs=3, learning_rate=1e-5, dataset="tfds:mnist", target_accuracy=0.5, seed=7, image_size=(28, 30)
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert Config.from_yaml(tmp_path / "config.yaml") == config


def test_a_config_is_the_config_of_each_topic():
    topics = (DataConfig, ModelConfig, AugmentationConfig, OptimizerConfig, TrainingConfig)
    fields = [field.name for topic in topics for field in dataclasses.fields(topic)]
    assert [field.name for field in dataclasses.fields(Config)] == fields
    assert isinstance(Config(), topics)


def test_settings_that_a_resumed_run_may_change():
    assert {
        "epochs",
        "patience",
        "cache_limit",
        "target_accuracy",
        "data_dir",
        "skip_unreadable",
        "checkpoint_every",
        "tensorboard",
    } == MAY_CHANGE


def test_tutorial_preset():
    preset = Config.from_yaml("tutorial")
    expected = Config(
        dataset="fashion_mnist",
        epochs=10,
        batch_size=100,
        learning_rate=0.01,
        shuffle=False,
        normalize=False,
        precision="float32",
    )
    assert preset == expected


def test_none_unsets_a_setting_of_a_preset():
    assert dataclasses.replace(Config.from_yaml("best"), model_depth="none", clip_norm="none") == dataclasses.replace(
        Config.from_yaml("best"), model_depth=None, clip_norm=None
    )
    with pytest.raises(InvalidSettingError):
        Config(epochs="none")


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.iterdir()))
def test_presets_describe_a_task(preset):
    """Settings that exist, do not contradict each other, and say in the first lines what they are for."""
    assert create_task(Config.from_yaml(preset), num_classes=10, steps_per_epoch=100).model.NAME
    assert (PRESETS / f"{preset}.yaml").read_text(encoding="utf-8").startswith("# ")


def test_yaml_scientific_notation_without_a_dot_is_a_number(tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-3\n")
    assert Config.from_yaml(tmp_path / "c.yaml").learning_rate == 0.001


def test_values_are_converted_to_the_annotated_types():
    config = Config(learning_rate=1, epochs="3", image_size=[28, 30], shuffle="false")
    assert (config.learning_rate, config.epochs, config.image_size, config.shuffle) == (1.0, 3, (28, 30), False)
    assert type(config.learning_rate) is float


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be a positive integer below 2**31, not 0"),
        ({"epochs": 2**31}, "epochs must be a positive integer below 2**31, not 2147483648"),
        ({"epochs": 1.5}, "epochs must be a positive integer below 2**31, not 1.5"),
        ({"epochs": True}, "epochs must be a positive integer below 2**31, not True"),
        ({"epochs": "ten"}, "epochs must be a positive integer below 2**31, not 'ten'"),
        ({"epochs": None}, "epochs must be a positive integer below 2**31, not None"),
        ({"batch_size": -1}, "batch_size must be a positive integer below 2**31, not -1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be a positive integer below 2**31, not 0"),
        ({"learning_rate": 0.0}, "learning_rate must be a positive number below 2**31, not 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a positive number below 2**31, not nan"),
        ({"learning_rate": float("inf")}, "learning_rate must be a positive number below 2**31, not inf"),
        ({"learning_rate": "fast"}, "learning_rate must be a positive number below 2**31, not 'fast'"),
        ({"shuffle": "yes"}, "shuffle must be true or false, not 'yes'"),
        ({"dataset": None}, "dataset must be a name, not None"),
        ({"dataset": 5}, "dataset must be a name, not 5"),
        ({"image_size": (28, 0)}, "image_size must be two integers from 1 to 10000, not (28, 0)"),
        ({"image_size": (28, True)}, "image_size must be two integers from 1 to 10000, not (28, True)"),
        ({"image_size": 28}, "image_size must be two integers from 1 to 10000, not 28"),
        ({"validation_fraction": 1}, "validation_fraction must be at least 0 and less than 1, not 1"),
        ({"split_seed": 2**32}, "split_seed must be an integer from 0 to 2**32 - 1, not 4294967296"),
        ({"channels": 2}, "channels must be 1 or 3, not 2"),
        ({"init_from": "a\0b"}, "init_from must be a path, not 'a\\x00b'"),
        ({"seed": -1}, "seed must be an integer from 0 to 2**32 - 1, not -1"),
        ({"target_accuracy": 90}, "target_accuracy must be greater than 0 and at most 1, not 90"),
    ],
)
def test_invalid_values_are_errors(settings, message):
    with pytest.raises(InvalidSettingError, match=f"^{re.escape(message)}$"):
        Config(**settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3\n", "unknown key 'epoch'; did you mean 'epochs'\\?"),
        ("epochs: [\n", "is not valid YAML"),
        ("epochs: ten\n", "c.yaml: epochs must be a positive integer below 2\\*\\*31, not 'ten'"),
        ("", "has no settings"),
        ("- epochs\n", "has no settings"),
        ("!!python/object/apply:os.getcwd []\n", "is not valid YAML"),
        ("3: 4\n", "unknown key 3"),
        ("epochs: 3\nepochs: 4\n", "is not valid YAML: duplicate key .* line 1"),
        ("epochs: 2026-13-41\n", "is not valid YAML"),
        (f"epochs: {'9' * 5000}\n", "is not valid YAML"),
        (f"epochs: {'[' * 5000}\n", "is not valid YAML"),
        ("epochs: 1 #" + "x" * 100_000, "is too long for a config: more than 100000 bytes"),
        ("a: &a [1,1]\nb: &b [*a,*a]\nepochs: [" + "*b," * 500 + "]\n", "unknown key 'a'"),
    ],
)
def test_invalid_files_are_one_line_errors(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        Config.from_yaml(tmp_path / "c.yaml")
    assert "\n" not in str(error.value)


def test_unknown_preset_suggests_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'tutorial'\\?; presets: best, cpu, fast, finetune, tutorial"):
        Config.from_yaml("tutorail")


def test_a_directory_of_the_same_name_does_not_hide_a_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tutorial").mkdir()
    assert Config.from_yaml("tutorial").dataset == "fashion_mnist"


def test_missing_file_is_an_error_that_names_it():
    with pytest.raises(UsageError, match=r"cannot read the config nowhere/c\.yaml: No such file"):
        Config.from_yaml("nowhere/c.yaml")
