"""What the families of networks share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Of the stages of `extract`, in pixels on each side: 9x9, two 3x3 in each residual block, 3x3.
REACH_OF_FIRST, REACH_OF_BLOCK, REACH_OF_LAST = 4, 2, 1
_WIDTHS = (64, 64, 128, 128, 256, 256, 512, 512)  # of the published discriminators


def doublings(scale: int) -> int:
    """How often a generator doubles height and width: log2, so that ×8 is 8 and not 16."""
    number = int(math.log2(scale))
    assert 2**number == scale, "the scale is a power of 2"
    return number


def reach_of_extract(num_blocks: int) -> int:
    """LR pixels on each side that a feature depends on."""
    return REACH_OF_FIRST + num_blocks * REACH_OF_BLOCK + REACH_OF_LAST


def reach_of_enlarge(scale: int) -> int:
    """LR pixels on each side, of features and picture, that an output pixel depends on.

    A 3x3 before each doubling and the last 9x9, at the resolutions they work at; the bicubic skip
    reaches less far.
    """
    return int(math.ceil(sum(1 / 2**n for n in range(doublings(scale))) + 4 / scale))


def start_at_zero(last: nn.Conv2d) -> None:
    """Let a generator with a global skip start as its skip."""
    nn.init.zeros_(last.weight)
    if last.bias is not None:
        nn.init.zeros_(last.bias)


def output(lr: Tensor, detail: Tensor, scale: int, global_skip: str) -> Tensor:
    """SR from the last layer's output: tanh to [0, 1], or added to the bicubic enlargement."""
    if global_skip == "none":
        return (torch.tanh(detail.float()) + 1) / 2
    # antialias selects the a = -0.5 kernel, Pillow's bicubic; enlarging has nothing to alias.
    base = F.interpolate(lr.float(), scale_factor=float(scale), mode="bicubic", antialias=True)
    return base + detail


def discriminator_widths(channels: int) -> Iterable[tuple[int, int]]:
    """(inputs, outputs) of each convolution; every second one has stride 2."""
    return zip((channels, *_WIDTHS), _WIDTHS, strict=False)


def classifier(head: str) -> nn.Sequential:
    """From features to a logit. `linear`: over a 6x6 pool, as published; `gap`: a global pool."""
    pool = 6 if head == "linear" else 1
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(pool),
        nn.Flatten(),
        nn.Linear(_WIDTHS[-1] * pool * pool, 1024),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Linear(1024, 1),
    )


def kernel_shape(state: Mapping[str, object], key: str) -> tuple[int, int, int, int]:
    """The shape of a convolution's weight in a state dict.

    Raises:
        ValueError: it is not there, or is none.
    """
    if key not in state:
        raise ValueError(f"weights lack {key}; they are of another model")
    value = state[key]
    if not isinstance(value, Tensor):
        raise ValueError(f"{key} is no tensor but {type(value).__name__}")
    if value.ndim != 4:
        raise ValueError(
            f"{key} has shape {tuple(value.shape)}; expected that of a convolution, four numbers"
        )
    outputs, inputs, height, width = value.shape
    return outputs, inputs, height, width


def count(state: dict[str, Tensor], prefix: str) -> int:
    """How many numbered submodules of `prefix` a state dict holds."""
    return len({key.split(".")[1] for key in state if key.startswith(prefix)})


def with_gradient_as_itself(weight: Tensor) -> Tensor:
    """The same; its gradient is laid out as it is, which DistributedDataParallel counts on."""
    same: Tensor = _WithGradientAsItself.apply(weight)
    return same


class _WithGradientAsItself(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (weight,) = ctx.saved_tensors
        return torch.empty_like(weight).copy_(grad)
