import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_jax.config import Config
from cnn_jax.data.shuffle import epoch_order
from cnn_jax.training import loop
from cnn_jax.training.history import EpochRecord
from cnn_jax.training.loop import NonFiniteError, Trainer, create_task
from cnn_jax.training.step import Batch, train_step

CONFIG = Config(epochs=2, batch_size=10, dataset="squares", seed=3, normalize=False)
TASK = create_task(CONFIG, 3)

# Compile counts, transfers and bitwise equality are checked of the programs that users run.
pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module", params=[1, 2])
def devices(request):
    """One device, then two."""
    return jax.devices()[: request.param]


@pytest.fixture(scope="module")
def make_trainer(devices):
    return functools.partial(Trainer, devices=devices)


def train(config, dataset, make_trainer, **options):
    """Each epoch's record and the parameters after it."""
    trainer = make_trainer(config, dataset, **options)
    # Copies, since the next epoch reuses the memory.
    return [
        (record, jax.tree.map(np.array, progress.state.params)) for record, progress in trainer.epochs(trainer.start())
    ]


@pytest.fixture(scope="module")
def whole(dataset, make_trainer):
    """Each epoch's record and the parameters after it, with an epoch as one chunk."""
    return train(CONFIG, dataset, make_trainer)


@pytest.mark.parametrize("shuffle", [False, True])
def test_epoch_equals_a_python_loop(dataset, shuffle, make_trainer):
    """The compiled epoch gives what a Python loop over unpadded batches gives."""
    config = dataclasses.replace(CONFIG, shuffle=shuffle)
    (record, params), *_ = train(config, dataset, make_trainer)

    state = make_trainer(config, dataset).start().state
    order = epoch_order(47, config.seed, 0, shuffle)
    total_loss, total_correct = 0.0, 0
    for first in range(0, 47, 10):
        indices = order[first : first + 10]
        images, labels = dataset.train.images[indices], dataset.train.labels[indices]
        state, metrics = train_step(state, Batch.of(images, labels), jax.random.key(0), 0.01, task=TASK)
        total_loss += float(metrics.loss)
        total_correct += int(metrics.num_correct)
    assert record.step == state.step == 5
    assert record.total_correct == total_correct
    assert record.loss == pytest.approx(total_loss, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, state.params)


def test_batch_larger_than_the_dataset(dataset, make_trainer):
    configs = (dataclasses.replace(CONFIG, batch_size=size, epochs=1) for size in (10_000_000, 47))
    larger, exact = (train(config, dataset, make_trainer) for config in configs)
    for (record1, params1), (record2, params2) in zip(larger, exact, strict=True):
        jax.tree.map(np.testing.assert_array_equal, params1, params2)
        assert (record1.step, record1.loss) == (record2.step, record2.loss)
        assert record1.test_loss == pytest.approx(record2.test_loss, rel=1e-6)


def test_every_test_example_counts_once(dataset, make_trainer):
    trainer = make_trainer(CONFIG, dataset)
    state = trainer.start().state
    score, logits = trainer.evaluate(state, "test")
    expected = jax.jit(TASK.logits)({"params": jax.device_get(state.params)}, jnp.asarray(dataset.test.images))
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    losses = optax.softmax_cross_entropy_with_integer_labels(expected, dataset.test.labels)
    assert len(logits) == 23
    assert score.accuracy == np.sum(np.argmax(expected, -1) == dataset.test.labels) / 23
    np.testing.assert_allclose(score.loss, np.asarray(losses, np.float64).sum() / 23, rtol=1e-6)


def test_the_network_learns(dataset, make_trainer):
    *_, (record, _) = train(dataclasses.replace(CONFIG, epochs=30), dataset, make_trainer)
    assert record.test_accuracy > 0.9
    assert record.train_accuracy == record.total_correct / 47


def test_training_is_bitwise_reproducible(dataset, make_trainer, whole):
    for (record1, params1), (record2, params2) in zip(whole, train(CONFIG, dataset, make_trainer), strict=True):
        jax.tree.map(np.testing.assert_array_equal, params1, params2)
        times = {"seconds": 0.0, "images_per_second": 0.0, "input_wait_seconds": 0.0}
        assert dataclasses.replace(record1, **times) == dataclasses.replace(record2, **times)


