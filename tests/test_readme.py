"""README.md and docs/ agree with the code: their commands and examples run, and their tables are complete."""

import dataclasses
import inspect
import re
import shlex
import shutil
import typing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnn_jax import cli
from cnn_jax.__main__ import command_module
from cnn_jax.cache import CacheFlags
from cnn_jax.compare import CompareFlags
from cnn_jax.config import MAY_CHANGE, Config
from cnn_jax.evaluate import EvaluateFlags
from cnn_jax.export import ExportFlags
from cnn_jax.models.__main__ import ModelsFlags
from cnn_jax.predict import PredictFlags
from cnn_jax.runs.run import load_run
from cnn_jax.settings import type_and_meta
from cnn_jax.sweep import SweepFlags
from cnn_jax.train import TrainFlags

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
COMMANDS = {
    "train": TrainFlags,
    "sweep": SweepFlags,
    "evaluate": EvaluateFlags,
    "compare": CompareFlags,
    "predict": PredictFlags,
    "export": ExportFlags,
    "models": ModelsFlags,
    "cache": CacheFlags,
}

NOT_RUN = {
    "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/python -m cnn_jax.train --epochs 10": "network",
    "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest": ".ci/run runs it",
    "ruff check . && ruff format --check . && pytest": ".ci/run runs it",
    "python -m cnn_jax.train --config tutorial --seed 0": "needs Fashion-MNIST; tests/test_real_data.py trains it",
    "python -m cnn_jax.train --config tutorial": "needs Fashion-MNIST; tests/test_real_data.py trains it",
    "python scripts/pytorch_lesson.py --epochs 10 --seeds 0 1 2 3 4 5 6 7 8 9": "needs Fashion-MNIST and PyTorch",
    "python scripts/benchmark.py --epochs 5 --torch-compile": "needs PyTorch and minutes",
    "python -m cnn_jax.train --config cpu": "needs Fashion-MNIST and two minutes",
    "python -m cnn_jax.train --config finetune --dataset folder:photos": "needs a network and PyTorch",
    "python scripts/speedrun.py --config cpu --target 0.93 --seeds 5": "needs Fashion-MNIST and minutes",
    "python -m cnn_jax.train --config cpu --model-depth 6 --model-width 24 --model-dropout 0.1 --shift 1 "
    "--tta multicrop --epochs 12": "the same",
    "python scripts/speedrun.py --config cpu --model-depth 6 --model-width 24 --model-dropout 0.1 --shift 1 "
    "--tta multicrop --epochs 12 --target 0.94 --seeds 5": "the same",
    "python scripts/speedrun.py --config cpu --epochs 2 --seeds 2 --pytorch": "needs PyTorch and minutes",
    "python scripts/speedrun.py --config cpu --model-depth 6 --model-width 24 --model-dropout 0.1 --shift 1 --epochs 1 "
    "--seeds 2 --pytorch": "the same",
    "python scripts/speedrun.py --config cpu --model-width 48 --model-dropout 0.1 --epochs 1 --seeds 1 --pytorch": (
        "the same"
    ),
    "python -m cnn_jax.sweep --config tutorial --precision float32 bfloat16 --seeds 5": "needs minutes",
    "python scripts/compile_ahead.py --targets v5e-1 v5e-8 --presets cpu fast --json ahead.json": "needs libtpu",
    "python -m cnn_jax.train --dataset folder:big --cache-limit 1 --epochs 1 --batch-size 32 --model small "
    "--model-width 4": "needs 41,000 images",
    "python scripts/streaming.py --images 2000 --side 64": "takes minutes; tests/test_scripts.py runs it briefly",
    "python scripts/scaling.py --json scaling.json": "needs minutes; tests/test_scripts.py measures three rows",
    "python scripts/transfer.py --dataset fashion_mnist --examples 1 3 10 30 --seeds 3": "needs Fashion-MNIST",
    "python scripts/compile_ahead.py --targets h100-1 --presets tutorial --members 1 16 64": "needs jax's CUDA plugin",
    "python scripts/single_batch.py --dataset digits": "tests/test_scripts.py runs it",
    "python -m cnn_jax.export runs/mine --format onnx": "needs jax2onnx; tests/formats/test_onnx.py exports it",
}
"""Commands of the pages that are not executed here, and why."""


