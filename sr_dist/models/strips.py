"""The features of a large picture, extracted in strips of rows: the same, in less memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sr_dist.models import layers

_AT_ONCE = 2**15  # LR pixels
_FEWEST = 16  # rows; each block computes up to four more


def extract(generator: nn.Module, lr: Tensor) -> Tensor:
    """What `generator.extract(lr)` returns in evaluation mode, up to rounding; without gradients.

    `lr`: (1, channels, H, W). Three tensors as large as the features are held, and small ones.
    `generator.extract` holds five, each of a hundred new: either the system clears their memory
    each time, which took a CPU a third of its time, or more is kept than five need.
    """
    if lr.shape[2] * lr.shape[3] <= _AT_ONCE:
        return generator.extract(lr)  # type: ignore[operator,no-any-return]
    model: Any = generator
    first, blocks, last = model.stages()
    features = x = _in_strips(first, layers.REACH_OF_FIRST, lr)
    turns = torch.empty_like(features), torch.empty_like(features)
    reaches = [layers.REACH_OF_BLOCK] * len(blocks) + [layers.REACH_OF_LAST]
    for number, (block, reach) in enumerate(zip([*blocks, last], reaches, strict=True)):
        x = _in_strips(block, reach, x, turns[number % 2])
    return x.add_(features)


def _in_strips(module: nn.Module, reach: int, x: Tensor, out: Tensor | None = None) -> Tensor:
    """`module(x)`, in `out` if given: each strip is computed with the rows that it depends on."""
    _, _, height, width = x.shape
    strips = max(1, min(height // _FEWEST, -(-height * width // _AT_ONCE)))
    edges = [height * strip // strips for strip in range(strips + 1)]
    for top, bottom in zip(edges, edges[1:], strict=False):
        above = max(0, top - reach)
        part = module(x[:, :, above : bottom + reach])[:, :, top - above : bottom - above]
        if out is None:
            shape = (1, part.shape[1], height, width)
            out = torch.empty(
                shape, dtype=part.dtype, device=x.device, memory_format=torch.channels_last
            )
        out[:, :, top:bottom] = part
    assert out is not None, "a picture has rows"
    return out
