"""Enlarge pictures of any size and kind with a generator, in tiles that bound the memory."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sr_dist import images, machine, metrics, models, tensors, tiles
from sr_dist.models import folding, strips

ENGINES = ("fp32", "bf16")
_PROBE = 128  # LR pixels on a side
_TURNS = 3
_NEAR = 45.0  # dB between results; beside an error of 30 dB, that costs 0.14 dB


def prepare(generator: nn.Module, device: torch.device) -> nn.Module:
    """The same function on `device`, in the form that is fastest to compute there."""
    if device.type == "cpu":
        machine.keep_freed_memory(large_too=False)
    folded = folding.fold_batch_norm(generator)
    folded.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return folded


def fastest(
    generator: nn.Module, picture: images.Picture, *, scale: int, channels: int
) -> tuple[str, str]:
    """Which of `ENGINES` is fastest here, and a sentence that says why.

    bf16 is chosen only where the device has it, and its result is near that of fp32, on the middle
    of `picture`, of any size and number of channels. `channels`: the generator's.
    """
    if not machine.has_bf16(next(generator.parameters()).device):
        return "fp32", "fp32: this machine does not compute in bf16"
    height, width, _ = picture.shape
    top, left = max(0, (height - _PROBE) // 2), max(0, (width - _PROBE) // 2)
    probe = picture[top : top + _PROBE, left : left + _PROBE, :channels]
    # A small one goes on as its mirror image, since what comes after it may be larger.
    missing = [(0, _PROBE - side) for side in probe.shape[:2]]
    probe = np.pad(probe, [*missing, (0, 0)], mode="symmetric")
    if probe.shape[2] < channels:
        probe = np.repeat(probe, channels, axis=2)
    seconds, results = {}, {}
    for engine in ENGINES:
        turns = []
        for _ in range(_TURNS):
            began = time.perf_counter()
            results[engine] = upscale(generator, probe, scale=scale, tile=tiles.SIDE, engine=engine)
            turns.append(time.perf_counter() - began)
        seconds[engine] = min(turns)
    gain = seconds["fp32"] / seconds["bf16"]
    near = float(metrics.psnr(*(tensors.to_batch([results[each]]) for each in ENGINES)))
    chosen = "bf16" if gain > 1 and near >= _NEAR else "fp32"
    return chosen, f"{chosen}: bf16 is {gain:.1f} times as fast here, and {near:.1f} dB from fp32"


@torch.inference_mode()
def upscale(
    generator: nn.Module, picture: images.Picture, *, scale: int, tile: int, engine: str = "fp32"
) -> images.Picture:
    """(H, W, C) → (scale·H, scale·W, C), C being the generator's channels.

    `tile`: features are extracted in tiles of about as many LR pixels as a square of this side, and
    enlarged in smaller ones, which take no more memory. Each tile is computed with as much of its
    surroundings as the generator reaches for, so the result is that of the whole picture, up to
    rounding. `engine`: bf16 computes convolutions in it.
    """
    assert tile > 0, "tiles have a side"
    height, width, channels = picture.shape
    device = next(generator.parameters()).device
    model: Any = generator
    far, near = models.reach(generator)
    result = np.empty((scale * height, scale * width, channels), np.uint8)
    whole = tiles.Box(0, height, 0, width)
    extract, side = model.extract, tile // scale  # which, enlarged, is as large as a tile
    if device.type == "cpu":  # blocks of less than 32 MiB at 64 channels, which are kept
        extract, side = functools.partial(strips.extract, generator), 5 * side // 8
    side = max(1, side)
    for large, seen in tiles.cut(whole, tile, far + near, whole):
        lr = tensors.to_float(tensors.to_batch([picture[seen.slices()]]).to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=engine == "bf16"):
            features = extract(lr)
            for small, part in tiles.cut(large, side, near, whole):
                rows, columns = part.slices(seen)
                sr = model.enlarge(features[..., rows, columns], lr[..., rows, columns])
                rows, columns = small.slices(part, scale)
                result[small.slices(scale=scale)] = tensors.to_pictures(sr[..., rows, columns])[0]
        del features  # before the next are made
    return result


def upscale_any(
    generator: nn.Module,
    path: Path,
    *,
    scale: int,
    channels: int,
    tile: int,
    bits: int = 16,
    engine: str = "fp32",
) -> images.Picture:
    """Decode a file and enlarge it, keeping its kind: gray stays gray, alpha stays.

    The result has 8 bits. `bits`: significant ones of 16-bit gray. `tile`, `engine`: see `upscale`.

    A colour generator sees gray as three equal channels; a gray generator enlarges each channel of
    a colour picture on its own. Alpha is enlarged bicubically.

    Raises:
        images.PictureError: the file cannot be used.
    """
    compute = functools.partial(upscale, generator, scale=scale, tile=tile, engine=engine)
    picture, alpha = images.decode_with_alpha(path, bits)
    own = picture.shape[2]
    if channels == own:
        result = compute(picture)
    elif channels == 3:
        result = gray_as_colour(compute, picture)
    else:
        planes = [compute(np.ascontiguousarray(picture[..., c : c + 1])) for c in range(own)]
        result = np.concatenate(planes, axis=2)
    if alpha is not None:
        result = np.concatenate([result, images.enlarge(alpha, scale, "bicubic")], axis=2)
    return result


def gray_as_colour(
    compute: Callable[[images.Picture], images.Picture], picture: images.Picture
) -> images.Picture:
    """(H, W, 1) enlarged by what enlarges colour: the luma of three nearly equal channels."""
    enlarged = compute(np.repeat(picture, 3, axis=2))
    return np.asarray(images.to_pillow(enlarged).convert("L"))[..., None]
