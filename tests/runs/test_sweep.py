"""Sweeps: members are the runs of their settings, however they are trained, interrupted and resumed."""

import contextlib
import csv
import dataclasses
import json
import re
import shutil
import statistics
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pytest
from helpers import assert_same_outcome, stop_at
from PIL import Image

from cnn_jax.config import Config
from cnn_jax.errors import UsageError
from cnn_jax.report import sweep as report
from cnn_jax.runs import sweep
from cnn_jax.runs.fit import StoppedError
from cnn_jax.runs.grid import Grid
from cnn_jax.runs.members import train_members
from cnn_jax.runs.opening import starting
from cnn_jax.runs.run import load_run
from cnn_jax.runs.sweep import create_sweep, train_sweep
from cnn_jax.runs.sweep_directory import SweepDirectory

CONFIG = Config(epochs=3, batch_size=10, dataset="squares", checkpoint_every=2)
VARIED = {"seed": (3, 5), "learning_rate": (0.01, 0.003)}


@pytest.fixture(scope="module")
def named(dataset):
    return dataclasses.replace(dataset, name="squares")


@pytest.fixture(scope="module")
def swept(named, tmp_path_factory):
    """A finished sweep on two devices; not to be changed."""
    directory = create_sweep(CONFIG, VARIED, tmp_path_factory.mktemp("sweep") / "sweep", dataset=named)
    train_sweep(directory, dataset=named)
    directory.write_results()
    return directory


def test_a_member_is_the_run_of_its_settings(swept, train, tmp_path):
    """To rounding: on a device of its own it sums in another order."""
    for result in swept.results():
        run = train(result.config, tmp_path / result.name)
        member = load_run(swept.member(result.name).path)
        assert member.config == run.config
        assert len(member.history) == len(run.history) == 3
        for ours, theirs in zip(member.history, run.history, strict=True):
            assert (ours.step, ours.total_correct) == (theirs.step, theirs.total_correct)
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), member.state, run.state)
        assert result.summary["test_accuracy"] == run.history[-1].test_accuracy


def test_members_of_one_device_are_vectorized(named, swept, tmp_path):
    """Four members on two devices have the results of two times two, to rounding."""
    with contextlib.ExitStack() as stack:
        trainings = [
            stack.enter_context(starting(result.config, tmp_path / result.name, dataset=named))
            for result in swept.results()
        ]
        try:
            ended = list(train_members(trainings))
        except NotImplementedError:
            pytest.skip("this version of jax does not vectorize the gradient of a convolution")
        assert ended == [(training, None) for training in trainings]
    for training in trainings:
        ours, theirs = (load_run(path) for path in (training.directory.path, member_path(swept, training)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), ours.state, theirs.state)


def member_path(directory, training):
    return directory.member(training.directory.path.name).path


@pytest.mark.parametrize("number", [0, 1, 4, 9])
def test_a_stopped_sweep_resumes_bit_for_bit(swept, named, tmp_path, number):
    directory = create_sweep(CONFIG, VARIED, tmp_path / "sweep", dataset=named)
    with pytest.raises(StoppedError, match=r"continue with python -m cnn_jax.sweep --resume --workdir .*/sweep"):
        train_sweep(directory, dataset=named, stop_requested=stop_at(number))
    results = train_sweep(directory, dataset=named)
    for result in results:
        assert_same_outcome(directory.member(result.name).path, swept.member(result.name).path)


def test_members_an_epoch_apart_resume(swept, named, tmp_path):
    """As after SIGKILL: the newest checkpoint of one member is gone, and the results of all."""
    shutil.copytree(swept.path, tmp_path / "sweep")
    directory = SweepDirectory(tmp_path / "sweep")
    for path in directory.path.glob("members/*/summary.json"):
        path.unlink()
    first = directory.member(directory.results()[0].name)
    newest = max(first.checkpoints.iterdir(), key=lambda path: int(path.name) if path.name.isdecimal() else -1)
    shutil.rmtree(newest)
    for result in train_sweep(directory, dataset=named):
        assert_same_outcome(directory.member(result.name).path, swept.member(result.name).path)


def test_a_finished_sweep_is_not_trained_again(swept, named):
    before = {path: path.stat().st_mtime_ns for path in swept.path.rglob("*")}
    assert all(result.summary for result in train_sweep(swept, dataset=named))
    assert {path: path.stat().st_mtime_ns for path in swept.path.rglob("*")} == before


