"""Small generators for tests, as they are after training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sr_dist import models

FAMILIES = ("swift_srgan", "srgan")
SIZES = [(1, 7, 13), (2, 32, 20), (3, 1, 1), (2, 45, 64)]  # batch, height, width


def describe(name: str = "swift_srgan", **changes: object) -> dict[str, Any]:
    arguments = {"scale": 2, "channels": 3, "num_channels": 8, "num_blocks": 1}
    return {"name": name, **arguments, "norm": "batch", "global_skip": "none", **changes}


def build(description: dict[str, Any], seed: int = 0) -> nn.Module:
    """As after training: no weight and no statistic is what it was built with."""
    torch.manual_seed(seed)
    generator = models.build_generator(**description)
    for name, value in generator.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.ndim == 4:  # a convolution, which keeps the size of its numbers
            value.normal_(std=value[0].numel() ** -0.5)
        elif value.is_floating_point():
            value.normal_(std=0.2)
        else:
            value.fill_(7 + seed)
    return generator.eval()


@torch.inference_mode()
def difference(generator: nn.Module, other: Callable[[Tensor], Tensor], channels: int = 3) -> float:
    greatest = 0.0
    for batch, height, width in SIZES:
        lr = torch.rand(batch, channels, height, width)
        expected, found = generator(lr), other(lr)
        assert found.shape == expected.shape and found.dtype == torch.float32
        assert torch.isfinite(found).all()
        greatest = max(greatest, float((found - expected).abs().max()))
    return greatest
