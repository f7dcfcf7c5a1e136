"""The page, as a reader of HTML finds it and as a browser shows it."""

import base64
import dataclasses
import io
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
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
    "train_seconds": 12.5,
    "compile_seconds": 3.25,
    "backend": "cpu",
    "device_count": 2,
    "versions": {"python": "3.11.7", "jax": "0.10.2", "jaxlib": "0.10.1", "flax": "0.12.8", "optax": "0.2.9"},
}
VOID = {"meta", "link", "img", "br"}
NASTY = ("<script>alert('1')</script>", 'Ähre & "Co"', "{{ 7 * 7 }}", "长" * 300, "&amp;", "\u202eright to left")


def make_history(num_epochs):
    return [
        EpochRecord(
            epoch=n,
            step=STEPS_PER_EPOCH * (n + 1),
            total_correct=900,
            loss=STEPS_PER_EPOCH * 1.4 / (n + 1),
            train_accuracy=1 - 0.4 / (n + 1),
            test_loss=0.2 + 0.9 / (n + 1),
            test_accuracy=0.9 - 0.25 / (n + 1),
            seconds=0.25 * (n + 1),
            images_per_second=4000.0 / (n + 1),
        )
        for n in range(num_epochs)
    ]


def make_run(num_classes=3, num_examples=60, image_shape=(8, 8, 1), num_epochs=4, names=None, config=None):
    """What ``save_page`` takes, of a network that is right two times out of three at least."""
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
        "summary": SUMMARY,
    }


def without_mistakes(run):
    return run | {"logits": np.eye(len(run["dataset"].class_names), dtype=np.float32)[run["dataset"].test.labels]}


RUNS = {
    "ordinary": make_run(),
    "nasty": make_run(6, names=NASTY, config=Config(dataset="tfds:<b>&\"'", data_dir="/a/<i>/ö & ü")),
    "one epoch": make_run(num_epochs=1),
    "hundreds of epochs": make_run(num_epochs=300),
    "two classes in colour": make_run(2, image_shape=(40, 60, 3)),
    "a hundred classes": make_run(100, 700, names=tuple(f"class number {n} of a hundred" for n in range(100))),
    "nothing wrong": without_mistakes(make_run()),
}


@dataclass
class Node:
    """An element of the page."""

    tag: str
    attributes: dict[str, str]
    children: list["Node | str"] = field(default_factory=list)

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag, **attributes):
        """The elements of a tag below this one, with these attributes."""
        found = []
        for child in self.children:
            if isinstance(child, Node):
                if child.tag == tag and attributes.items() <= child.attributes.items():
                    found.append(child)
                found += child.all(tag, **attributes)
        return found

    def rows(self):
        """The texts of the cells below this element."""
        return [[cell.text for cell in row.children if isinstance(cell, Node)] for row in self.all("tr")]


