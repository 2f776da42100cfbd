"""The same functions as PyTorch's own, in forms that take a CPU less time.

Tests hold them against the plain forms. They are for float32 in channels-last memory; elsewhere the
plain forms are used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import grad as gradients

from sr_dist.models import layers


def suits(x: Tensor) -> bool:
    """Whether these forms are for `x`, (N, C, H, W)."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # what is exported has the plain forms
    )


def enlarge(x: Tensor, pointwise: nn.Conv2d) -> Tensor:
    """PixelShuffle(2) of a pointwise convolution: (N, C, H, W) → (N, outputs / 4, 2H, 2W).

    PixelShuffle gathers single numbers, four channels apart; with the filters in another order the
    channels of an output pixel lie together, and are moved as one.
    """
    batch, _, height, width = x.shape
    outputs = pointwise.out_channels // 4
    weight = layers.with_gradient_as_itself(pointwise.weight)
    weight = weight.view(outputs, 4, -1, 1, 1).transpose(0, 1).flatten(0, 1)
    assert pointwise.bias is not None
    bias = pointwise.bias.view(outputs, 4).t().flatten()
    pixels = F.conv2d(x, weight, bias).permute(0, 2, 3, 1)
    pixels = pixels.reshape(batch, height, width, 2, 2, outputs).transpose(2, 3)
    return pixels.reshape(batch, 2 * height, 2 * width, outputs).permute(0, 3, 1, 2)


def separable_to_few(x: Tensor, depthwise: nn.Conv2d, pointwise: nn.Conv2d) -> Tensor:
    """A separable convolution to few channels, whose gradient is that of a dense one.

    The two are together a dense convolution with the filters w_pointwise[k, c] w_depthwise[c]. With
    few outputs its gradients, as products of large matrices, take a third of the time that those of
    the depthwise convolution do.
    """
    result: Tensor = _SeparableToFew.apply(
        x, depthwise.weight, depthwise.bias, pointwise.weight, pointwise.bias
    )
    return result


class _SeparableToFew(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, depth: Tensor, depth_bias: Tensor, point: Tensor, point_bias: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, depth, depth_bias, point)
        padding = depth.shape[-1] // 2
        spread = F.conv2d(x, depth, depth_bias, padding=padding, groups=len(depth))
        return F.conv2d(spread, point, point_bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, depth, depth_bias, point = ctx.saved_tensors
        padding = depth.shape[-1] // 2
        dense = point * depth.transpose(0, 1)  # (outputs, inputs, side, side)
        back = dense.flip(2, 3).transpose(0, 1)
        grad_x = F.conv2d(grad, back, padding=padding)
        # The gradient of the dense filters, with the parts of x and grad exchanged: the inputs of a
        # convolution are then the few, which is the case of a network's first layer.
        of_back: Tensor = gradients.conv2d_weight(  # type: ignore[no-untyped-call]
            grad, back.shape, x, padding=padding
        )
        of_dense = of_back.flip(2, 3).transpose(0, 1)
        total = grad.sum((0, 2, 3))
        of_depth = (of_dense * point).sum(0).unsqueeze(1)
        of_point = (of_dense * depth.transpose(0, 1)).sum((2, 3), keepdim=True)
        of_point += (total[:, None] * depth_bias).view_as(point)
        return (
            grad_x,
            torch.empty_like(depth).copy_(of_depth),  # laid out as it is, see below
            (total[:, None] * point[:, :, 0, 0]).sum(0),
            torch.empty_like(point).copy_(of_point),
            total,
        )
