"""The same training on any number of ranks, and what a step sends between them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers import run_ranks, succeed

# In double precision; each of two steps moves a weight by up to 1e-4.
LARGEST = 1e-10


def train_on(ranks: int, output: Path) -> dict[str, dict[str, torch.Tensor]]:
    done = run_ranks(ranks, "tests/workers/equal_steps.py", output)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, torch.Tensor]] = torch.load(output, weights_only=True)
    assert found.pop("world_size") == ranks  # type: ignore[comparison-overlap]
    return found


@pytest.mark.multiprocess
def test_ranks_with_parts_of_a_batch_train_as_one_with_all_of_it(tmp_path: Path) -> None:
    """2 × 2 rows and 4 × 1 = 1 × 4, after two GAN steps: G, D and the averaged G.

    Without BatchNorm, and with that of all ranks together; several ranks send factors of the
    gradient of a layer, where one makes it as usual.
    """
    one = train_on(1, tmp_path / "1.pt")
    for ranks in (2, 4):
        several = train_on(ranks, tmp_path / f"{ranks}.pt")
        assert several.keys() == one.keys() and len(one) == 4
        for way, expected in one.items():
            for name, value in expected.items():
                gap = (several[way][name] - value).abs()
                where = f"{way} on {ranks} ranks: {name}"
                assert gap.max() < LARGEST, where
            assert any(
                (expected[n.replace("before", "generator")] - expected[n]).abs().mean() > 1e-4
                for n in expected
                if n.startswith("before.")
            )


def test_what_a_step_sends_on_512_ranks() -> None:
    """Every trained number once, in fp32, and nothing besides; in warm-up those of G alone.

    A rank of a ring sends 2 × 511 / 512 of it. With factors the weight of the head's first layer,
    512 × 36 inputs by 1024 outputs, is not among them, but a row of both for HR and for SR.
    """
    done = succeed("tests/workers/bytes_of_a_step.py")
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("world_size") == 512
    generator, linear, gap = 200_121, 19_413_279, 1_063_199
    numbers = {
        "linear": generator + linear,
        "gap": generator + gap,
        "gap in parts": generator + gap,
        "warm-up": generator,
        "factors": generator + linear - 512 * 36 * 1024,
    }
    assert {way: sent["gradients"] for way, sent in found.items()} == {
        way: 4 * number for way, number in numbers.items()
    }
    messages = {"linear": 3, "gap": 3, "gap in parts": 3, "warm-up": 1, "factors": 4}
    assert {way: sent["messages"] for way, sent in found.items()} == messages
    assert found["factors"]["factors"] == 4 * 2 * 2 * (512 * 36 + 1024)  # 2 crops on each rank
    meanwhile = {"linear": 2, "gap": 2, "gap in parts": 0, "warm-up": 0, "factors": 3}
    assert {way: sent["meanwhile"] for way, sent in found.items()} == meanwhile
    assert all(sent["others"] == 0 for sent in found.values())
    assert found["linear"]["discriminator"] == linear and found["gap"]["generator"] == generator
