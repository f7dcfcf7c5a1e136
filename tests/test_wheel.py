"""What a plain installation holds."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    words = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", directory, ROOT]
    built = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return next(directory.iterdir())


def test_the_wheel_finds_its_presets_in_a_fresh_environment(wheel, tmp_path):
    """A fresh environment has the wheel from its own place, and borrows the dependencies of this one."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", wheel]
    subprocess.run(install, check=True, capture_output=True)
    dependencies = Path(pytest.__file__).parents[1]
    code = f"""
import sys
sys.path.append({str(dependencies)!r})
import cnn_jax
from cnn_jax.train import parse
print(cnn_jax.__file__)
print(parse(["--config", "tutorial"]).dataset)
"""
    used = subprocess.run([python, "-E", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert used.returncode == 0, used.stderr
    file, dataset = used.stdout.split()
    assert Path(file).is_relative_to(tmp_path / "venv")
    assert dataset == "fashion_mnist"


def test_the_wheel_holds_what_is_no_code(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    presets = {f"cnn_jax/configs/{path.name}" for path in (ROOT / "configs").iterdir()}
    templates = {f"cnn_jax/report/{path.name}" for path in (ROOT / "src/cnn_jax/report").glob("*.j2")}
    assert templates >= {"cnn_jax/report/base.html.j2", "cnn_jax/report/page.html.j2"}
    assert presets | templates <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
