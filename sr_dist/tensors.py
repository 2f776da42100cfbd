"""Pictures as tensors: value ranges, luma, and the one way LR is made from HR.

Apart from images.py, so that what gathers and shards pictures starts without torch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sr_dist import images

AnyPicture = images.Picture | images.DeepPicture


def to_batch(pictures: list[images.Picture]) -> Tensor:
    """Equal-sized pictures as (N, C, H, W) uint8, channels last in memory."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def to_pictures(batch: Tensor) -> list[images.Picture]:
    """(N, C, H, W) uint8, or float in [0, 1] (clipped, rounded), as pictures."""
    if batch.dtype != torch.uint8:
        batch = to_uint8(batch)
    return list(batch.permute(0, 2, 3, 1).cpu().numpy())


def to_float(batch: Tensor) -> Tensor:
    """uint8 in [0, 255] to float32 in [0, 1], channels last."""
    return batch.to(torch.float32, memory_format=torch.channels_last) / 255


def to_uint8(batch: Tensor) -> Tensor:
    """Float in [0, 1] to uint8 in [0, 255]: clipped, rounded to nearest."""
    return (batch.float().clamp(0, 1) * 255).round().to(torch.uint8)


def crop(picture: Tensor, where: images.Crop) -> Tensor:
    """(C, H, W) → (C, size, size), on the same device: what `where.of` gives of a picture."""
    part = picture[:, where.top : where.top + where.size, where.left : where.left + where.size]
    mirrored = [axis for axis, bit in ((2, 1), (1, 2)) if where.symmetry & bit]
    part = part.flip(mirrored) if mirrored else part
    return part.transpose(1, 2) if where.symmetry & 4 else part


def downscale(hr: Tensor, scale: int) -> Tensor:
    """LR from HR, the one way it is made: antialiased bicubic, within a level of Pillow's.

    `hr`: (N, C, sH, sW) uint8. Returns (N, C, H, W) uint8.
    """
    height, width = hr.shape[-2] // scale, hr.shape[-1] // scale
    assert (height * scale, width * scale) == hr.shape[-2:], "HR must be a multiple of the scale"
    if hr.device.type == "cpu":
        return F.interpolate(hr, size=(height, width), mode="bicubic", antialias=True)
    return downscale_as_floats(hr, height, width)


def downscale_as_floats(hr: Tensor, height: int, width: int) -> Tensor:
    """`downscale` where PyTorch has it of floats alone, as on GPUs; within a level of it.

    Across, then down: Pillow, and PyTorch with bytes, round to bytes in between as well.
    """
    for size in ((hr.shape[-2], width), (height, width)):
        values = F.interpolate(hr.float(), size=size, mode="bicubic", antialias=True)
        hr = values.clamp(0, 255).round().to(torch.uint8)
    return hr


def reduce(picture: AnyPicture, factor: int) -> AnyPicture:
    """(H, W, C) to (H // factor, W // factor, C), antialiased bicubic; 16-bit gray keeps its depth.

    The rows and columns beyond the last multiple are dropped.
    """
    whole = images.crop_to_multiple(picture, factor)
    if whole.dtype == np.uint8:
        return to_pictures(downscale(to_batch([whole]), factor))[0]  # type: ignore[list-item]
    values = torch.from_numpy(whole.astype(np.float32)).permute(2, 0, 1)[None]
    size = (values.shape[-2] // factor, values.shape[-1] // factor)
    smaller = F.interpolate(values, size=size, mode="bicubic", antialias=True)
    deep = smaller.clamp(0, np.iinfo(np.uint16).max).round()[0].permute(1, 2, 0).numpy()
    return deep.astype(np.uint16)


def luma(pictures: Tensor) -> Tensor:
    """(N, C, H, W) RGB or gray in [0, 255] to BT.601 luma (N, 1, H, W) in [16, 235].

    Gray is taken as three equal channels, so that it measures the same either way.
    """
    if pictures.shape[1] == 1:
        return 16 + pictures * (219 / 255)
    weights = pictures.new_tensor([65.481, 128.553, 24.966]) / 255
    return 16 + (pictures * weights.view(1, 3, 1, 1)).sum(1, keepdim=True)
