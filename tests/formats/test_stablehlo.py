import dataclasses
import os
import subprocess
import sys
import textwrap

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax import export
from PIL import Image

from cnn_jax.config import Config
from cnn_jax.formats import stablehlo
from cnn_jax.models import MODELS, create_model
from cnn_jax.training.loop import abstract_state, create_task

WITHOUT_THE_PACKAGE = "import sys\nsys.modules['cnn_jax'] = None\n"
"""Makes every import of it fail."""


@pytest.fixture
def path(network, tmp_path):
    (tmp_path / "model.stablehlo").write_bytes(stablehlo.to_bytes(network))
    return tmp_path / "model.stablehlo"


def test_any_number_of_images(path, network, run, images):
    classify = stablehlo.load(path, network)
    expected = run.predict(images)
    for count in (1, 2, 3, 32, 60):
        probabilities = classify(images[:count])
        assert probabilities.dtype == np.float32
        np.testing.assert_allclose(probabilities, expected[:count], atol=1e-6)


@pytest.mark.parametrize("tta", ["none", "multicrop"])
@pytest.mark.parametrize("model", MODELS)
def test_every_model_takes_any_number_of_images(model, tta):
    """Traced, but not compiled."""
    task = create_task(Config(model=model, tta=tta), num_classes=3)
    task = dataclasses.replace(task, model=task.model.clone(portable=True))
    like = abstract_state(task, (32, 32, 3))
    (count,) = export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((count, 32, 32, 3), np.uint8)
    logits = jax.eval_shape(task.logits, {"params": like.params, **like.model_state}, images)
    assert logits.shape == (count, 3)


def test_one_program_for_every_platform(path, image_shape):
    exported = export.deserialize(bytearray(path.read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    (images,), (probabilities,) = exported.in_avals, exported.out_avals
    assert (str(images.dtype), images.shape[1:]) == ("uint8", image_shape)
    assert (str(probabilities.dtype), probabilities.shape[1:]) == ("float32", (3,))
    assert images.shape[0] == probabilities.shape[0]
    program = exported.mlir_module()
    assert "stablehlo.convolution" in program
    assert "stablehlo.while" not in program
    # Nowhere may the factors of a product be shortened, as GPUs and TPUs do where they are not told otherwise.
    assert "HIGHEST" in program
    assert "DEFAULT" not in program


def test_no_path_of_whoever_exports_is_told(path):
    content = path.read_bytes()
    assert b"cnn_jax" not in content
    assert os.fsencode(sys.prefix) not in content


def test_exporting_leaves_jax_as_it_was(path, network, monkeypatch):
    limit = jax.config.jax_traceback_in_locations_limit
    monkeypatch.setattr(export, "export", lambda *arguments, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stablehlo.to_bytes(network)
    assert jax.config.jax_traceback_in_locations_limit == limit


def test_the_example_runs_without_this_package(path, run, image_shape):
    height, width, channels = image_shape
    pixels = np.random.default_rng(2).integers(0, 256, (height, width, channels), dtype=np.uint8)
    Image.fromarray(pixels.squeeze()).save(path.parent / "picture.png")
    lines = [line for line in stablehlo.__doc__.splitlines() if line.startswith("    ") or not line]
    example = WITHOUT_THE_PACKAGE + textwrap.dedent("\n".join(lines))
    done = subprocess.run([sys.executable, "-c", example], cwd=path.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = [float(number) for number in done.stdout.strip("[] \n").split()]
    np.testing.assert_allclose(printed, run.predict(pixels[None])[0], atol=1e-6)


def test_a_portable_network_is_the_same_network(network, images):
    inputs = network.task.preprocess(images)
    logits = [create_model("cnn", 3, portable).apply({"params": network.params}, inputs) for portable in (False, True)]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(network.probabilities(images), nn.softmax(logits[0]), rtol=1e-5, atol=1e-5)
    shapes = [
        jax.eval_shape(create_model("cnn", 3, portable).init, jax.random.key(0), images[:1].astype(np.float32))
        for portable in (False, True)
    ]
    assert shapes[0] == shapes[1]
