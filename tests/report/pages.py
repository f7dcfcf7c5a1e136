"""Runs to save a report of, and a parser of their pages."""

import base64
import dataclasses
import io
from dataclasses import dataclass, field
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from cnn_jax.config import Config
from cnn_jax.data import Dataset, Split
from cnn_jax.training.history import EpochRecord

STEPS_PER_EPOCH = 15
SUMMARY = {
    "compile_seconds": 3.25,
    "date": "2026-11-24T10:38:15+01:00",
    "backend": "cpu",
    "device": "AMD EPYC 7B13",
    "device_count": 2,
    "process_count": 1,
    "cpu_count": 8,
    "versions": {"python": "3.11.7", "jax": "0.10.2", "jaxlib": "0.10.1", "flax": "0.12.8", "optax": "0.2.9"},
}
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
            input_wait_seconds=0.05 * (n + 1),
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
VOID = {"meta", "link", "img", "br"}


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


def section(root, name):
    (found,) = [node for node in root.all("section") if node.attributes["aria-labelledby"] == name]
    return found


def elements(node):
    for child in node.children:
        if isinstance(child, Node):
            yield child
            yield from elements(child)


def details(root):
    """The tables of the last section by caption, without the settings."""
    tables = section(root, "details").all("table")[1:]
    return {table.all("caption")[0].text: dict(table.rows()) for table in tables}


def counts(run):
    """The confusion matrix."""
    matrix = np.zeros(2 * [len(run["dataset"].class_names)], int)
    np.add.at(matrix, (run["dataset"].test.labels, run["logits"].argmax(axis=-1)), 1)
    return matrix


def decode(url):
    with Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))) as image:
        assert image.format == "PNG"
        return np.asarray(image)
