"""``python -m cnn_jax.models``."""

import subprocess
import sys

import pytest

from cnn_jax import __main__
from cnn_jax.errors import UsageError
from cnn_jax.models import MODELS
from cnn_jax.models.__main__ import main


def table(capsys, *args):
    assert main(args) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["model", "parameters", "MFLOPs", "options"]
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert list(rows) == list(MODELS)
    return rows


def test_parameters_flops_and_options(capsys):
    rows = table(capsys)
    # Multiplications and additions of the layers, and 12,000 others:
    # 2 (24 24 6 25 + 8 8 12 150 + 192 120 + 120 60 + 60 10) = 465,000
    assert rows["cnn"].split() == ["32,998", "0.5"]
    assert rows["wide_resnet"].endswith("  --model-depth 16 --model-width 4 --model-dropout 0.0")


def test_published_flops(capsys):
    """torchvision's counts, where a multiplication and an addition are one, and those with padding count."""
    rows = table(capsys, "--image-size", "224", "224", "--channels", "3", "--classes", "1000")
    for name, (parameters, billions) in {
        "resnet18": ("11,689,512", 1.814),
        "resnet34": ("21,797,672", 3.664),
        "resnet50": ("25,557,032", 4.089),
    }.items():
        number, megaflops = rows[name].split()
        assert number == parameters
        assert 0.9 < float(megaflops.replace(",", "")) / (2000 * billions) < 1


def test_networks_that_do_not_fit(capsys):
    rows = table(capsys, "--image-size", "12", "28")
    assert rows["resnet18"].strip() == rows["cnn"].strip() == "needs images of at least 16x16 pixels"
    assert rows["resnet9"].split()[0] == "6,571,978"


def test_as_a_subcommand():
    with pytest.raises(UsageError, match="--channels must be 1 or 3, not '2'; see python"):
        __main__._run(["models", "--channels", "2"])


def test_the_help_does_not_import_jax():
    code = "import sys; from cnn_jax.models.__main__ import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    assert "--image-size HEIGHT WIDTH" in done.stdout
    assert " jax\n" not in done.stderr
