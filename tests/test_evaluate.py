"""``python -m cnn_jax.evaluate``: its text, JSON, predictions, report and warnings."""

import csv
import dataclasses
import errno
import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from cnn_jax import cli, data, evaluate
from cnn_jax.config import Config
from cnn_jax.data import Dataset, Split
from cnn_jax.runs.fit import fit


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """The data, and a run that is wrong about some of the test images because their labels are."""
    labels = np.where(np.arange(23) % 4, dataset.test.labels, (dataset.test.labels + 1) % 3).astype(np.int32)
    dataset = dataclasses.replace(dataset, test=Split(dataset.test.images, labels))
    workdir = tmp_path_factory.mktemp("run") / "run"
    return dataset, fit(Config(epochs=3, batch_size=10, dataset="squares", seed=3), workdir, dataset=dataset)


@pytest.fixture
def loaded(trained, monkeypatch):
    """What ``data.load`` returns for names that it does not know; initially the data that the run was trained on."""
    loaded = {"squares": trained[0]}
    load = data.load
    monkeypatch.setattr(data, "load", lambda config: loaded.get(config.dataset) or load(config))
    return loaded


@pytest.fixture
def call(trained, loaded, monkeypatch, capsys):
    """Run the command; returns its exit status, its standard output and its standard error."""

    def call(*words):
        monkeypatch.setattr("sys.argv", ["evaluate", str(trained[1].workdir), *map(str, words)])
        status = cli.run(evaluate.main)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def expected(trained):
    """The labels and the probabilities that the run predicts for the test images."""
    dataset, run = trained
    probabilities = run.predict(dataset.test.images)
    assert 0 < np.mean(probabilities.argmax(axis=-1) == dataset.test.labels) < 1
    return dataset.test.labels, probabilities


