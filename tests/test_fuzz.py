"""Damaged, false and hostile files, which fuzzing.py makes, are read or refused."""

import dataclasses
import importlib.util
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cnn_jax.config import Config
from cnn_jax.data import Dataset, Split
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.runs.metadata import FORMAT
from cnn_jax.runs.run import load_run

SCRIPT = Path(__file__).parent / "fuzzing.py"


def load_script():
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    sys.modules["fuzz"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fuzz = load_script()


@pytest.fixture(scope="module", autouse=True)
def no_late_callbacks():
    with fuzz.late_callbacks_ignored():
        yield


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    return fuzz.readers(tmp_path_factory.mktemp("fuzz"))


EXAMPLES = {"images": 300, "labels": 300, "pictures": 300, "weights": 300, "config": 300, "run": 200, "resume": 100}


@pytest.mark.parametrize(
    ("name", "examples"),
    [(name, count // 5) for name, count in EXAMPLES.items()]
    + [pytest.param(name, count, marks=pytest.mark.slow) for name, count in EXAMPLES.items()],
)
def test_files_are_read_or_refused(readers, name, examples):
    tally = fuzz.Tally()
    fuzz.fuzz(readers[name], examples, tally, derandomize=True)
    assert tally.succeeded + tally.refused >= examples
    assert tally.succeeded > 0
    assert tally.refused > 0


def test_other_exceptions_are_raised_and_their_input_is_kept():
    def read(directory):
        if b"\xff" in (directory / "file").read_bytes():
            raise KeyError("a bug")

    tally = fuzz.Tally()
    with pytest.raises(KeyError):
        fuzz.fuzz(fuzz.Reader(fuzz.idx_files(1), read), 1000, tally, derandomize=True)
    assert tally.failing == {"file": b"\xff"}


@pytest.mark.parametrize(
    ("message", "wrong"), [("two\nlines", "two"), ("\x1b[31mred", "red"), ("x" * 1000, "1000 characters")]
)
def test_messages_of_many_lines_or_characters_are_found(message, wrong):
    class UnescapedError(CnnJaxError):
        def __str__(self):
            return message

    def read(directory):
        raise UnescapedError

    with pytest.raises(AssertionError, match=wrong):
        fuzz.fuzz(fuzz.Reader(fuzz.idx_files(1), read), 10, fuzz.Tally(), derandomize=True)


@pytest.mark.parametrize("key", ["learning_rate", "data_dir"])
def test_hostile_settings_are_valid_or_a_one_line_error(tmp_path, key):
    for value in fuzz.HOSTILE_YAML:
        (tmp_path / "config.yaml").write_text(f"{key}: {value}\n", encoding="utf-8")
        try:
            config = Config.from_yaml(tmp_path / "config.yaml")
        except UsageError as error:
            fuzz.check_message(str(error))
        else:
            assert Config(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: !!int ''", "is not valid YAML: string index out of range"),
        ("shuffle: !!bool x", "is not valid YAML: 'x'"),
        ("model: !!timestamp x", "is not valid YAML: 'NoneType' object"),
        ("learning_rate: " + "1:" * 300 + "1.5", "is not valid YAML: int too large"),
        ("<<: {epochs: 1}", "is not valid YAML: could not determine a constructor"),
        (f"epochs: 0x{'f' * 300}", r"epochs must be a positive integer below 2\*\*31, not \d+\.\.\.\d+$"),
        (
            f"epochs: 0x{'f' * 5000}",
            "epochs must be a positive integer .*, not a number of thousands of digits$",
        ),
        (
            f"learning_rate: -0x{'f' * 5000}",
            "must be a positive number .*, not a number of thousands of digits$",
        ),
        (f"dataset: [0x{'f' * 5000}]", "dataset must be a name, not a number of thousands of digits"),
        (f"? 0x{'f' * 5000}\n: 1", "unknown key a number of thousands of digits"),
        (f"seed: {'9' * 4000}", r"seed must be an integer from 0 to 2\*\*32 - 1, not 9{18}\.\.\.9{19}$"),
        (f"model: {'x' * 201}", r"model must be a name, not 'x+\.\.\.x+'$"),
        ('dataset: "a\\nb"', r"dataset must be a name, not 'a\\nb'$"),
        ('data_dir: "a\\0b"', r"data_dir must be a path, not 'a\\x00b'$"),
        ('data_dir: "\\ud800"', r"data_dir must be a path, not '\\ud800'$"),
    ],
)
def test_settings_that_once_raised_other_errors(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        Config.from_yaml(tmp_path / "config.yaml")


def test_nested_merge_keys_take_no_time(tmp_path):
    (tmp_path / "config.yaml").write_text(fuzz.GROWING_YAML, encoding="utf-8")
    began = time.perf_counter()
    with pytest.raises(UsageError, match="is not valid YAML"):
        Config.from_yaml(tmp_path / "config.yaml")
    assert time.perf_counter() - began < 5


@pytest.fixture
def workdir(tmp_path, readers):
    return shutil.copytree(readers["run"].base, tmp_path / "run")


@pytest.fixture
def checkpoint(workdir):
    return workdir / "checkpoints" / str(fuzz.STEP)


def alter(checkpoint, file, **values):
    content = json.loads((checkpoint / file).read_text())
    (checkpoint / file).write_text(json.dumps(content | values))
    fuzz.write_sums(checkpoint)


RECORD = fuzz.RECORD.to_json()
METRICS = fuzz.METADATA.epoch_metrics.to_numbers()
FOREIGN = "were not written by this package"


def as_lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "2\n" * 1000}, rf"of format '2\\n.{{,40}}', and this version of cnn_jax reads format {FORMAT}"),
        ({"image_shape": [24, 24, 1]}, rf"{FOREIGN} \(opt_state.0.mu.fc1.kernel is not float32\[108, 120\]\)"),
        ({"image_shape": [10**6, 10**6, 1]}, rf"{FOREIGN} \(its files are too small for the expected \d+ bytes"),
        ({"image_shape": [16, 16, 2**31]}, FOREIGN),
        ({"image_shape": [16, 16]}, FOREIGN),
        ({"class_names": "abc"}, FOREIGN),
        ({"class_names": [1, 2, 3]}, FOREIGN),
        ({"class_names": ["a"] * 4}, rf"{FOREIGN} \(opt_state.0.mu.out.bias is not float32\[4\]\)"),
        ({"class_names": []}, FOREIGN),
        ({"history": as_lines(RECORD | {"loss": "2.25"})}, FOREIGN),
        ({"history": as_lines(RECORD | {"step": 10**400})}, FOREIGN),
        ({"history": as_lines(RECORD | {"test_loss": 1e308})}, FOREIGN),
        ({"history": [RECORD]}, FOREIGN),
        ({"history": "{"}, FOREIGN),
        ({"history": "[" * 100_000}, FOREIGN),
        ({"config": {"seed": -1}}, FOREIGN),
        ({"config": []}, FOREIGN),
        ({"epoch_metrics": {}}, FOREIGN),
        ({"epoch_seconds": None}, FOREIGN),
        ({"epoch_metrics": METRICS | {"num_correct": 2**31}}, FOREIGN),
        ({"epoch_metrics": METRICS | {"loss": [1.0, 2.0]}}, FOREIGN),
    ],
)
def test_false_metadata_is_refused(workdir, checkpoint, values, message):
    alter(checkpoint, "meta/metadata", **values)
    with pytest.raises(CnnJaxError, match=message):
        fuzz.read_run(workdir)
    if "image_shape" not in values and "class_names" not in values:
        with pytest.raises(CnnJaxError, match=message):
            fuzz.resume_run(workdir)


