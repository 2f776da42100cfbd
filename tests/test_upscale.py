from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sr_dist import images, machine, models, tiles, upscale
from sr_dist.models import strips
from tests.generators import build, describe


def generator(channels: int = 3, scale: int = 4, name: str = "swift_srgan") -> torch.nn.Module:
    torch.manual_seed(0)
    built = models.build_generator(
        name, scale=scale, channels=channels, num_channels=8, num_blocks=3
    )
    return built.eval()


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("tile", [32, 45, 256])
def test_tiles_give_the_picture_of_the_whole(
    picture: images.Picture, scale: int, tile: int
) -> None:
    network = generator(scale=scale)
    network.final_conv.pointwise.weight.data *= 20  # type: ignore[union-attr]
    whole = upscale.upscale(network, picture, scale=scale, tile=10_000)
    assert whole.shape == (64 * scale, 80 * scale, 3) and whole.std() > 10
    tiled = upscale.upscale(network, picture, scale=scale, tile=tile)
    assert np.abs(tiled.astype(int) - whole.astype(int)).max() <= 1
    assert (tiled != whole).mean() < 1e-3


@pytest.mark.parametrize("name", ["swift_srgan", "srgan"])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_tiles_see_as_far_as_the_generator_reaches(
    name: str, scale: int, picture: images.Picture
) -> None:
    """A pixel at the edge of its reach changes the result, one beyond does not."""
    network = build(describe(name, scale=scale, num_channels=8, num_blocks=2), seed=1).double()
    reach = sum(models.reach(network))
    lr = torch.rand(1, 3, 1, 2 * reach + 8, dtype=torch.double).requires_grad_(True)
    middle = reach + 4  # its leftmost and rightmost pixels reach furthest
    sr = network(lr)[..., scale * middle : scale * (middle + 1)]
    (gradient,) = torch.autograd.grad(sr.square().sum(), lr)
    (touched,) = torch.nonzero(gradient.abs().sum((0, 1, 2)), as_tuple=True)
    assert middle - int(touched.min()) <= reach and int(touched.max()) - middle <= reach
    assert max(middle - int(touched.min()), int(touched.max()) - middle) >= reach - 1


