import pytest

from cnn_jax.config import Config
from cnn_jax.errors import UsageError


def test_round_trip_through_yaml(tmp_path):
    config = Config(
        epochs=3, learning_rate=1e-5, dataset="tfds:mnist", target_accuracy=0.5, seed=7, image_size=(28, 30)
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert Config.from_yaml(tmp_path / "config.yaml") == config


def test_tutorial_preset_is_the_lesson():
    preset = Config.from_yaml("tutorial")
    lesson = Config(dataset="fashion_mnist", epochs=10, batch_size=100, learning_rate=0.01, shuffle=False)
    assert preset == lesson


def test_yaml_scientific_notation_without_a_dot_is_a_number(tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-3\n")
    assert Config.from_yaml(tmp_path / "c.yaml").learning_rate == 0.001


def test_whole_numbers_are_good_rates():
    assert Config(learning_rate=1).learning_rate == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be a finite number above zero, not 0"),
        ({"batch_size": -1}, "batch_size must be a finite number above zero, not -1"),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number above zero"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number above zero, not nan"),
        ({"learning_rate": float("inf")}, "learning_rate must be a finite number above zero, not inf"),
        ({"epochs": 1.5}, "epochs must be a whole number, not 1.5"),
        ({"epochs": True}, "epochs must be a whole number, not True"),
        ({"epochs": "ten"}, "epochs must be a whole number, not 'ten'"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, not 'fast'"),
        ({"shuffle": "yes"}, "shuffle must be true or false, not 'yes'"),
        ({"dataset": None}, "dataset must be text, not None"),
        ({"image_size": (28, 0)}, "image_size must be two numbers from 1 to 10000, not \\(28, 0\\)"),
        ({"image_size": (28, True)}, "image_size must be two whole numbers or nothing, not \\(28, True\\)"),
        ({"image_size": 28}, "image_size must be two whole numbers or nothing, not 28"),
        ({"channels": 2}, "channels must be 1 or 3, not 2"),
        ({"init_from": "a\0b"}, "init_from must be a path"),
        ({"seed": -1}, "seed must be between 0 and 4294967295"),
        ({"target_accuracy": 90}, "target_accuracy is a fraction between 0 and 1, not 90"),
    ],
)
def test_bad_values_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        Config(**settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3\n", "unknown key 'epoch'; did you mean 'epochs'\\?"),
        ("epochs: [\n", "is not a YAML file"),
        ("epochs: ten\n", "c.yaml: epochs must be a whole number, not 'ten'"),
        ("", "holds no settings"),
        ("- epochs\n", "holds no settings"),
        ("!!python/object/apply:os.getcwd []\n", "is not a YAML file"),
        ("3: 4\n", "unknown key 3"),
        ("epochs: 3\nepochs: 4\n", "is not a YAML file: a key stands there twice .* line 1"),
        ("epochs: 2026-13-41\n", "is not a YAML file"),
        (f"epochs: {'9' * 5000}\n", "is not a YAML file"),
        (f"epochs: {'[' * 5000}\n", "is not a YAML file"),
        ("epochs: 1 #" + "x" * 100_000, "holds no settings"),
        ("a: &a [1,1]\nb: &b [*a,*a]\nepochs: [" + "*b," * 500 + "]\n", "unknown key 'a'"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        Config.from_yaml(tmp_path / "c.yaml")
    assert "\n" not in str(error.value)


def test_unknown_preset_is_suggested():
    with pytest.raises(UsageError, match="did you mean 'tutorial'\\?; presets: tutorial"):
        Config.from_yaml("tutorail")


def test_a_directory_of_that_name_does_not_hide_a_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tutorial").mkdir()
    assert Config.from_yaml("tutorial").dataset == "fashion_mnist"


def test_missing_file_is_named():
    with pytest.raises(UsageError, match=r"cannot read the config nowhere/c\.yaml: No such file"):
        Config.from_yaml("nowhere/c.yaml")