TRAINING = (
    "python -m cnn_jax.train --dataset folder:photos --image-size 64 64 --validation-fraction 0.1 --workdir runs/mine"
)
"""The command of the README that trains the run of the other commands, executed once for all pages."""


def blocks(page, language):
    """The fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], flags=re.DOTALL | re.MULTILINE)


def commands(page):
    return [line for block in blocks(page, "shell") for line in block.splitlines()]


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """A directory with the files that the pages mention: images, and the run of the README's ``TRAINING``."""
    assert TRAINING in commands("README.md")
    directory = tmp_path_factory.mktemp("examples")
    rng = np.random.default_rng(0)
    for name, color in {"cat": (200, 120, 40), "dog": (40, 80, 160)}.items():
        (directory / "photos" / name).mkdir(parents=True)
        for number in range(15):
            pixels = rng.normal(color, 20, (20, 24, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(directory / "photos" / name / f"{number}.png")
    (directory / "more_pictures").mkdir()
    for copy in ("picture.png", "more_pictures/1.png"):
        shutil.copy(directory / "photos" / "cat" / "1.png", directory / copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        assert execute(TRAINING) == 0
    return directory


@pytest.fixture
def copied_examples(examples, tmp_path, monkeypatch):
    """The working directory: a copy of the examples, so that each page finds them new."""
    shutil.copytree(examples, tmp_path / "examples")
    monkeypatch.chdir(tmp_path / "examples")


def execute(command):
    """Run a command in this process, which has jax imported and programs compiled; returns its exit status."""
    python, dash_m, module, *words = shlex.split(command)
    assert (python, dash_m) == ("python", "-m"), command
    return command_module(module.removeprefix("cnn_jax.")).main(words)


@pytest.mark.parametrize("page", [page for page in PAGES if set(commands(page)) - NOT_RUN.keys()])
def test_commands_run(copied_examples, page):
    for command in commands(page):
        if command not in NOT_RUN and command != TRAINING:
            assert execute(command) == 0, command


def test_python_examples_of_the_readme_run(copied_examples, capsys):
    names = {}
    first, second = blocks("README.md", "python")
    exec(first, names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" total_correct")[0] for line in lines[:3]] == ["epoch: 0", "epoch: 1", "epoch: 2"]
    assert f"test_accuracy: {float(lines[3]):.4f}" in "".join(lines[:3])
    assert re.match(r"verified on 300 images, largest difference \d", lines[-1])
    exec(second, names)
    assert names["run"].class_names == tuple("0123456789")
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_example_of_the_lesson_runs(capsys):
    (block,) = blocks("lesson.md", "python")
    exec(block, {})
    losses = [float(loss) for loss in re.findall(r"loss: (\S+)", capsys.readouterr().out)]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 3


def test_the_example_of_stablehlo_runs(copied_examples, capsys):
    execute("python -m cnn_jax.export runs/mine --format stablehlo")
    exec(blocks("formats.md", "python")[0], names := {})
    assert names["network"].call(names["pixels"]).shape == (1, 2)


def test_the_example_of_metadata_runs(copied_examples):
    execute("python -m cnn_jax.export runs/mine --format pytorch --output weights.safetensors")
    exec(blocks("formats.md", "python")[1], names := {})
    assert (tuple(names["mean"]), tuple(names["std"])) == dataclasses.astuple(load_run("runs/mine").task.preprocess)


def test_the_example_of_sweeps_runs(copied_examples, capsys):
    exec(blocks("sweeps.md", "python")[0], {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["seed=0", "seed=1"]


def test_every_python_example_is_run():
    assert {page: len(blocks(page, "python")) for page in PAGES if blocks(page, "python")} == {
        "README.md": 2,
        "formats.md": 2,
        "lesson.md": 1,
        "sweeps.md": 1,
    }


def test_commands_that_are_not_run_are_in_a_page_and_have_valid_flags():
    written = {command for page in PAGES for command in commands(page)}
    assert NOT_RUN.keys() <= written
    for command in NOT_RUN:
        if match := re.search(r"python -m cnn_jax\.(\w+) (.*)$", command):
            parse = cli.parse_several if match[1] == "sweep" else cli.parse
            parse(COMMANDS[match[1]], shlex.split(match[2]), module=f"cnn_jax.{match[1]}")


def test_every_command_is_in_a_block():
    for page, text in PAGES.items():
        outside = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        assert re.findall(r"^(?: {4}|\$ )(python.*|pip.*)$", outside, flags=re.MULTILINE) == [], page


def flag_row(field, hint, is_config):
    """The row of a field in a Markdown table of flags."""
    kind, meta = type_and_meta(hint)
    placeholder = field.metadata["metavar"] or meta.title
    flag = f"--{field.name.replace('_', '-')}"
    if field.metadata["positional"]:
        flag = placeholder
    elif kind is not bool:
        flag += f" {placeholder if isinstance(placeholder, str) else ' '.join(placeholder)}"
    meaning, default = re.fullmatch(r"(.*?)(?: \(default: (.*)\)| \(required\))?", field.metadata["help"]).groups()
    if field.default is dataclasses.MISSING:
        default = "required"
    elif isinstance(field.default, bool):
        default = "on" if field.default else "off"
    elif isinstance(field.default, tuple):
        default = f"`{' '.join(map(str, field.default))}`"
    elif field.default is not None:
        default = f"`{field.default}`"
    cells = [f"`{flag}`", default or "none", meaning]
    if is_config:
        cells[0] += f", `--no-{flag.removeprefix('--')}`" if kind is bool else ""
        cells.append("yes" if field.name in MAY_CHANGE else "no")
    return [cell.replace("<", "&lt;") for cell in cells]


def flag_tables(flags):
    """The Markdown tables of a command: of its own flags, and of each group of settings, which sweep has from train."""
    hints = typing.get_type_hints(flags, include_extras=True)
    for base in flags.__mro__:
        own = inspect.get_annotations(base)
        is_config = issubclass(flags, Config) and base is not flags
        if is_config and flags is SweepFlags:
            continue
        if fields := [field for field in dataclasses.fields(flags) if field.name in own]:
            head = ["flag", "default", "meaning"] + ["may change on resume"] * is_config
            rows = [head, ["---"] * len(head), *(flag_row(field, hints[field.name], is_config) for field in fields)]
            yield "\n".join(f"| {' | '.join(row)} |" for row in rows)


@pytest.mark.parametrize("command", COMMANDS)
def test_tables_of_flags_agree_with_the_code(command):
    section = PAGES["flags.md"].partition(f"## {command.capitalize()}\n")[2].partition("\n## ")[0]
    tables = re.findall(r"^\| flag .*?(?=\n\n|\n*\Z)", section, flags=re.DOTALL | re.MULTILINE)
    expected = list(flag_tables(COMMANDS[command]))
    assert sorted(tables) == sorted(expected), "docs/flags.md should have:\n\n" + "\n\n".join(expected)


def test_settings_that_may_change_on_resume_are_listed():
    paragraph = re.search(r"These may change: (.*?)\.", PAGES["runs.md"], flags=re.DOTALL)[1]
    assert {name.replace("-", "_") for name in re.findall(r"`--([\w-]+)`", paragraph)} == MAY_CHANGE


def test_flags_in_the_text_exist():
    fields = [field.name.replace("_", "-") for flags in COMMANDS.values() for field in dataclasses.fields(flags)]
    known = {f"--{name}" for name in ("help", "batch_size", *fields, *(f"no-{field}" for field in fields))}
    for page, text in PAGES.items():
        prose = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        assert set(re.findall(r"`(--[a-z][\w-]*)", prose)) <= known, page


def test_links_lead_somewhere():
    anchors = {
        page: {
            re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)
        }
        for page, text in PAGES.items()
    }
    for page, text in PAGES.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
        assert links or page == "flags.md"
        for link in links:
            path, _, anchor = link.partition("#")
            assert (folder / path).exists(), link
            assert not anchor or anchor in anchors[Path(path).name or page], link


def test_every_page_is_linked_in_the_readme():
    assert [page for page in PAGES if page != "README.md" and f"(docs/{page})" not in PAGES["README.md"]] == []


def test_every_script_named_exists():
    named = {script for text in PAGES.values() for script in re.findall(r"(?:scripts|tests)/\w+\.py", text)}
    assert named
    assert [script for script in named if not (ROOT / script).exists()] == []


SCRIPTS = [path for path in sorted((ROOT / "scripts").glob("*.py")) if "__main__" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_says_how_to_call_it(script):
    assert f"python scripts/{script.name}" in script.read_text(encoding="utf-8")