@pytest.mark.parametrize("history", [[], [RECORD, RECORD], [RECORD | {"step": 3}], [RECORD | {"epoch": 1}]])
def test_history_that_does_not_lead_to_the_step_is_refused(workdir, checkpoint, history):
    alter(checkpoint, "meta/metadata", history=as_lines(*history))
    with pytest.raises(CnnJaxError, match="do not have 2 steps"):
        fuzz.resume_run(workdir)


def test_checkpoint_named_after_another_step_is_refused(workdir, checkpoint):
    checkpoint.rename(checkpoint.with_name("2147483647"))
    for read in (fuzz.read_run, fuzz.resume_run):
        with pytest.raises(CnnJaxError, match="contains the state of another step"):
            read(workdir)


@pytest.mark.parametrize(
    "changes", [{"chunks": [2**29]}, {"shape": [2**29], "chunks": [2**29]}, {"dtype": "<f8"}, {"shape": [5]}]
)
def test_false_array_metadata_is_refused_before_allocating(workdir, checkpoint, changes):
    key = b"params.conv1.bias"
    header = json.loads(fuzz.ocdbt(checkpoint).read(key + b"/.zarray").result().value)
    entries = {key + b"/.zarray": json.dumps(header | changes).encode(), key + b"/0": fuzz.zstd(2**31)}
    for name, content in fuzz.rewritten(checkpoint, entries).items():
        (checkpoint / name).write_bytes(content)
    fuzz.write_sums(checkpoint)
    before = fuzz.peak_memory()
    with pytest.raises(CnnJaxError, match=rf"{FOREIGN} \(params.conv1.bias is not float32\[6\]\)"):
        load_run(workdir)
    assert fuzz.peak_memory() - before < 2**28


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_invalid_metrics_of_orbax_are_an_error(workdir, checkpoint, content):
    (checkpoint / "metrics" / "metrics").write_text(content)
    fuzz.write_sums(checkpoint)
    with pytest.raises(CnnJaxError, match="cannot write a checkpoint to"):
        fuzz.resume_run(workdir)


def test_class_names_stay_on_one_line(workdir, checkpoint):
    alter(checkpoint, "meta/metadata", class_names=["a\nb", "x" * 5000, "c"])
    split = Split(np.zeros((1, 16, 16, 1), np.uint8), np.zeros(1, np.int32))
    with pytest.raises(UsageError, match=r"classes \(a\\nb, x+\.\.\.x+, c\), and other has"):
        load_run(workdir).evaluate(Dataset("other", split, split, ("a", "b", "c")))
