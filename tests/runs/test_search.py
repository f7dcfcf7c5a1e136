"""Searches: trials are the runs of their settings, ended early, interrupted, and shared by processes."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import assert_same_outcome, stop_at

from cnn_jax.config import Config
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.report import sweep as report
from cnn_jax.runs import search
from cnn_jax.runs.fit import StoppedError, fit
from cnn_jax.runs.opening import starting
from cnn_jax.runs.run import load_run
from cnn_jax.runs.search import create_search, open_study, train_search
from cnn_jax.runs.space import Space
from cnn_jax.runs.sweep_directory import SweepDirectory
from cnn_jax.settings import Range

optuna = pytest.importorskip("optuna")

CONFIG = Config(epochs=2, batch_size=200, dataset="digits", validation_fraction=0.2, seed=3)
VARIED = {"learning_rate": Range(1e-4, 1e-1), "batch_size": Range(200, 300), "optimizer": ("adam", "sgd")}


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A finished search; not to be changed."""
    directory = create_search(CONFIG, VARIED, 4, tmp_path_factory.mktemp("search") / "search")
    train_search(directory, seed=3)
    directory.write_results(search.pictures(directory))
    return directory


def test_trials_are_the_runs_of_their_settings(searched, tmp_path):
    results = searched.results()
    assert [result.name for result in results] == ["trial-0000", "trial-0001", "trial-0002", "trial-0003"]
    for result, trial in zip(results, open_study(searched).trials, strict=True):
        assert trial.params == {name: getattr(result.config, name) for name in VARIED}
        assert 1e-4 <= result.config.learning_rate <= 1e-1
        assert 200 <= result.config.batch_size <= 300
        assert trial.value == load_run(searched.member(result.name).path).history[-1].validation_accuracy
    fit(results[1].config, tmp_path / "run", report=False)
    assert_same_outcome(searched.member("trial-0001").path, tmp_path / "run")


def test_the_results_have_pictures(searched):
    for name in ("accuracy.png", "importances.png", "parallel_coordinates.png"):
        assert (searched.path / name).read_bytes().startswith(b"\x89PNG")
    page = (searched.path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    table = json.loads((searched.path / "results.json").read_text())
    assert table["selection_metric"] == "validation_accuracy"
    assert len(table["combinations"]) == 4


def test_processes_that_ask_at_the_same_time_begin_no_trial_too_many(tmp_path, monkeypatch):
    directory = create_search(CONFIG, VARIED, 3, tmp_path / "search")
    num_begun = search._num_begun

    def slow(study):
        number = num_begun(study)
        time.sleep(0.05)
        return number

    def ask_for_all(study):
        return sum(1 for _ in iter(lambda: search._ask(study, directory, directory.plan()), None))

    monkeypatch.setattr(search, "_num_begun", slow)
    studies = [open_study(directory) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(ask_for_all, studies)) == 3
    assert len(open_study(directory).trials) == 3


def test_a_stopped_trial_is_picked_up(searched, tmp_path):
    """And the trials after it are other ones, because a process that joins draws other numbers."""
    directory = create_search(CONFIG, VARIED, 2, tmp_path / "search")
    with pytest.raises(StoppedError):
        train_search(directory, seed=3, stop_requested=stop_at(2))
    (interrupted,) = open_study(directory).trials
    assert interrupted.state == optuna.trial.TrialState.RUNNING
    results = train_search(directory)
    assert all(result.summary for result in results)
    assert [trial.state.name for trial in open_study(directory).trials] == ["COMPLETE", "COMPLETE"]
    assert_same_outcome(directory.member("trial-0000").path, searched.member("trial-0000").path)


def test_a_trial_of_another_process_is_left_to_it(tmp_path):
    directory = create_search(CONFIG, VARIED, 2, tmp_path / "search")
    trial = open_study(directory).ask(directory.plan().distributions())
    config = search._member(directory.plan(), trial).config
    with starting(config, directory.member("trial-0000").path):
        assert [result.name for result in train_search(directory)] == ["trial-0001"]


def test_trials_below_the_median_are_ended_early(tmp_path, monkeypatch):
    """With the rule applied from the second trial on."""
    pruner = optuna.pruners.MedianPruner
    monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda: pruner(n_startup_trials=1))
    directory = create_search(CONFIG, {"learning_rate": (0.01, 1e-9)}, 2, tmp_path / "search")
    for rate in (0.01, 1e-9):
        open_study(directory).enqueue_trial({"learning_rate": rate})
    results = train_search(directory)
    assert [(result.summary is None, result.is_pruned) for result in results] == [(False, False), (True, True)]
    assert "stopped after epoch 0: its validation accuracy" in results[1].error
    assert [trial.state.name for trial in open_study(directory).trials] == ["COMPLETE", "PRUNED"]
    assert "pruned: 1" in report.as_text(results, ["learning_rate"])


