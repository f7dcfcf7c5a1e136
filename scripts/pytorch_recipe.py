"""The network ``small`` and its recipes in PyTorch: the peer of ``scripts/speedrun.py``.

It follows the config that cnn_jax trains with: the same architecture and initialization, batches, optimizer, schedule,
augmentation, loss and test-time augmentation, written as one would in PyTorch, with the dataset in memory and
``channels_last``, which on CPUs is faster. It has what the presets for this network use; other settings are an error.
One difference: with Muon, the other parameters are trained with Adam, where optax adds Nesterov momentum.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp

try:
    import torch
    import torch.nn.functional as F  # noqa: N812
    from torch import nn
except ModuleNotFoundError:
    sys.exit("error: PyTorch is not installed: pip install -e '.[torch]'")

from cnn_jax.config import Config
from cnn_jax.data import Dataset, Split
from cnn_jax.errors import UsageError
from cnn_jax.training.loop import create_task_for

USED = {
    "dataset",
    "data_dir",
    "epochs",
    "batch_size",
    "seed",
    "shuffle",
    "model",
    "model_depth",
    "model_width",
    "model_dropout",
    "normalize",
    "tta",
    "flip",
    "shift",
    "optimizer",
    "learning_rate",
    "momentum",
    "schedule",
    "warmup",
    "weight_decay",
    "label_smoothing",
}
"""The settings that are followed; the others must have their defaults."""

KNOWN = {"model": {"small"}, "optimizer": {"adamw", "muon"}, "tta": {"none", "flip"}}
"""The values that are followed of settings with several."""


class Conv(nn.Module):
    """``nn.Conv2d`` whose kernel is a matrix ``[output, input * height * width]``, as ``torch.optim.Muon`` needs it."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.kernel = nn.Parameter(convolution.weight.detach().reshape(out_channels, -1))
        self.bias = nn.Parameter(convolution.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, C, H, W]`` to ``[N, O, H, W]``."""
        kernel = self.kernel.reshape(len(self.bias), -1, 3, 3)
        return F.conv2d(x, kernel.contiguous(memory_format=torch.channels_last), self.bias, padding=1)


class SmallCNN(nn.Sequential):
    """The network ``small``: ``depth`` convolutions in three stages, the first with ``width`` channels."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, depth: int, width: int, dropout: float):
        height, width_of_image, channels = image_shape
        layers: list[nn.Module] = []
        for features in (width, 2 * width, 4 * width):
            for index in range(depth // 3):
                pooling = [nn.MaxPool2d(2)] if index == 0 else []
                layers += [Conv(channels, features), nn.ReLU(), *pooling, nn.BatchNorm2d(features)]
                channels = features
        features = channels * (height // 8) * (width_of_image // 8)
        super().__init__(*layers, nn.Flatten(), nn.Dropout(dropout), nn.Linear(features, num_classes))


class Recipe:
    """Trains the network as a config says.

    Raises:
        UsageError: the config has a setting that is not followed here.
    """

    def __init__(self, config: Config, dataset: Dataset):
        default = Config()
        other = [
            field.name
            for field in dataclasses.fields(Config)
            if field.name not in USED and getattr(config, field.name) != getattr(default, field.name)
        ]
        other += [name for name, known in KNOWN.items() if getattr(config, name) not in known]
        if other:
            raise UsageError(f"scripts/pytorch_recipe.py does not have {other[0]} {getattr(config, other[0])!r}")
        self._config = config
        self._task = create_task_for(config, dataset)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(config.seed)
        model = self._task.model
        options = {"depth": model.depth, "width": model.width, "dropout": model.dropout}
        self._network = SmallCNN(dataset.image_shape, len(dataset.class_names), **options)
        self._network.to(self._device, memory_format=torch.channels_last)
        self._train, self._test = (self._to_tensors(split) for split in (dataset.train, dataset.test))
        steps = config.epochs * -(-len(dataset.train) // config.batch_size)
        self._rates = (config.learning_rate * jax.vmap(self._task.optimizer.schedule)(jnp.arange(steps))).tolist()
        self._steps = 0
        self._make_optimizer()

    def warm_up(self) -> None:
        """Train on a few batches, then restore the initial state."""
        state = {name: value.clone() for name, value in self._network.state_dict().items()}
        for _, batch in zip(range(10), self._batches(0), strict=False):
            self._train_step(*batch)
        self._network.load_state_dict(state)
        self._steps = 0
        self._make_optimizer()

    def train_epoch(self, epoch: int) -> float:
        """Train an epoch and return its seconds."""
        began = time.perf_counter()
        self._network.train()
        for images, labels in self._batches(epoch):
            self._train_step(images, labels)
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    @torch.no_grad()
    def test_accuracy(self) -> float:
        """The fraction of the test images correctly classified."""
        self._network.eval()
        images, labels = self._test
        correct = 0
        for start in range(0, len(labels), 1000):
            part = images[start : start + 1000]
            logits = self._network(part)
            if self._config.tta == "flip":
                logits = logits + self._network(part.flip(3))
            correct += int((logits.argmax(1) == labels[start : start + 1000]).sum())
        return correct / len(labels)

    def _make_optimizer(self) -> None:
        config, params = self._config, list(self._network.parameters())
        kernels, others = ([param for param in params if (param.ndim > 1) is kernel] for kernel in (True, False))
        *matrices, head = kernels
        if config.optimizer == "adamw":
            decaying, muon = kernels, []
        else:
            decaying, muon = [head], matrices
        groups = [{"params": decaying, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups)]
        if muon:
            options = {"weight_decay": config.weight_decay, "momentum": config.momentum, "nesterov": True}
            self._optimizers.append(torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw", **options))

    def _to_tensors(self, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
        preprocess = self._task.preprocess
        mean, std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (preprocess.mean, preprocess.std))
        images = (torch.tensor(split.images).permute(0, 3, 1, 2).float() / 255 - mean) / std
        images = images.to(self._device, memory_format=torch.channels_last)
        return images, torch.tensor(split.labels).long().to(self._device)

    def _batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        images, labels = self._train
        order = torch.randperm(len(labels)) if self._config.shuffle else torch.arange(len(labels))
        if epoch == 0:
            self._flipped_first = torch.rand(len(labels)) < 0.5
        for indices in order.to(self._device).split(self._config.batch_size):
            yield self._augment(images[indices], indices, epoch), labels[indices]

    def _augment(self, images: torch.Tensor, indices: torch.Tensor, epoch: int) -> torch.Tensor:
        if self._config.flip != "none":
            alternating = self._flipped_first[indices.cpu()] ^ bool(epoch % 2)
            flipped = torch.rand(len(images)) < 0.5 if self._config.flip == "random" else alternating
            images = torch.where(flipped.to(self._device).reshape(-1, 1, 1, 1), images.flip(3), images)
        if shift := self._config.shift:
            height, width = images.shape[2:]
            padded = F.pad(images, (shift,) * 4, mode="reflect")
            rows, columns = torch.randint(0, 2 * shift + 1, (2, len(images), 1))
            rows, columns = rows + torch.arange(height), columns + torch.arange(width)
            images = padded[torch.arange(len(images))[:, None, None], :, rows[:, :, None], columns[:, None]]
            images = images.permute(0, 3, 1, 2)
        return images

    def _train_step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._rates[self._steps]
        loss = F.cross_entropy(self._network(images), labels, label_smoothing=self._config.label_smoothing)
        self._network.zero_grad()
        loss.backward()
        for optimizer in self._optimizers:
            optimizer.step()
        self._steps += 1
