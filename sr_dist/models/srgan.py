"""SRGAN's networks (Ledig et al., arXiv 1609.04802), with standard convolutions.

The generator is the paper's SRResNet in its common layout: convolutions before a BatchNorm carry no
bias and each PReLU has one weight, 1,547,350 parameters at ×4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sr_dist.models import layers

KEYS = {"initial.0.weight", "middle.0.weight"}


class ResidualBlock(nn.Module):
    def __init__(self, width: int, normed: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=not normed)
        self.bn1 = nn.BatchNorm2d(width) if normed else nn.Identity()
        self.act = nn.PReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=not normed)
        self.bn2 = nn.BatchNorm2d(width) if normed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return out


class Generator(nn.Module):
    """(N, channels, H, W) in [0, 1] → (N, channels, scale·H, scale·W).

    Arguments and `global_skip` as those of `swift_srgan.Generator`.
    """

    def __init__(
        self,
        *,
        scale: int,
        channels: int,
        num_channels: int,
        num_blocks: int,
        norm: str,
        global_skip: str,
    ) -> None:
        super().__init__()
        width, normed = num_channels, norm == "batch"
        doublings = layers.doublings(scale)
        self.scale = scale
        self.global_skip = global_skip
        self.initial = nn.Sequential(nn.Conv2d(channels, width, 9, padding=4), nn.PReLU())
        self.residual = nn.Sequential(*(ResidualBlock(width, normed) for _ in range(num_blocks)))
        self.middle = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=not normed),
            nn.BatchNorm2d(width) if normed else nn.Identity(),
        )
        self.upsampler = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.PReLU()
                )
                for _ in range(doublings)
            )
        )
        self.final = nn.Conv2d(width, channels, 9, padding=4)
        if global_skip == "bicubic":
            layers.start_at_zero(self.final)
        self.reach_of_extract = layers.reach_of_extract(num_blocks)
        self.reach_of_enlarge = layers.reach_of_enlarge(scale)

    def forward(self, lr: Tensor) -> Tensor:
        return self.enlarge(self.extract(lr), lr)

    def stages(self) -> tuple[nn.Module, nn.Sequential, nn.Module]:
        """Of `extract`: from LR to features, residual blocks, and what is added to the features."""
        return self.initial, self.residual, self.middle

    def extract(self, lr: Tensor) -> Tensor:
        first, blocks, last = self.stages()
        features: Tensor = first(lr)
        out: Tensor = last(blocks(features)) + features
        return out

    def enlarge(self, features: Tensor, lr: Tensor) -> Tensor:
        detail = self.final(self.upsampler(features))
        return layers.output(lr, detail, self.scale, self.global_skip)


class Discriminator(nn.Module):
    """(N, channels, H, W) in [0, 1] → logits (N, 1): the paper's VGG-style network."""

    def __init__(self, *, channels: int, head: str) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(layers.discriminator_widths(channels)):
            normed = number > 0
            blocks.append(nn.Conv2d(inputs, outputs, 3, 1 + number % 2, padding=1, bias=not normed))
            if normed:
                blocks.append(nn.BatchNorm2d(outputs))
            blocks.append(nn.LeakyReLU(0.2, inplace=True))
        self.blocks = nn.Sequential(*blocks)
        self.classifier = layers.classifier(head)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.blocks(x))
        return logits


def infer(state: dict[str, torch.Tensor]) -> dict[str, object]:
    """`Generator`'s arguments, read from the names and shapes of a state dict.

    Raises:
        ValueError: a weight that is looked at is missing, or no convolution's.
    """
    width, channels, _, _ = layers.kernel_shape(state, "initial.0.weight")
    return {
        "scale": 2 ** layers.count(state, "upsampler."),
        "channels": channels,
        "num_channels": width,
        "num_blocks": layers.count(state, "residual."),
        "norm": "batch" if "middle.1.weight" in state else "none",
        "global_skip": "none",
    }
