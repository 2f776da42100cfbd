"""Pixel conventions: decode, encode, bits, colour and crop.

A picture on the CPU is a numpy array (H, W, C) uint8, RGB or one-channel gray; 16-bit gray is
uint16 until it has been cropped. A batch is a tensor (N, C, H, W), uint8 in [0, 255] until it
reaches the device, float32 in [0, 1] there (tensors.py).
"""

from __future__ import annotations

import functools
import io
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from sr_dist import files
from sr_dist.errors import UserError

log = logging.getLogger(__name__)

Picture = npt.NDArray[np.uint8]  # (H, W, C)
DeepPicture = npt.NDArray[np.uint16]  # (H, W, 1), 16-bit gray as it is stored
AnyPicture = TypeVar("AnyPicture", Picture, DeepPicture, Picture | DeepPicture)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
CLASSICAL_METHODS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Of Pillow's readers no others: some run programs (EPS starts Ghostscript), whatever a file's name.
FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")  # JPEG: phones' MPO as well
_ORIENTATION = 0x0112  # EXIF tag
# What Pillow finds one in: these chunks may come behind the pixels.
_PNG_ORIENTATIONS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # TIFF tag
_TRANSPOSING_ORIENTATIONS = (5, 6, 7, 8)
_GRAY_MODES = ("1", "L", "LA")
_DEEP_GRAY_MODES = ("I", "I;16", "I;16B", "I;16L")  # of Pillow; I where an older one reads a PNG


class PictureError(ValueError):
    """A picture that cannot be used; the message is the reason, without the file's name."""


def find(folder: Path, *, broken_links: bool = False) -> list[Path]:
    """Files below `folder` whose names end as pictures do, sorted; hidden ones left out.

    Links are followed, each folder once. `broken_links`: those that lead nowhere too, so that
    somebody is told of them.

    Raises:
        UserError: a name that a list of files cannot hold.
    """
    found = [path for path in _files(folder) if path.suffix.lower() in SUFFIXES]
    for path in found:
        try:
            text = str(path.relative_to(folder)).encode("utf-8").decode()
        except UnicodeEncodeError:
            raise UserError(f"{str(path)!r}: its name is not UTF-8; rename it") from None
        if len(text.splitlines()) != 1:
            raise UserError(f"{str(path)!r}: its name holds a line break; rename it")
    return sorted(path for path in found if path.is_file() or broken_links and not path.exists())


def other_files(folder: Path, apart_from: Path | None = None) -> str:
    """What `find` passes over below `folder`, as in "12 .dcm, 1 without"; empty for nothing.

    What lies in the folder `apart_from` is not counted.
    """
    apart = None if apart_from is None else apart_from.resolve()
    endings = (
        path.suffix.lower() or "without"
        for path in _files(folder)
        if apart is None or not path.resolve().is_relative_to(apart)
    )
    counts = Counter(ending for ending in endings if ending not in SUFFIXES)
    # An ending need not be text that can be printed.
    named = [f"{count} {ascii(ending)[1:-1]}" for ending, count in counts.most_common(5)]
    others = counts.total() - sum(count for _, count in counts.most_common(5))
    return ", ".join([*named, f"{others} others"] if others else named)


def no_pictures(folder: Path) -> UserError:
    """The error for a folder in which `find` finds nothing."""
    others = other_files(folder)
    found = f"; by the endings of their names, its files are: {others}" if others else ""
    return UserError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}){found}")


