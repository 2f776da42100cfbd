"""The models of the package, on real photographs, against what was measured of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sr_dist
from sr_dist import generators
from tests.helpers import succeed

# dB on luma, border 4: the means over astronaut, chelsea and coffee; and those of bicubic.
BICUBIC = 28.5336
RECORDED = {"swift_srgan_x4": 29.7113, "swift_srgan_x4_psnr": 30.1869}


def test_they_are_those_that_are_told_of() -> None:
    assert generators.shipped() == sorted(RECORDED) and generators.DEFAULT in RECORDED
    for name in RECORDED:
        folder = generators.SHIPPED / name
        size = sum(path.stat().st_size for path in folder.iterdir())
        assert size < 1_000_000
        card = (folder / "README.md").read_text()
        for part in ("## Data", "CC BY-SA", "Set5", "Set14", "minutes", "```yaml", "## Licence"):
            assert part in card, f"the card of {name} lacks {part}"
        assert sum(p.numel() for p in sr_dist.load(name).parameters()) < 210_000


def test_they_do_as_well_as_when_they_were_measured(photographs: Path, tmp_path: Path) -> None:
    checkpoints = [word for name in RECORDED for word in ("--checkpoint", name)]
    words = ("--data", photographs, "--output", tmp_path / "out")
    done = succeed("launch/evaluate.py", *words, "--method", "bicubic", *checkpoints)
    found = {
        row["name"]: row["psnr"] for row in json.loads(done.stdout.splitlines()[-1])["results"]
    }
    assert found == pytest.approx({"bicubic": BICUBIC, **RECORDED}, abs=0.005)


def test_they_do_on_set5_what_their_cards_say(shared: Path, tmp_path: Path) -> None:
    folder = shared / "benchmarks" / "Set5"
    done = succeed(
        *("launch/evaluate.py", "--data", folder / "HR", "--lr", folder / "LR_bicubic" / "X4"),
        *(word for name in RECORDED for word in ("--checkpoint", name)),
        *("--lpips", shared / "weights" / "squeezenet1_1_imagenet.pth", "--output", tmp_path),
    )
    for row in json.loads(done.stdout.splitlines()[-1])["results"]:
        card = (generators.SHIPPED / row["name"] / "README.md").read_text()
        said = re.search(r"PSNR ([\d.]+) dB, SSIM ([\d.]+), LPIPS ([\d.]+)", card)
        assert said is not None
        found = [row["psnr"], row["ssim"], row["lpips"]]
        assert found == pytest.approx([float(each) for each in said.groups()], abs=0.0006)


def test_between_the_two_lies_what_the_readme_makes(tmp_path: Path) -> None:
    names = ("swift_srgan_x4_psnr", "swift_srgan_x4")
    words = ("--interpolate", *names, "--alpha", 0.25, "--format", "safetensors", "--output")
    succeed("launch/export.py", *words, tmp_path / "between")
    one, other, between = (
        dict(sr_dist.load(path).named_parameters()) for path in (*names, tmp_path / "between")
    )
    for name, value in between.items():
        expected = 0.75 * one[name] + 0.25 * other[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


def test_pictures_are_enlarged_and_measured_without_naming_a_model(
    photographs: Path, tmp_path: Path
) -> None:
    photo = photographs / "chelsea.png"
    words = ("--engine", "fp32", "--output")
    succeed("launch/upscale.py", "--input", photo, *words, tmp_path / "out")
    named = ("--checkpoint", generators.DEFAULT, *words, tmp_path / "named")
    succeed("launch/upscale.py", "--input", photo, *named)
    one, other = (np.asarray(Image.open(tmp_path / n / "chelsea.png")) for n in ("out", "named"))
    assert one.shape == (1200, 1804, 3) and np.array_equal(one, other)
    done = succeed("launch/evaluate.py", "--data", photo, "--output", tmp_path / "measured")
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert [row["name"] for row in results] == ["bicubic", generators.DEFAULT]
    assert results[1]["psnr"] > results[0]["psnr"]