class Reader(HTMLParser):
    """Reads a page and sees to it that each element is closed, in order."""

    def __init__(self):
        super().__init__()
        self.root = Node("", {})
        self.open = [self.root]

    def handle_starttag(self, tag, attrs):
        node = Node(tag, dict(attrs))
        assert len(node.attributes) == len(attrs), f"an attribute stands twice in {tag}"
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
    """A run, and its page as read."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    save_page(path, **RUNS[request.param])
    return RUNS[request.param], read(path)


@pytest.fixture
def page(tmp_path):
    """Saves the page of a run and reads it."""

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


def test_it_asks_for_nothing_and_runs_nothing(saved):
    _, root = saved
    for node in elements(root):
        assert node.tag not in {"script", "iframe", "object", "embed", "base", "form"}
        for name, value in node.attributes.items():
            assert not name.startswith("on"), f"a script in {name}"
            if name in {"src", "href", "srcset", "action", "data", "poster", "xlink:href"}:
                assert value.startswith("data:")
            assert "url(" not in value
    (style,) = root.all("style")
    assert not re.search(r"url\(|@import|@font-face", style.text)


def test_titles_headings_and_tables_tell_what_they_are(saved):
    run, root = saved
    last = run["history"][-1]
    assert root.all("title")[0].text == f"{run['config'].dataset}, cnn: test accuracy {last.test_accuracy:.4f}"
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
            assert re.match(r"Test image \d+: .+, taken for .+", node.attributes["alt"], flags=re.DOTALL)
        if node.tag == "svg" and node.attributes.get("role") == "img":
            assert "by epoch, train " in node.all("title")[0].text


def test_every_setting_and_its_value_is_there(saved):
    run, root = saved
    shown = dict(section(root, "made").all("table")[0].rows())
    config = run["config"]
    assert shown.keys() == {field.name for field in dataclasses.fields(Config)}
    assert shown["dataset"] == config.dataset
    assert shown["data_dir"] == (config.data_dir or "none")
    assert (shown["epochs"], shown["shuffle"], shown["learning_rate"]) == (str(config.epochs), "on", "0.01")


def test_settings_that_are_not_the_default_are_bold(page):
    root = page(make_run(config=Config(dataset="squares", image_size=(28, 20), shuffle=False)))
    rows = section(root, "made").all("table")[0].all("tr")
    changed = {row.all("th")[0].text: row.all("b")[0].text for row in rows if row.all("b")}
    assert changed == {"dataset": "squares", "image_size": "28 20", "shuffle": "off"}


def test_speed_device_and_versions(page):
    made = section(page(RUNS["ordinary"]), "made")
    speed, versions = (dict(table.rows()) for table in made.all("table")[1:])
    assert speed == {
        "Device": "2 \N{MULTIPLICATION SIGN} CPU",
        "Median epoch": "0.62 s",
        "Images a second": "1,667",
        "Training, all epochs": "12.50 s",
        "Compilation": "3.25 s",
    }
    assert versions == SUMMARY["versions"]


def test_every_name_and_every_count_is_in_the_matrix(saved):
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
        *["right-5", "wrong-3", "wrong-1"],  # 95 % right; 4.5 % and 0.5 % wrong
        *["wrong-6", "right-3", None],  # 20 % wrong, 80 % right
        *["wrong-6", None, None],
    ]


def test_most_often_confused(page):
    run = RUNS["ordinary"]
    rows = section(page(run), "confusion").all("table")[1].rows()[1:]
    mistakes = {(f"class {i}", f"class {j}"): n for (i, j), n in np.ndenumerate(counts(run)) if i != j and n}
    assert {(true, taken): int(times) for true, taken, times in rows} == mistakes
    assert [int(times) for _, _, times in rows] == sorted(mistakes.values(), reverse=True)


def test_scores_of_each_class(saved):
    run, root = saved
    (table,) = section(root, "classes").all("table")
    rows = [[cell.strip() for cell in row] for row in table.rows()[1:]]
    matrix = counts(run)
    right, taken, support = np.diag(matrix), matrix.sum(axis=0), matrix.sum(axis=1)
    expected = [
        right / np.maximum(taken, 1),
        right / np.maximum(support, 1),
        2 * right / np.maximum(taken + support, 1),
    ]
    *classes, macro, weighted = rows
    assert [row[0] for row in classes] == list(run["dataset"].class_names)
    assert [int(row[4].replace(",", "")) for row in classes] == support.tolist()
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


def test_the_pictures_are_those_most_confidently_wrong(saved):
    run, root = saved
    dataset, logits = run["dataset"], run["logits"].astype(float)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    mistaken = [n for n in range(len(logits)) if logits[n].argmax() != dataset.test.labels[n]]
    expected = sorted(mistaken, key=lambda n: -probabilities[n].max())[:24]
    pictures = section(root, "wrong").all("li")
    assert len(pictures) == len(expected)
    for picture, index in zip(pictures, expected, strict=True):
        true = dataset.class_names[dataset.test.labels[index]]
        taken = dataset.class_names[logits[index].argmax()]
        (image,) = picture.all("img")
        assert image.attributes["alt"] == f"Test image {index}: {true}, taken for {taken}"
        assert [name.text for name in picture.all("bdi")] == [true, taken]
        assert float(picture.all("span")[0].text) == pytest.approx(probabilities[index].max(), abs=5.1e-4)
        np.testing.assert_array_equal(decode(image.attributes["src"]), dataset.test.images[index].squeeze())
    if not expected:
        assert "No test image was classified wrongly." in section(root, "wrong").text


def test_large_pictures_are_scaled_down_and_a_page_of_noise_stays_small(page, tmp_path):
    root = page(make_run(num_examples=90, image_shape=(150, 300, 3)))
    images = [decode(image.attributes["src"]) for image in root.all("img")]
    assert {image.shape for image in images} == {(48, 96, 3)}
    page(make_run(num_examples=90, image_shape=(100, 100, 3)))
    assert (tmp_path / "report.html").stat().st_size < 1_000_000


def test_only_small_pictures_are_pixelated(page):
    assert page(make_run(image_shape=(64, 32, 1))).all("ul", **{"class": "pictures pixelated"})
    assert page(make_run(image_shape=(65, 32, 1))).all("ul", **{"class": "pictures"})


def test_probabilities_near_one_are_not_called_one(page):
    run = make_run()
    root = page(run | {"logits": 100 * run["logits"]})
    assert section(root, "wrong").all("span")[0].text == "over 0.999"


def number(text):
    return float(text.removesuffix("%"))


def axis(chart):
    """The ticks' values, and a function from places to values that they agree on."""
    labels = [node for node in chart.children if isinstance(node, Node) and node.tag == "text"]
    places, values = np.transpose(
        [(number(n.attributes["y"]), float(n.text)) for n in labels if n.attributes["x"] == "0"]
    )
    slope, offset = np.polyfit(places, values / values.max(), 1) * values.max()
    np.testing.assert_allclose(slope * places + offset, values, atol=1e-3 * np.ptp(values))
    return values, lambda place: slope * place + offset


