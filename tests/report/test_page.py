"""The HTML report, parsed and as rendered by a browser."""

import base64
import dataclasses
import io
import itertools
import json
import math
import re
import shutil
import subprocess
import threading
from dataclasses import dataclass, field
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from cnn_jax.config import Config
from cnn_jax.data import Dataset, Split
from cnn_jax.report.page import save_page
from cnn_jax.training.history import EpochRecord

STEPS_PER_EPOCH = 15
SUMMARY = {
    "compile_seconds": 3.25,
    "date": "2026-11-24T10:38:15+01:00",
    "backend": "cpu",
    "device": "AMD EPYC 7B13",
    "device_count": 2,
    "cpu_count": 8,
    "versions": {"python": "3.11.7", "jax": "0.10.2", "jaxlib": "0.10.1", "flax": "0.12.8", "optax": "0.2.9"},
}
VOID = {"meta", "link", "img", "br"}
NASTY = ("<script>alert('1')</script>", 'Ähre & "Co"', "{{ 7 * 7 }}", "长" * 300, "&amp;", "\u202eright to left")


def make_history(num_epochs, split="test"):
    """A history with a test or a validation split."""
    metrics = dict.fromkeys(("test_loss", "test_accuracy"))
    return [
        EpochRecord(
            epoch=n,
            step=STEPS_PER_EPOCH * (n + 1),
            total_correct=900,
            loss=STEPS_PER_EPOCH * 1.4 / (n + 1),
            train_accuracy=1 - 0.4 / (n + 1),
            seconds=0.25 * (n + 1),
            images_per_second=4000.0 / (n + 1),
            **metrics | {f"{split}_loss": 0.2 + 0.9 / (n + 1), f"{split}_accuracy": 0.9 - 0.25 / (n + 1)},
        )
        for n in range(num_epochs)
    ]


def make_run(num_classes=3, num_examples=60, image_shape=(8, 8, 1), num_epochs=4, names=None, config=None):
    """Arguments of ``save_page``, with at least two thirds of the predictions correct."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, num_examples, dtype=np.int32)
    images = rng.integers(0, 256, (num_examples, *image_shape), dtype=np.uint8)
    logits = rng.normal(size=(num_examples, num_classes)).astype(np.float32)
    sure = np.arange(num_examples) % 3 > 0
    logits[sure, labels[sure]] += 9
    config = config or Config(dataset="squares", epochs=num_epochs)
    split = Split(images, labels)
    return {
        "config": config,
        "history": make_history(num_epochs),
        "steps_per_epoch": STEPS_PER_EPOCH,
        "dataset": Dataset(config.dataset, split, split, names or tuple(f"class {n}" for n in range(num_classes))),
        "logits": logits,
        "test_loss": 0.425,
        "num_parameters": 1_663_370,
        "summary": SUMMARY,
    }


def without_mistakes(run):
    return run | {"logits": np.eye(len(run["dataset"].class_names), dtype=np.float32)[run["dataset"].test.labels]}


def with_validation(run):
    return run | {
        "history": make_history(4, "validation"),
        "dataset": dataclasses.replace(run["dataset"], validation=run["dataset"].test.subset(np.arange(7))),
    }


RUNS = {
    "ordinary": make_run(),
    "validation": with_validation(make_run()),
    "nasty": make_run(6, names=NASTY, config=Config(dataset="tfds:<b>&\"'", data_dir="/a/<i>/ö & ü")),
    "one epoch": make_run(num_epochs=1),
    "hundreds of epochs": make_run(num_epochs=300),
    "two classes in color": make_run(2, image_shape=(40, 60, 3)),
    "a hundred classes": make_run(100, 700, names=tuple(f"class number {n} of a hundred" for n in range(100))),
    "no mistakes": without_mistakes(make_run()),
}


@dataclass
class Node:
    """An element of a page."""

    tag: str
    attributes: dict[str, str]
    children: list["Node | str"] = field(default_factory=list)

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag, **attributes):
        """The descendants with this tag and these attributes."""
        found = []
        for child in self.children:
            if isinstance(child, Node):
                if child.tag == tag and attributes.items() <= child.attributes.items():
                    found.append(child)
                found += child.all(tag, **attributes)
        return found

    def rows(self):
        """The texts of the table cells in this element, by row."""
        return [[cell.text for cell in row.children if isinstance(cell, Node)] for row in self.all("tr")]


class Reader(HTMLParser):
    """Parses a page and checks that every element is closed in order."""

    def __init__(self):
        super().__init__()
        self.root = Node("", {})
        self.open = [self.root]

    def handle_starttag(self, tag, attrs):
        node = Node(tag, dict(attrs))
        assert len(node.attributes) == len(attrs), f"duplicate attribute in {tag}"
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].children.append(data)

    def close(self):
        super().close()
        assert self.open == [self.root]


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    return reader.root


@pytest.fixture(scope="module", params=RUNS)
def saved(request, tmp_path_factory):
    """The arguments of a run and its parsed page."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    save_page(path, **RUNS[request.param])
    return RUNS[request.param], read(path)


