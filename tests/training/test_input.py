import jax
import numpy as np
import pytest

from cnn_jax.data import Split
from cnn_jax.data.shuffle import epoch_order
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