@pytest.mark.parametrize("num_epochs", [1, 2, 4, 30, 31, 300])
def test_curves_show_the_history(page, num_epochs):
    history = make_history(num_epochs)
    root = page(make_run(num_epochs=num_epochs))
    curves = {
        "Loss": {"train": [r.loss / STEPS_PER_EPOCH for r in history], "test": [r.test_loss for r in history]},
        "Accuracy": {"train": [r.train_accuracy for r in history], "test": [r.test_accuracy for r in history]},
    }
    for chart, series in zip(root.all("svg", **{"class": "axes"}), curves.values(), strict=True):
        ticks, value_at = axis(chart)
        tolerance = 1e-3 * np.ptp(ticks)
        for name, values in series.items():
            (path,) = chart.all("path", **{"class": name})
            xs, ys = np.transpose([[float(x) for x in p.split(",")] for p in path.attributes["d"][1:].split("L")])
            np.testing.assert_allclose(xs, np.linspace(0, 100, num_epochs) if num_epochs > 1 else 50, atol=0.01)
            np.testing.assert_allclose(value_at(ys), values, atol=tolerance)
            (group,) = chart.all("g", **{"class": name})
            assert group.all("text")[0].text == f"{name} {values[-1]:.4f}"
            marks = group.all("circle")
            assert len(marks) == (num_epochs if num_epochs <= 30 else 1)
            assert marks[-1].text == f"epoch {num_epochs - 1}, {name}: {values[-1]:.4f}"
            assert value_at(number(marks[-1].attributes["cy"])) == pytest.approx(values[-1], abs=tolerance)
            assert number(marks[-1].attributes["cx"]) == pytest.approx(xs[-1], abs=0.01)


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 0.7, 3, 4e4, 1e30])
def test_ticks_are_few_and_round_and_hold_the_curves(page, scale):
    history = [dataclasses.replace(r, loss=r.loss * scale, test_loss=r.test_loss * scale) for r in make_history(3)]
    for chart in page(make_run() | {"history": history}).all("svg", **{"class": "axes"}):
        ticks, _ = axis(chart)
        assert 2 <= len(ticks) <= 7
        step = np.diff(ticks)[0]
        assert re.fullmatch(r"[-+]?[125]0*\.?0*e[-+]\d+", f"{abs(step):.3e}")
        for mark in chart.all("circle"):
            assert 0 <= number(mark.attributes["cy"]) <= 100


def test_x_ticks_are_epochs(page):
    (chart, _) = page(make_run(num_epochs=300)).all("svg", **{"class": "axes"})
    labels = chart.all("text", y="100%", dy="22")
    assert [label.text for label in labels] == ["epoch 0", "50", "100", "150", "200", "250"]
    places = [number(label.attributes["x"]) for label in labels]
    np.testing.assert_allclose(places, 100 * np.arange(0, 300, 50) / 299, atol=0.01)


def test_labels_of_like_values_do_not_overlap(page):
    like = [dataclasses.replace(record, test_loss=record.loss / STEPS_PER_EPOCH) for record in make_history(4)]
    for history in (like, [dataclasses.replace(record, loss=0.0, test_loss=0.0) for record in like]):
        (chart, _) = page(make_run() | {"history": history}).all("svg", **{"class": "axes"})
        first, second = (number(group.all("text")[0].attributes["y"]) for group in chart.all("g"))
        assert abs(first - second) >= 8
        assert max(first, second) <= 100


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("epochs", [[1], [3], [0, 1, 2, 3]], ids=str)
def test_figures_that_are_not_finite_are_said_to_be_so(page, value, epochs):
    """A loss beyond the numbers of 32 bits, which the test set may have and training not."""
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


