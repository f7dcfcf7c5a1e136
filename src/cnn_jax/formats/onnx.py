"""A network as an ONNX model, converted by jax2onnx.

The input ``images`` is uint8 ``[batch, H, W, C]``, the output ``probabilities`` float32 ``[batch, classes]``. The
metadata properties contain the class names as JSON.
"""

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import jax
import numpy as np

from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.formats.network import Classifier, Network

INPUT, OUTPUT = "images", "probabilities"


def check_installed() -> None:
    """Raise UsageError unless the packages of the extra ``onnx`` are installed."""
    missing = [name for name in ("jax2onnx", "onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"exporting to ONNX needs {', '.join(missing)}: pip install -e '.[onnx]'")


def to_bytes(network: Network) -> bytes:
    """Convert a network to the content of an ONNX file.

    Raises:
        CnnJaxError: the installed jax2onnx does not support the installed jax.
    """
    images = jax.ShapeDtypeStruct(("batch", *network.image_shape), np.uint8)
    with _quiet():
        try:
            import onnx
            from jax2onnx import to_onnx

            model = to_onnx(
                lambda images: network.probabilities(images), [images], input_names=[INPUT], output_names=[OUTPUT]
            )
        except Exception as error:  # jax2onnx uses jax internals and may raise anything with an unsupported version
            raise CnnJaxError(
                f"jax2onnx {metadata.version('jax2onnx')} cannot convert the network with jax {jax.__version__} "
                f"({type(error).__name__}): install compatible versions, or choose another --format"
            ) from error
    onnx.helper.set_model_props(model, network.metadata)
    return model.SerializeToString(deterministic=True)


def load(path: Path, network: Network) -> Classifier:
    """Load the model in a file into onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: session.run([OUTPUT], {INPUT: images})[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the converter's warnings about unsupported operations, which no model here uses."""
    loggers = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
