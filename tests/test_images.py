from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from sr_dist import images, tensors


def encoded(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_downscale_is_within_a_level_of_pillow(photographs: Path) -> None:
    hr = images.decode(photographs / "astronaut.png", 3)[:480, :480]
    ours = tensors.to_pictures(tensors.downscale(tensors.to_batch([hr]), 4))[0]
    pillows = np.asarray(Image.fromarray(hr).resize((120, 120), Image.Resampling.BICUBIC))
    difference = np.abs(ours.astype(int) - pillows.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.001


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_downscaling_as_gpus_do_is_within_a_level(photographs: Path, scale: int) -> None:
    """Where values leave [0, 255] on the way, too: in noise of black and white, everywhere."""
    random = np.random.default_rng(1)
    noise = 255 * random.integers(2, size=(96, 120, 3)).astype(np.uint8)
    for hr in (images.decode(photographs / "astronaut.png", 3)[:480, :480], noise):
        batch = tensors.to_batch([hr])
        height, width = hr.shape[0] // scale, hr.shape[1] // scale
        found = tensors.downscale_as_floats(batch, height, width)
        difference = (found.int() - tensors.downscale(batch, scale).int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 0.02


def test_downscale_does_not_depend_on_the_rest_of_the_batch(picture: images.Picture) -> None:
    other = np.ascontiguousarray(picture[::-1])
    together = tensors.downscale(tensors.to_batch([picture, other]), 4)
    alone = tensors.downscale(tensors.to_batch([other]), 4)
    assert torch.equal(together[1], alone[0])


def test_decode_applies_orientation(picture: images.Picture) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    data = encoded(Image.fromarray(picture), exif=exif)
    assert np.array_equal(images.decode(data, 3), np.rot90(picture, -1))
    assert images.header(data)[:2] == (80, 64)


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
        (encoded(Image.fromarray(np.full((8, 8), 40_000, np.uint16))), "is 16-bit gray"),
        (encoded(Image.new("F", (8, 8)), "tiff"), "more than 8 bits"),
        (
            encoded(
                Image.new("L", (8, 8)),
                "tiff",
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
    crops = set()
    for seed in range(600):
        crop = images.random_crop(5, 6, 4, np.random.default_rng(seed))
        crops.add(crop.of(picture).tobytes())
        of_tensor = tensors.crop(torch.from_numpy(picture).permute(2, 0, 1), crop)
        assert np.array_equal(of_tensor.permute(1, 2, 0).numpy(), crop.of(picture))
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
    values = tensors.luma(colours.T.reshape(1, 3, 1, 5)).flatten().tolist()
    assert values == pytest.approx([16, 235, 81.481, 144.553, 40.966], abs=1e-3)
    gray = torch.tensor([[[[0.0, 99, 255]]]])
    torch.testing.assert_close(tensors.luma(gray), tensors.luma(gray.expand(1, 3, 1, 3)))


def test_float_round_trip_and_clipping() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(tensors.to_uint8(tensors.to_float(levels)), levels)
    assert tensors.to_uint8(torch.tensor([-0.5, 1.7, 0.5]).view(1, 1, 1, 3)).tolist() == [
        [[[0, 255, 128]]]
    ]


def png_of_16_bits(colour_type: int, channels: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = b"".join(b"\0" + b"\x12\x34" * (channels * 8) for _ in range(8))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)], ids=["L", "RGB", "LA", "RGBA"]
)
def test_16_bits_are_refused_in_colour(colour_type: int, channels: int) -> None:
    with pytest.raises(images.PictureError, match="more than 8 bits|is 16-bit gray"):
        images.decode(png_of_16_bits(colour_type, channels), 3)


@pytest.mark.parametrize("kind", ["png", "tiff", "compressed tiff", "big-endian tiff"])
def test_16_bit_gray_is_read_exactly(kind: str) -> None:
    deep = np.arange(64 * 80, dtype=np.uint16).reshape(64, 80) * 12
    image = Image.fromarray(deep)
    if kind == "big-endian tiff":
        data = encoded(Image.frombytes("I;16B", (80, 64), deep.astype(">u2").tobytes()), "tiff")
        assert data[:2] in (b"MM", b"II")
    elif kind == "compressed tiff":
        data = encoded(image, "tiff", compression="tiff_lzw")
    else:
        data = encoded(image, kind)
    decoded = images.decode(data, 1)
    assert decoded.dtype == np.uint16 and np.array_equal(decoded[..., 0], deep)
    assert images.header(data).channels == 1
    assert images.header(data)[:2] == (64, 80)
    shown, alpha = images.decode_with_alpha(data, 16)
    assert alpha is None and shown.dtype == np.uint8
    assert np.array_equal(shown[..., 0], (deep / 257).round().astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_turned_tiffs(orientation: int, compression: str, tmp_path: Path) -> None:
    """Gray, 16-bit and colour, from a file and from memory, by what the tag means."""
    y, x = np.mgrid[0:48, 0:80]
    stored = (x * 3 + y).astype(np.uint8)
    turned = {  # what stands upright of what is stored: EXIF 2.32, tag 0x112
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1],
        5: stored.T, 6: stored.T[:, ::-1], 7: stored.T[::-1, ::-1], 8: stored.T[::-1],
    }[orientation]  # fmt: skip
    for kind in (np.uint8, np.uint16, "RGB"):
        pixels = np.stack([stored] * 3, axis=2) if kind == "RGB" else stored.astype(kind)
        exif = Image.Exif()
        exif[0x112] = orientation
        path = tmp_path / "turned.tif"
        Image.fromarray(pixels).save(path, compression=compression, exif=exif)
        for source in (path, path.read_bytes()):
            found = images.decode(source, 3 if kind == "RGB" else 1)
            assert np.array_equal(found[..., 0], turned), f"{kind}"
            assert images.header(source)[:2] == turned.shape


@pytest.mark.parametrize("order", ["<", ">"])
def test_signed_16_bits_are_refused(order: str) -> None:
    """As a scanner writes them; Pillow itself writes none that are big-endian."""
    signed = np.arange(-50, 50, dtype=f"{order}i2").reshape(10, 10)
    tags = {256: 10, 257: 10, 258: 16, 259: 1, 262: 1, 273: 0, 277: 1, 278: 10, 279: 200, 339: 2}
    entries = 2 + 12 * len(tags) + 4
    tags[273] = 8 + entries
    data = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    data += struct.pack(f"{order}H", len(tags))
    for tag, value in sorted(tags.items()):
        data += struct.pack(f"{order}HHII", tag, 4, 1, value)
    data += bytes(4) + signed.tobytes()
    with pytest.raises(images.PictureError, match="more than 8 bits a channel"):
        images.decode(data, 1)


def test_16_bits_a_pixel_are_not_16_bits_a_channel() -> None:
    """A BMP of 5, 6 and 5 bits."""
    pixels = np.array([[0xF800, 0x07E0], [0x001F, 0xFFFF]], "<u2")
    header = struct.pack("<IiiHHIIiiII", 40, 2, -2, 1, 16, 3, 8, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    data = b"BM" + struct.pack("<IHHI", 14 + 40 + 12 + 8, 0, 0, 14 + 40 + 12)
    found = images.decode(data + header + masks + pixels.tobytes(), 3)
    assert found.tolist() == [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]]


def test_16_bits_whose_white_is_0_are_refused() -> None:
    deep = np.zeros((40, 40), np.uint16)
    data = encoded(Image.fromarray(deep), "tiff", tiffinfo={262: 0})
    with pytest.raises(images.PictureError, match="of which 0 is white"):
        images.decode(data, 1)


def test_few_significant_bits_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    images._warn_of_bits.cache_clear()
    dark = np.full((2, 2, 1), 4095, np.uint16)
    data = images.encode(dark, "png")
    images.decode_8_bits(data, 1, 12)
    assert not caplog.messages
    images.decode_8_bits(data, 1, 16)
    images.decode_8_bits(data, 1, 16)
    images.to_8_bits(dark, 16)  # of parts of pictures, which may be dark
    assert len(caplog.messages) == 1 and "a quarter of the 16 bits" in caplog.messages[0]


def test_8_bits_of_16() -> None:
    values = np.array([[[0], [4095], [2048]]], np.uint16)
    assert images.to_8_bits(values, 12).ravel().tolist() == [0, 255, 128]
    assert images.to_8_bits(values, 16).ravel().tolist() == [0, 16, 8]
    with pytest.raises(images.PictureError, match="values up to 4095, more than 11 bits can"):
        images.to_8_bits(values, 11)
    own = np.array([[[7]]], np.uint8)
    assert images.to_8_bits(own, 12) is own


@pytest.mark.parametrize(
    "data", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"GIF89a", b"8BPS\0\1"]
)
def test_formats_that_are_not_named_are_not_tried(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EPS starts a program, whatever the file is called."""
    started = []
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: started.append(a))
    (tmp_path / "a.png").write_bytes(data + bytes(200))
    for read in (images.header, images.decode_with_alpha):
        with pytest.raises(images.PictureError, match="of no known format"):
            read(tmp_path / "a.png")
    assert not started


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_are_refused(mode: str) -> None:
    with pytest.raises(images.PictureError, match="more than 8 bits a channel"):
        images.decode(encoded(Image.new(mode, (8, 8)), "tiff"), 1)


def test_the_first_picture_of_a_phones_file_is_taken(picture: images.Picture) -> None:
    main, second = Image.fromarray(picture), Image.fromarray(picture[::2, ::2])
    data = encoded(main, "mpo", save_all=True, append_images=[second], quality=95)
    decoded = images.decode(data, 3)
    assert decoded.shape == picture.shape
    assert np.abs(decoded.astype(int) - picture.astype(int)).mean() < 3


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged metadata
def test_damaged_bytes_only_ever_raise_picture_errors(picture: images.Picture) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(picture)
    files = [encoded(image, kind, exif=exif) for kind in ("png", "jpeg", "webp", "tiff")] + [
        encoded(image, "bmp"),
        encoded(image.convert("P"), "png"),
    ]
    random = np.random.default_rng(0)
    refused = 0
    for data in files:
        for _ in range(150):
            damaged = bytearray(data)
            for place in random.integers(min(len(data), 400), size=3):
                damaged[place] = int(random.integers(256))
            damaged = damaged[: int(random.integers(1, len(data) * 2))]
            for read in (images.header, images.decode_with_alpha, lambda d: images.decode(d, 3)):
                try:
                    read(bytes(damaged))
                except images.PictureError:
                    refused += 1
    assert refused > 100


def test_colour_profiles_are_kept(picture: images.Picture, tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(picture).save(tmp_path / "a.png", icc_profile=profile)
    assert images.colour_profile(tmp_path / "a.png") == profile
    images.save(picture, tmp_path / "b.png", profile)
    assert images.colour_profile(tmp_path / "b.png") == profile
    images.save(picture, tmp_path / "c.png")
    assert images.colour_profile(tmp_path / "c.png") is None
    # Its pixels become RGB, so that of their four colours would be wrong.
    images.to_pillow(picture).convert("CMYK").save(tmp_path / "d.jpg", icc_profile=profile)
    assert images.colour_profile(tmp_path / "d.jpg") is None


@pytest.mark.parametrize("where", ["before the pixels", "behind them", "as text"])
def test_turned_pngs(where: str, picture: images.Picture, tmp_path: Path) -> None:
    """Sizes are those after turning, and only PNGs that may be turned are decoded for that."""
    exif = Image.Exif()
    exif[0x0112] = 6
    saved, buffer = images.to_pillow(picture), io.BytesIO()
    if where == "as text":
        text = PngImagePlugin.PngInfo()
        xmp = '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
        text.add_itxt("XML:com.adobe.xmp", xmp)
        saved.save(buffer, "png", pnginfo=text)
    else:
        saved.save(buffer, "png", exif=exif)
    data = buffer.getvalue()
    if where == "behind them":
        start = data.index(b"eXIf") - 4
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        data = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    height, width, _ = picture.shape
    assert images.header(data)[:2] == images.decode(data, 3).shape[:2] == (width, height)


def test_find_follows_links_once_and_refuses_names_that_lists_cannot_hold(
    tmp_path: Path, picture: images.Picture
) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
        images.save(picture, folder / f"{folder.name}.png")
    (inside / "link").symlink_to(outside)
    (outside / "back").symlink_to(inside)
    names = [path.relative_to(inside).as_posix() for path in images.find(inside)]
    assert names == ["in.png", "link/out.png"]
    (inside / "two\nlines.png").write_bytes((inside / "in.png").read_bytes())
    with pytest.raises(ValueError, match="line break; rename it"):
        images.find(inside)
    (inside / "two\nlines.png").unlink()
    (inside / " led by a space.png").write_bytes((inside / "in.png").read_bytes())
    (inside / "list.txt").write_text(" led by a space.png\n")
    assert images.list_pictures(inside / "list.txt")[0][0].is_file()
    Path(os.fsdecode(bytes(inside) + b"/\xff.png")).write_bytes(b"")
    with pytest.raises(ValueError, match="not UTF-8; rename it"):
        images.find(inside)


def test_list_pictures_of_folders_and_lists(tmp_path: Path, picture: images.Picture) -> None:
    (tmp_path / "a").mkdir()
    for name in ("b.PNG", "a/c.jpg", "a/.hidden.png"):
        images.to_pillow(picture).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("b.PNG\n\n")
    assert [name for _, name in images.list_pictures(tmp_path)] == ["a/c.jpg", "b.PNG"]
    assert images.list_pictures(tmp_path / "notes.txt") == [(tmp_path / "b.PNG", "b.PNG")]
    (tmp_path / "notes.txt").write_text("b.PNG\nmissing.png\n")
    with pytest.raises(ValueError, match="1 file.s. that do not exist .* first: missing.png"):
        images.list_pictures(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="neither a folder nor a text file"):
        images.list_pictures(Path(sys.executable))
    with pytest.raises(ValueError, match="b.PNG is named as a picture; expected a folder, or a"):
        images.list_pictures(tmp_path / "b.PNG")


def test_files_that_are_passed_over_are_counted_by_their_endings(tmp_path: Path) -> None:
    for name in (
        "a.dcm",
        "sub/b.DCM",
        "c",
        "d.png",
        ".hidden/e.dcm",
        *(f"f.{n}" for n in range(9)),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    told = images.other_files(tmp_path)
    assert told.startswith("2 .dcm, 1 ") and told.endswith(", 6 others")
    assert len(told.split(", ")) == 6