@pytest.fixture
def page(tmp_path):
    """Saves the page of a run and parses it."""

    def save_and_read(run):
        save_page(tmp_path / "report.html", **run)
        return read(tmp_path / "report.html")

    return save_and_read


def section(root, name):
    (found,) = [node for node in root.all("section") if node.attributes["aria-labelledby"] == name]
    return found


def elements(node):
    for child in node.children:
        if isinstance(child, Node):
            yield child
            yield from elements(child)


def counts(run):
    """The confusion matrix."""
    matrix = np.zeros(2 * [len(run["dataset"].class_names)], int)
    np.add.at(matrix, (run["dataset"].test.labels, run["logits"].argmax(axis=-1)), 1)
    return matrix


def test_no_scripts_and_no_external_resources(saved):
    _, root = saved
    for node in elements(root):
        assert node.tag not in {"script", "iframe", "object", "embed", "base", "form"}
        for name, value in node.attributes.items():
            assert not name.startswith("on"), f"script in {name}"
            if name in {"src", "href", "srcset", "action", "data", "poster"}:
                assert value.startswith("data:")
            if name == "xlink:href":
                assert value.startswith("#")
            assert "url(" not in value
    (style,) = root.all("style")
    assert not re.search(r"url\(|@import|@font-face", style.text)


