"""The settings, sizes, times and versions in the HTML report."""

import dataclasses

from pages import RUNS, SUMMARY, details, make_history, make_run, section

from cnn_jax.config import Config


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
            "Waiting for images": "0.50 s, 20.0% of it",
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
