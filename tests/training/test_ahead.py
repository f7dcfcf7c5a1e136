"""What is compiled ahead of time is what a trainer runs."""

import jax

from cnn_jax.config import Config
from cnn_jax.training import evaluation, loop
from cnn_jax.training.ahead import collectives, lower_evaluation, lower_training
from cnn_jax.training.loop import Trainer, abstract_state, create_task_for
from cnn_jax.training.sharding import make_mesh


def recorded(monkeypatch, module, name):
    """Lower the program of that name on the arguments of its calls, instead of running it."""
    program, lowered = getattr(module, name), []

    def record(*args, **options):
        lowered.append(program.lower(*args, **options).as_text())
        return program(*args, **options)

    monkeypatch.setattr(module, name, record)
    return lowered


def test_the_programs_are_those_of_a_trainer(monkeypatch, dataset):
    config = Config(batch_size=9, optimizer="sgd", model="small", model_width=4, epochs=1)
    trainer = Trainer(config, dataset, jax.devices()[:2])
    trained = recorded(monkeypatch, loop, "train_chunk")
    evaluated = recorded(monkeypatch, evaluation, "chunk_logits")
    list(trainer.epochs(trainer.start()))
    common = {"image_shape": dataset.image_shape, "mesh": trainer.mesh, "batch_size": 9}
    training = lower_training(trainer.task, steps_per_epoch=trainer.steps_per_epoch, **common)
    assert {training.as_text()} == set(trained)
    logits = lower_evaluation(trainer.task, num_images=len(dataset.test), **common)
    assert {logits.as_text()} == set(evaluated)


def test_devices_sum_gradients_loss_and_number_correct_at_once(dataset):
    task = create_task_for(Config(batch_size=9), dataset)
    lowered = lower_training(task, dataset.image_shape, make_mesh(jax.devices()[:2]), batch_size=9, steps_per_epoch=6)
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_state(task, dataset.image_shape).params))
    assert collectives(lowered.compile().as_text()) == [("all-reduce", 4 * (num_parameters + 2))]


def test_bytes_of_collectives():
    text = """
  %psum.1 = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce-start(%x, %y), replica_groups={}
  %psum.2 = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce-done(%psum.1)
  %gather.1 = (f32[4]{0}, f32[8]{0}) all-gather-start(%copy.1), dimensions={0}
  %copy.1 = f32[4]{0} copy(%p)
"""
    assert collectives(text) == [("all-reduce", 4 * 4 + 2 * 6), ("all-gather", 4 * 8)]
