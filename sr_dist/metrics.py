"""PSNR and SSIM of each picture. Average them over pictures; never average squared errors first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sr_dist import images

SSIM_SIDE = 11
SSIM_SIGMA = 1.5
DATA_RANGE = 255


def psnr(sr: Tensor, hr: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (N,), of (N, C, H, W) in [0, 255]; infinite where equal."""
    error = (sr.double() - hr.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(DATA_RANGE**2 / error)


def ssim(sr: Tensor, hr: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), (N,), of (N, C, H, W) in [0, 255].

    Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01 and K2 = 0.03, over the places where the
    window lies inside the picture, averaged over channels.
    """
    channels = sr.shape[1]
    places = torch.arange(SSIM_SIDE, dtype=torch.float64, device=sr.device) - SSIM_SIDE // 2
    weights = torch.exp(-(places**2) / (2 * SSIM_SIGMA**2))
    weights = (weights / weights.sum()).expand(channels, 1, SSIM_SIDE)

    def blurred(x: Tensor) -> Tensor:
        x = F.conv2d(x, weights.unsqueeze(2), groups=channels)
        return F.conv2d(x, weights.unsqueeze(3), groups=channels)

    a, b = sr.double(), hr.double()
    mean_a, mean_b = blurred(a), blurred(b)
    variance_a = blurred(a * a) - mean_a**2
    variance_b = blurred(b * b) - mean_b**2
    covariance = blurred(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    )
    return similarity.mean(dim=(1, 2, 3))


def compare(
    sr: images.Picture, hr: images.Picture, *, colour: str, border: int
) -> tuple[float, float]:
    """(PSNR in dB, SSIM) of two (H, W, C) pictures by a protocol.

    `colour`: y (BT.601 luma, unrounded) or rgb. `border`: pixels left out on every side.
    """
    inner = slice(border, -border or None)
    pair = [images.to_batch([picture[inner, inner]]).double() for picture in (sr, hr)]
    if colour == "y":
        pair = [images.luma(picture) for picture in pair]
    return float(psnr(*pair)), float(ssim(*pair))


def protocol(
    colour: str, border: int, lpips: bool = False, bits: int | None = None
) -> dict[str, object]:
    """The protocol as the machine-readable outputs state it.

    `bits`: significant ones that 16-bit gray pictures were scaled to 8 from, where there are some.
    """
    named: dict[str, object] = {
        "colour": colour,
        "border": border,
        "data_range": DATA_RANGE,
        "ssim": f"gaussian {SSIM_SIDE}, sigma {SSIM_SIGMA}",
    }
    if lpips:
        named["lpips"] = "squeeze, rgb, border 0"
    return named if bits is None else {**named, "bits": bits}
