"""Means over what all ranks hold, which gradients pass through; BatchNorm on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Sum(torch.autograd.Function):
    """The sum over ranks. What one rank holds matters to all, so gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total: Tensor = _Sum.apply(gradient)
        return total


def mean(value: Tensor) -> Tensor:
    """The mean over ranks, element by element; the value itself where there is one rank.

    Together with the mean over ranks that DistributedDataParallel takes of the gradients, a loss
    has the gradient that it would have on one rank with the whole batch.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return value
    total: Tensor = _Sum.apply(value)
    return total / torch.distributed.get_world_size()


def mean_of_all(values: Tensor) -> Tensor:
    """The mean of all elements on all ranks, which hold equally many."""
    return mean(values.mean())


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d with the statistics of all ranks' parts of the batch, which are equally large.

    Unlike torch's it runs on the CPU and can be differentiated twice, as R1 needs. (N, C, H, W)
    floating point in and out; statistics in fp32 at least.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        center = mean(x.mean((0, 2, 3)))
        x = x - center[:, None, None]
        variance = mean(x.square().mean((0, 2, 3)))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        self._remember(center.detach(), variance.detach(), x.numel() // len(center))
        return (x * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _remember(self, center: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics as BatchNorm2d does: the variance is the unbiased one."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        count *= torch.distributed.get_world_size()
        self.running_mean.lerp_(center, self.momentum)
        self.running_var.lerp_(variance * (count / max(1, count - 1)), self.momentum)
        self.num_batches_tracked.add_(1)


def synchronise(module: nn.Module) -> None:
    """Put a `SyncBatchNorm` in the place of each BatchNorm2d; names and values stay."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            same = SyncBatchNorm(child.num_features, eps=child.eps, momentum=child.momentum)
            same.to(child.weight).load_state_dict(child.state_dict())
            setattr(module, name, same)
        else:
            synchronise(child)
