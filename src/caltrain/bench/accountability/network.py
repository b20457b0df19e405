"""A small convolutional network that learns in half a minute on one core: what verdicts are judged on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DIMS = 256


class Network(nn.Module):
    """Pictures (N, channels, H, W), scaled to about -1..1, to logits (N, classes), by a fingerprint of `DIMS` numbers.

    After the residual network of nine layers that is common in speed contests on CIFAR-10 (D. Page, "How to train your
    ResNet", 2018), narrower, and with strides where that has poolings of large maps.
    """

    def __init__(self, channels: int, classes: int, *, width: int = 32) -> None:
        super().__init__()
        self.front = _block(channels, width, size=4, stride=2)
        self.center = nn.Sequential(
            _block(width, 2 * width),
            _Residual(2 * width),
            nn.MaxPool2d(2),
            _block(2 * width, 4 * width),
            nn.MaxPool2d(2),
            _block(4 * width, DIMS),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )
        self.last = nn.Linear(DIMS, classes)

    def embed(self, pictures: Tensor) -> Tensor:
        """Penultimate features (N, DIMS), never negative, not of length one."""
        features: Tensor = self.center(self.front(pictures))
        return features

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits (N, classes)."""
        return self.classify(self.embed(pictures))

    def classify(self, features: Tensor) -> Tensor:
        """Features (N, DIMS) to logits (N, classes), scaled down so that learning starts slowly."""
        logits: Tensor = self.last(features) * 0.25
        return logits

    def incoming(self) -> Tensor:
        """Size of the weights into each number of the fingerprint (DIMS,)."""
        deepest = [module for module in self.center.modules() if isinstance(module, nn.Conv2d)][-1]
        return deepest.weight.detach().flatten(1).abs().sum(1)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _block(width, width), _block(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.as_tensor(self.second(self.first(x)))


def _block(wide_in: int, wide_out: int, *, size: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(wide_in, wide_out, size, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(wide_out), nn.ReLU(inplace=True))
