import importlib.util
import json
import logging

import jax
import numpy as np
import pytest

from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.formats import onnx

installed = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("jax2onnx", "onnx", "onnxruntime")),
    reason="needs the extra onnx",
)


def test_missing_packages_are_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else ...)
    expected = "exporting to ONNX needs jax2onnx, onnx, onnxruntime: pip install -e '\\.\\[onnx\\]'"
    with pytest.raises(UsageError, match=expected):
        run.export(tmp_path / "model.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


@installed
@pytest.mark.usefixtures("known_data")
def test_what_onnxruntime_computes(run, images, tmp_path, capfd):
    import onnxruntime

    path = tmp_path / "model.onnx"
    assert run.export(path, "onnx").largest_difference < 2e-6
    assert capfd.readouterr() == ("", "")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,), (gives,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["batch", *run.image_shape])
    assert (gives.name, gives.type, gives.shape) == ("probabilities", "tensor(float)", ["batch", 3])
    expected = run.predict(images)
    for count in (1, 2, 60):
        (probabilities,) = session.run(None, {"images": images[:count]})
        np.testing.assert_allclose(probabilities, expected[:count], atol=1e-6)


@installed
def test_the_file_tells_what_it_is(network):
    import onnx as library

    content = onnx.to_bytes(network)
    model = library.load_from_string(content)
    library.checker.check_model(model, full_check=True)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["model"] == "cnn"
    assert json.loads(properties["image_shape"]) == list(network.image_shape)
    assert json.loads(properties["class_names"]) == list(network.class_names)
    assert onnx.to_bytes(network) == content


@installed
def test_exporting_leaves_jax_and_logging_as_they_were(network, images):
    levels = [logging.getLogger(name).level for name in ("jax2onnx", "onnx_ir")]
    before = jax.jit(network.probabilities).lower(images).as_text()
    onnx.to_bytes(network)
    assert jax.jit(network.probabilities).lower(images).as_text() == before
    assert [logging.getLogger(name).level for name in ("jax2onnx", "onnx_ir")] == levels


@installed
def test_a_converter_that_does_not_get_on_with_jax_is_one_error(network, monkeypatch):
    import jax2onnx

    def convert(*arguments, **options):
        raise AttributeError("no such part of jax")

    monkeypatch.setattr(jax2onnx, "to_onnx", convert)
    with pytest.raises(CnnJaxError, match=r"jax2onnx \S+ cannot convert the network with jax \S+ \(AttributeError\): "):
        onnx.to_bytes(network)
