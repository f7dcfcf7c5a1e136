"""A network as one program for every platform: StableHLO, as jax.export writes it.

It runs on CPU, CUDA and TPU, on any number of images at a time, with jax and without this package:

    from pathlib import Path

    import numpy as np
    from jax import export
    from PIL import Image

    network = export.deserialize(bytearray(Path("model.stablehlo").read_bytes()))
    (images,), (probabilities,) = network.in_avals, network.out_avals  # uint8[n,28,28,1], float32[n,10]
    height, width, channels = images.shape[1:]
    image = Image.open("picture.png").convert("L" if channels == 1 else "RGB").resize((width, height))
    pixels = np.asarray(image, np.uint8).reshape(1, height, width, channels)
    print(network.call(pixels))  # a row of probabilities for each image, in the order of the run's classes

The form has no room for the names of the classes, which ONNX's and safetensors' have. And it does not last: jax reads
what a version of it wrote up to half a year before (0.10 still reads 0.7's, 0.12 no longer), but nothing newer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax import export

from cnn_jax.formats.network import Classifier, Network

PLATFORMS = ("cpu", "cuda", "tpu")


def to_bytes(network: Network) -> bytes:
    """The file."""
    (batch,) = export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((batch, *network.image_shape), np.uint8)
    with _no_source_locations():
        return bytes(export.export(jax.jit(network.probabilities), platforms=PLATFORMS)(images).serialize())


def load(path: Path, network: Network) -> Classifier:
    """The program in a file."""
    return jax.jit(export.deserialize(bytearray(path.read_bytes())).call)


@contextmanager
def _no_source_locations() -> Iterator[None]:
    """Keep the paths of the source files out of the program: they name directories of whoever exports."""
    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)
