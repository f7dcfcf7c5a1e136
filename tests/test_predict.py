"""``python -m cnn_jax.predict``: from files to lines."""

import dataclasses
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from cnn_jax import cli, data, evaluate, predict
from cnn_jax.config import Config
from cnn_jax.runs.fit import fit
from cnn_jax.runs.run import Run
from cnn_jax.training import evaluation
from cnn_jax.training.evaluation import chunk_logits

LINE = re.compile(r"(.*): (top|middle|bottom) (\d\.\d{4}), (top|middle|bottom) (\d\.\d{4})")


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda config: dataset)
        return fit(Config(epochs=20, batch_size=10, dataset="squares", seed=3), tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def pictures(dataset, tmp_path):
    """The test images as files, and what each shows."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    shown = {}
    for index, (image, label) in enumerate(zip(dataset.test.images, dataset.test.labels, strict=True)):
        path = folder / f"{index:02}.png"
        Image.fromarray(image.squeeze()).save(path)
        shown[str(path)] = dataset.class_names[label]
    return shown


@pytest.fixture
def call(run, monkeypatch, capsys):
    def call(*words, command=predict):
        monkeypatch.setattr("sys.argv", ["command", str(run.workdir), *map(str, words)])
        status = cli.run(command.main)
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err

    return call


def test_a_line_for_each_file_with_what_it_shows(call, run, pictures):
    status, lines, err = call("--top-k", 2, *pictures)
    assert (status, err) == (0, "")
    matches = [LINE.fullmatch(line) for line in lines]
    assert [match[1] for match in matches] == list(pictures)
    images = np.stack([np.asarray(Image.open(path))[..., None] for path in pictures])
    for match, probabilities in zip(matches, run.predict(images), strict=True):
        first, second = np.argsort(-probabilities)[:2]
        assert (match[2], match[4]) == (run.class_names[first], run.class_names[second])
        assert (match[3], match[5]) == (f"{probabilities[first]:.4f}", f"{probabilities[second]:.4f}")
    assert np.mean([match[2] == shown for match, shown in zip(matches, pictures.values(), strict=True)]) > 0.9


def test_json_lines(call, pictures):
    status, lines, _ = call("--json", *pictures)
    assert status == 0
    objects = [json.loads(line) for line in lines]
    assert [answer["path"] for answer in objects] == list(pictures)
    for answer in objects:
        probabilities = [entry["probability"] for entry in answer["classes"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert {entry["name"] for entry in answer["classes"]} == {"top", "middle", "bottom"}


def test_folders_lists_and_files_name_the_same(call, pictures, tmp_path, monkeypatch):
    (tmp_path / "pictures" / "notes.txt").write_text("no image, and not named like one")
    by_name = call(*pictures)
    assert call(tmp_path / "pictures") == by_name
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(pictures) + "\n\n"))
    assert call("-") == by_name
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert call("-") == (2, [], "error: no file names on standard input: write one on each line\n")


def test_a_file_named_twice_has_two_lines(call, pictures):
    path = next(iter(pictures))
    _, lines, _ = call(path, path)
    assert len(lines) == 2
    assert lines[0] == lines[1]


def test_files_are_read_batch_by_batch(call, pictures, monkeypatch):
    """So that no more images are held than are classified at a time."""
    whole = call(*pictures)
    sizes = []

    def record(self, images, predict=Run.predict):
        sizes.append(len(images))
        return predict(self, images)

    monkeypatch.setattr(Run, "predict", record)
    monkeypatch.setattr(evaluation, "MAX_BATCH_BYTES", 4 * 16 * 16)
    assert call(*pictures) == whole
    assert sizes == [4, 4, 4, 4, 4, 3]


@pytest.mark.parametrize(("count", "batch_sizes"), [(1, [1]), (3, [4]), (10, [4, 4, 4])])
def test_a_batch_has_a_size_that_fits_its_images(run, dataset, monkeypatch, count, batch_sizes):
    """The images of a batch decide how much memory the network takes."""
    seen = []

    def record(variables, images, **settings):
        seen.extend([images.shape[1]] * images.shape[0])
        return chunk_logits(variables, images, **settings)

    monkeypatch.setattr(evaluation, "chunk_logits", record)
    monkeypatch.setattr(evaluation, "MAX_BATCH_BYTES", 4 * 16 * 16)
    run.predict(dataset.test.images[:count])
    assert seen == batch_sizes


def inverted(path, tmp_path):
    name = tmp_path / "inverted.png"
    Image.fromarray(255 - np.asarray(Image.open(path))).save(name)
    return name


def test_dark_on_light_is_inverted_where_the_network_learned_light_on_dark(call, run, pictures, tmp_path):
    assert run.dark_background
    path = next(iter(pictures))
    other = inverted(path, tmp_path)
    answers = {
        (name, invert): call(file, "--invert", invert)[1][0].split(": ")[1]
        for name, file in (("as learned", path), ("other", other))
        for invert in ("auto", "yes", "no")
    }
    assert answers["as learned", "auto"] == answers["as learned", "no"] == answers["other", "yes"]
    assert answers["other", "auto"] == answers["other", "yes"]
    assert answers["other", "no"] == answers["as learned", "yes"]
    assert answers["other", "no"] != answers["other", "yes"]


def test_nothing_is_inverted_by_itself_where_grounds_differ(run, pictures, tmp_path):
    other = inverted(next(iter(pictures)), tmp_path)
    kept = dataclasses.replace(run, dark_background=False).prepare(other)
    np.testing.assert_array_equal(kept.squeeze(), np.asarray(Image.open(other)))


def test_other_sizes_and_colors_are_brought_to_the_networks(call, tmp_path):
    Image.new("RGB", (40, 31), "black").save(tmp_path / "a.jpg")
    status, lines, err = call(tmp_path / "a.jpg")
    assert (status, err, len(lines)) == (0, "", 1)


def test_height_and_width_are_not_swapped(run, pictures):
    wide = dataclasses.replace(run, image_shape=(16, 24, 1))
    assert wide.prepare(next(iter(pictures))).shape == (16, 24, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: PATH..."),
        (["nowhere.png"], "cannot read nowhere.png: No such file"),
        (["text.png"], "text.png is not a PNG, JPEG, WebP, BMP or GIF image"),
        (["."], "no images in .: expected files named *.png"),
        (["--top-k", 0, "text.png"], "--top-k must be a positive integer below 2**31, not '0'"),
        (["--invert", "maybe", "text.png"], "--invert must be auto, yes or no, not 'maybe'"),
    ],
)
def test_bad_input_is_status_2_in_one_line(call, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    if "text.png" in words:
        (tmp_path / "text.png").write_text("text")
    status, lines, err = call(*words)
    assert (status, lines) == (2, [])
    assert message in err
    assert err.count("\n") == 1


def test_unreadable_files_are_passed_over_on_request(call, pictures, tmp_path, caplog):
    (tmp_path / "pictures" / "00a.png").write_text("text")
    status, lines, err = call("--skip-unreadable", tmp_path / "pictures")
    assert status == 0
    assert [LINE.match(line)[1] for line in lines] == list(pictures)
    assert "skipped 1 file(s) that cannot be read as images; the first: " in caplog.text + err


def test_what_can_be_read_is_classified_before_the_error(call, pictures, tmp_path):
    (tmp_path / "text.png").write_text("text")
    status, lines, err = call(tmp_path / "text.png", *pictures)
    assert status == 2
    assert len(lines) == len(pictures)
    assert "text.png is not a PNG" in err


def test_a_name_stays_on_its_line_and_hidden_files_are_left_alone(call, pictures, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    shutil.copy(next(iter(pictures)), folder / "a\nb.png")
    (folder / "._a.png").write_text("what macOS leaves")
    (folder / "directory.png").mkdir()
    status, lines, err = call(folder)
    assert (status, err, len(lines)) == (0, "", 1)
    assert "a\\nb.png" in lines[0]


HOSTILE_NAMES = ("\x1b[31mred", "two\nlines", "turned\u202eround")
PRINTED_NAMES = (r"\x1b[31mred", r"two\nlines", r"turned\u202eround")


@pytest.fixture
def hostile(run, dataset, monkeypatch):
    """The commands find a run and a dataset with names that a terminal obeys."""
    monkeypatch.setattr("cnn_jax.runs.run.load_run", lambda *args: dataclasses.replace(run, class_names=HOSTILE_NAMES))
    named = dataclasses.replace(dataset, class_names=HOSTILE_NAMES, name="\x1b[2Jset")
    monkeypatch.setattr(data, "load", lambda config: named)


@pytest.mark.usefixtures("hostile")
def test_predict_prints_no_name_that_a_terminal_obeys(call, pictures, tmp_path):
    shutil.copy(next(iter(pictures)), tmp_path / "pictures" / "\x1b[31m\u202e.png")
    status, lines, err = call(tmp_path / "pictures")
    assert (status, err, len(lines)) == (0, "", len(pictures) + 1)
    assert all(line.isprintable() for line in lines)
    for text in (*PRINTED_NAMES, r"/\x1b[31m\u202e.png: "):
        assert any(text in line for line in lines)


@pytest.mark.usefixtures("hostile")
def test_evaluate_prints_no_name_that_a_terminal_obeys(call):
    status, lines, err = call(command=evaluate)
    assert (status, err) == (0, "")
    assert all(line.isprintable() for line in lines)
    assert lines[0].startswith(r"dataset: \x1b[2Jset step: ")
    for text in PRINTED_NAMES:
        assert any(text in line for line in lines)


@pytest.mark.usefixtures("hostile")
def test_json_escapes_every_name_and_loses_none(call, pictures, tmp_path):
    path = tmp_path / os.fsdecode(b"\xff\xc3\xa9.png")  # not valid UTF-8
    try:
        shutil.copy(next(iter(pictures)), path)
    except OSError:
        pytest.skip("the file system has no such names")
    status, (line,), err = call("--json", path)
    assert (status, err) == (0, "")
    assert line.isascii()
    assert line.isprintable()
    answer = json.loads(line)
    assert answer["path"] == str(path)
    assert {entry["name"] for entry in answer["classes"]} == set(HOSTILE_NAMES)


def test_all_of_a_folder_that_was_not_trained_on_is_evaluated(call, dataset, tmp_path):
    for index, (image, label) in enumerate(zip(dataset.test.images, dataset.test.labels, strict=True)):
        folder = tmp_path / "new" / dataset.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(folder / f"{index}.png")
    _, lines, _ = call("--dataset", f"folder:{tmp_path / 'new'}", command=evaluate)
    assert lines[0].endswith(" examples: 23")


def test_a_folder_is_evaluated(call, dataset, tmp_path):
    """Labels come from the folders' names; both parts have the run's size."""
    for part, split in (("train", dataset.train), ("test", dataset.test)):
        for index, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            folder = tmp_path / "images" / part / dataset.class_names[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.squeeze()).resize((32, 32), Image.Resampling.NEAREST).save(folder / f"{index}.png")
    status, lines, err = call("--dataset", f"folder:{tmp_path / 'images'}", command=evaluate)
    assert (status, err.count("\n")) == (0, 1)
    assert "not checked whether the network was trained on test images: unknown dataset 'squares'" in err
    assert lines[0].startswith(f"dataset: folder:{tmp_path}/images step: 100 test_accuracy: ")
    assert float(re.search(r"test_accuracy: (\S+)", lines[0])[1]) > 0.9


def test_a_folder_of_other_classes_is_refused(call, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(2):
            Image.new("L", (16, 16)).save(tmp_path / name / f"{index}.png")
    status, _, err = call("--dataset", f"folder:{tmp_path}", command=evaluate)
    assert status == 2
    assert "trained on 16x16x1 images of 3 classes (top, middle, bottom), and folder:" in err
    assert err.count("\n") == 1