def test_the_figures_of_every_epoch(page):
    rows = section(page(RUNS["ordinary"]), "curves").all("table")[0].rows()
    assert rows[1] == ["0", "1.4000", "1.1000", "0.6000", "0.6500", "0.25", "4,000"]
    assert [row[0] for row in rows[1:]] == ["0", "1", "2", "3"]


def test_the_best_epoch_is_named_where_it_is_not_the_last(page):
    history = make_history(4)
    assert "best" not in section(page(make_run() | {"history": history}), "curves").text
    history[1] = dataclasses.replace(history[1], test_accuracy=0.95)
    root = page(make_run() | {"history": history})
    assert "The best test accuracy, 0.9500, was that of epoch 1." in section(root, "curves").text


def test_of_more_classes_there_is_no_matrix(page):
    root = page(make_run(101, 400))
    assert [table.attributes["class"] for table in section(root, "confusion").all("table")] == ["figures"]
    assert len(section(root, "classes").all("tr")) == 1 + 101 + 2


def test_a_name_that_is_no_text_is_no_error(page):
    """As of a folder whose name is not UTF-8: Python keeps the odd byte as a lone surrogate."""
    root = page(make_run(names=("caf\udce9", "b", "c")))
    assert section(root, "classes").rows()[1][0] == "caf\N{REPLACEMENT CHARACTER}"


def test_same_run_same_page_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it is an error
    for name in ("first", "second"):
        save_page(tmp_path / name, **RUNS["ordinary"])
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def luminance(colour):
    """WCAG 2.2's relative luminance of ``#rrggbb``."""
    channels = np.array([int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)])
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
        pairs = [(name, "paper") for name in ("ink", "muted", "train", "test", "wrong", "wrong-5", "wrong-6")]
        pairs += [("ink", name) for name in palette if re.match(r"right-|wrong-[1-4]", name)]
        for names in pairs:
            darker, lighter = sorted(luminance(palette[name]) for name in names)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, names


class Browser:
    """A headless Chromium, driven by its DevTools protocol.

    A context manager: leaving it ends the browser.
    """

    def __init__(self, program, profile):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={profile}"]
        # It reads its file descriptor 3 and writes its 4.
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
        self.process.stdin.close()  # at which it ends
        self.process.wait()
        self.process.stdout.close()
        self.deadline.cancel()

    def receive(self):
        while b"\0" not in self.received:
            part = self.process.stdout.read1()
            assert part, "the browser has ended"
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
        """Show a page, as a telephone does where it is narrow; what happens then is in ``events``."""
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
        pytest.skip("there is no Chromium")
    with Browser(program, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


CUT_OFF = """
[...document.querySelectorAll("h1, h2, p, dt, dd, img, .axes text, .facts td")].filter(node => {
  const {left, right} = node.getBoundingClientRect();
  return left < 0 || right > innerWidth;
}).map(node => node.outerHTML)
"""

OVERLAPPING = """
[...document.querySelectorAll(".axes")].flatMap(chart => {
  const texts = [...chart.querySelectorAll("text")].map(node => [node.textContent, node.getBoundingClientRect()]);
  return texts.flatMap(([one, a], n) => texts.slice(n + 1).filter(([other, b]) =>
    a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom
  ).map(([other]) => [one, other]));
})
"""


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", RUNS)
def test_a_browser_shows_it_whole_and_asks_for_nothing(browser, tmp_path, name, width):
    path = tmp_path / "report.html"
    save_page(path, **RUNS[name])
    browser.open(path.as_uri(), width)
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.evaluate(CUT_OFF) == []
    assert browser.evaluate(OVERLAPPING) == []
    events = [(event["method"], event["params"]) for event in browser.events]
    asked_for = {details["request"]["url"] for method, details in events if method == "Network.requestWillBeSent"}
    assert {url for url in asked_for if not url.startswith("data:")} == {path.as_uri()}
    complaints = {"Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"}
    assert [event for event in events if event[0] in complaints] == []


def test_it_is_light_or_dark_as_the_reader_likes(browser, tmp_path):
    path = tmp_path / "report.html"
    save_page(path, **RUNS["ordinary"])
    for theme, paper in (("light", "#fdfcf9"), ("dark", "#151719")):
        browser.open(path.as_uri(), 1200, theme)
        picture = browser.screenshot()
        assert picture[0, 0].tolist() == list(bytes.fromhex(paper[1:]))
        assert len(np.unique(picture[::4, ::4].reshape(-1, 3), axis=0)) > 50, "there is nothing on the page"
