from __future__ import annotations

import math

import pytest
import torch

from sr_dist import finite

CPU = torch.device("cpu")


def seen(nonfinite: finite.Nonfinite, first: int, pixel: str) -> finite.Nonfinite:
    """Add the steps from `first` on; each character of `pixel` is the pixel loss of one.

    `n`: NaN, which the gradient is as well; `g`: the gradient alone is infinite; else finite.
    """
    for step, kind in enumerate(pixel, start=first):
        nonfinite.add(
            {
                "loss/pixel": torch.tensor(math.nan if kind == "n" else 0.5),
                "loss/content": torch.tensor(0.5),
                "gradient/generator": torch.tensor(1.0 if kind == "." else math.inf),
            },
            step,
        )
    return nonfinite


@pytest.mark.parametrize(
    ("limit", "steps", "counts", "first", "bad"),
    [
        (4, ".n......nnnn", [5, 4, 4], 9, True),
        (4, ".n......gnnn.", [5, 0, 4], 9, False),  # the first step's terms, not the row's
        (4, ".nnnn....nnnnnn..n", [11, 1, 6], 2, True),  # the first row that is too long
        (4, ".nn..n.", [3, 0, 2], 6, True),  # none is; the newest row
        (1, ".g..nnn", [4, 3, 3], 2, False),
        (1, ".......", [0, 0, 0], -1, False),
    ],
)
def test_the_first_step_of_the_row_that_is_too_long(
    limit: int, steps: str, counts: list[int], first: int, bad: bool
) -> None:
    found = seen(finite.Nonfinite(CPU, limit), 1, steps)
    assert found.counts.tolist() == counts
    assert (int(found.first), int(found.earlier)) == (first, 0)
    assert {name: bool(value) for name, value in found.terms.items()} == {
        "loss/pixel": bad,
        "loss/content": False,
        "gradient/generator": first > 0,
    }


def test_what_lies_before_a_start_is_counted_and_not_judged_again() -> None:
    before = seen(finite.Nonfinite(CPU, limit=10), 1, "nnnnn..nn").counts
    assert before.tolist() == [7, 2, 5]
    held = finite.Nonfinite(CPU, limit=4)
    held.restore(before)
    assert held.counts.tolist() == [7, 2, 0], "five in a row are too many by now, but are over"
    seen(held, 10, "n")
    assert held.counts.tolist() == [8, 3, 3], "the row goes on"
    assert (int(held.first), int(held.earlier)) == (10, 2)
    seen(held, 11, ".n")
    assert (int(held.first), int(held.earlier), held.counts.tolist()) == (12, 0, [9, 1, 3])
