"""Swift-SRGAN (Krishnan et al., arXiv 2111.14320): SRGAN with depthwise-separable convolutions.

Names and shapes of the state dicts are those of the published checkpoints.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sr_dist.models import cpu, gpu, layers

KEYS = {"initial.cnn.depthwise.weight"}


class SeparableConv(nn.Module):
    """A depthwise convolution, then a pointwise one."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            inputs, inputs, kernel, stride, padding=kernel // 2, groups=inputs, bias=bias
        )
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pointwise(self.depthwise(x))
        return out


class ConvBlock(nn.Module):
    """Separable convolution, normalisation and activation, the last two optional."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        norm: bool,
        activation: nn.Module,
        activated: bool = True,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.cnn = SeparableConv(inputs, outputs, kernel, stride=stride, bias=not norm)
        self.bn = nn.BatchNorm2d(outputs) if norm else nn.Identity()
        self.act = activation
        self.activated = activated
        if not activated:
            # Published blocks carry these weights without using them: kept in the state dict, but
            # DistributedDataParallel must not wait for their gradients.
            activation.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.cnn(x))
        return self.act(out) if self.activated else out


class ResidualBlock(nn.Module):
    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.block1 = ConvBlock(width, width, 3, norm=norm, activation=nn.PReLU(width))
        self.block2 = ConvBlock(
            width, width, 3, norm=norm, activation=nn.PReLU(width), activated=False
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.block2(self.block1(x))
        return out


class UpsampleBlock(nn.Module):
    """Doubles height and width by sub-pixel convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = SeparableConv(width, 4 * width, 3)
        self.ps = nn.PixelShuffle(2)
        self.act = nn.PReLU(width)

    def forward(self, x: Tensor) -> Tensor:
        if cpu.suits(x):
            enlarged = cpu.enlarge(self.conv.depthwise(x), self.conv.pointwise)
        else:
            enlarged = self.ps(self.conv(x))
        out: Tensor = self.act(enlarged)
        return out


class Generator(nn.Module):
    """(N, channels, H, W) in [0, 1] → (N, channels, scale·H, scale·W).

    With `global_skip="none"`, as published, tanh keeps the output in [0, 1]. With `"bicubic"` the
    network's output is added to the bicubic enlargement of its input, and its last layer starts at
    zero, so training starts from bicubic; the sum may leave [0, 1] and is clipped where pictures
    are made of it.
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
        self.scale = scale
        self.global_skip = global_skip
        self.initial = ConvBlock(channels, width, 9, norm=False, activation=nn.PReLU(width))
        self.residual = nn.Sequential(*(ResidualBlock(width, normed) for _ in range(num_blocks)))
        self.convblock = ConvBlock(
            width, width, 3, norm=normed, activation=nn.PReLU(width), activated=False
        )
        self.upsampler = nn.Sequential(
            *(UpsampleBlock(width) for _ in range(layers.doublings(scale)))
        )
        self.final_conv = SeparableConv(width, channels, 9)
        if global_skip == "bicubic":
            layers.start_at_zero(self.final_conv.pointwise)
        self.reach_of_extract = layers.reach_of_extract(num_blocks)
        self.reach_of_enlarge = layers.reach_of_enlarge(scale)

    def forward(self, lr: Tensor) -> Tensor:
        return self.enlarge(self.extract(lr), lr)

    def stages(self) -> tuple[nn.Module, nn.Sequential, nn.Module]:
        """Of `extract`: from LR to features, residual blocks, and what is added to the features."""
        return self.initial, self.residual, self.convblock

    def extract(self, lr: Tensor) -> Tensor:
        first, blocks, last = self.stages()
        features: Tensor = first(lr)
        out: Tensor = last(blocks(features)) + features
        return out

    def enlarge(self, features: Tensor, lr: Tensor) -> Tensor:
        detail = self.upsampler(features)
        if self.training and cpu.suits(detail):
            last = self.final_conv
            detail = cpu.separable_to_few(detail, last.depthwise, last.pointwise)
        elif detail.device.type == "cuda":
            detail = gpu.separable(detail, self.final_conv.depthwise, self.final_conv.pointwise)
        else:
            detail = self.final_conv(detail)
        return layers.output(lr, detail, self.scale, self.global_skip)


class Discriminator(nn.Module):
    """(N, channels, H, W) in [0, 1] → logits (N, 1).

    The published network ends in a sigmoid; here that belongs to the loss.
    """

    def __init__(self, *, channels: int, head: str) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                ConvBlock(
                    inputs,
                    outputs,
                    3,
                    norm=number > 0,
                    activation=nn.LeakyReLU(0.2, inplace=True),
                    stride=1 + number % 2,
                )
                for number, (inputs, outputs) in enumerate(layers.discriminator_widths(channels))
            )
        )
        self.classifier = layers.classifier(head)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.blocks(x))
        return logits


def infer(state: dict[str, Any]) -> dict[str, Any]:
    """`Generator`'s arguments, read from the names and shapes of a state dict.

    Raises:
        ValueError: a weight that is looked at is missing, or no convolution's.
    """
    width, channels, _, _ = layers.kernel_shape(state, "initial.cnn.pointwise.weight")
    return {
        "scale": 2 ** layers.count(state, "upsampler."),
        "channels": channels,
        "num_channels": width,
        "num_blocks": layers.count(state, "residual."),
        "norm": "batch" if "convblock.bn.weight" in state else "none",
        "global_skip": "none",
    }
