from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from sr_dist import evaluate, images, metrics, tensors
from tests.helpers import REPOSITORY, SHARED, succeed


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    hr = (torch.rand(2, 3, 40, 52, generator=random) * 255).round().double()
    hr = torch.nn.functional.avg_pool2d(hr, 3, 1, 1).round()
    return (hr + torch.randn(hr.shape, generator=random) * 8).clamp(0, 255).round(), hr


def test_psnr_by_hand_and_per_picture() -> None:
    hr = torch.zeros(2, 1, 2, 2)
    sr = torch.stack([torch.full((1, 2, 2), 5.0), torch.tensor([[[1.0, 0], [0, 0]]])])
    assert metrics.psnr(sr, hr).tolist() == pytest.approx(
        [20 * math.log10(255 / 5), 10 * math.log10(255**2 / 0.25)]
    )


def test_metrics_agree_with_torchmetrics(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    sr, hr = pair
    for n in range(2):
        a, b = sr[n : n + 1], hr[n : n + 1]
        theirs = peak_signal_noise_ratio(a, b, data_range=255.0)
        assert metrics.psnr(a, b).item() == pytest.approx(theirs.item(), abs=1e-5)
        # torchmetrics pads by reflection; the published metric is the mean over the places inside.
        _, places = structural_similarity_index_measure(
            a, b, sigma=1.5, kernel_size=11, data_range=255.0, return_full_image=True
        )
        theirs = places[..., 5:-5, 5:-5].mean()
        assert metrics.ssim(a, b).item() == pytest.approx(theirs.item(), abs=1e-5)


@pytest.mark.parametrize("height", [11, 31, 32, 33, 41, 42, 43, 64, 96, 101])
@pytest.mark.parametrize(("colour", "channels"), [("y", 3), ("y", 1), ("rgb", 3)])
def test_bands_of_a_picture_measure_as_the_whole(height: int, colour: str, channels: int) -> None:
    assert metrics._BAND == 32, "or choose other heights"
    random = np.random.default_rng(height)
    hr = random.integers(0, 256, (height, 23, channels), np.uint8)
    sr = (hr + random.normal(0, 9, hr.shape)).clip(0, 255).astype(np.uint8)
    whole = [tensors.to_batch([picture]).double() for picture in (sr, hr)]
    if colour == "y":
        whole = [tensors.luma(picture) for picture in whole]
    expected = (metrics.psnr(*whole).item(), metrics.ssim(*whole).item())
    found = metrics.compare(sr, hr, colour=colour, border=0)
    assert found == pytest.approx(expected, rel=1e-12)
    framed = [np.pad(picture, ((4, 4), (4, 4), (0, 0))) for picture in (sr, hr)]
    assert metrics.compare(*framed, colour=colour, border=4) == found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_large_picture_is_bounded() -> None:
    """Of 4096x4096: SSIM of it at once took 4.6 GB beside the pictures."""
    code = """
import re
import numpy as np
from sr_dist import metrics
def megabytes(what):  # ru_maxrss would be the parent's at first
    return int(re.search(rf"{what}:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1000
hr = np.full((4096, 4096, 3), 100, np.uint8)
metrics.compare(hr[:64, :64], hr[:64, :64], colour="rgb", border=4)
before = megabytes("VmRSS")
metrics.compare(hr + 1, hr, colour="rgb", border=4)
print(megabytes("VmHWM") - before)
"""
    done = succeed(sys.executable, "-c", code, cwd=REPOSITORY)
    assert float(done.stdout) < 250, "50 MB of them are the other picture"


def test_equal_pictures(picture: images.Picture) -> None:
    assert metrics.compare(picture, picture, colour="y", border=4) == (
        math.inf,
        pytest.approx(1.0, abs=1e-12),
    )


def test_border_is_left_out(picture: images.Picture) -> None:
    other = picture.copy()
    other[:4], other[-4:], other[:, :4], other[:, -4:] = 0, 0, 0, 0
    assert metrics.compare(other, picture, colour="rgb", border=4)[0] == math.inf
    assert metrics.compare(other, picture, colour="rgb", border=3)[0] < 40
    assert metrics.compare(other, picture, colour="rgb", border=0)[0] < 20


def test_luma_protocol_does_not_see_what_luma_does_not_hold() -> None:
    gray = np.full((32, 32, 3), 100, np.uint8)
    blue = gray.copy()
    blue[..., 2] += 50
    difference = 24.966 * 50 / 255
    psnr, _ = metrics.compare(blue, gray, colour="y", border=0)
    assert psnr == pytest.approx(20 * math.log10(255 / difference), abs=1e-6)
    psnr, _ = metrics.compare(blue, gray, colour="rgb", border=0)
    assert psnr == pytest.approx(10 * math.log10(255**2 / (50**2 / 3)), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "scale", "psnr", "ssim"),
    [
        ("Set5", 2, 33.66, 0.9299),
        ("Set5", 4, 28.42, 0.8104),
        ("Set14", 2, 30.24, 0.8688),
        ("Set14", 4, 26.00, 0.7027),
    ],
)
def test_bicubic_near_the_published_table(
    shared: Path, name: str, scale: int, psnr: float, ssim: float
) -> None:
    """Pillow's bicubic against MATLAB's: within 0.1 dB and 0.0025."""
    mean = bicubic_mean(name, scale)
    assert mean.psnr == pytest.approx(psnr, abs=0.1)
    assert mean.ssim == pytest.approx(ssim, abs=0.0025)


@pytest.mark.parametrize(
    ("name", "scale", "psnr", "ssim"),
    [
        ("Set5", 2, 33.674, 0.9303),
        ("Set5", 4, 28.430, 0.8111),
        ("Set14", 2, 30.325, 0.8698),
        ("Set14", 4, 26.088, 0.7048),
    ],
)
def test_bicubic_on_the_given_pairs(
    shared: Path, name: str, scale: int, psnr: float, ssim: float
) -> None:
    mean = bicubic_mean(name, scale)
    assert mean.psnr == pytest.approx(psnr, abs=0.001)
    assert mean.ssim == pytest.approx(ssim, abs=0.0001)


def bicubic_mean(name: str, scale: int) -> evaluate.Mean:
    folder = SHARED / "benchmarks" / name
    pairs = evaluate.read_pairs(
        str(folder / "HR"), scale=scale, channels=3, lr_folder=folder / "LR_bicubic" / f"X{scale}"
    )
    rows = evaluate.evaluate(
        {"bicubic": evaluate.classical("bicubic", scale)}, pairs, colour="y", border=scale
    )
    return evaluate.averages(rows)[0]
