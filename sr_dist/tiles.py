"""How a picture is cut into tiles, in LR pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from sr_dist.errors import UserError

SIDE, SMALLEST_SIDE = 480, 64  # by default, and the least that margins leave sensible


def check(side: int) -> None:
    """Raises UserError: --tile is too small."""
    if side < SMALLEST_SIDE:
        raise UserError(f"--tile: expected {SMALLEST_SIDE} or more, found {side}")


class Box(NamedTuple):
    """Rows and columns of LR."""

    top: int
    bottom: int
    left: int
    right: int

    def slices(self, of: Box | None = None, scale: int = 1) -> tuple[slice, slice]:
        """Where it lies in an array that holds `of` (by default the whole), enlarged."""
        top, left = (of.top, of.left) if of else (0, 0)
        return (
            slice(scale * (self.top - top), scale * (self.bottom - top)),
            slice(scale * (self.left - left), scale * (self.right - left)),
        )


def cut(box: Box, side: int, margin: int, within: Box) -> Iterator[tuple[Box, Box]]:
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
            yield Box(top, bottom, left, right), Box(y, y + tall, x, x + wide)


def _stretches(start: int, stop: int, parts: int) -> Iterator[tuple[int, int]]:
    edges = [start + (stop - start) * part // parts for part in range(parts + 1)]
    return zip(edges, edges[1:], strict=False)
