"""The event files, as read back."""

import dataclasses
import struct
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.report.tensorboard import EventFiles
from cnn_jax.runs.fit import fit, resume
from cnn_jax.training.history import EpochRecord

HISTORY = [
    EpochRecord(n, 15 * (n + 1), 900, 30.0 / (n + 1), 0.6 + n / 10, 1.5 / (n + 1), 0.5 + n / 10, 2.0, 450.0)
    for n in range(3)
]


def continue_run(config, workdir, **options):
    """Resume with all the settings of a config, as the command does."""
    return resume(workdir, **options, **dataclasses.asdict(config))


def crc32c(data):
    """The CRC-32C of RFC 3720, masked as in TFRecord files."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def read_events(path):
    content, events = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        message, end = content[12 : 12 + length], 12 + length
        assert struct.unpack("<II", content[8:12] + content[end : end + 4]) == (crc32c(content[:8]), crc32c(message))
        events.append(Event.FromString(message))
        content = content[end + 4 :]
    return events


def read_scalars(directory):
    """The (step, value) pairs in all event files, by split and tag."""
    scalars = {}
    for path in sorted(directory.rglob("*tfevents*")):
        first, *events = read_events(path)
        assert first.file_version == "brain.Event:2"
        for event in events:
            (value,) = event.summary.value
            scalars.setdefault((path.parent.name, value.tag), []).append((event.step, value.simple_value))
    return scalars


def expected(history, steps_per_epoch):
    figures = {
        ("train", "loss"): [record.loss / steps_per_epoch for record in history],
        ("train", "accuracy"): [record.train_accuracy for record in history],
        ("test", "loss"): [record.test_loss for record in history],
        ("test", "accuracy"): [record.test_accuracy for record in history],
    }
    return {key: [(step, pytest.approx(value)) for step, value in enumerate(values)] for key, values in figures.items()}


def test_each_epoch_can_be_read_immediately(tmp_path):
    with EventFiles(tmp_path / "tensorboard", [], steps_per_epoch=15) as files:
        for n, record in enumerate(HISTORY):
            files.append(record)
            assert read_scalars(tmp_path) == expected(HISTORY[: n + 1], 15)


def test_validation_metrics_instead_of_test_metrics(tmp_path):
    record = dataclasses.replace(
        HISTORY[0], test_loss=None, test_accuracy=None, validation_loss=1.25, validation_accuracy=0.75
    )
    with EventFiles(tmp_path, [record], steps_per_epoch=15):
        scalars = read_scalars(tmp_path)
    assert scalars["validation", "loss"] == [(0, 1.25)]
    assert scalars["validation", "accuracy"] == [(0, 0.75)]
    assert {split for split, _ in scalars} == {"train", "validation"}


def test_resumed_files_contain_each_epoch_once(tmp_path):
    with EventFiles(tmp_path, [], steps_per_epoch=15) as files:
        for record in HISTORY:
            files.append(record)
    other = [dataclasses.replace(record, test_loss=7.0) for record in HISTORY]
    with EventFiles(tmp_path, other[:1], steps_per_epoch=15) as files:  # resumed from an earlier checkpoint
        files.append(other[1])
    assert read_scalars(tmp_path) == expected(other[:2], 15)


def test_wall_times_are_training_times(tmp_path):
    with EventFiles(tmp_path, HISTORY[:2], steps_per_epoch=15) as files:
        files.append(HISTORY[2])
    (path,) = (tmp_path / "test").iterdir()
    dates = [event.wall_time for event in read_events(path)[1::2]]
    assert [later - dates[0] for later in dates] == pytest.approx([0, 2, 4])


def test_write_errors(tmp_path):
    (tmp_path / "tensorboard").touch()
    with pytest.raises(
        CnnJaxError, match=r"cannot write .*tensorboard \(Not a directory\): fix this, then rerun with --resume"
    ):
        EventFiles(tmp_path / "tensorboard", [], steps_per_epoch=15)


@pytest.fixture
def squares(dataset, monkeypatch):
    monkeypatch.setattr(data, "load", lambda config: dataset)
    return Config(epochs=2, batch_size=10, dataset="squares", tensorboard=True)


def test_a_run_writes_its_history(tmp_path, squares):
    fit(dataclasses.replace(squares, epochs=1), tmp_path)
    run = continue_run(squares, tmp_path)
    assert read_scalars(tmp_path / "tensorboard") == expected(run.history, 5)
    continue_run(dataclasses.replace(squares, epochs=3, tensorboard=False), tmp_path)
    run = continue_run(dataclasses.replace(squares, epochs=4), tmp_path)
    assert read_scalars(tmp_path / "tensorboard") == expected(run.history, 5)


def test_off_by_default(tmp_path, squares):
    run = fit(dataclasses.replace(squares, epochs=1, tensorboard=False), tmp_path / "run")
    assert not (run.workdir / "tensorboard").exists()


def test_missing_tensorboardx_is_reported_before_the_run_starts(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # as if not installed
    with pytest.raises(UsageError, match=r"needs the package tensorboardX: pip install -e '\.\[tensorboard\]'"):
        fit(Config(dataset="digits", tensorboard=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()
