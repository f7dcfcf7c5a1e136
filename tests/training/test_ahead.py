"""What is compiled ahead of time is what a trainer runs."""

import jax

from cnn_jax.config import Config
from cnn_jax.training import evaluation, loop
from cnn_jax.training.ahead import lower_evaluation, lower_training
from cnn_jax.training.loop import Trainer


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
