"""Wide residual networks, compared to the same network of PyTorch's layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import examples, import_torch, inference_error, num_parameters, randomize, training_errors

from cnn_jax.errors import UsageError
from cnn_jax.models import create_model
from cnn_jax.models.layers import BatchContext


def network_in_pytorch(channels, num_classes, depth, width):
    torch = import_torch()
    nn = torch.nn

    def conv(inputs, outputs, kernel, stride=1):
        return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.bn0 = nn.BatchNorm2d(inputs)
            self.conv0 = conv(inputs, outputs, 3, stride)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.conv1 = conv(outputs, outputs, 3)
            self.convdim = None if inputs == outputs else conv(inputs, outputs, 1, stride)

        def forward(self, x):
            first = torch.relu(self.bn0(x))
            y = self.conv1(torch.relu(self.bn1(self.conv0(first))))
            return y + (x if self.convdim is None else self.convdim(first))

    class WideResNet(nn.Module):
        def __init__(self):
            super().__init__()
            sizes = [16, 16 * width, 32 * width, 64 * width]
            self.conv0 = conv(channels, 16, 3)
            for group in range(3):
                blocks = nn.Module()
                for index in range((depth - 4) // 6):
                    begins = index == 0
                    block = Block(sizes[group + 1 - begins], sizes[group + 1], 2 if begins and group else 1)
                    blocks.add_module(f"block{index}", block)
                self.add_module(f"group{group}", blocks)
            self.bn = nn.BatchNorm2d(sizes[-1])
            self.fc = nn.Linear(sizes[-1], num_classes)

        def forward(self, x):
            x = self.conv0(x)
            for blocks in (self.group0, self.group1, self.group2):
                for block in blocks.children():
                    x = block(x)
            return self.fc(torch.relu(self.bn(x)).mean((2, 3)))

    return WideResNet()


@pytest.mark.parametrize(
    ("depth", "width", "millions"), [(None, None, 2.7), (16, 4, 2.7), (40, 4, 8.9), (16, 8, 11.0), (28, 10, 36.5)]
)
def test_number_of_parameters(depth, width, millions):
    """Those of the paper's tables 4 and 5."""
    model = create_model("wide_resnet", 10, depth=depth, width=width)
    assert round(num_parameters(model, (32, 32, 3)) / 1e6, 1) == millions


@pytest.mark.parametrize(("depth", "width", "shape"), [(16, 2, (12, 9, 3)), (10, 1, (8, 8, 1))])
def test_logits_and_a_training_step_are_pytorchs(depth, width, shape):
    network = network_in_pytorch(shape[-1], 4, depth, width)
    randomize(network, seed=3)
    model, (images, labels) = create_model("wide_resnet", 4, depth=depth, width=width), examples((3, *shape), 4)
    assert inference_error(model, network, images) < 1e-4
    assert max(training_errors(model.clone(portable=True), network, images, labels)) < 1e-7


def test_dropout_acts_in_training_only():
    images = jnp.asarray(examples((2, 8, 8, 1), 3)[0], jnp.float32)
    batch = BatchContext(jnp.arange(2), jnp.ones(2, bool))
    model = create_model("wide_resnet", 3, True, depth=10, width=1, dropout=0.5)
    variables = jax.jit(model.init)(jax.random.key(0), images)

    def logits(model, batch=None, seed=0):
        run = jax.jit(model.apply, static_argnames="mutable")
        return run(variables, images, batch, mutable=("batch_stats",), rngs={"dropout": jax.random.key(seed)})[0]

    assert not np.array_equal(logits(model, batch, 0), logits(model, batch, 1))
    np.testing.assert_array_equal(logits(model), logits(model.clone(dropout=0.0)))


@pytest.mark.parametrize("depth", [4, 15, 17, 20])
def test_depths_that_blocks_do_not_fill_are_refused(depth):
    message = f"--model-depth must be 6 n \\+ 4 for the network wide_resnet, such as 10, 16, 28 or 40, not {depth}"
    with pytest.raises(UsageError, match=message):
        create_model("wide_resnet", 10, depth=depth)
