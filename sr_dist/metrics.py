"""PSNR and SSIM of each picture. Average them over pictures; never average squared errors first."""

from __future__ import annotations

import torch
from torch import Tensor

from sr_dist import images, tensors

SSIM_SIDE = 11
SSIM_SIGMA = 1.5
DATA_RANGE = 255
_BAND = 32  # rows of a picture that are compared at once, which bounds the memory


def psnr(sr: Tensor, hr: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (N,), of (N, C, H, W) in [0, 255]; infinite where equal."""
    return _decibels((sr.double() - hr.double()).square().mean(dim=(1, 2, 3)))


def _decibels(error: Tensor) -> Tensor:
    return 10 * torch.log10(DATA_RANGE**2 / error)


def ssim(sr: Tensor, hr: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), (N,), of (N, C, H, W) in [0, 255].

    Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01 and K2 = 0.03, over the places where the
    window lies inside the picture, averaged over channels.
    """
    return _similarity(sr, hr).mean(dim=(1, 2, 3))


def _similarity(sr: Tensor, hr: Tensor) -> Tensor:
    """`ssim` at each place of the window, (N, C, H - 10, W - 10), float64."""
    places = torch.arange(SSIM_SIDE, dtype=torch.float64) - SSIM_SIDE // 2
    window = torch.exp(-(places**2) / (2 * SSIM_SIGMA**2))
    weights = (window / window.sum()).tolist()

    def blurred(x: Tensor) -> Tensor:
        # On CPUs faster than convolutions in double precision are, and in less memory.
        for dim in (2, 3):
            length = x.shape[dim] - SSIM_SIDE + 1
            total = weights[0] * x.narrow(dim, 0, length)
            for place, weight in enumerate(weights[1:], start=1):
                total.add_(x.narrow(dim, place, length), alpha=weight)
            x = total
        return x

    a, b = sr.double(), hr.double()
    mean_a, mean_b = blurred(a), blurred(b)
    variance_a = blurred(a * a) - mean_a**2
    variance_b = blurred(b * b) - mean_b**2
    covariance = blurred(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    return ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    )


def compare(
    sr: images.Picture, hr: images.Picture, *, colour: str, border: int
) -> tuple[float, float]:
    """(PSNR in dB, SSIM) of two (H, W, C) pictures by a protocol.

    `colour`: y (BT.601 luma, unrounded) or rgb. `border`: pixels left out on every side. Pictures
    are compared in bands of rows, so that the memory does not grow with their height: in double
    precision, with all that SSIM needs, that of a whole one would be a hundred times its own.
    """
    inner = slice(border, -border or None)
    sr, hr = sr[inner, inner], hr[inner, inner]
    (height, width, _), beyond = hr.shape, SSIM_SIDE - 1
    squared, similar, channels = 0.0, 0.0, 0
    for top in range(0, height, _BAND):
        rows = slice(top, top + _BAND + beyond)  # what the windows of the band's rows see
        pair = [tensors.to_batch([picture[rows]]).double() for picture in (sr, hr)]
        if colour == "y":
            pair = [tensors.luma(picture) for picture in pair]
        a, b = (picture[:, :, :_BAND] for picture in pair)
        channels = a.shape[1]
        squared += float((a - b).square().sum())
        if pair[0].shape[2] > beyond:
            similar += float(_similarity(*pair).sum())
    error = torch.tensor(squared / (channels * height * width), dtype=torch.float64)
    return float(_decibels(error)), similar / (channels * (height - beyond) * (width - beyond))


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