def test_titles_headings_and_labels(saved):
    run, root = saved
    accuracy = np.trace(counts(run)) / len(run["logits"])
    assert root.all("title")[0].text == f"{run['config'].dataset}, cnn: test accuracy {accuracy:.4f}"
    assert [value.text for value in root.all("dd")[:2]] == [f"{accuracy:.4f}", "0.4250"]
    assert root.all("html")[0].attributes["lang"] == "en"
    assert root.all("meta", name="viewport")
    levels = [int(node.tag[1]) for node in elements(root) if re.fullmatch("h[1-6]", node.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(second <= first + 1 for first, second in itertools.pairwise(levels))
    ids = [node.attributes["id"] for node in elements(root) if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    for node in elements(root):
        assert set(node.attributes.get("aria-labelledby", "").split()) <= set(ids)
        if node.tag == "th":
            assert node.attributes["scope"] in {"row", "col"}
        if node.tag == "img":
            assert re.match(r"Test image \d+: .+, predicted as .+", node.attributes["alt"], flags=re.DOTALL)
    charts = [chart.attributes["aria-label"] for chart in root.all("svg", role="img")]
    assert [label.partition(":")[0] for label in charts] == [
        "Loss by epoch, at the end",
        "Accuracy by epoch, at the end",
    ]


def test_every_setting_is_listed(saved):
    run, root = saved
    shown = dict(section(root, "details").all("table")[0].rows())
    config = run["config"]
    assert shown.keys() == {field.name for field in dataclasses.fields(Config)}
    assert shown["dataset"] == config.dataset
    assert shown["data_dir"] == (config.data_dir or "none")
    assert (shown["epochs"], shown["shuffle"], shown["learning_rate"]) == (str(config.epochs), "on", "0.01")


def test_settings_other_than_the_default_are_bold(page):
    root = page(make_run(config=Config(dataset="squares", image_size=(28, 20), shuffle=False)))
    rows = section(root, "details").all("table")[0].all("tr")
    changed = {row.all("th")[0].text: row.all("b")[0].text for row in rows if row.all("b")}
    assert changed == {"dataset": "squares", "image_size": "28 20", "shuffle": "off"}


def details(root):
    """The tables of the last section by caption, without the settings."""
    tables = section(root, "details").all("table")[1:]
    return {table.all("caption")[0].text: dict(table.rows()) for table in tables}


def test_data_hardware_and_versions(page):
    assert details(page(RUNS["ordinary"])) == {
        "Data and model": {
            "Train images": "60",
            "Test images": "60",
            "Image size": "8 \N{MULTIPLICATION SIGN} 8 pixels",
            "Channels": "1 (grayscale)",
            "Classes": "3",
            "Parameters": "1,663,370",
        },
        "Hardware and speed": {
            "Device": "CPU: AMD EPYC 7B13",
            "Number of devices": "2",
            "CPU cores": "8",
            "Training, all epochs": "2.50 s",
            "Median epoch": "0.62 s",
            "Images per second": "1,667",
            "Compilation": "3.25 s",
        },
        "Versions": SUMMARY["versions"],
    }


def test_size_of_the_splits_and_of_color_images(page):
    data = details(page(RUNS["validation"]))["Data and model"]
    assert [data[f"{name} images"] for name in ("Train", "Validation", "Test")] == ["60", "7", "60"]
    data = details(page(RUNS["two classes in color"]))["Data and model"]
    assert (data["Image size"], data["Channels"]) == ("40 \N{MULTIPLICATION SIGN} 60 pixels", "3 (color)")


def test_date_parameters_and_duration_at_the_top(page):
    history = [dataclasses.replace(record, seconds=3100.0) for record in make_history(4)]
    root = page(make_run() | {"history": history})
    assert root.all("p")[0].text == "cnn_jax training report, 2026-11-24 10:38 UTC+01:00"
    assert [value.text for value in root.all("dd")[2:4]] == ["1,663,370", "3 h 26 min"]
    speed = details(root)["Hardware and speed"]
    assert (speed["Training, all epochs"], speed["Median epoch"]) == ("3 h 26 min", "51 min 40 s")


def test_what_is_not_known_is_left_out(page):
    """A network evaluated later, after less than an epoch, on another dataset than it was trained on."""
    run = make_run() | {"history": [], "summary": None}
    root = page(run | {"dataset": dataclasses.replace(run["dataset"], name="circles")})
    assert root.all("title")[0].text == "circles, cnn: test accuracy 0.8000"
    assert root.all("p")[0].text == "cnn_jax training report"
    text = "correctly classifies 48 of 60 test images of another dataset, circles."
    assert text in " ".join(root.all("p")[1].text.split())
    assert not root.all("svg", role="img")
    assert details(root).keys() == {"Data and model"}
    assert "Train images" not in details(root)["Data and model"]
    head, first, *_ = section(root, "classes").rows()
    assert [cell for cell in head if "images" in cell] == ["Test images"]
    assert len(first) == len(head)


def test_the_matrix_has_every_name_and_count(saved):
    run, root = saved
    table = section(root, "confusion").all("table")[0]
    names = list(run["dataset"].class_names)
    head, *rows = table.rows()
    assert head[1:] == names
    assert [name for name, *_ in rows] == names
    np.testing.assert_array_equal([[int(cell) for cell in row] for _, *row in rows], counts(run))


def test_shades_follow_the_share_of_the_row(page):
    run = make_run()
    labels = np.repeat(np.arange(3, dtype=np.int32), [200, 40, 1])
    predictions = np.concatenate([np.repeat([0, 1, 2], [190, 9, 1]), np.repeat([0, 1], [8, 32]), [0]])
    split = Split(np.zeros((241, 8, 8, 1), np.uint8), labels)
    root = page(run | {"dataset": Dataset("squares", split, split, ("a", "b", "c")), "logits": np.eye(3)[predictions]})
    cells = section(root, "confusion").all("table", **{"class": "matrix"})[0].all("tbody")[0].all("td")
    assert [cell.attributes.get("class") for cell in cells] == [
        *["correct-5", "wrong-3", "wrong-1"],  # 95% correct; 4.5% and 0.5% wrong
        *["wrong-6", "correct-3", None],  # 20% wrong, 80% correct
        *["wrong-6", None, None],
    ]


def test_most_frequent_mistakes(page):
    run = RUNS["ordinary"]
    rows = section(page(run), "confusion").all("table")[1].rows()[1:]
    mistakes = {(f"class {i}", f"class {j}"): n for (i, j), n in np.ndenumerate(counts(run)) if i != j and n}
    assert {(true, predicted): int(count) for true, predicted, count in rows} == mistakes
    assert [int(count) for _, _, count in rows] == sorted(mistakes.values(), reverse=True)


def test_metrics_by_class(saved):
    run, root = saved
    (table,) = section(root, "classes").all("table")
    rows = [[cell.strip() for cell in row] for row in table.rows()[1:]]
    matrix = counts(run)
    correct, predicted, support = np.diag(matrix), matrix.sum(axis=0), matrix.sum(axis=1)
    expected = [
        correct / np.maximum(predicted, 1),
        correct / np.maximum(support, 1),
        2 * correct / np.maximum(predicted + support, 1),
    ]
    *classes, macro, weighted = rows
    assert [row[0] for row in classes] == list(run["dataset"].class_names)
    for column in (4, 5):  # the test and the training set are the same
        assert [int(row[column].replace(",", "")) for row in classes] == support.tolist()
    for shown, figures in zip(np.transpose([row[1:4] for row in classes]).astype(float), expected, strict=True):
        np.testing.assert_allclose(shown, figures, atol=5.1e-5)
    assert (macro[0], weighted[0]) == ("macro average", "weighted average")
    np.testing.assert_allclose([float(x) for x in macro[1:4]], np.mean(expected, axis=1), atol=5.1e-5)
    np.testing.assert_allclose(
        [float(x) for x in weighted[1:4]], np.average(expected, axis=1, weights=support), atol=5.1e-5
    )


def decode(url):
    with Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def test_most_confident_mistakes(saved):
    run, root = saved
    dataset, logits = run["dataset"], run["logits"].astype(float)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    mistaken = [n for n in range(len(logits)) if logits[n].argmax() != dataset.test.labels[n]]
    expected = sorted(mistaken, key=lambda n: -probabilities[n].max())[:24]
    pictures = section(root, "mistakes").all("li")
    assert len(pictures) == len(expected)
    for picture, index in zip(pictures, expected, strict=True):
        true = dataset.class_names[dataset.test.labels[index]]
        predicted = dataset.class_names[logits[index].argmax()]
        (image,) = picture.all("img")
        assert image.attributes["alt"] == f"Test image {index}: {true}, predicted as {predicted}"
        assert [name.text for name in picture.all("bdi")] == [true, predicted]
        assert float(picture.all("span")[0].text) == pytest.approx(probabilities[index].max(), abs=5.1e-4)
        np.testing.assert_array_equal(decode(image.attributes["src"]), dataset.test.images[index].squeeze())
    if not expected:
        assert "No test image was misclassified." in section(root, "mistakes").text


def test_pictures_of_a_folder_are_named_by_their_files(page):
    run = make_run()
    files = np.array([f"test/class {n % 3}/<{n}>.png" for n in range(60)], object)
    named = dataclasses.replace(run["dataset"], test=dataclasses.replace(run["dataset"].test, files=files))
    for picture in section(page(run | {"dataset": named}), "mistakes").all("li"):
        index = int(re.match(r"Test image (\d+):", picture.all("img")[0].attributes["alt"])[1])
        assert picture.all("bdi")[2].text == files[index]


def test_large_pictures_are_scaled_down_and_the_page_stays_small(page, tmp_path):
    root = page(make_run(num_examples=90, image_shape=(150, 300, 3)))
    images = [decode(image.attributes["src"]) for image in root.all("img")]
    assert {image.shape for image in images} == {(48, 96, 3)}
    page(make_run(num_examples=90, image_shape=(100, 100, 3)))
    assert (tmp_path / "report.html").stat().st_size < 1_000_000


def test_only_small_pictures_are_pixelated(page):
    assert page(make_run(image_shape=(64, 32, 1))).all("ul", **{"class": "pictures pixelated"})
    assert page(make_run(image_shape=(65, 32, 1))).all("ul", **{"class": "pictures"})


def test_probabilities_near_one_are_not_rounded_to_one(page):
    run = make_run()
    root = page(run | {"logits": 100 * run["logits"]})
    assert section(root, "mistakes").all("span")[0].text == "over 0.999"


def points(path):
    return np.array([point.split()[1:] for point in path.attributes["d"].splitlines()], float)


def scale(places, values):
    """A function from coordinates to values, which all ticks agree on."""
    slope, offset = np.polyfit(places, values, 1)
    np.testing.assert_allclose(slope * np.array(places) + offset, values, atol=1e-3 * np.ptp(values))
    return lambda places: slope * places + offset


@pytest.mark.parametrize(("num_epochs", "split"), [(2, "test"), (30, "validation"), (31, "test"), (300, "validation")])
def test_curves_show_the_history(page, num_epochs, split):
    history = make_history(num_epochs, split)
    train_loss = [record.loss / STEPS_PER_EPOCH for record in history]
    train_accuracy = [record.train_accuracy for record in history]
    loss = [getattr(record, f"{split}_loss") for record in history]
    accuracy = [getattr(record, f"{split}_accuracy") for record in history]
    loss_chart, accuracy_chart = page(make_run() | {"history": history}).all("svg", role="img")
    for chart, curves, title, unit in (
        (loss_chart, {"train": train_loss, split: loss}, "Loss", "mean cross-entropy"),
        (accuracy_chart, {"train": train_accuracy, split: accuracy}, "Accuracy", "fraction correctly classified"),
    ):
        texts = {anchor: [] for anchor in ("start", "middle", "end")}
        for text in chart.all("text"):
            texts[re.search("text-anchor: (\\w+)", text.attributes["style"])[1]].append(text)
        *x_ticks, x_label, y_label = texts["middle"]
        assert (x_label.text, y_label.text) == ("epoch", unit)
        ends = [f"{name} {values[-1]:.4f}" for name, values in curves.items()]
        assert [text.text for text in texts["start"]] == [*ends, title]
        assert len(x_ticks) <= 7
        x = scale([float(tick.attributes["x"]) for tick in x_ticks], [int(tick.text) for tick in x_ticks])
        lines = {color: [] for color in ("rule", *curves)}
        for path in chart.all("path"):
            if line := re.match(r"fill: none; stroke: var\(--(\w+)\)", path.attributes["style"]):
                lines[line[1]].append(points(path))
        y_ticks = [float(text.text) for text in texts["end"]]
        assert 2 <= len(y_ticks) <= 7
        y = scale([line[0, 1] for line in lines["rule"]], y_ticks)
        for name, values in curves.items():
            ((xs, ys),) = (line.T for line in lines[name])
            # Interpolated, because matplotlib omits points that make no visible difference.
            drawn = y(np.interp(range(num_epochs), x(xs), ys))
            np.testing.assert_allclose(drawn, values, atol=5e-3 * np.ptp(y_ticks))
            markers = [use for use in chart.all("use") if f"fill: var(--{name})" in use.attributes["style"]]
            marked = range(num_epochs) if num_epochs <= 30 else [num_epochs - 1]
            assert [use.text for use in markers] == [f"epoch {n}, {name}: {values[n]:.4f}" for n in marked]


@pytest.mark.parametrize("scale", [0, 1e-9, 1e-3, 3, 4e4, 1e30])
def test_charts_of_any_loss(page, scale):
    history = [dataclasses.replace(r, loss=r.loss * scale, test_loss=r.test_loss * scale) for r in make_history(3)]
    (chart, _) = page(make_run() | {"history": history}).all("svg", role="img")
    _, top, _, height = map(float, chart.attributes["viewbox"].split())
    for use in chart.all("use"):
        assert top < float(use.attributes["y"]) < height


def test_best_epoch_and_the_split_it_was_chosen_on(page):
    for split, sentence in {
        "test": "There is no validation split: the best checkpoint, epoch 1 with a test accuracy of 0.9500, "
        "was chosen on the test set.",
        "validation": "The best checkpoint, epoch 1 with a validation accuracy of 0.9500, "
        "was chosen on the validation set.",
    }.items():
        history = make_history(4, split)
        history[1] = dataclasses.replace(history[1], **{f"{split}_accuracy": 0.95})
        text = section(page(make_run() | {"history": history}), "curves").text
        assert sentence in text
        assert f"{split} metrics are computed at its end" in text
        assert ("no validation split" in text) == (split == "test")


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("epochs", [[1], [3], [0, 1, 2, 3]], ids=str)
def test_metrics_that_are_not_finite(page, value, epochs):
    """The test loss may overflow although the training loss does not."""
    history = make_history(4)
    for epoch in epochs:
        history[epoch] = dataclasses.replace(history[epoch], test_loss=value)
    run = make_run()
    logits = run["logits"].copy()
    logits[0], logits[3, 0], logits[6, 1] = math.nan, math.inf, -math.inf
    root = page(run | {"history": history, "logits": logits})
    shown = [node.text for node in elements(root) if node.tag != "style"]
    shown += [value for node in elements(root) if node.tag != "img" for value in node.attributes.values()]
    assert not [text for text in shown if re.search(r"\bnan\b|\binf\b", text, flags=re.IGNORECASE)]
    losses = [row[2] for row in section(root, "curves").all("table")[0].rows()[1:]]
    assert losses[epochs[0]] == ("3e+38" if value == 3e38 else "not finite")


def test_metrics_of_every_epoch(page):
    for split in ("test", "validation"):
        head, *_ = section(page(make_run() | {"history": make_history(4, split)}), "curves").all("table")[0].rows()
        name = split.capitalize()
        assert head[1:5] == ["Train loss", f"{name} loss", "Train accuracy", f"{name} accuracy"]
    rows = section(page(RUNS["ordinary"]), "curves").all("table")[0].rows()
    assert rows[1] == ["0", "1.4000", "1.1000", "0.6000", "0.6500", "0.25", "4,000"]
    assert [row[0] for row in rows[1:]] == ["0", "1", "2", "3"]


def test_a_split_has_its_color_in_the_tables_too(page):
    root = page(RUNS["validation"])
    for name, colors in (
        ("curves", {"Train loss": "train", "Validation accuracy": "validation"}),
        ("classes", {"Train images": "train", "Test images": "test"}),
    ):
        heads = {head.text: head.attributes.get("class") for head in section(root, name).all("th", scope="col")}
        for text, color in colors.items():
            assert heads[text] == f"figure {color}"
    (style,) = root.all("style")
    for split in ("train", "validation", "test"):
        assert f".figures .{split} {{ color: var(--{split}); }}" in style.text


def test_axes_of_the_matrix_are_labelled(page):
    head = section(page(RUNS["ordinary"]), "confusion").all("table")[0].rows()[0]
    assert head[0].split() == ["true", "\N{DOWNWARDS ARROW}", "predicted", "\N{RIGHTWARDS ARROW}"]


def test_no_matrix_of_more_than_a_hundred_classes(page):
    root = page(make_run(101, 400))
    assert [table.attributes["class"] for table in section(root, "confusion").all("table")] == ["figures"]
    assert len(section(root, "classes").all("tr")) == 1 + 101 + 2


def test_a_class_name_that_is_not_unicode(page):
    """In the name of a folder, Python represents a byte that is not UTF-8 as a lone surrogate."""
    root = page(make_run(names=("caf\udce9", "b", "c")))
    assert section(root, "classes").rows()[1][0] == "caf\N{REPLACEMENT CHARACTER}"


def test_the_page_is_deterministic(tmp_path):
    for name in ("first", "second"):
        save_page(tmp_path / name, **RUNS["ordinary"])
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_names_are_escaped(tmp_path):
    save_page(tmp_path / "report.html", **RUNS["nasty"])
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in source
    assert "&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;" in source
    assert "{{ 7 * 7 }}" in source


def test_many_classes_and_wide_tables_have_a_scroll_hint(page):
    root = page(make_run(60, 400))
    assert "Scroll sideways and down to see all 60 columns." in section(root, "confusion").text
    assert "Scroll" not in section(page(make_run(3)), "confusion").text


def luminance(color):
    """The relative luminance of ``#rrggbb`` as defined by WCAG 2.2."""
    channels = np.array([int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_contrasts_are_aa(page):
    (style,) = page(RUNS["ordinary"]).all("style")
    palettes = [
        dict(re.findall(r"--([\w-]+): (#\w{6});", block))
        for block in re.findall(r":root {(.*?)}", style.text, re.DOTALL)
    ]
    light, dark, _ = palettes
    assert light.keys() == dark.keys()
    for palette in (light, dark):
        pairs = [
            (name, "paper") for name in ("ink", "muted", "train", "validation", "test", "wrong", "wrong-5", "wrong-6")
        ]
        pairs += [("ink", name) for name in palette if re.match(r"correct-|wrong-[1-4]", name)]
        for names in pairs:
            darker, lighter = sorted(luminance(palette[name]) for name in names)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, names


class Browser:
    """A headless Chromium, controlled by the DevTools protocol.

    A context manager: leaving it closes the browser.
    """

    def __init__(self, program, profile):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={profile}"]
        # DevTools messages arrive on file descriptor 3 and leave on 4.
        command = ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null', "sh", program, *flags]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.deadline = threading.Timer(300, self.process.kill)
        self.deadline.daemon = True
        self.deadline.start()
        self.numbers = itertools.count()
        self.session = {}
        self.received = b""
        self.events = []
        target = self.call("Target.createTarget", url="about:blank")
        self.session = self.call("Target.attachToTarget", flatten=True, **target)
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.stdin.close()  # which ends it
        self.process.wait()
        self.process.stdout.close()
        self.deadline.cancel()

    def receive(self):
        while b"\0" not in self.received:
            part = self.process.stdout.read1()
            assert part, "the browser exited"
            self.received += part
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def call(self, method, **params):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params, **self.session}
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        while (answer := self.receive()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url, width, theme="light"):
        """Load a page, as a phone does if the width is small, and collect its events in ``events``."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.events = []
        self.call("Page.navigate", url=url)
        while all(event["method"] != "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def evaluate(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def screenshot(self):
        with Image.open(io.BytesIO(base64.b64decode(self.call("Page.captureScreenshot")["data"]))) as image:
            return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("Chromium is not installed")
    with Browser(program, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


CUT_OFF = """
[...document.querySelectorAll("h1, h2, p, dt, dd, img, .chart text, .facts td")].filter(node => {
  const {left, right} = node.getBoundingClientRect();
  return left < 0 || right > innerWidth;
}).map(node => node.outerHTML)
"""

OVERLAPPING = """
[...document.querySelectorAll(".chart")].flatMap(chart => {
  const texts = [...chart.querySelectorAll("text")].map(node => [node.textContent, node.getBoundingClientRect()]);
  return texts.flatMap(([one, a], n) => texts.slice(n + 1).filter(([other, b]) =>
    a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom
  ).map(([other]) => [one, other]));
})
"""


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", ["validation", "one epoch", "nasty", "a hundred classes"])
def test_nothing_is_cut_off_or_loaded_in_a_browser(browser, tmp_path, name, width):
    path = tmp_path / "report.html"
    save_page(path, **RUNS[name])
    browser.open(path.as_uri(), width)
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.evaluate(CUT_OFF) == []
    assert browser.evaluate(OVERLAPPING) == []
    events = [(event["method"], event["params"]) for event in browser.events]
    requested = {details["request"]["url"] for method, details in events if method == "Network.requestWillBeSent"}
    assert {url for url in requested if not url.startswith("data:")} == {path.as_uri()}
    errors = {"Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"}
    assert [event for event in events if event[0] in errors] == []


def test_light_and_dark_theme(browser, tmp_path):
    path = tmp_path / "report.html"
    save_page(path, **RUNS["ordinary"])
    for theme, *colors in (
        ("light", "#fdfcf9", "#96570a", "#14568f", "#62605a"),
        ("dark", "#151719", "#e0a64e", "#7fb9ec", "#a5a29a"),
    ):
        browser.open(path.as_uri(), 1200, theme)
        browser.evaluate("document.querySelector('.chart').scrollIntoView()")
        drawn = set(np.unique(browser.screenshot() @ np.array([65536, 256, 1])).tolist())
        assert {int(color[1:], 16) for color in colors} <= drawn  # background, curves and axes