def test_a_diverging_trial_does_not_stop_the_others(tmp_path):
    directory = create_search(CONFIG, {"learning_rate": (1e9, 1e8, 0.01)}, 5, tmp_path / "search")
    results = train_search(directory)
    states = [trial.state.name for trial in open_study(directory).trials]
    assert [state == "FAIL" for state in states] == [result.error is not None for result in results]
    assert len(results) == 5


def test_a_search_without_validation_is_refused(tmp_path):
    config = Config(dataset="digits")
    with pytest.raises(UsageError, match="set --validation-fraction"):
        create_search(config, VARIED, 4, tmp_path / "search")
    assert not (tmp_path / "search").exists()


def test_settings_that_contradict_each_other_are_refused(tmp_path):
    varied = {"optimizer": ("adamw", "adam"), "weight_decay": Range(0.0, 0.1)}
    with pytest.raises(UsageError, match="adam has no weight decay"):
        create_search(CONFIG, varied, 4, tmp_path / "search")


def test_distributions():
    """Logarithmic if the ends differ by a factor of ten."""
    space = Space(CONFIG, {**VARIED, "momentum": Range(0.0, 0.9), "epochs": Range(1, 10)}, 4)
    distributions = optuna.distributions
    assert space.distributions() == {
        "learning_rate": distributions.FloatDistribution(1e-4, 1e-1, log=True),
        "batch_size": distributions.IntDistribution(200, 300),
        "optimizer": distributions.CategoricalDistribution(("adam", "sgd")),
        "momentum": distributions.FloatDistribution(0.0, 0.9),
        "epochs": distributions.IntDistribution(1, 10, log=True),
    }
    assert Space.from_json(json.loads(json.dumps(space.to_json())), "file") == space


@pytest.mark.parametrize("varied", ["3", '{"learning_rate": {"low": 1}}', '{"learning_rate": ["fast"]}', '{"no": [1]}'])
def test_damaged_settings_are_one_line(tmp_path, varied):
    (tmp_path / "sweep.json").write_text(f'{{"settings": {{}}, "varied": {varied}, "trials": 3}}')
    with pytest.raises(UsageError, match=r"sweep\.json"):
        SweepDirectory(tmp_path).plan()


def test_every_trial_has_the_data_of_its_settings(tmp_path):
    directory = create_search(CONFIG, {"validation_fraction": (0.1, 0.4)}, 3, tmp_path / "search")
    for fraction in (0.1, 0.4):
        open_study(directory).enqueue_trial({"validation_fraction": fraction})
    for result in train_search(directory):
        summary = json.loads((directory.member(result.name).path / "summary.json").read_text())
        held_out = summary["examples"]["validation"] / 1437
        assert held_out == pytest.approx(result.config.validation_fraction, abs=0.02)


def test_a_journal_that_was_cut_off_is_repaired(searched, tmp_path):
    """As after a power failure: the study does not know the end of the last trial, whose directory does."""
    shutil.copytree(searched.path, tmp_path / "search")
    directory = SweepDirectory(tmp_path / "search")
    journal = directory.path / search.JOURNAL
    journal.write_bytes(journal.read_bytes()[:-20])
    assert train_search(directory) == searched.results()
    assert [trial.value for trial in open_study(directory).trials] == [
        trial.value for trial in open_study(searched).trials
    ]
    journal.write_bytes(journal.read_bytes() + b"garbage\n")
    with pytest.raises(CnnJaxError, match=r"journal\.log is damaged: start a new search"):
        train_search(directory)