def test_seed_determines_the_parameters(dataset, make_trainer, whole):
    (_, params1), *_ = whole
    (_, params2), *_ = train(dataclasses.replace(CONFIG, seed=4), dataset, make_trainer)
    assert not np.allclose(params1["out"]["kernel"], params2["out"]["kernel"])


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_results_do_not_depend_on_the_length_of_chunks(dataset, chunk, make_trainer, whole):
    parts = train(CONFIG, dataset, make_trainer, max_chunk_steps=chunk)
    for (record1, params1), (record2, params2) in zip(whole, parts, strict=True):
        jax.tree.map(np.testing.assert_array_equal, params1, params2)
        assert (record1.loss, record1.total_correct) == (record2.loss, record2.total_correct)


def test_chunks_are_reported(dataset, make_trainer):
    trainer = make_trainer(CONFIG, dataset, max_chunk_steps=2)
    reports = []
    list(trainer.epochs(trainer.start(), on_chunk=reports.append))
    assert [(r.epoch, r.steps_done, r.steps) for r in reports] == [(e, s, 5) for e in (0, 1) for s in (0, 2, 4)]
    assert [int(r.metrics.num_examples) for r in reports] == [0, 20, 40] * 2


def test_nothing_compiles_after_compile(dataset, make_trainer):
    """Chunks of different lengths and the short last batch run the programs compiled at the start."""
    trainer = make_trainer(CONFIG, dataset, max_chunk_steps=2)
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
    assert len(compilations) == 1, "the listener does not receive compilations"
    list(trainer.epochs(start))
    list(trainer.epochs(dataclasses.replace(start, state=restored)))
    assert len(compilations) == 1


def test_nothing_is_transferred_inside_a_chunk(dataset, monkeypatch, make_trainer):
    """Everything that a chunk takes lies on the device already, and what it gives stays there."""
    trainer = make_trainer(CONFIG, dataset)
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


def test_metrics_are_fetched_after_the_next_chunk_is_dispatched(dataset, monkeypatch, make_trainer):
    trainer = make_trainer(CONFIG, dataset, max_chunk_steps=2)
    start = trainer.start()
    events = []
    train_chunk = loop.train_chunk
    monkeypatch.setattr(
        loop, "train_chunk", lambda *args, **kwargs: events.append("chunk") or train_chunk(*args, **kwargs)
    )
    next(trainer.epochs(start, on_chunk=lambda report: events.append(report.steps_done)))
    assert events == ["chunk", 0, "chunk", 2, "chunk", 4]


@pytest.mark.parametrize("checkpoint_every", [1, 3, 4, 7])
def test_before_chunk_is_called_where_checkpoints_are_due(dataset, checkpoint_every, make_trainer):
    trainer = make_trainer(dataclasses.replace(CONFIG, checkpoint_every=checkpoint_every), dataset)
    steps = []
    list(trainer.epochs(trainer.start(), before_chunk=lambda progress: steps.append(progress.step)))
    assert {step for step in range(10) if step % checkpoint_every == 0 or step % 5 == 0} == set(steps)


@pytest.mark.parametrize("step", [1, 3, 5, 8])
def test_training_from_any_step_is_bitwise_exact(dataset, step, make_trainer):
    """Progress copied to the host inside an epoch, and gone on with, changes nothing."""
    config = dataclasses.replace(CONFIG, checkpoint_every=1)
    saved = []

    def save(progress):
        if progress.step == step:
            saved.append(dataclasses.replace(progress, state=jax.tree.map(np.array, progress.state)))

    trainer = make_trainer(config, dataset)
    *_, (whole, end) = trainer.epochs(trainer.start(), before_chunk=save)
    *_, (resumed, resumed_end) = trainer.epochs(saved[0])
    jax.tree.map(np.testing.assert_array_equal, end.state, resumed_end.state)
    assert (whole.loss, whole.total_correct) == (resumed.loss, resumed.total_correct)


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_non_finite_numbers_are_an_error_that_names_the_step(dataset, chunk, make_trainer):
    trainer = make_trainer(dataclasses.replace(CONFIG, learning_rate=1e9), dataset, max_chunk_steps=chunk)
    with pytest.raises(NonFiniteError, match=r"not finite at step 1: start .* --learning-rate below 1e\+09"):
        list(trainer.epochs(trainer.start()))


def test_line_of_an_epoch():
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
    assert record.line(100).endswith("test_loss: 0.4823 seconds: 2.31")
    assert record.line(10) == "epoch: 0 total_correct: 46586 loss: 349.01"
