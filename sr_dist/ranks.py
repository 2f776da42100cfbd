"""Means over all ranks: of gradients, on their way; of values, which gradients pass through; and
layers that take some.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Reductions:
    """Gradients on their way to be the means of all ranks; what needs them ends this by `finish`.

    Until then the next thing can be computed, while messages travel and slower ranks come.
    """

    def __init__(self, world_size: int, compression: str) -> None:
        """`compression` of what is sent: bf16, or none."""
        self.world_size, self._compression = world_size, compression
        self._begun: list[Callable[[], None]] = []

    def __deepcopy__(self, memo: object) -> Reductions:
        return self  # a copy of a network sends among the same ranks, in the same order

    def begin(self, flat: Tensor) -> None:
        """Make `flat`, floating point, its mean over ranks."""
        sent = flat.bfloat16() if self._compression == "bf16" else flat
        work = torch.distributed.all_reduce(sent.div_(self.world_size), async_op=True)

        def finish() -> None:
            work.wait()
            if sent is not flat:
                flat.copy_(sent)

        self._begun.append(finish)

    def begin_bucket(
        self,
        bucket: torch.distributed.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[Tensor]:
        """A hook of DistributedDataParallel, which is not let wait: it takes them for averaged."""
        flat = bucket.buffer()
        self.begin(flat)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(flat)
        return done

    def begin_gather(self, rows: Tensor, use: Callable[[Tensor], None]) -> None:
        """Have `use` called with the `rows` of all ranks, one after the other."""
        everyones = [torch.empty_like(rows) for _ in range(self.world_size)]
        work = torch.distributed.all_gather(everyones, rows, async_op=True)

        def finish() -> None:
            work.wait()
            use(torch.cat(everyones))

        self._begun.append(finish)

    @torch.no_grad()
    def finish(self) -> None:
        """Wait for all that is begun, in its order; on a GPU its stream waits, not this process.

        Raises:
            RuntimeError: another rank is gone.
        """
        begun, self._begun = self._begun, []
        for finish in begun:
            finish()


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


class FactoredLinear(nn.Module):
    """nn.Linear with the parameters of another, (rows, inputs) → (rows, outputs); but the weight's
    gradient is made once a backward, of the factors of all ranks.

    It is the product of what came in, (rows, inputs), and the gradient of what went out, (rows,
    outputs). Where rows are few, these are fewer numbers to send than their product (sufficient
    factor broadcasting, Xie et al., arXiv 1511.08486), and rows of several forwards make one
    product. Each rank multiplies them itself: all must compute the same, see `made_alike`.
    DistributedDataParallel must leave such a weight alone. Cannot be differentiated twice.
    """

    def __init__(self, plain: nn.Linear, reductions: Reductions) -> None:
        """`reductions`: those whose end gives the weight its gradient; of one rank the backward."""
        super().__init__()
        self.weight, self.bias, self.reductions = plain.weight, plain.bias, reductions
        self.rows: list[Tensor] = []  # factors of this backward: inputs and outputs beside another

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return F.linear(x, self.weight, self.bias)
        self.rows = []  # those of a backward that failed
        out: Tensor = _FactoredLinear.apply(x, self.weight, self.bias, self)
        return out

    def add_rows(self, x: Tensor, gradient: Tensor) -> None:
        """Inside a backward, at whose end what they make is on its way to `weight.grad`."""
        if not self.rows:
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        self.rows.append(torch.cat([x, gradient], dim=1))

    @torch.no_grad()
    def _finish(self) -> None:
        rows = torch.cat(self.rows)
        self.rows = []
        if self.reductions.world_size > 1:
            self.reductions.begin_gather(rows, self._add)
        else:
            self._add(rows)

    def _add(self, rows: Tensor) -> None:
        product = self.multiply(rows)
        self.weight.grad = product if self.weight.grad is None else self.weight.grad + product

    def multiply(self, rows: Tensor) -> Tensor:
        """The weight's gradient, of `rows` of all ranks, (rows, inputs and outputs)."""
        outputs, inputs = self.weight.shape
        x, gradient = torch.split(rows.to(self.weight.dtype), [inputs, outputs], dim=1)
        return (gradient / self.reductions.world_size).t() @ x


class _FactoredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: FactoredLinear) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.layer.add_rows(x.to(gradient.dtype), gradient)
        of_x = (gradient @ weight.to(gradient.dtype)).to(x.dtype)
        return of_x, None, gradient.to(weight.dtype).sum(0), None


@dataclasses.dataclass(frozen=True)
class Factors:
    """What decides whether the factors of a layer's gradient are sent in its place."""

    rows: int  # the crops of a step, over all ranks, each of which passes as HR and as SR
    parts: int = 1  # backwards in a step, which share the rows
    cost: float = 1.0  # bytes of a number of the factors over those of one of a gradient


def factor(module: nn.Module, factors: Factors, reductions: Reductions) -> list[str]:
    """Put a `FactoredLinear` in the place of each Linear for which that is less to send.

    For all ranks at once. Returns the names of their weights, which get their gradients here.
    """
    names = []
    for name, child in module.named_children():
        if type(child) is nn.Linear:  # none whose weight is computed, as spectral norm's
            if child.weight.is_cuda and reductions.world_size == 1:
                continue  # nothing is sent; whether one product then gains has not been measured
            # To each other rank go 2 rows / world_size rows of factors, against, in a ring,
            # 2 / world_size of the weight.
            of_rows = factors.rows * factors.cost * (child.in_features + child.out_features)
            if of_rows >= child.weight.numel():
                continue
            layer = FactoredLinear(child, reductions)
            # What ranks that multiply otherwise make of the factors would drift apart.
            if made_alike(layer, 2 * factors.rows // factors.parts):
                setattr(module, name, layer)
                names.append(f"{name}.weight")
        else:
            names += [f"{name}.{inner}" for inner in factor(child, factors, reductions)]
    return names


@torch.no_grad()
def made_alike(layer: FactoredLinear, rows: int) -> bool:
    """Whether all ranks make the same bits of so many rows of factors.

    With other processors or libraries they may not, and with more rows, which are multiplied in
    blocks, sooner than with few.
    """
    world_size = layer.reductions.world_size
    if world_size == 1:
        return True
    random = torch.Generator().manual_seed(0)
    numbers = torch.rand(rows, sum(layer.weight.shape), generator=random)
    product = layer.multiply(numbers.to(layer.weight.device)).cpu().numpy()
    digest = np.frombuffer(hashlib.sha256(product.tobytes()).digest(), np.int64)
    own = torch.from_numpy(digest.copy()).to(layer.weight.device)
    everyones = [torch.empty_like(own) for _ in range(world_size)]
    torch.distributed.all_gather(everyones, own)
    return all(torch.equal(one, own) for one in everyones)
