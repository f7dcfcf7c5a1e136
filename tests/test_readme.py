"""The README is true."""

import dataclasses
import re
from pathlib import Path

import pytest

from cnn_jax.train import TrainFlags

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(block, names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("epoch: ") for line in lines[:4]] == [True, True, True, False]
    assert f"test_accuracy: {float(lines[3]):.4f}" in lines[2]
    assert names["run"].predict(names["dataset"].test.images[:5]).shape == (5, 10)
    assert re.match(r"verified on 300 images, largest difference \d", lines[-1])
    assert (tmp_path / "digits.safetensors").exists()


def test_every_flag_is_in_the_table_with_its_default():
    rows = dict(re.findall(r"^\| `--([\w-]+)[^|]*\| ([^|]+) \|", README, flags=re.MULTILINE))
    fields = {field.name.replace("_", "-"): field.default for field in dataclasses.fields(TrainFlags)}
    assert rows.keys() == fields.keys()
    for name, default in fields.items():
        if default is not None:
            shown = {True: "on", False: "off"}.get(default) if isinstance(default, bool) else str(default)
            assert rows[name].strip("`") == shown


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_script_named_is_there():
    named = set(re.findall(r"scripts/\w+\.py", README))
    assert named
    assert [script for script in named if not (ROOT / script).exists()] == []


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_every_script_says_how_to_call_it(script):
    assert f"python scripts/{script.name}" in script.read_text(encoding="utf-8")
