"""The pictures of the most confident mistakes in the HTML report."""

import dataclasses
import re

import numpy as np
import pytest
from pages import decode, make_run, section


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
