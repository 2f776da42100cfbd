"""Real-ESRGAN's discriminator (Wang et al., arXiv 2107.10833): a U-Net with a logit per pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

_WIDTH = 64


class Discriminator(nn.Module):
    """(N, channels, H, W) in [0, 1] → logits (N, 1, H, W).

    Without BatchNorm; with spectral norm on all convolutions but the first and the last.
    """

    def __init__(self, *, channels: int) -> None:
        super().__init__()
        widths = [_WIDTH * 2**n for n in range(4)]
        self.first = nn.Conv2d(channels, _WIDTH, 3, padding=1)
        self.down = nn.ModuleList(
            spectral_norm(nn.Conv2d(inputs, outputs, 4, 2, padding=1, bias=False))
            for inputs, outputs in zip(widths, widths[1:], strict=False)
        )
        self.up = nn.ModuleList(
            spectral_norm(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
            for inputs, outputs in zip(widths[::-1], widths[-2::-1], strict=False)
        )
        self.last = nn.Sequential(
            spectral_norm(nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1, bias=False)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1, bias=False)),
            nn.LeakyReLU(0.2),
            nn.Conv2d(_WIDTH, 1, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        levels = [_activated(self.first(x))]
        for down in self.down:
            levels.append(_activated(down(levels[-1])))
        out = levels.pop()
        for up in self.up:
            skip = levels.pop()
            # To the size of the skip, which is not twice the other where a side was odd.
            out = F.interpolate(out, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            out = _activated(up(out)) + skip
        logits: Tensor = self.last(out)
        return logits


def _activated(x: Tensor) -> Tensor:
    return torch.nn.functional.leaky_relu(x, 0.2)
