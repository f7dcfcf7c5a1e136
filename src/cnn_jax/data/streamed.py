"""Images that are decoded whenever they are read, for datasets larger than memory and than the space on disk."""

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import SupportsIndex

import numpy as np

from cnn_jax.processors import num_processors

BLOCK_IMAGES = 8
"""Maximum number of images that a thread decodes at a time: handing over a single small one takes as long as it."""

BLOCK_BYTES = 1 << 20
"""Maximum number of bytes that a thread decodes at a time, if a single image does not exceed it."""

AHEAD_BYTES = 1 << 26
"""Number of bytes to decode ahead, unless the reader asks for another number of images."""


class StreamedImages:
    """An array of images of which none is in memory: uint8 ``[N, H, W, C]``, read-only.

    As in an array, an integer selects one image, which is decoded, and any other index selects several, which are not
    decoded until they are read: by iterating over them, by ``ahead``, or by ``numpy.asarray``, which needs memory for
    all of them.

    Args:
        decode: decodes the image with a number, uint8 ``[H, W, C]``; called in several threads.
        image_shape: ``(H, W, C)``.
        sums: uint64 ``[M, 2, C]``, for each number the result of ``cnn_jax.data.statistics.channel_sums``.
        numbers: int ``[N]``, the number of each image; by default ``0`` to ``M - 1``.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self,
        decode: Callable[[int], np.ndarray],
        image_shape: tuple[int, int, int],
        sums: np.ndarray,
        numbers: np.ndarray | None = None,
    ) -> None:
        self._decode = decode
        self._sums = sums
        self._numbers = np.arange(len(sums)) if numbers is None else numbers
        self.shape = (len(self._numbers), *image_shape)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: "SupportsIndex | slice | np.ndarray") -> "np.ndarray | StreamedImages":
        numbers = self._numbers[index]
        if numbers.ndim == 0:
            return self._decode(int(numbers))
        return StreamedImages(self._decode, self.shape[1:], self._sums, numbers)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.ahead())

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("the images have to be decoded")
        images = np.empty(self.shape, np.uint8)
        self.ahead().read_into(images)
        return images if dtype is None else images.astype(dtype, copy=False)

    @property
    def channel_sums(self) -> np.ndarray:
        """The sums over all images, uint64 ``[2, C]``; see ``cnn_jax.data.statistics.channel_sums``."""
        return self._sums[self._numbers].sum(axis=0)

    def decoded(self) -> list[np.ndarray]:
        """The images, decoded one after the other in this thread; once, if the same one follows."""
        images: list[np.ndarray] = []
        for index, number in enumerate(self._numbers.tolist()):
            repeated = index and number == self._numbers[index - 1]
            images.append(images[-1] if repeated else self._decode(number))
        return images

    def ahead(self, num_images: int | None = None) -> "ReadAhead":
        """Read the images in order, and start to decode the first ones.

        Args:
            num_images: number of images to decode ahead of those that have been read.
        """
        return ReadAhead(self, num_images or max(1, AHEAD_BYTES // int(np.prod(self.shape[1:]))))


class ReadAhead:
    """Images in order, of which the next ones are being decoded by Grain's threads.

    Threads suffice, and need none of the copies of processes: Pillow releases the interpreter lock while it decodes and
    resizes. An error of decoding is raised when the turn of that image comes.

    Args:
        images: the images.
        num_images: number of images to decode ahead.
    """

    def __init__(self, images: StreamedImages, num_images: int) -> None:
        from grain import MapDataset, ReadOptions

        # Not within a context, because other threads go on when it ends.
        warnings.filterwarnings("ignore", module="PIL")
        threads = num_processors()
        # Every thread needs a block to decode, besides the next one to read.
        blocks = _Blocks(images, max(1, min(BLOCK_IMAGES, num_images // threads)))
        options = ReadOptions(threads, max(threads, -(-num_images // blocks.size)) + 1)
        self._blocks = iter(MapDataset.source(blocks).to_iter_dataset(options))
        self._blocks.start_prefetch()
        self._images = itertools.chain.from_iterable(self._blocks)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self._images

    def read_into(self, out: np.ndarray) -> None:
        """Read the next images into an array uint8 ``[n, H, W, C]``, of which there must be as many."""
        for place, image in zip(out, itertools.islice(self._images, len(out)), strict=True):
            place[...] = image

    def close(self) -> None:
        """Decode no more images."""
        self._blocks.close()


class _Blocks:
    """Lists of consecutive images: a data source of Grain, which reads it in any order, in several threads."""

    def __init__(self, images: StreamedImages, max_size: int) -> None:
        self.size = max(1, min(max_size, BLOCK_BYTES // int(np.prod(images.shape[1:]))))
        self._images = images

    def __len__(self) -> int:
        return -(-len(self._images) // self.size)

    def __getitem__(self, index: int) -> list[np.ndarray]:
        block = self._images[index * self.size : (index + 1) * self.size]
        return block.decoded()


class ArrayReader:
    """Images of an array in order, as ``ReadAhead`` reads those that have to be decoded."""

    def __init__(self, images: np.ndarray) -> None:
        self._images = images
        self._position = 0

    def read_into(self, out: np.ndarray) -> None:
        """See ``ReadAhead.read_into``."""
        out[...] = self._images[self._position : self._position + len(out)]
        self._position += len(out)


Images = np.ndarray | StreamedImages
"""Images uint8 ``[N, H, W, C]``."""


def in_order(images: Images, num_ahead: int) -> ArrayReader | ReadAhead:
    """Read images in order; of those that have to be decoded, a number is decoded ahead."""
    return ArrayReader(images) if isinstance(images, np.ndarray) else images.ahead(num_ahead)