@given(
    *(st.integers(1, 400), st.integers(1, 400), st.integers(32, 384), st.sampled_from([2, 10])),
    *(st.integers(1, 40), st.integers(0, 4)),
)
def test_tiles_cover_the_picture_and_see_enough(
    height: int, width: int, side: int, parts: int, far: int, near: int
) -> None:
    """Each pixel is of one tile; what a tile is computed of lies in what it was extracted from."""
    whole, times = tiles.Box(0, height, 0, width), np.zeros((height, width), int)
    larges = list(tiles.cut(whole, side, far + near, whole))
    for large, seen in larges:
        assert_enough(large, seen, far + near, whole)
        for small, part in tiles.cut(large, side // parts, near, whole):
            assert_enough(small, part, near, whole)
            assert seen.top <= part.top and part.bottom <= seen.bottom
            assert seen.left <= part.left and part.right <= seen.right
            times[small.slices()] += 1
    assert (times == 1).all()
    shapes = {(seen.bottom - seen.top, seen.right - seen.left) for _, seen in larges}
    assert len(shapes) == 1
    assert math.prod(shapes.pop()) <= (side + 2 * (far + near)) ** 2


@given(st.integers(1, 2600), st.integers(1, 2600), st.integers(100, 600), st.integers(1, 60))
def test_a_picture_turned_takes_the_tiles_turned(
    height: int, width: int, side: int, margin: int
) -> None:
    """Also of portraits the tiles are those that compute the least."""

    def computed(height: int, width: int) -> int:
        whole = tiles.Box(0, height, 0, width)
        parts = tiles.cut(whole, side, margin, whole)
        return sum((seen.bottom - seen.top) * (seen.right - seen.left) for _, seen in parts)

    assert computed(height, width) == computed(width, height)


def assert_enough(box: Any, seen: Any, margin: int, whole: Any) -> None:
    assert whole.top <= seen.top <= max(box.top - margin, whole.top)
    assert whole.left <= seen.left <= max(box.left - margin, whole.left)
    assert min(box.bottom + margin, whole.bottom) <= seen.bottom <= whole.bottom
    assert min(box.right + margin, whole.right) <= seen.right <= whole.right


def test_memory_is_that_of_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more pixels at a time than in a square tile and its margin, and always as many."""
    network, seen = generator(), {"extract": [], "enlarge": []}
    extract, enlarge = strips.extract, network.enlarge
    monkeypatch.setattr(
        strips, "extract", lambda g, lr: seen["extract"].append(lr.shape) or extract(g, lr)
    )
    monkeypatch.setattr(
        network, "enlarge", lambda x, lr: seen["enlarge"].append(x.shape) or enlarge(x, lr)
    )
    picture = np.zeros((240, 360, 3), np.uint8)  # whole squares, of what is enlarged
    upscale.upscale(network, picture, scale=4, tile=192)
    far, near = models.reach(network)
    for step, side, reach in (("extract", 192, far + near), ("enlarge", 30, near)):
        shapes = seen[step]
        assert len(set(shapes)) == 1
        pixels, most = math.prod(shapes[0][2:]), (side + 2 * reach) ** 2
        assert most / 2 < pixels <= most
        assert len(shapes) * pixels <= (240 / side) * (360 / side) * most, "of squares"


@pytest.mark.parametrize("name", ["swift_srgan", "srgan"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("height", "width", "at_once", "number"),
    [
        *((21, 34, 5 * 34, 5), (64, 1, 5, 13), (40, 90, 5 * 90, 8)),
        (40, 30, 30, 10),  # no strip of fewer than four rows
        (3, 60, 60, 1),
    ],
)
def test_features_in_strips_are_those_of_the_whole(
    name: str,
    channels: int,
    height: int,
    width: int,
    at_once: int,
    number: int,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = generator(channels, name=name)
    lr, seen = torch.rand(1, channels, height, width), []
    in_bf16 = precision == "bf16"
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
        whole = network.extract(lr)  # type: ignore[operator]
        monkeypatch.setattr(strips, "_AT_ONCE", at_once)
        monkeypatch.setattr(strips, "_FEWEST", 4)
        network.initial.register_forward_hook(  # type: ignore[union-attr]
            lambda module, given, out: seen.append(1)
        )
        in_strips = strips.extract(network, lr)
    assert len(seen) == number and in_strips.dtype == whole.dtype
    # A rounding of bf16 is an eighth of a percent, of sums of eight terms.
    near = 0.01 * float(whole.abs().max()) if in_bf16 else 1e-6
    torch.testing.assert_close(in_strips, whole, rtol=0, atol=near)
    assert float(whole.std()) > 0.01


@pytest.mark.parametrize("channels", [1, 3])
def test_bf16_is_near(channels: int, picture: images.Picture) -> None:
    network, lr = generator(channels), picture[..., :channels]
    network.final_conv.pointwise.weight.data *= 20  # type: ignore[union-attr]
    exact = upscale.upscale(network, lr, scale=4, tile=32)
    near = upscale.upscale(network, lr, scale=4, tile=32, engine="bf16")
    difference = np.abs(exact.astype(int) - near.astype(int))
    assert 0 < difference.mean() < 1


def test_the_fastest_engine_is_near(
    monkeypatch: pytest.MonkeyPatch, picture: images.Picture
) -> None:
    real, offsets = upscale.upscale, {"fp32": 0.0, "bf16": 0.0}

    def fake(*arguments: object, engine: str, **options: object) -> images.Picture:
        time.sleep({"fp32": 0.05, "bf16": 0.01}[engine])
        result = real(*arguments, **options)  # type: ignore[arg-type]
        return (result + offsets[engine]).clip(0, 255).astype(np.uint8)

    monkeypatch.setattr(upscale, "upscale", fake)
    monkeypatch.setattr(machine, "has_bf16", lambda device: True)
    offsets["bf16"] = 1  # 48 dB
    chosen, why = upscale.fastest(generator(), picture, scale=4, channels=3)
    assert chosen == "bf16" and "48.1 dB" in why
    offsets["bf16"] = 2  # 42 dB
    chosen, why = upscale.fastest(generator(), picture, scale=4, channels=3)
    assert chosen == "fp32" and "42.1 dB" in why
    seen = []
    monkeypatch.setattr(
        upscale, "upscale", lambda g, lr, **o: seen.append(lr.shape) or real(g, lr, **o)
    )
    upscale.fastest(generator(), picture[:2, :3], scale=4, channels=3)
    assert set(seen) == {(128, 128, 3)}, "a thumbnail decides for those after it too"


def test_bf16_is_not_tried_where_it_is_emulated(
    monkeypatch: pytest.MonkeyPatch, picture: images.Picture
) -> None:
    """Which takes twenty times as long as fp32."""
    monkeypatch.setattr(machine, "has_bf16", lambda device: False)
    monkeypatch.setattr(upscale, "upscale", None)
    chosen, why = upscale.fastest(generator(), picture, scale=4, channels=3)
    assert chosen == "fp32" and "does not compute in bf16" in why


def test_a_prepared_generator_is_the_same_function(picture: images.Picture) -> None:
    network = build(describe(num_blocks=3, scale=4), seed=1)
    prepared = upscale.prepare(network, torch.device("cpu"))
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in prepared.modules())
    expected, found = (upscale.upscale(n, picture, scale=4, tile=64) for n in (network, prepared))
    assert expected.std() > 10 and np.abs(expected.astype(int) - found.astype(int)).max() <= 1


def test_gray_stays_gray_and_alpha_stays(picture: images.Picture, tmp_path: Path) -> None:
    gray = picture[..., :1]
    alpha = np.zeros((64, 80, 1), np.uint8)
    alpha[20:40] = 255
    for name, pixels, channels in (
        ("gray", gray, 1),
        ("gray_alpha", np.concatenate([gray, alpha], 2), 2),
        ("colour", picture, 3),
        ("colour_alpha", np.concatenate([picture, alpha], 2), 4),
    ):
        path = tmp_path / f"{name}.png"
        images.save(pixels, path)
        for own in (1, 3):
            result = upscale.upscale_any(generator(own), path, scale=4, channels=own, tile=64)
            assert result.shape == (256, 320, channels), (name, own)
            if channels in (2, 4):
                expected = np.asarray(
                    Image.fromarray(alpha[..., 0]).resize((320, 256), Image.Resampling.BICUBIC)
                )
                assert np.array_equal(result[..., -1], expected)


def test_gray_through_a_colour_model_is_its_luma(picture: images.Picture, tmp_path: Path) -> None:
    images.save(picture[..., :1], tmp_path / "gray.png")
    network = generator()
    result = upscale.upscale_any(network, tmp_path / "gray.png", scale=4, channels=3, tile=64)
    three = upscale.upscale(network, np.repeat(picture[..., :1], 3, 2), scale=4, tile=64)
    assert np.array_equal(result[..., 0], np.asarray(Image.fromarray(three).convert("L")))
