"""LPIPS (Zhang et al., arXiv 1801.03924) with SqueezeNet: a distance as people see it.

Needs torchmetrics, which ships the learned weights of the distance, and a file with the backbone's
weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from sr_dist import images, losses, tensors, weights
from sr_dist.errors import UserError

# The activations after the first convolution and after each group of fire modules that ends before
# a pooling, then after every one: as the authors chose them. Places in torchvision's `features`.
_PLACES = (1, 4, 7, 9, 10, 11, 12)
_CHANNELS = (64, 128, 256, 384, 384, 512, 512)
_SHIFT = (-0.030, -0.088, -0.188)  # of pictures in [-1, 1]
_SCALE = (0.458, 0.448, 0.450)
_EPSILON = 1e-8
LEAST = 17  # pixels on a side: below, the last of the maps is empty


class _Lpips(nn.Module):
    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        from torchvision import models  # at need: slow to import

        self.features = models.squeezenet1_1(weights=None).features
        self.heads = nn.ParameterList(torch.zeros(channels) for channels in _CHANNELS)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] twice → (N,)."""
        maps = losses.FeatureMaps(self.features, _PLACES)
        pair = [maps((2 * x - 1 - self.shift) / self.scale) for x in (sr, hr)]
        total = sr.new_zeros(len(sr))
        for a, b, head in zip(*pair, self.heads, strict=True):
            a, b = (x / (x.square().sum(1, keepdim=True) + _EPSILON).sqrt() for x in (a, b))
            total += ((a - b).square() * head.view(1, -1, 1, 1)).sum(1).mean((1, 2))
        return total


def build(
    backbone: Path, device: torch.device
) -> Callable[[images.Picture, images.Picture], float]:
    """The distance of two (H, W, C) pictures, whole and in colour (gray counts as equal channels).

    `backbone`: a file with a state dict of torchvision's squeezenet1_1.

    Raises:
        UserError: torchmetrics is not installed, or the file does not fit; by the distance, a
            picture is too small.
    """
    found = importlib.util.find_spec("torchmetrics")
    if found is None or found.origin is None:
        raise UserError(
            "LPIPS needs torchmetrics, which is not installed: pip install 'sr_dist[lpips]'"
        )
    module = _Lpips()
    folder = Path(found.origin).parent / "functional" / "image" / "lpips_models"
    heads = weights.read(folder / "squeeze.pth")
    state = weights.read(backbone)
    if not isinstance(state, dict):
        raise UserError(f"{backbone} holds no state dict of torchvision's squeezenet1_1")
    held = {
        key.removeprefix("features."): value.float() if isinstance(value, Tensor) else value
        for key, value in state.items()
        if key.startswith("features.")
    }
    weights.load(module.features, held, str(backbone))
    for number, head in enumerate(module.heads):
        head.data.copy_(heads[f"lin{number}.model.1.weight"].flatten())
    module.to(device).eval().requires_grad_(False)

    @torch.inference_mode()
    def distance(sr: images.Picture, hr: images.Picture) -> float:
        if min(hr.shape[:2]) < LEAST:
            size = f"{hr.shape[1]}x{hr.shape[0]}"
            raise UserError(f"a picture has {size} pixels; LPIPS needs {LEAST} on each side")
        pair = [tensors.to_float(tensors.to_batch([p]).to(device)) for p in (sr, hr)]
        return float(module(*(p.expand(-1, 3, -1, -1) for p in pair)))

    return distance
