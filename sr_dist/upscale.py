"""Enlarge pictures of any size and kind with a generator, in tiles that bound the memory."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from sr_dist import images, machine, metrics, models, tensors
from sr_dist.models import folding

ENGINES = ("fp32", "bf16")
_PROBE = 128  # LR pixels on a side
_TURNS = 3
_NEAR = 45.0  # dB between results; beside an error of 30 dB, that costs 0.14 dB


def prepare(generator: nn.Module, device: torch.device) -> nn.Module:
    """The same function on `device`, in the form that is fastest to compute there."""
    if device.type == "cpu":
        machine.keep_freed_memory()
    folded = folding.fold_batch_norm(generator)
    folded.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return folded


def fastest(
    generator: nn.Module, picture: images.Picture, *, scale: int, channels: int
) -> tuple[str, str]:
    """Which of `ENGINES` is fastest here, and a sentence that says why.

    bf16 is chosen only where the device has it, and its result is near that of fp32, on the middle
    of `picture`, of any number of channels. `channels`: the generator's.
    """
    if not machine.has_bf16(next(generator.parameters()).device):
        return "fp32", "fp32: this machine does not compute in bf16"
    height, width, _ = picture.shape
    top, left = max(0, (height - _PROBE) // 2), max(0, (width - _PROBE) // 2)
    probe = picture[top : top + _PROBE, left : left + _PROBE, :channels]
    if probe.shape[2] < channels:
        probe = np.repeat(probe, channels, axis=2)
    seconds, results = {}, {}
    for engine in ENGINES:
        turns = []
        for _ in range(_TURNS):
            began = time.perf_counter()
            results[engine] = upscale(generator, probe, scale=scale, tile=_PROBE, engine=engine)
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

    `tile`: features are enlarged in tiles of about as many LR pixels as a square of this side; the
    features themselves are extracted in tiles with a side `scale` times as long, which take as much
    memory. Each tile is computed with as much of its surroundings as the generator reaches for, so
    the result is that of the whole picture, up to rounding. `engine`: bf16 computes convolutions in
    it.
    """
    assert tile > 0, "tiles have a side"
    height, width, channels = picture.shape
    device = next(generator.parameters()).device
    model: Any = generator
    far, near = models.reach(generator)
    result = np.empty((scale * height, scale * width, channels), np.uint8)
    whole = _Box(0, height, 0, width)
    for large, seen in _tiles(whole, scale * tile, far + near, whole):
        lr = tensors.to_float(tensors.to_batch([picture[seen.slices()]]).to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=engine == "bf16"):
            features = model.extract(lr)
            for small, part in _tiles(large, tile, near, whole):
                rows, columns = part.slices(seen)
                sr = model.enlarge(features[..., rows, columns], lr[..., rows, columns])
                rows, columns = small.slices(part, scale)
                result[small.slices(scale=scale)] = tensors.to_pictures(sr[..., rows, columns])[0]
        del features  # before the next are made
    return result


class _Box(NamedTuple):
    """Rows and columns of LR."""

    top: int
    bottom: int
    left: int
    right: int

    def slices(self, of: _Box | None = None, scale: int = 1) -> tuple[slice, slice]:
        """Where it lies in an array that holds `of` (by default the whole), enlarged."""
        top, left = (of.top, of.left) if of else (0, 0)
        return (
            slice(scale * (self.top - top), scale * (self.bottom - top)),
            slice(scale * (self.left - left), scale * (self.right - left)),
        )


def _tiles(box: _Box, side: int, margin: int, within: _Box) -> Iterator[tuple[_Box, _Box]]:
    """Parts of `box`, and of each the part of `within` that is `margin` pixels larger.

    No larger part has more pixels than that of a square of `side` has; of such grids it is the one
    that computes the least. All larger parts are of one size, moved inwards at the edges of
    `within`: the memory of one is then what the next needs.
    """
    length = box.bottom - box.top, box.right - box.left
    whole = within.bottom - within.top, within.right - within.left
    most = (side + 2 * margin) ** 2

    def larger(axis: int, parts: int) -> int:
        return min(math.ceil(length[axis] / parts) + 2 * margin, whole[axis])

    def grids(one: int, other: int) -> Iterator[dict[int, int]]:
        """Parts along each axis: a number along `one`, and the least along the `other`."""
        for parts in range(1, math.ceil(length[one] / side) + 1):
            longest = most // larger(one, parts)
            if longest >= whole[other]:
                yield {one: parts, other: 1}
            elif longest > 2 * margin:
                yield {one: parts, other: math.ceil(length[other] / (longest - 2 * margin))}

    def computed(grid: dict[int, int]) -> int:
        return math.prod(parts * larger(axis, parts) for axis, parts in grid.items())

    grid = min((*grids(0, 1), *grids(1, 0)), key=computed)
    (rows, tall), (columns, wide) = ((grid[axis], larger(axis, grid[axis])) for axis in (0, 1))
    for top, bottom in _stretches(box.top, box.bottom, rows):
        for left, right in _stretches(box.left, box.right, columns):
            y = min(max(top - margin, within.top), within.bottom - tall)
            x = min(max(left - margin, within.left), within.right - wide)
            yield _Box(top, bottom, left, right), _Box(y, y + tall, x, x + wide)


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


def _stretches(start: int, stop: int, parts: int) -> Iterator[tuple[int, int]]:
    edges = [start + (stop - start) * part // parts for part in range(parts + 1)]
    return zip(edges, edges[1:], strict=False)
