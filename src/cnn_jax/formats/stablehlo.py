"""A network as a StableHLO program, serialized with ``jax.export``.

It runs on CPU, CUDA and TPU, for any batch size, with jax and without this package:

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

Unlike ONNX and safetensors, the format cannot store the class names. Compatibility is limited: jax reads files written
by versions up to half a year older (0.10 reads those of 0.7, 0.12 does not), and none written by newer versions.
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
    """Convert a network to a serialized StableHLO program."""
    (batch,) = export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((batch, *network.image_shape), np.uint8)
    with _no_source_locations():
        return bytes(export.export(jax.jit(network.probabilities), platforms=PLATFORMS)(images).serialize())


def load(path: Path, network: Network) -> Classifier:
    """Load the program in a file."""
    return jax.jit(export.deserialize(bytearray(path.read_bytes())).call)


@contextmanager
def _no_source_locations() -> Iterator[None]:
    """Keep the paths of source files, which contain the user's directories, out of the program."""
    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)
