"""Enlarge pictures of any size and kind with a generator, in tiles that bound the memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sr_dist import images, models


@torch.inference_mode()
def upscale(
    generator: nn.Module, picture: images.Picture, *, scale: int, tile: int
) -> images.Picture:
    """(H, W, C) → (scale·H, scale·W, C), C being the generator's channels.

    `tile`: the side of the LR tiles, in pixels. Each is computed with as much of its surroundings
    as the generator reaches for, so the result is that of the whole picture, up to rounding.
    """
    assert tile > 0, "tiles have a side"
    height, width, channels = picture.shape
    device = next(generator.parameters()).device
    reach = models.reach(generator)
    result = np.empty((scale * height, scale * width, channels), np.uint8)
    for top, bottom in _stretches(height, tile):
        for left, right in _stretches(width, tile):
            above, before = max(0, top - reach), max(0, left - reach)
            around = picture[above : bottom + reach, before : right + reach]
            lr = images.to_float(images.to_batch([around]).to(device))
            sr = images.to_pictures(generator(lr))[0]
            y, x = scale * (top - above), scale * (left - before)
            result[scale * top : scale * bottom, scale * left : scale * right] = sr[
                y : y + scale * (bottom - top), x : x + scale * (right - left)
            ]
    return result


def upscale_any(
    generator: nn.Module, path: Path, *, scale: int, channels: int, tile: int, bits: int = 16
) -> images.Picture:
    """Decode a file and enlarge it, keeping its kind: gray stays gray, alpha stays.

    The result has 8 bits. `bits`: significant ones of 16-bit gray.

    A colour generator sees gray as three equal channels; a gray generator enlarges each channel of
    a colour picture on its own. Alpha is enlarged bicubically.

    Raises:
        images.PictureError: the file cannot be used.
    """
    picture, alpha = images.decode_with_alpha(path, bits)
    own = picture.shape[2]
    if channels == own:
        result = upscale(generator, picture, scale=scale, tile=tile)
    elif channels == 3:
        enlarged = upscale(generator, np.repeat(picture, 3, axis=2), scale=scale, tile=tile)
        # Back to one channel; the luma of three nearly equal channels.
        result = np.asarray(images.to_pillow(enlarged).convert("L"))[..., None]
    else:
        planes = [
            upscale(
                generator, np.ascontiguousarray(picture[..., c : c + 1]), scale=scale, tile=tile
            )
            for c in range(own)
        ]
        result = np.concatenate(planes, axis=2)
    if alpha is not None:
        result = np.concatenate([result, images.enlarge(alpha, scale, "bicubic")], axis=2)
    return result


def _stretches(length: int, tile: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, tile):
        yield start, min(start + tile, length)