def test_a_diverging_member_does_not_stop_the_others(swept, named, tmp_path):
    varied = {"learning_rate": (0.01, 1e9), "seed": (3, 5, 6)}
    directory, ended = create_sweep(CONFIG, varied, tmp_path / "sweep", dataset=named), []
    results = train_sweep(directory, dataset=named, on_result=ended.append)
    assert sorted(ended, key=results.index) == results
    assert [result.summary is None for result in results] == [False] * 3 + [True] * 3
    assert all("the loss or the gradient is not finite at step" in result.error for result in results[3:])
    same = {result.config.seed: result for result in swept.results() if result.config.learning_rate == 0.01}
    for result in results[:2]:
        assert result.summary["test_accuracy"] == same[result.config.seed].summary["test_accuracy"]
    assert train_sweep(directory, dataset=named, on_result=pytest.fail) == results  # not attempted again


def test_a_member_that_another_process_trains_is_left_to_it(named, tmp_path):
    directory = create_sweep(CONFIG, {"seed": (3, 5)}, tmp_path / "sweep", dataset=named)
    first, _ = directory.results()
    with starting(first.config, directory.member(first.name).path, dataset=named):
        results = train_sweep(directory, dataset=named)
    assert [result.is_done for result in results] == [False, True]
    assert all(result.summary for result in train_sweep(directory, dataset=named))


def test_early_stopping_members_end_with_their_best_epoch(named, train, tmp_path):
    """A member that has reached its target is as the run, though the other one goes on."""
    config = dataclasses.replace(CONFIG, epochs=6, target_accuracy=0.6)
    directory = create_sweep(config, {"learning_rate": (0.02, 1e-9)}, tmp_path / "sweep", dataset=named)
    results = train_sweep(directory, dataset=named)
    epochs = [len(train(result.config, tmp_path / result.name).history) for result in results]
    assert [result.summary["epochs"] for result in results] == epochs
    assert epochs[0] < epochs[1] == 6


def test_statistics_are_those_of_the_members(swept):
    table = json.loads((swept.path / "results.json").read_text())
    rows = list(csv.DictReader((swept.path / "results.csv").read_text().splitlines()))
    assert table["selection_metric"] == "test_accuracy"
    for combination in table["combinations"]:
        rate = combination["settings"]["learning_rate"]
        values = [float(row["test_accuracy"]) for row in rows if float(row["learning_rate"]) == rate]
        scores = combination["test_accuracy"]
        assert (scores["n"], scores["best"]) == (2, max(values))
        assert scores["mean"] == pytest.approx(statistics.fmean(values))
        assert scores["std"] == pytest.approx(statistics.stdev(values))
    means = [combination["test_accuracy"]["mean"] for combination in table["combinations"]]
    assert means == sorted(means, reverse=True)
    assert [row["member"] for row in rows] == [result.name for result in swept.results()]


def test_combinations_are_chosen_by_validation(named, tmp_path):
    config = dataclasses.replace(CONFIG, validation_fraction=0.3)
    directory = create_sweep(config, {"learning_rate": (1e-9, 0.02), "seed": (3, 5)}, tmp_path / "sweep", dataset=named)
    results = train_sweep(directory, dataset=named)
    best, worst = report.combinations(results, ["learning_rate"])
    assert best.settings == {"learning_rate": 0.02}
    means = [found.statistics("validation_accuracy").mean for found in (best, worst)]
    assert means[0] > means[1]
    header, first, _ = report.as_text(results, ["learning_rate"]).splitlines()
    assert header.split() == ["learning_rate", "validation_accuracy", "test_accuracy", "best", "n", "seconds"]
    assert first.split()[0] == "0.02"


