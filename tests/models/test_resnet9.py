"""ResNet-9, compared to the same network of PyTorch's layers."""

import pytest
from oracle import examples, import_torch, inference_error, num_parameters, randomize, training_errors

from cnn_jax.errors import UsageError
from cnn_jax.models import create_model


def network_in_pytorch(channels, num_classes):
    torch = import_torch()
    nn = torch.nn

    class ConvNorm(nn.Module):
        def __init__(self, inputs, outputs, pool=False, residual=False):
            super().__init__()
            self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            self.bn = nn.BatchNorm2d(outputs)
            self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
            if residual:
                self.residual = nn.ModuleDict({name: ConvNorm(outputs, outputs) for name in ("res1", "res2")})

        def forward(self, x):
            x = self.pool(torch.relu(self.bn(self.conv(x))))
            return x + self.residual.res2(self.residual.res1(x)) if hasattr(self, "residual") else x

    class ResNet9(nn.Module):
        def __init__(self):
            super().__init__()
            self.prep = ConvNorm(channels, 64)
            self.layer1 = ConvNorm(64, 128, pool=True, residual=True)
            self.layer2 = ConvNorm(128, 256, pool=True)
            self.layer3 = ConvNorm(256, 512, pool=True, residual=True)
            self.linear = nn.Linear(512, num_classes)

        def forward(self, x):
            x = self.layer3(self.layer2(self.layer1(self.prep(x)))).amax((2, 3))
            return nn.functional.linear(x, self.linear.weight) * 0.125 + self.linear.bias

    return ResNet9()


def test_number_of_parameters():
    # The original has 6,573,120, without the bias.
    assert num_parameters(create_model("resnet9", 10), (32, 32, 3)) == 6_573_120 + 10


@pytest.mark.parametrize("shape", [(28, 28, 1), (9, 12, 3)])
def test_logits_are_pytorchs(shape):
    network = network_in_pytorch(shape[-1], 4)
    randomize(network, seed=2)
    images, _ = examples((2, *shape), 4)
    assert inference_error(create_model("resnet9", 4), network, images) < 1e-4


def test_a_training_step_is_pytorchs():
    network = network_in_pytorch(3, 4)
    randomize(network, seed=2)
    errors = training_errors(create_model("resnet9", 4, portable=True), network, *examples((3, 17, 12, 3), 4))
    assert max(errors) < 1e-7


def test_images_too_small_are_refused():
    model = create_model("resnet9", 10)
    with pytest.raises(UsageError, match="resnet9 needs images of at least 8x8 pixels, not 7x28: use larger images"):
        num_parameters(model, (7, 28, 1))
    num_parameters(model, (8, 8, 1))
