from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sr_dist import images


def encoded(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_downscale_is_within_a_level_of_pillow(photographs: Path) -> None:
    hr = images.decode(photographs / "astronaut.png", 3)[:480, :480]
    ours = images.to_pictures(images.downscale(images.to_batch([hr]), 4))[0]
    pillows = np.asarray(Image.fromarray(hr).resize((120, 120), Image.Resampling.BICUBIC))
    difference = np.abs(ours.astype(int) - pillows.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.001


def test_downscale_does_not_depend_on_the_rest_of_the_batch(picture: images.Picture) -> None:
    other = np.ascontiguousarray(picture[::-1])
    together = images.downscale(images.to_batch([picture, other]), 4)
    alone = images.downscale(images.to_batch([other]), 4)
    assert torch.equal(together[1], alone[0])


def test_decode_applies_orientation(picture: images.Picture) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    data = encoded(Image.fromarray(picture), exif=exif)
    assert np.array_equal(images.decode(data, 3), np.rot90(picture, -1))
    assert images.read_size(data) == (80, 64)


def test_decode_of_other_modes(picture: images.Picture) -> None:
    image = Image.fromarray(picture)
    gray = images.decode(encoded(image.convert("L")), 3)
    assert gray.shape == (64, 80, 3) and np.array_equal(gray[..., 0], gray[..., 2])
    luma = images.decode(encoded(image), 1)
    assert luma.shape == (64, 80, 1)
    assert np.array_equal(luma[..., 0], np.asarray(image.convert("L")))
    palette = images.decode(encoded(image.convert("P")), 3)
    assert np.array_equal(palette, np.asarray(image.convert("P").convert("RGB")))
    assert images.decode(encoded(image.convert("CMYK"), "tiff"), 3).shape == (64, 80, 3)


def test_decode_composites_alpha_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert (images.decode(encoded(clear), 3) == 255).all()
    assert np.abs(images.decode(encoded(half), 3).astype(int) - 127).max() <= 1


def test_decode_with_alpha_keeps_colour_and_alpha() -> None:
    pixels = np.full((4, 5, 4), (10, 20, 30, 0), np.uint8)
    pixels[0, 0, 3] = 200
    colour, alpha = images.decode_with_alpha(encoded(Image.fromarray(pixels)))
    assert np.array_equal(colour, pixels[..., :3])
    assert alpha is not None and np.array_equal(alpha[..., 0], pixels[..., 3])
    colour, alpha = images.decode_with_alpha(encoded(Image.new("L", (5, 4), 7)))
    assert colour.shape == (4, 5, 1) and alpha is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(Image.fromarray(np.full((8, 8), 40_000, np.uint16))), "more than 8 bits"),
        (encoded(Image.new("F", (8, 8)), "tiff"), "more than 8 bits"),
        (
            encoded(
                Image.new("L", (8, 8)),
                "gif",
                save_all=True,
                append_images=[Image.new("L", (8, 8), 9)],
            ),
            "2 frames",
        ),
        (b"no picture", "of no known format"),
        (b"", "of no known format"),
        (encoded(Image.effect_noise((64, 64), 90))[:-2000], "cannot be decoded"),
    ],
    ids=["16-bit", "float", "animation", "text", "empty", "truncated"],
)
def test_pictures_that_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(images.PictureError, match=reason):
        images.decode(data, 3)


@pytest.mark.parametrize("kind", ["webp", "png"])
@pytest.mark.parametrize("channels", [1, 3])
def test_encode_is_lossless(picture: images.Picture, kind: str, channels: int) -> None:
    picture = picture[..., :channels]
    assert np.array_equal(images.decode(images.encode(picture, kind), channels), picture)


def test_encode_jpeg_is_close(picture: images.Picture) -> None:
    again = images.decode(images.encode(picture, "jpeg"), 3)
    assert np.abs(again.astype(int) - picture.astype(int)).mean() < 2


def test_random_crop_takes_all_places_and_symmetries() -> None:
    picture = np.arange(5 * 6, dtype=np.uint8).reshape(5, 6, 1)
    crops = {images.random_crop(picture, 4, np.random.default_rng(n)).tobytes() for n in range(600)}
    expected = set()
    for top in range(2):
        for left in range(3):
            square = picture[top : top + 4, left : left + 4]
            for turned in (square, square.transpose(1, 0, 2)):
                for flipped in (turned, turned[::-1], turned[:, ::-1], turned[::-1, ::-1]):
                    expected.add(flipped.tobytes())
    assert crops == expected and len(expected) == 2 * 3 * 8


def test_luma_of_known_colours() -> None:
    colours = torch.tensor([[0.0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]])
    values = images.luma(colours.T.reshape(1, 3, 1, 5)).flatten().tolist()
    assert values == pytest.approx([16, 235, 81.481, 144.553, 40.966], abs=1e-3)
    gray = torch.full((1, 1, 2, 2), 99.0)
    assert torch.equal(images.luma(gray), gray)


def test_float_round_trip_and_clipping() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(images.to_uint8(images.to_float(levels)), levels)
    assert images.to_uint8(torch.tensor([-0.5, 1.7, 0.5]).view(1, 1, 1, 3)).tolist() == [
        [[[0, 255, 128]]]
    ]


def test_list_pictures_of_folders_and_lists(tmp_path: Path, picture: images.Picture) -> None:
    (tmp_path / "a").mkdir()
    for name in ("b.png", "a/c.jpg", "a/.hidden.png"):
        images.to_pillow(picture).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("b.png\n\n")
    assert [name for _, name in images.list_pictures(tmp_path)] == ["a/c.jpg", "b.png"]
    assert images.list_pictures(tmp_path / "notes.txt") == [(tmp_path / "b.png", "b.png")]
    (tmp_path / "notes.txt").write_text("b.png\nmissing.png\n")
    with pytest.raises(ValueError, match="1 file.s. that do not exist .* first: missing.png"):
        images.list_pictures(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="neither a folder nor a text file"):
        images.list_pictures(tmp_path / "b.png")