def test_a_directory_in_use_is_refused(swept, named, tmp_path):
    with pytest.raises(UsageError, match="contains a sweep: continue it with --resume"):
        create_sweep(CONFIG, VARIED, swept.path, dataset=named)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is not empty"):
        create_sweep(CONFIG, VARIED, tmp_path, dataset=named)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"settings": {}, "varied": 3}',
        '{"settings": {"epoch": 3}, "varied": {}}',
        '{"settings": {}, "varied": {"learning_rate": ["fast"]}}',
        '{"settings": {}, "varied": {"no": [1]}}',
        "[" * 100_000,
    ],
)
def test_damaged_settings_are_one_line(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(UsageError, match=r"sweep\.json") as error:
        SweepDirectory(tmp_path).results()
    assert len(str(error.value)) < 500


def test_damaged_results_count_as_missing(swept, tmp_path):
    shutil.copytree(swept.path, tmp_path / "sweep")
    directory = SweepDirectory(tmp_path / "sweep")
    summaries = [directory.member(result.name).path / "summary.json" for result in directory.results()]
    for path, content in zip(summaries, ("", "3", '{"test_accuracy": "high"}', '{"test_loss": 1}'), strict=True):
        path.write_text(content)
    assert not any(result.is_done for result in directory.results())


def test_every_combination_is_a_member():
    grid = Grid(CONFIG, {"seed": (1, 2), "model_width": (None, 4), "init_from": ("a/b", "a-b")})
    members = grid.members()
    assert len(members) == 8
    assert {(member.seed, member.model_width, member.init_from) for member in members.values()} == {
        (seed, width, weights) for seed in (1, 2) for width in (None, 4) for weights in ("a/b", "a-b")
    }
    assert all(re.fullmatch(r"[\w.,=+-]{1,110}", name) for name in members)
    assert Grid.from_json(json.loads(json.dumps(grid.to_json())), "file") == grid


@pytest.mark.parametrize(
    ("varied", "message"),
    [
        ({"seed": (1, 2, 1)}, "seed has a value twice: 1, 2, 1"),
        ({"seed": tuple(range(200)), "epochs": tuple(range(1, 101))}, "20000 combinations, more than 10000"),
    ],
)
def test_impossible_grids_are_refused(varied, message):
    with pytest.raises(UsageError, match=message):
        Grid(CONFIG, varied)


def test_what_another_process_has_finished_is_left_alone(named, tmp_path):
    """A process that knows a member as pending finds it finished when its turn comes."""
    directory = create_sweep(CONFIG, {"seed": (3, 5, 6)}, tmp_path / "sweep", dataset=named)
    written = []

    def train_the_rest(result):
        if not written:
            others = [other for other in train_sweep(directory, dataset=named) if other.config.seed == 6]
            written.extend(other.summary for other in others)
            summary = directory.member(others[0].name).path / "summary.json"
            written.append(summary.stat().st_mtime_ns)
        assert result.config.seed != 6

    results = train_sweep(directory, dataset=named, on_result=train_the_rest)
    assert results[2].summary == written[0]
    assert (directory.member(results[2].name).path / "summary.json").stat().st_mtime_ns == written[1]


@pytest.mark.parametrize(
    ("settings", "varied", "message"),
    [
        ({}, {"warmup": ("0 epochs", "3 epochs")}, "the warm-up takes 15 updates, and the whole run 15"),
        (
            {"validation_fraction": 0.2},
            {"accumulate": (1, 100)},
            "--accumulate 100 is more than the 12 steps of the run",
        ),
        ({"patience": 1}, {"seed": (0, 1)}, "--patience needs a validation set"),
        ({"model": "small"}, {"batch_size": (10, 1)}, "needs batches of at least 2 examples"),
    ],
)
def test_members_that_cannot_be_trained_are_refused_at_the_start(named, tmp_path, settings, varied, message):
    config = dataclasses.replace(CONFIG, **settings)
    with pytest.raises(UsageError, match=message):
        create_sweep(config, varied, tmp_path / "sweep", dataset=named)
    assert not (tmp_path / "sweep").exists()


def test_results_with_infinite_losses_and_without_members():
    summaries = [{"test_accuracy": 0.1, "test_loss": loss, "epochs": 1, "train_seconds": 1.0} for loss in (2.0, np.inf)]
    results = [report.Result(str(seed), CONFIG, summary) for seed, summary in enumerate(summaries)]
    (combination,) = report.as_json(results, [])["combinations"]
    assert combination["test_loss"] == {"mean": None, "std": None, "n": 2}
    assert report.as_csv([], ["epochs"]).startswith("member,epochs,seed,test_accuracy,")


def test_a_sweep_of_a_folder_that_moved_is_resumed(tmp_path):
    rng = np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(100 * label, 100 * label + 100, (16, 16), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    config = Config(dataset=f"folder:{tmp_path / 'photos'}", epochs=2, batch_size=4)
    directory = create_sweep(config, {"seed": (0, 1, 2)}, tmp_path / "sweep")
    with pytest.raises(StoppedError):
        train_sweep(directory, stop_requested=stop_at(1))
    (tmp_path / "photos").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="cannot read the folder"):
        train_sweep(directory)
    results = train_sweep(directory, dataset=f"folder:{tmp_path / 'moved'}")
    assert all(result.summary for result in results)


def test_the_number_of_members_on_a_gpu_is_what_its_memory_allows(named, monkeypatch):
    """With a program for two members on each of two devices that takes 200 bytes besides the images."""
    images = named.train.images
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": (images.nbytes + 1000) / 0.8 + 2})
    trainer = SimpleNamespace(
        mesh=SimpleNamespace(size=2, devices=SimpleNamespace(flat=[device])),
        dataset=named,
        config=CONFIG,
        task=None,
        chunk_steps=5,
    )
    analysis = SimpleNamespace(
        argument_size_in_bytes=images.nbytes + 150,
        output_size_in_bytes=100,
        alias_size_in_bytes=100,
        temp_size_in_bytes=50,
    )
    program = mock.Mock(**{"compile.return_value.memory_analysis.return_value": analysis})
    lower = mock.Mock(return_value=program)
    monkeypatch.setattr(sweep, "lower_members", lower)
    assert sweep.max_members(trainer) == 2 * 10
    assert lower.call_args.kwargs["num_members"] == 4
    lower.side_effect = NotImplementedError
    assert sweep.max_members(trainer) == 2
