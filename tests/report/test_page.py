"""The HTML report as a whole: its structure, names, colors and labels."""

import dataclasses
import itertools
import re

import numpy as np
from pages import RUNS, counts, details, elements, make_run, section

from cnn_jax.report.page import save_page


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


def test_a_class_name_that_is_not_unicode(page):
    """In the name of a folder, Python represents a byte that is not UTF-8 as a lone surrogate."""
    root = page(make_run(names=("caf\udce9", "b", "c")))
    assert section(root, "classes").rows()[1][0] == "caf\N{REPLACEMENT CHARACTER}"


def test_names_are_escaped(tmp_path):
    save_page(tmp_path / "report.html", **RUNS["nasty"])
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in source
    assert "&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;" in source
    assert "{{ 7 * 7 }}" in source


def test_the_page_is_deterministic(tmp_path):
    for name in ("first", "second"):
        save_page(tmp_path / name, **RUNS["ordinary"])
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_many_classes_and_wide_tables_have_a_scroll_hint(page):
    root = page(make_run(60, 400))
    assert "Scroll sideways and down to see all 60 columns." in section(root, "confusion").text
    assert "Scroll" not in section(page(make_run(3)), "confusion").text


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