def put(root, split, names):
    """Write images as files of a folder of classes; returns their names within it."""
    files = []
    for index, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
        (root / names[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(root / names[label] / f"{index}.png")
        files.append(f"{names[label]}/{index}.png")
    return files


# --json


def test_json_agrees_with_scikit_learn(call, trained, expected):
    labels, probabilities = expected
    predictions = probabilities.argmax(axis=-1)
    status, out, err = call("--json")
    assert (status, err, out.count("\n")) == (0, "", 1)
    result = json.loads(out)
    assert (result["dataset"], result["step"], result["examples"]) == ("squares", 15, 23)
    assert result["test_accuracy"] == np.mean(predictions == labels)
    losses = -np.log(probabilities[np.arange(23), labels].astype(float))
    assert result["test_loss"] == pytest.approx(losses.mean(), rel=1e-5)
    scores = np.transpose(precision_recall_fscore_support(labels, predictions, zero_division=0))
    keys = ("precision", "recall", "f1", "support")
    for name, entry, row in zip(trained[1].class_names, result["classes"], scores, strict=True):
        assert entry == {"name": name, **dict(zip(keys, row, strict=True))}
    macro = np.mean(scores[:, :3], axis=0)
    assert result["averages"]["macro"] == pytest.approx(dict(zip(keys[:3], macro, strict=True)))
    assert result["confusion_matrix"] == confusion_matrix(labels, predictions).tolist()
    assert sum(map(sum, result["confusion_matrix"])) == 23


def test_text_shows_the_numbers_of_the_json(call):
    result = json.loads(call("--json")[1])
    first, *lines = call()[1].splitlines()
    assert first == (
        f"dataset: squares step: 15 test_accuracy: {result['test_accuracy']:.4f} "
        f"test_loss: {result['test_loss']:.4f} examples: 23"
    )
    rows = {line.split()[0]: line.split()[1:] for line in lines if "predicted as" not in line and line}
    for entry in result["classes"]:
        assert rows[entry["name"]] == [
            *(f"{entry[key]:.4f}" for key in ("precision", "recall", "f1")),
            str(entry["support"]),
        ]


def test_json_of_a_loss_that_is_not_finite(call, monkeypatch):
    original = evaluate._json
    monkeypatch.setattr(
        evaluate, "_json", lambda run, dataset, result: original(run, dataset, dataclasses.replace(result, loss=np.inf))
    )
    assert json.loads(call("--json")[1], parse_constant=pytest.fail)["test_loss"] is None


# --predictions


def test_predictions_by_index(call, trained, expected, tmp_path):
    status, out, err = call("--predictions", tmp_path / "predictions.csv")
    assert (status, err) == (0, "")
    assert out.startswith("dataset: squares ")
    head, *rows = csv.reader((tmp_path / "predictions.csv").read_text().splitlines())
    assert head == ["index", "label", "prediction", "probability"]
    labels, probabilities = expected
    names = trained[1].class_names
    assert [int(row[0]) for row in rows] == list(range(23))
    assert [row[1] for row in rows] == [names[label] for label in labels]
    assert [row[2] for row in rows] == [names[index] for index in probabilities.argmax(axis=-1)]
    assert [float(row[3]) for row in rows] == pytest.approx(probabilities.max(axis=-1), abs=1e-5)


def test_names_of_files_with_commas_quotes_line_breaks_and_bytes(call, loaded, trained, tmp_path):
    test = trained[0].test.subset(np.arange(4))
    names = ['a,"b".png', "two\nlines.png", os.fsdecode(b"caf\xe9.png"), "é.png"]
    files = np.array(names, object)
    loaded["squares"] = dataclasses.replace(trained[0], test=dataclasses.replace(test, files=files))
    path = tmp_path / "predictions.csv"
    assert call("--predictions", path)[0] == 0
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        head, *rows = csv.reader(file)
    assert head[0] == "file"
    assert [row[0] for row in rows] == names
    assert b"caf\xe9.png" in path.read_bytes()


def test_predictions_for_a_folder_name_its_files(call, trained, tmp_path):
    dataset, run = trained
    files = put(tmp_path / "photos", dataset.test, dataset.class_names)
    call("--dataset", f"folder:{tmp_path / 'photos'}", "--predictions", tmp_path / "p.csv")
    rows = {row["file"]: row for row in csv.DictReader((tmp_path / "p.csv").read_text().splitlines())}
    assert rows.keys() == set(files)
    for file, probabilities in zip(files, run.predict(dataset.test.images), strict=True):
        assert rows[file]["label"] == file.partition("/")[0]
        assert rows[file]["prediction"] == run.class_names[probabilities.argmax()]


def test_an_existing_file_is_replaced(call, tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    assert call("--predictions", tmp_path / "link")[0] == 0
    assert (tmp_path / "target").read_text().startswith("index,label,")
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("flag", ["--predictions", "--report"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/file", r"cannot write .*missing/file \(No such file or directory\): choose another file"),
        (".", "is not a regular file: choose another file"),
        ("pipe", "is not a regular file: choose another file"),
    ],
)
def test_a_file_that_cannot_be_written(call, tmp_path, monkeypatch, flag, name, message):
    """It is reported before the network is evaluated."""
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("cnn_jax.runs.run.Run.evaluate", lambda *args: pytest.fail("evaluated"))
    status, out, err = call(flag, tmp_path / name)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_two_outputs_to_one_file_are_refused(call, tmp_path):
    status, out, err = call("--predictions", tmp_path / "same", "--report", tmp_path / "same")
    assert (status, out) == (2, "")
    assert err.startswith("error: --predictions and --report name the same file")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_failure_that_names_the_file(call, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(evaluate, "_save_predictions", fail)
    status, _, err = call("--predictions", tmp_path / "full.csv", "--report", tmp_path / "report.html")
    assert (status, err.count("\n")) == (1, 1)
    assert f"cannot write {tmp_path}/full.csv (No space left on device): free some space" in err
    assert not list(tmp_path.iterdir())


# --report


def test_report_of_another_checkpoint(call, trained, tmp_path):
    accuracy = json.loads(call("--json", "--checkpoint", "best")[1])["test_accuracy"]
    status, _, err = call("--checkpoint", "best", "--report", tmp_path / "report.html")
    assert (status, err) == (0, "")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"<title>squares, cnn: test accuracy {accuracy:.4f}</title>" in page
    assert page.count('role="img"') == 2  # the curves of loss and accuracy
    assert "Train images" in page


def test_report_on_another_dataset_with_fewer_classes_in_another_order(call, loaded, trained, tmp_path):
    """Only the test images are those of this dataset; the counts of the run's training images are not known."""
    dataset, run = trained
    kept = dataset.test.subset(dataset.test.labels != 1)
    turned = Split(255 - kept.images, np.where(kept.labels == 0, 1, 0).astype(np.int32))
    loaded["turned"] = Dataset("turned", turned, turned, ("bottom", "top"))
    call("--dataset", "turned", "--report", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    right = np.sum(run.predict(turned.images).argmax(axis=-1) == kept.labels)
    assert f"correctly classifies {right} of {len(kept)} test images of another dataset, <bdi>turned</bdi>." in page
    assert "Train images" not in page


# Images that the network was trained on


@pytest.fixture
def photos(trained, tmp_path):
    """Writes a folder with some of the training and of the test images."""

    def photos(num_train, num_test):
        dataset, _ = trained
        put(tmp_path / "photos" / "train", dataset.test, dataset.class_names)
        images = np.concatenate([dataset.train.images[:num_train], dataset.test.images[:num_test]])
        labels = np.concatenate([dataset.train.labels[:num_train], dataset.test.labels[:num_test]])
        put(tmp_path / "photos" / "test", Split(images, labels), dataset.class_names)
        return f"folder:{tmp_path / 'photos'}"

    return photos


def test_test_images_that_were_trained_on_are_counted(call, photos):
    status, out, err = call("--dataset", photos(12, 15))
    assert status == 0
    assert out.splitlines()[0].endswith(" examples: 27")
    assert err.endswith("12 of the 27 test images are among the run's training images: the accuracy is too high\n")
    assert err.count("\n") == 1


def test_no_warning_if_none_was_trained_on(call, photos):
    assert call("--dataset", photos(0, 23))[2] == ""
    assert call()[2] == ""


def test_a_warning_if_the_training_images_cannot_be_loaded(call, loaded, photos):
    del loaded["squares"]
    status, _, err = call("--dataset", photos(12, 15))
    assert status == 0
    assert "not checked whether the network was trained on test images: unknown dataset 'squares'" in err
    assert err.count("\n") == 1


@pytest.fixture(scope="module")
def folder_run(dataset, tmp_path_factory):
    """A run trained on a folder without splits, and the folder."""
    root = tmp_path_factory.mktemp("folder")
    put(root / "photos", dataset.train, dataset.class_names)
    config = Config(epochs=1, batch_size=10, dataset=f"folder:{root / 'photos'}", validation_fraction=0.2)
    return fit(config, root / "run", report=False), root / "photos"


def test_a_folder_that_has_moved_is_the_runs_own(call, folder_run, monkeypatch, tmp_path):
    """Its test split is scored, not all its images; the report counts its training images."""
    run, photos = folder_run
    shutil.copytree(photos, tmp_path / "moved")
    monkeypatch.setattr("cnn_jax.runs.run.load_run", lambda *args: run)
    own = json.loads(call("--json")[1])
    status, out, err = call("--json", "--dataset", f"folder:{tmp_path / 'moved'}", "--report", tmp_path / "report.html")
    assert (status, err.count("\n")) == (0, 1)
    assert "has the images of the run's own dataset: scoring its test split" in err
    assert json.loads(out) == own | {"dataset": f"folder:{tmp_path / 'moved'}"}
    train = len(data.load(run.config).train)
    assert f"Train images</th><td>{train}</td>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert json.loads(call("--json", "--dataset", f"folder:{photos}")[1]) == own


def test_a_folder_that_has_grown_is_another_one(call, folder_run, monkeypatch, tmp_path):
    run, photos = folder_run
    shutil.copytree(photos, tmp_path / "more")
    Image.new("L", (16, 16), 7).save(tmp_path / "more" / "top" / "new.png")
    monkeypatch.setattr("cnn_jax.runs.run.load_run", lambda *args: run)
    _, out, err = call("--dataset", f"folder:{tmp_path / 'more'}")
    assert out.splitlines()[0].endswith(" examples: 48")
    train = len(data.load(run.config).train)
    assert f"{train} of the 48 test images are among the run's training images" in err
