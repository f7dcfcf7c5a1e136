"""The content of ``summary.json``."""

import dataclasses
import datetime
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import CONFIG

from cnn_jax.processors import cpu_model
from cnn_jax.report.page import save_page
from cnn_jax.runs.run import load_run
from cnn_jax.runs.summary import summarize
from cnn_jax.training.evaluation import Score
from cnn_jax.training.history import EpochRecord


@pytest.fixture
def history():
    """Epochs of which the third is the best: the later one of two with the same accuracy."""
    epoch = EpochRecord(0, 5, 40, 3.0, 0.9, None, None, 2.0, 24.0, 0.5, validation_loss=0.5)
    return [
        dataclasses.replace(epoch, epoch=n, step=5 * (n + 1), validation_accuracy=accuracy)
        for n, accuracy in enumerate((0.5, 0.8, 0.8, 0.7))
    ]


@pytest.fixture
def summarized(dataset, history):
    def summarized(devices):
        return summarize(
            CONFIG,
            history,
            dataset,
            num_parameters=1234,
            test_score=Score(0.25, 0.75),
            compile_seconds=1.5,
            devices=devices,
        )

    return summarized


def test_results_sizes_and_times(summarized):
    summary = json.loads(json.dumps(summarized(jax.devices())))
    now = datetime.datetime.now(datetime.UTC)
    date = datetime.datetime.fromisoformat(summary.pop("date"))
    assert abs(now - date) < datetime.timedelta(minutes=5)  # aware of its time zone
    assert summary.pop("versions").keys() == {"python", "jax", "jaxlib", "flax", "optax"}
    assert summary.pop("cpu_count") >= 1
    assert summary == {
        "test_accuracy": 0.75,
        "test_loss": 0.25,
        "validation_accuracy": 0.7,
        "validation_loss": 0.5,
        "best_epoch": 2,
        "best_accuracy": 0.8,
        "epochs": 4,
        "steps": 20,
        "train_seconds": 8.0,
        "input_wait_seconds": 2.0,
        "compile_seconds": 1.5,
        "dataset": "squares",
        "image_shape": [16, 16, 1],
        "examples": {"train": 47, "test": 23},
        "num_parameters": 1234,
        "backend": "cpu",
        "device": cpu_model(),
        "device_count": 2,
        "process_count": 1,
    }


def test_accelerators_are_named_by_their_kind(summarized):
    gpus = [
        SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", process_index=i // 2) for i in range(4)
    ]
    summary = summarized(gpus)
    assert (summary["backend"], summary["device_count"], summary["process_count"]) == ("gpu", 4, 2)
    assert summary["device"] == "NVIDIA H100 80GB HBM3"


def test_a_run_writes_it(uninterrupted):
    summary = json.loads((uninterrupted / "summary.json").read_text())
    run = load_run(uninterrupted)
    accuracies = [record.test_accuracy for record in run.history]
    assert (summary["best_accuracy"], summary["best_epoch"]) == max((a, n) for n, a in enumerate(accuracies))
    assert summary["num_parameters"] == sum(array.size for array in jax.tree.leaves(run.state.params)) > 1000


def test_the_report_can_show_it(tmp_path, summarized, history, dataset):
    save_page(
        tmp_path / "report.html",
        config=CONFIG,
        history=history,
        steps_per_epoch=5,
        dataset=dataset,
        logits=np.eye(3)[dataset.test.labels],
        test_loss=0.1,
        num_parameters=1234,
        summary=summarized(jax.devices()),
    )
    assert cpu_model() in (tmp_path / "report.html").read_text(encoding="utf-8")
