import jax
import numpy as np
import pytest

from cnn_jax.data import Split
from cnn_jax.data.shuffle import epoch_order
from cnn_jax.data.statistics import channel_sums
from cnn_jax.data.streamed import StreamedImages
from cnn_jax.training import input
from cnn_jax.training.input import ArraySource
from cnn_jax.training.sharding import make_mesh


@pytest.fixture(params=[1, 2])
def mesh(request):
    return make_mesh(jax.devices()[: request.param])


@pytest.fixture
def split():
    return Split(np.arange(7, dtype=np.uint8).reshape(7, 1, 1, 1), np.arange(7, dtype=np.int32))


def source(split, mesh, **options):
    return ArraySource(split, **{"batch_size": 3, "seed": 1, "shuffle": True, "mesh": mesh} | options)


def test_the_batches_are_the_shuffled_examples_in_order(split, mesh):
    chunk = source(split, mesh).chunk(4, 0, 3)
    images, labels, mask, num_examples, epochs = jax.device_get(chunk.batches)
    assert chunk.num_steps == 3
    np.testing.assert_array_equal(epochs, [4, 4, 4])
    np.testing.assert_array_equal(num_examples, [3, 3, 1])
    np.testing.assert_array_equal(mask.sum(axis=1), num_examples)
    np.testing.assert_array_equal(labels[mask], epoch_order(7, 1, 4, shuffle=True))
    np.testing.assert_array_equal(images.squeeze()[mask], labels[mask])


def test_batches_are_padded_to_a_multiple_of_the_devices(split, mesh):
    """Every device works at every batch size; padding comes last."""
    batches = source(split, mesh).chunk(0, 0, 3).batches
    assert batches.images.shape == (3, 3 + (mesh.size == 2), 1, 1, 1)
    assert len(batches.images.sharding.device_set) == mesh.size
    assert {shard.data.shape[1] for shard in batches.images.addressable_shards} == {
        batches.images.shape[1] // mesh.size
    }
    mask = jax.device_get(batches.mask)
    assert all(np.all(row[: row.sum()]) for row in mask)


def test_a_chunk_is_a_function_of_its_steps(split, mesh):
    whole = jax.device_get(source(split, mesh).chunk(2, 0, 3))
    for step in range(3):
        part = jax.device_get(source(split, mesh).chunk(2, step, step + 1))
        assert part.num_steps == 1
        for array, expected in zip(part.batches, whole.batches, strict=True):
            assert array.shape == expected.shape, "one program serves all chunks"
            np.testing.assert_array_equal(array[0], expected[step])


def test_chunks_are_bounded_by_steps_and_by_bytes(split, mesh, monkeypatch):
    assert source(split, mesh).chunk_steps == 3
    assert source(split, mesh, max_chunk_steps=2).chunk_steps == 2
    monkeypatch.setattr(input, "MAX_CHUNK_BYTES", 2 * 3 + 3)
    assert source(split, mesh).chunk_steps == (3 if mesh.size == 1 else 2)
    monkeypatch.setattr(input, "MAX_CHUNK_BYTES", 1)
    assert source(split, mesh).chunk_steps == 1


def test_a_memory_mapped_split_is_read_as_it_goes(tmp_path, split, mesh):
    np.save(tmp_path / "images.npy", split.images)
    mapped = Split(np.load(tmp_path / "images.npy", mmap_mode="r"), split.labels)
    expected, chunk = (jax.device_get(source(s, mesh).chunk(0, 0, 3)) for s in (split, mapped))
    np.testing.assert_array_equal(chunk.batches.images, expected.batches.images)


@pytest.fixture
def decoded():
    """The numbers of the images that have been decoded."""
    return []


@pytest.fixture
def streamed(split, decoded):
    def decode(number):
        decoded.append(number)
        return split.images[number]

    images = StreamedImages(decode, split.images.shape[1:], np.stack([channel_sums(image) for image in split.images]))
    return Split(images, split.labels)


# In order, as training reads them; from the middle, as a resumed run does; and in any order.
@pytest.mark.parametrize(
    "chunks",
    [
        [(0, 0, 0), (0, 0, 2), (0, 2, 3), (1, 0, 2), (1, 2, 3), (2, 0, 3)],
        [(4, 1, 2), (4, 2, 3), (5, 0, 1)],
        [(3, 2, 3), (3, 0, 1), (0, 1, 3), (0, 1, 3)],
    ],
)
def test_streamed_images_make_the_same_batches(split, streamed, mesh, chunks):
    mapped_source, streamed_source = (source(one, mesh, max_chunk_steps=3) for one in (split, streamed))
    for chunk in chunks:
        expected, actual = (jax.device_get(one.chunk(*chunk)) for one in (mapped_source, streamed_source))
        assert actual.num_steps == expected.num_steps
        for name, array in expected.batches._asdict().items():
            np.testing.assert_array_equal(
                getattr(actual.batches, name)[: expected.num_steps], array[: expected.num_steps]
            )


def test_every_streamed_image_is_decoded_once_an_epoch(streamed, mesh, decoded):
    streamed_source = source(streamed.subset(np.arange(6)), mesh, batch_size=2, max_chunk_steps=1)
    for epoch in range(2):
        for step in range(3):
            streamed_source.chunk(epoch, step, step + 1)
    assert set(np.bincount(decoded, minlength=6)) <= {2, 3}  # those of the third epoch are being decoded
