import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from cnn_jax.config import Config
from cnn_jax.data.shuffle import epoch_order
from cnn_jax.training import loop, sharding
from cnn_jax.training.history import EpochRecord
from cnn_jax.training.loop import NonFiniteError, Trainer, take_batch
from cnn_jax.training.sharding import SAME, on_every_device, parts_along
from cnn_jax.training.step import Batch, eval_step, train_step

CONFIG = Config(epochs=2, batch_size=10, dataset="squares", seed=3)


@pytest.fixture(params=[1, 2], autouse=True)
def devices(request, monkeypatch):
    """All of it holds on one device and on two."""
    monkeypatch.setattr(sharding, "MIN_PART", CONFIG.batch_size // request.param)
    return request.param


def train(config, dataset):
    """Each epoch's record and the parameters after it."""
    trainer = Trainer(config, dataset)
    # Copies, since the next epoch reuses the memory.
    return [
        (record, jax.tree.map(np.array, progress.state.params)) for record, progress in trainer.epochs(trainer.start())
    ]


def test_take_batch_masks_what_fills_up_the_last_batch(devices):
    images, labels = jnp.arange(7, dtype=jnp.uint8).reshape(7, 1, 1, 1), jnp.arange(7)
    order = jnp.array([3, 1, 2, 0, 6, 5, 4, 3])
    mesh = Mesh(jax.devices()[:devices], ("devices",))
    parts = Batch(*[parts_along(axis=0)] * 3, SAME)
    batch = on_every_device(lambda *args: take_batch(*args, 4, mesh), mesh, parts)(images, labels, order, jnp.int32(1))
    np.testing.assert_array_equal(batch.labels, [6, 5, 4, 3])
    np.testing.assert_array_equal(batch.images.ravel(), [6, 5, 4, 3])
    np.testing.assert_array_equal(batch.mask, [True, True, True, False])
    assert batch.num_examples == 3


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_is_the_lessons_loop(dataset, shuffle):
    """The compiled epoch gives what a Python loop over unpadded batches gives."""
    config = dataclasses.replace(CONFIG, shuffle=shuffle)
    (record, params), *_ = train(config, dataset)

    state = Trainer(config, dataset).start().state
    order = epoch_order(47, config.seed, 0, shuffle)
    total_loss, total_correct = 0.0, 0
    for first in range(0, 47, 10):
        indices = order[first : first + 10]
        images, labels = dataset.train.images[indices], dataset.train.labels[indices]
        state, metrics = train_step(state, Batch.of(images, labels))
        total_loss += float(metrics.loss)
        total_correct += int(metrics.num_correct)
    assert record.step == state.step == 5
    assert record.total_correct == total_correct
    assert record.loss == pytest.approx(total_loss, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, state.params)


def test_a_batch_larger_than_the_data_set_is_the_data_set(dataset):
    larger, exact = (train(dataclasses.replace(CONFIG, batch_size=size), dataset) for size in (10_000_000, 47))
    for (record1, params1), (record2, params2) in zip(larger, exact, strict=True):
        jax.tree.map(np.testing.assert_array_equal, params1, params2)
        assert (record1.step, record1.loss) == (record2.step, record2.loss)
        assert record1.test_loss == pytest.approx(record2.test_loss, rel=1e-6)


def test_every_test_example_counts_once(dataset):
    trainer = Trainer(CONFIG, dataset)
    state = trainer.start().state
    metrics, logits = jax.device_get(trainer.evaluate(state.params))
    params = jax.device_put(state.params, jax.devices()[0])
    expected = eval_step(params, state.apply_fn, jnp.asarray(dataset.test.images))
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    losses = optax.softmax_cross_entropy_with_integer_labels(expected, dataset.test.labels)
    assert metrics.num_examples == 23
    assert metrics.num_correct == np.sum(np.argmax(expected, -1) == dataset.test.labels)
    np.testing.assert_allclose(metrics.loss, np.asarray(losses, np.float64).sum(), rtol=1e-6)


def test_the_network_learns(dataset):
    *_, (record, _) = train(dataclasses.replace(CONFIG, epochs=30), dataset)
    assert record.test_accuracy > 0.9
    assert record.train_accuracy == record.total_correct / 47


def test_same_config_same_bits(dataset):
    for (record1, params1), (record2, params2) in zip(train(CONFIG, dataset), train(CONFIG, dataset), strict=True):
        jax.tree.map(np.testing.assert_array_equal, params1, params2)
        times = {"seconds": 0.0, "images_per_second": 0.0}
        assert dataclasses.replace(record1, **times) == dataclasses.replace(record2, **times)


def test_the_seed_matters(dataset):
    (_, params1), *_ = train(CONFIG, dataset)
    (_, params2), *_ = train(dataclasses.replace(CONFIG, seed=4), dataset)
    assert not np.allclose(params1["out"]["kernel"], params2["out"]["kernel"])


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_do_not_change_a_bit(dataset, monkeypatch, chunk):
    whole = train(CONFIG, dataset)
    monkeypatch.setattr(loop, "CHUNK", chunk)
    for (record1, params1), (record2, params2) in zip(whole, train(CONFIG, dataset), strict=True):
        jax.tree.map(np.testing.assert_array_equal, params1, params2)
        assert (record1.loss, record1.total_correct) == (record2.loss, record2.total_correct)


def test_chunks_are_reported(dataset, monkeypatch):
    monkeypatch.setattr(loop, "CHUNK", 2)
    trainer = Trainer(CONFIG, dataset)
    reports = []
    list(trainer.epochs(trainer.start(), on_chunk=reports.append))
    assert [(r.epoch, r.steps_done, r.steps) for r in reports] == [(e, s, 5) for e in (0, 1) for s in (0, 2, 4)]
    assert [int(r.metrics.num_examples) for r in reports] == [0, 20, 40] * 2


def test_nothing_compiles_after_compile(dataset, monkeypatch):
    """Chunks of different lengths and the short last batch run the programs compiled at the start."""
    monkeypatch.setattr(loop, "CHUNK", 2)
    trainer = Trainer(CONFIG, dataset)
    trainer.compile()
    start = trainer.start()
    # As a checkpoint gives it back.
    restored = jax.device_put(jax.tree.map(np.array, start.state))
    compilations = []

    def count(event, duration, **details):
        if event.endswith("backend_compile_duration"):
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    jax.jit(lambda x: x + 1)(0).block_until_ready()
    assert len(compilations) == 1, "the listener does not hear of compilations"
    list(trainer.epochs(start))
    list(trainer.epochs(dataclasses.replace(start, state=restored)))
    assert len(compilations) == 1


def test_nothing_is_transferred_inside_a_chunk(dataset, monkeypatch):
    """Everything that a chunk takes lies on the device already, and what it gives stays there."""
    trainer = Trainer(CONFIG, dataset)
    trainer.compile()
    start = trainer.start()
    calls = []
    train_chunk = loop.train_chunk

    def guarded(*args, **kwargs):
        with jax.transfer_guard("disallow_explicit"):
            calls.append(train_chunk(*args, **kwargs))
        return calls[-1]

    monkeypatch.setattr(loop, "train_chunk", guarded)
    list(trainer.epochs(start))
    assert len(calls) == CONFIG.epochs


def test_metrics_are_fetched_when_the_next_chunk_is_on_its_way(dataset, monkeypatch):
    monkeypatch.setattr(loop, "CHUNK", 2)
    trainer = Trainer(CONFIG, dataset)
    start = trainer.start()
    events = []
    train_chunk = loop.train_chunk
    monkeypatch.setattr(
        loop, "train_chunk", lambda *args, **kwargs: events.append("chunk") or train_chunk(*args, **kwargs)
    )
    next(trainer.epochs(start, on_chunk=lambda report: events.append(report.steps_done)))
    assert events == ["chunk", 0, "chunk", 2, "chunk", 4]


@pytest.mark.parametrize("checkpoint_every", [1, 3, 4, 7])
def test_the_host_looks_up_where_checkpoints_are_due(dataset, checkpoint_every):
    trainer = Trainer(dataclasses.replace(CONFIG, checkpoint_every=checkpoint_every), dataset)
    steps = []
    list(trainer.epochs(trainer.start(), before_chunk=lambda progress: steps.append(progress.step)))
    assert {step for step in range(10) if step % checkpoint_every == 0 or step % 5 == 0} == set(steps)


@pytest.mark.parametrize("step", [1, 3, 5, 8])
def test_from_any_step_it_comes_out_the_same_to_the_bit(dataset, step):
    """Progress copied to the host inside an epoch, and gone on with, changes nothing."""
    config = dataclasses.replace(CONFIG, checkpoint_every=1)
    saved = []

    def save(progress):
        if progress.step == step:
            saved.append(dataclasses.replace(progress, state=jax.tree.map(np.array, progress.state)))

    trainer = Trainer(config, dataset)
    *_, (whole, end) = trainer.epochs(trainer.start(), before_chunk=save)
    *_, (resumed, resumed_end) = trainer.epochs(saved[0])
    jax.tree.map(np.testing.assert_array_equal, end.state, resumed_end.state)
    assert (whole.loss, whole.total_correct) == (resumed.loss, resumed.total_correct)


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_numbers_that_break_are_noticed_with_their_step(dataset, monkeypatch, chunk):
    monkeypatch.setattr(loop, "CHUNK", chunk)
    trainer = Trainer(dataclasses.replace(CONFIG, learning_rate=1e9), dataset)
    with pytest.raises(NonFiniteError, match=r"not finite at step 1: train anew with a --learning-rate below 1e\+09"):
        list(trainer.epochs(trainer.start()))


def test_the_line_of_an_epoch():
    record = EpochRecord(
        epoch=0,
        step=600,
        total_correct=46586,
        loss=349.0149,
        train_accuracy=0.77643,
        test_loss=0.48232,
        test_accuracy=0.82111,
        seconds=2.3103,
        images_per_second=25974.03,
    )
    assert str(record) == (
        "epoch: 0 total_correct: 46586 loss: 349.01 test_accuracy: 0.8211 test_loss: 0.4823 "
        "seconds: 2.31 images_per_second: 25974"
    )