def _files(folder: Path) -> Iterator[Path]:
    """All below `folder` but what is hidden. Links are followed, each folder once."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [each for each in folders if not each.startswith(".")]
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(place, name) for name in names if not name.startswith("."))


def list_pictures(source: Path) -> list[tuple[Path, str]]:
    """(path, recorded name) of every picture of a folder, or of a text file with a path a line.

    Paths in a list are relative to the list's own folder.

    Raises:
        UserError: nothing is there, or a listed file is missing.
    """
    if source.is_dir():
        inside = find(source, broken_links=True)
        found = [(path, path.relative_to(source).as_posix()) for path in inside]
        if not found:
            raise no_pictures(source)
        return found
    if not source.exists():
        raise UserError(f"{source} does not exist; expected a folder of pictures or a list of them")
    try:
        if source.suffix.lower() in SUFFIXES:
            raise UserError(f"{source} is named as a picture; expected a folder, or a list of them")
        lines = source.read_text(encoding="utf-8").splitlines()
    except (UnicodeDecodeError, OSError):
        raise UserError(
            f"{source} is neither a folder nor a text file with a path a line"
        ) from None
    names = [line for line in lines if line.strip()]
    if not names:
        raise UserError(f"{source} lists no pictures")
    missing = [name for name in names if not (source.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{source} lists {len(missing)} file(s) that do not exist in {source.parent}, "
            f"first: {missing[0]}"
        )
    return [(source.parent / name, name) for name in sorted(set(names))]


class Header(NamedTuple):
    """What is known of a picture before it is decoded."""

    height: int  # after EXIF orientation
    width: int
    channels: int  # 1 for gray, 3 for another
    deep: bool  # 16-bit gray
    upright: bool  # whether pixels are stored in the order they are seen in


def header(source: bytes | Path) -> Header:
    """Decodes no more than it needs: turned TIFFs, and PNGs that may be turned, whole.

    Raises:
        PictureError: the header cannot be read, or the picture is of a kind that is refused.
    """
    with _open(source) as image:
        deep = _is_deep(image)
        channels = 1 if image.mode in _GRAY_MODES or deep else 3
        orientation = _orientation(image)
        turned = orientation in _TRANSPOSING_ORIENTATIONS
        if turned and image.format == "TIFF":  # whose size Pillow turns, or not, by its version
            _load(image)
            image = _upright(image)
            turned = False
        width, height = image.size
    height, width = (width, height) if turned else (height, width)
    return Header(height, width, channels, deep, orientation == 1)


def pixels(source: bytes | Path) -> int:
    """How many it says to have, before anything is decoded.

    Raises:
        PictureError: it is of a kind that is refused.
    """
    with _open(source) as image:
        return image.width * image.height


def decode(source: bytes | Path, channels: int | None) -> Picture | DeepPicture:
    """Decode to (H, W, `channels`), EXIF orientation applied; None: 1 if it is gray, 3 if not.

    uint8; 16-bit gray as one channel stays uint16 (see `to_8_bits`). Alpha is composited on white,
    palettes are expanded, CMYK and other colour spaces become RGB; for one channel, colour becomes
    luma as JPEG defines it. Of a phone's MPO file the first picture is taken. More than 8 bits a
    channel are refused in colour rather than clipped, as are animations and multi-page files.

    Raises:
        PictureError: the bytes are no whole picture, or of a kind that is refused.
    """
    with _open(source) as image:
        deep = _is_deep(image)  # before it is loaded: Pillow then forgets how it was stored
        if channels is None:
            channels = 1 if deep or image.mode in _GRAY_MODES else 3
        _load(image)
        if not deep:
            return to_array(image, channels)
        if channels != 1:
            raise PictureError("is 16-bit gray, which is read as one channel and not as three")
        return np.array(_upright(image)).astype(np.uint16)[..., None]


def decode_8_bits(source: bytes | Path, channels: int, bits: int) -> Picture:
    """`decode`, and `to_8_bits` where it is needed: of whole pictures."""
    return whole_to_8_bits(decode(source, channels), bits)


def whole_to_8_bits(picture: Picture | DeepPicture, bits: int) -> Picture:
    """`to_8_bits` of a whole picture, which warns where it uses few of its bits."""
    if picture.dtype != np.uint8 and int(picture.max()) < 2**bits // 4:
        _warn_of_bits(bits)
    return to_8_bits(picture, bits)


def to_8_bits(picture: Picture | DeepPicture, bits: int) -> Picture:
    """16-bit gray of `bits` significant bits as 8-bit, scaled and rounded; 8-bit as it is.

    Raises:
        PictureError: it holds values that need more bits.
    """
    if picture.dtype == np.uint8:
        return picture  # type: ignore[return-value]
    white, most = 2**bits - 1, int(picture.max())
    if most > white:
        raise PictureError(f"holds values up to {most}, more than {bits} bits can")
    scaled: Picture = (picture * (255 / white)).round().astype(np.uint8)
    return scaled


@functools.cache  # once is enough
def _warn_of_bits(bits: int) -> None:
    log.warning(
        "a 16-bit gray picture uses less than a quarter of the %d bits that are taken as "
        "significant: if the scanner gives fewer, say so with data.bits (in commands --bits)",
        bits,
    )


def decode_with_alpha(source: bytes | Path, bits: int = 16) -> tuple[Picture, Picture | None]:
    """Decode to its own number of channels, 1 or 3, and the alpha channel (H, W, 1) if any.

    The colour below transparent places is kept as stored, not composited. `bits`: significant ones
    of 16-bit gray.
    """
    with _open(source) as image:
        if _is_deep(image):
            return decode_8_bits(source, 1, bits), None
        _load(image)
        image = _upright(image)
        gray = image.mode in _GRAY_MODES
        if not image.has_transparency_data:
            return to_array(image, 1 if gray else 3), None
        pixels = np.asarray(image.convert("LA" if gray else "RGBA"))
        return pixels[..., :-1].copy(), pixels[..., -1:].copy()


def colour_profile(source: Path) -> bytes | None:
    """The ICC profile of a picture whose pixels are decoded as they are stored: RGB and gray."""
    with _open(source) as image:
        profile = image.info.get("icc_profile")
        return profile if image.mode in ("L", "LA", "RGB", "RGBA", "P") else None


def to_array(image: Image.Image, channels: int) -> Picture:
    """An opened Pillow image as (H, W, `channels`) uint8; see `decode` for what becomes of what."""
    image = _upright(image)
    if image.has_transparency_data:
        colour = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour)
    mode = "RGB" if channels == 3 else "L"
    if image.mode != mode:
        image = image.convert("RGB").convert(mode)
    pixels = np.array(image)
    return pixels if channels == 3 else pixels[..., None]


def to_pillow(picture: Picture | DeepPicture) -> Image.Image:
    """(H, W, C) with 1 (gray), 2 (gray and alpha), 3 or 4 channels as a Pillow image."""
    return Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)


def encode(picture: Picture | DeepPicture, kind: str) -> bytes:
    """Encode as `webp` (lossless), `png` or `jpeg` (quality 95, full-resolution colour).

    16-bit gray fits into PNG alone.
    """
    assert picture.dtype == np.uint8 or kind == "png"
    # Lossless WebP at its least effort decodes faster than PNG and is a quarter smaller.
    options: dict[str, dict[str, object]] = {
        "webp": {"lossless": True, "quality": 0, "method": 0, "exact": True},
        "png": {"compress_level": 6},
        "jpeg": {"quality": 95, "subsampling": 0},
    }
    buffer = io.BytesIO()
    to_pillow(picture).save(buffer, format=kind, **options[kind])
    return buffer.getvalue()


def save(picture: Picture, path: Path, profile: bytes | None = None) -> None:
    """Write a PNG (or what the name's ending says) that appears whole or not at all.

    `profile`: an ICC profile to store with it.
    """
    image_format = Image.registered_extensions()[path.suffix.lower()]
    with files.whole(path) as file:
        to_pillow(picture).save(file, format=image_format, icc_profile=profile)


class Crop(NamedTuple):
    """A square part of a picture, in one of the square's eight symmetries."""

    top: int
    left: int
    size: int
    symmetry: int  # bits: 1 mirrors left and right, 2 top and bottom, then 4 exchanges the two

    def of(self, picture: Picture | DeepPicture) -> Picture | DeepPicture:
        """(H, W, C) → a view (size, size, C)."""
        crop = picture[self.top : self.top + self.size, self.left : self.left + self.size]
        if self.symmetry & 1:
            crop = crop[:, ::-1]
        if self.symmetry & 2:
            crop = crop[::-1]
        if self.symmetry & 4:
            crop = crop.transpose(1, 0, 2)
        return crop


def random_crop(height: int, width: int, size: int, random: np.random.Generator) -> Crop:
    """Anywhere in a picture of that size, which is `size` pixels or more on each side."""
    top = int(random.integers(height - size + 1))
    left = int(random.integers(width - size + 1))
    return Crop(top, left, size, int(random.integers(8)))


def crop_to_multiple(picture: AnyPicture, scale: int) -> AnyPicture:
    """Drop the rows and columns beyond the last multiple of `scale`, bottom and right."""
    height, width, _ = picture.shape
    return picture[: height - height % scale, : width - width % scale]


def enlarge(picture: Picture, scale: int, method: str) -> Picture:
    """(H, W, C) to (sH, sW, C) by one of `CLASSICAL_METHODS`, as Pillow does it."""
    height, width, _ = picture.shape
    image = to_pillow(picture).resize((width * scale, height * scale), CLASSICAL_METHODS[method])
    return np.asarray(image).reshape(height * scale, width * scale, -1)


# Pillow's readers raise whatever damaged bytes provoke, from OSError to struct.error and TypeError;
# all of it says the same of the picture.


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:
        raise PictureError(f"cannot be decoded: {error}") from error


def _orientation(image: Image.Image) -> int:
    file = getattr(image, "fp", None)
    if image.format == "PNG" and isinstance(file, io.BytesIO):  # not loaded yet
        data = file.getvalue()
        if not any(sign in data for sign in _PNG_ORIENTATIONS):
            return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))  # decodes a PNG: EXIF may lie at its end
    except Exception as error:
        raise PictureError(f"cannot be decoded: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    if _orientation(image) == 1:
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:
        raise PictureError(f"cannot be turned upright: {error}") from error


def _open(source: bytes | Path) -> Image.Image:
    try:
        # From memory: of a file Pillow maps turned TIFFs with their sides exchanged.
        data = source if isinstance(source, bytes) else source.read_bytes()
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        frames = getattr(image, "n_frames", 1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise PictureError(f"cannot be read: {error.strerror}") from error
        # Pillow names the file, or an object in memory; the caller knows better what it is.
        unknown = isinstance(error, UnidentifiedImageError)
        reason = (
            f"of no known format ({', '.join(FORMATS)}), or its header is damaged"
            if unknown
            else str(error)
        )
        raise PictureError(f"is no picture: {reason}") from error
    if frames > 1 and image.format != "MPO":
        raise PictureError(f"has {frames} frames or pages; one is expected")
    deep = image.mode.startswith(("I", "F")) or _stored_in_16_bits(image)
    if deep and not _is_deep(image):
        raise PictureError(
            f"has more than 8 bits a channel (mode {image.mode}), which is read of gray pictures "
            "with 16 bits alone; convert it to 8 bits first"
        )
    if deep and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise PictureError("has 16 bits a pixel of which 0 is white; convert it to black as 0")
    return image


def _stored_in_16_bits(image: Image.Image) -> bool:
    tiles = str(getattr(image, "tile", ""))
    return ";16" in tiles and "BGR;16" not in tiles  # which is 5, 6 and 5 bits


def _is_deep(image: Image.Image) -> bool:
    """Whether it is 16-bit gray, unsigned."""
    if image.mode not in _DEEP_GRAY_MODES:
        return False
    return image.mode != "I" or (
        _stored_in_16_bits(image) and not re.search(r";16B?S", str(getattr(image, "tile", "")))
    )
