"""What may be done to LR beyond bicubic downscaling: blur, noise, JPEG."""

from __future__ import annotations

import dataclasses
import io
import math

import numpy as np
from PIL import Image

from sr_dist import images, tensors


@dataclasses.dataclass(frozen=True)
class Degradation:
    """Ranges that each crop draws from evenly; the defaults do nothing."""

    blur_sigma: tuple[float, float] = (0.0, 0.0)  # Gaussian, HR pixels, before downscaling
    noise_sigma: tuple[float, float] = (0.0, 0.0)  # Gaussian, levels of 255, after downscaling
    jpeg_quality: tuple[int, int] = (100, 100)  # last; 100: no JPEG

    @property
    def does_something(self) -> bool:
        return self != Degradation()


def degrade(
    hr: images.Picture, scale: int, degradation: Degradation, random: np.random.Generator
) -> images.Picture:
    """LR (H, W, C) from HR (sH, sW, C): blurred, downscaled, noised, compressed.

    Draws the same numbers from `random` whatever the ranges are, so that switching one kind on
    leaves the others as they were.
    """
    blur = random.uniform(*degradation.blur_sigma)
    noise = random.uniform(*degradation.noise_sigma)
    low, high = degradation.jpeg_quality
    quality = low + int(random.random() * (high - low + 1))
    batch = tensors.to_batch([np.ascontiguousarray(hr)])
    if blur > 0:
        from torchvision.transforms import functional as transforms  # at need: slow to import

        side = 2 * math.ceil(3 * blur) + 1
        batch = transforms.gaussian_blur(batch, [side, side], [blur, blur])
    lr = tensors.to_pictures(tensors.downscale(batch, scale))[0]
    grain = random.standard_normal(lr.shape)
    if noise > 0:
        lr = (lr + noise * grain).round().clip(0, 255).astype(np.uint8)
    if quality < 100:
        file = io.BytesIO()
        images.to_pillow(np.ascontiguousarray(lr)).save(file, format="jpeg", quality=quality)
        with Image.open(file) as image:
            lr = images.to_array(image, hr.shape[2])
    return lr
