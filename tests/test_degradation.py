from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sr_dist import images, tensors
from sr_dist.degradation import Degradation, degrade


def run(picture: images.Picture, seed: int = 0, **ranges: tuple[float, float]) -> images.Picture:
    random = np.random.default_rng(seed)
    return degrade(picture, 4, Degradation(**ranges), random)  # type: ignore[arg-type]


def plain(picture: images.Picture) -> images.Picture:
    return tensors.to_pictures(tensors.downscale(tensors.to_batch([picture]), 4))[0]


def test_nothing_asked_is_the_plain_downscale(picture: images.Picture) -> None:
    assert not Degradation().does_something
    assert np.array_equal(run(picture), plain(picture))


def test_noise_has_the_drawn_strength() -> None:
    gray = np.full((256, 256, 1), 128, np.uint8)
    noise = run(gray, noise_sigma=(5, 5)).astype(float) - 128
    assert noise.std() == pytest.approx(5, rel=0.05) and abs(noise.mean()) < 0.3
    strengths = {round(float(run(gray, seed, noise_sigma=(2, 8)).std())) for seed in range(20)}
    assert min(strengths) <= 3 and max(strengths) >= 7


def test_blur_is_gaussian_before_the_downscale() -> None:
    """Two blurs of sigma a and b are one of sqrt(a² + b²): the spread of a line tells sigma."""
    line = np.zeros((96, 96, 1), np.uint8)
    line[:, 48] = 255

    def spread(lr: images.Picture) -> float:
        weights = lr[12, :, 0].astype(float)
        places = np.arange(24)
        middle = (weights * places).sum() / weights.sum()
        return float((weights * (places - middle) ** 2).sum() / weights.sum()) * 16  # HR pixels²

    own = spread(run(line, blur_sigma=(4, 4))) - spread(run(line, blur_sigma=(2, 2)))
    assert own == pytest.approx(16 - 4, rel=0.15)


def test_jpeg_is_worse_the_lower_its_quality(photographs) -> None:  # type: ignore[no-untyped-def]
    hr = images.decode(photographs / "astronaut.png", 3)[:256, :256]
    errors = [
        np.square(run(hr, jpeg_quality=(q, q)).astype(float) - plain(hr)).mean()
        for q in (95, 60, 20)
    ]
    assert 0 < errors[0] < errors[1] < errors[2]


def test_jpeg_takes_every_quality_of_its_range(
    picture: images.Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    qualities, save = [], Image.Image.save

    def noting(image: Image.Image, *words: object, **options: object) -> None:
        qualities.append(options["quality"])
        save(image, *words, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "save", noting)
    for seed in range(40):
        run(picture, seed, jpeg_quality=(30, 32))
    assert set(qualities) == {30, 31, 32}


def test_one_kind_leaves_the_draws_of_the_others(picture: images.Picture) -> None:
    random = np.random.default_rng(5)
    degrade(picture, 4, Degradation(blur_sigma=(0, 2), jpeg_quality=(30, 100)), random)
    after = random.random()
    random = np.random.default_rng(5)
    degrade(picture, 4, Degradation(), random)
    assert random.random() == after


def test_gray_stays_gray(picture: images.Picture) -> None:
    lr = run(picture[..., :1].copy(), blur_sigma=(1, 1), noise_sigma=(3, 3), jpeg_quality=(50, 50))
    assert lr.shape == (16, 20, 1) and lr.dtype == np.uint8
