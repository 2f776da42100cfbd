"""Measure upscalers (models or classical methods) on pictures: metrics of each, averaged."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import statistics
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from sr_dist import images, metrics, shard_reader, shards, storage, tensors, upscale
from sr_dist.errors import UserError

Distance = Callable[[images.Picture, images.Picture], float]
Upscaler = Callable[[images.Picture], images.Picture]  # (H, W, C) → (scale·H, scale·W, C)

_IDENTICAL = 100.0  # dB, in place of infinity, so that averages and JSON stay numbers
_LABEL_HEIGHT = 20  # pixels
_LISTED = 20  # pictures that cannot be used
_GAP = 4


@dataclasses.dataclass(frozen=True)
class Pair:
    name: str
    lr: images.Picture
    hr: images.Picture  # exactly `scale` times the size of lr
    deep: bool = False  # whether HR was stored with 16 bits


@dataclasses.dataclass(frozen=True)
class Row:
    """What one upscaler reached on one picture."""

    picture: str
    upscaler: str
    psnr: float  # dB
    ssim: float
    lpips: float | None = None  # where it was asked for


@dataclasses.dataclass(frozen=True)
class Mean:
    """The averages over pictures."""

    upscaler: str
    psnr: float
    ssim: float
    lpips: float | None = None


def read_pairs(
    data: str,
    *,
    scale: int,
    channels: int,
    lr_folder: Path | None = None,
    bits: int = 16,
    least: int = 0,
    reading: storage.Settings = storage.DEFAULT,
    wanted: Callable[[int], bool] = lambda number: True,
) -> Iterator[Pair]:
    """The HR pictures of `data`, each with its LR: one at a time, in the order of their names.

    `data`: a folder of pictures, a text file that lists some, one picture, or shards. HR is cut to
    a multiple of `scale` and LR made from it, unless `lr_folder` holds it (`NAME.*`, `NAMEx4.*` or
    `NAME_x4.*`, in the same folder below it); HR is then cut to `scale` times LR. `bits`:
    significant ones of 16-bit gray pictures, which are measured as 8-bit ones. `least`: HR pixels
    on a side that LPIPS needs, where it is measured. `reading`: of shards elsewhere. `wanted`: of
    the pictures' numbers, from 0; the others are not decoded.

    Raises:
        UserError: nothing is there, a picture cannot be used, or an LR does not fit its HR.
    """
    pair = _pair_maker(scale=scale, channels=channels, lr_folder=lr_folder, bits=bits, least=least)
    for number, (name, source) in enumerate(_sources(data, reading)):
        if wanted(number):
            try:
                yield pair(name, source)
            except images.PictureError as error:
                raise UserError(f"{data}: {error}") from None


def _pair_maker(
    *, scale: int, channels: int, lr_folder: Path | None = None, bits: int = 16, least: int = 0
) -> Callable[[str, bytes | Path], Pair]:
    """See `read_pairs`. What is wrong with a picture is raised as PictureError, with its name."""
    least = max(least, 2 * scale + metrics.SSIM_SIDE)
    given = _by_place(lr_folder) if lr_folder is not None else {}

    def decoded(source: bytes | Path, name: str | Path) -> tuple[images.Picture, bool]:
        try:
            stored = images.decode(source, channels)
            return images.whole_to_8_bits(stored, bits), stored.dtype != np.uint8
        except images.PictureError as error:
            raise images.PictureError(f"{name} {error}") from None

    def pair(name: str, source: bytes | Path) -> Pair:
        hr, deep = decoded(source, name)
        size = f"{hr.shape[1]}x{hr.shape[0]}"
        if lr_folder is None:
            hr = images.crop_to_multiple(hr, scale)
        else:
            path = _find_lr(given, lr_folder, name, scale)
            lr, _ = decoded(path, path)
            height, width = scale * lr.shape[0], scale * lr.shape[1]
            over = (hr.shape[0] - height, hr.shape[1] - width)
            if min(over) < 0 or max(over) >= scale:
                raise images.PictureError(
                    f"{path} is {lr.shape[1]}x{lr.shape[0]} pixels, which times {scale} is not the "
                    f"size of {name} ({size})"
                )
            hr = hr[:height, :width]
        if min(hr.shape[:2]) < least:
            raise images.PictureError(
                f"{name} is {size} pixels; the metrics need {least} on each side, which is cut to "
                f"a multiple of {scale}"
            )
        if lr_folder is None:
            lr = tensors.to_pictures(tensors.downscale(tensors.to_batch([hr]), scale))[0]
        return Pair(name, np.ascontiguousarray(lr), np.ascontiguousarray(hr), deep)

    return pair


def count(data: str, reading: storage.Settings = storage.DEFAULT) -> int:
    """The number of pictures of `data`, see `read_pairs`; none is decoded.

    Raises:
        UserError: nothing is there.
    """
    return shards.read_index(data, reading).samples if _is_shards(data) else len(_files(data))


def local_files(data: str) -> list[Path]:
    """The files of `data` (see `read_pairs`), unless it is shards.

    Raises:
        UserError: nothing is there.
    """
    found = [] if _is_shards(data) else _files(data)
    return [source for _, source in found if isinstance(source, Path)]


def is_gray(data: str, reading: storage.Settings = storage.DEFAULT) -> bool:
    """Whether all pictures of `data` (see `read_pairs`) have one channel.

    Raises:
        UserError: nothing is there, or a picture cannot be used.
    """
    for name, source in _sources(data, reading):
        try:
            if images.header(source).channels == 3:
                return False
        except images.PictureError as error:
            raise UserError(f"{data}: {name} {error}") from None
    return True


@dataclasses.dataclass(frozen=True)
class Checked:
    """What `check` found."""

    pictures: int
    pixels: int  # of HR, in all of them
    deep: int  # pictures with 16 bits
    fingerprint: str  # of names and pixels


def check(data: str, *, reading: storage.Settings = storage.DEFAULT, **options: Any) -> Checked:
    """Read all that `read_pairs` will read, given the same.

    Raises:
        UserError: as `read_pairs`, but with all pictures that cannot be used.
    """
    pair, digest = _pair_maker(**options), hashlib.sha256()
    pictures, pixels, deep, problems = 0, 0, 0, []
    for name, source in _sources(data, reading):
        pictures += 1
        try:
            found = pair(name, source)
        except images.PictureError as error:
            problems.append(str(error))
            continue
        pixels += found.hr.shape[0] * found.hr.shape[1]
        deep += found.deep
        digest.update(f"{name}\0{found.hr.shape}".encode() + found.lr.tobytes())
        digest.update(found.hr.tobytes())
    if len(problems) == 1:
        raise UserError(f"{data}: {problems[0]}; take it out")
    if problems:
        remedy = "mend what is given" if len(problems) == pictures else "take them out"
        many = f"{len(problems)} of {pictures} pictures cannot be measured; {remedy}"
        more = [f"… and {len(problems) - _LISTED} more"] * (len(problems) > _LISTED)
        raise UserError("\n  ".join([f"{data}: {many}:", *problems[:_LISTED], *more]))
    return Checked(pictures, pixels, deep, digest.hexdigest())


def evaluate(
    upscalers: Mapping[str, Upscaler],
    pairs: Iterable[Pair],
    *,
    colour: str,
    border: int,
    lpips: Distance | None = None,
    look: Callable[[Pair, Mapping[str, images.Picture]], None] = lambda pair, results: None,
) -> list[Row]:
    """PSNR, SSIM and (given `lpips`) LPIPS of every upscaler on every pair.

    `look` is shown each pair and its results.
    """
    rows = []
    for pair in pairs:
        results = {name: upscaler(pair.lr) for name, upscaler in upscalers.items()}
        for name, sr in results.items():
            psnr, ssim = metrics.compare(sr, pair.hr, colour=colour, border=border)
            perceived = None if lpips is None else lpips(sr, pair.hr)
            rows.append(Row(pair.name, name, min(psnr, _IDENTICAL), ssim, perceived))
        look(pair, results)
    return rows


def averages(rows: Iterable[Row]) -> list[Mean]:
    """Means over pictures, an upscaler a row, in the order they came."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.upscaler, []).append(row)
    return [
        Mean(
            name,
            statistics.fmean(row.psnr for row in its),
            statistics.fmean(row.ssim for row in its),
            _mean_or_none([row.lpips for row in its]),
        )
        for name, its in by_name.items()
    ]


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def classical(method: str, scale: int) -> Upscaler:
    """One of `images.CLASSICAL_METHODS` as an upscaler."""
    return lambda lr: images.enlarge(lr, scale, method)


def learned(generator: nn.Module, *, scale: int, tile: int) -> Upscaler:
    """A generator as an upscaler, in LR tiles of `tile` pixels."""
    return lambda lr: upscale.upscale(generator, lr, scale=scale, tile=tile)


def unused_name(wanted: str, taken: Container[str]) -> str:
    """`wanted`, or `wanted 2`, `wanted 3`, … where that is taken."""
    names = (wanted if number == 1 else f"{wanted} {number}" for number in itertools.count(1))
    return next(name for name in names if name not in taken)


def file_name(picture: str) -> str:
    """A picture's name, which may hold folders, as the name of one file without ending."""
    return Path(picture).with_suffix("").as_posix().strip("./").replace("/", "_")


def middle(
    pair: Pair, results: Mapping[str, images.Picture], side: int
) -> tuple[Pair, Mapping[str, images.Picture]]:
    """The middle of a pair and of its results, `side` HR pixels wide and high at most."""
    scale = pair.hr.shape[0] // pair.lr.shape[0]
    height, width = (min(length, side // scale) for length in pair.lr.shape[:2])
    top, left = (pair.lr.shape[0] - height) // 2, (pair.lr.shape[1] - width) // 2

    def part(picture: images.Picture, factor: int) -> images.Picture:
        down = slice(factor * top, factor * (top + height))
        return picture[down, factor * left : factor * (left + width)]

    shown = Pair(pair.name, part(pair.lr, 1), part(pair.hr, scale))
    return shown, {name: part(picture, scale) for name, picture in results.items()}


def side_by_side(pair: Pair, results: Mapping[str, images.Picture]) -> images.Picture:
    """LR (each pixel enlarged), the results and HR in a row, labelled."""
    height, width = pair.hr.shape[:2]
    enlarged = images.enlarge(np.ascontiguousarray(pair.lr), height // pair.lr.shape[0], "nearest")
    panels = {"LR": enlarged, **results, "HR": pair.hr}
    size = (len(panels) * (width + _GAP) - _GAP, height + _LABEL_HEIGHT)
    canvas = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=_LABEL_HEIGHT - 4)
    for number, (label, picture) in enumerate(panels.items()):
        left = number * (width + _GAP)
        # Where it is wider than its picture, its end, which tells models apart.
        while len(label) > 1 and draw.textlength(label, font) > width:
            label = label[1:]
        draw.text((left + 2, 1), label, fill="black", font=font)
        canvas.paste(images.to_pillow(np.ascontiguousarray(picture)), (left, _LABEL_HEIGHT))
    return np.asarray(canvas)


def _sources(data: str, reading: storage.Settings) -> Iterator[tuple[str, bytes | Path]]:
    if not _is_shards(data):
        yield from _files(data)
        return
    index = shards.read_index(data, reading)
    for number, shard in enumerate(index.shards):
        address = index.address(number)
        try:
            for sample in shard_reader.read_range(index, number, 0, shard.count, reading):
                if sample.problem:
                    what = f"sample {sample.key} {sample.problem}" if sample.key else sample.problem
                    raise UserError(f"shard {address}: {what}")
                yield f"{Path(shard.name).stem}/{sample.key}", sample.picture
        except shard_reader.UnreadableShard as error:
            raise UserError(f"shard {address} {error}") from None


def _is_shards(data: str) -> bool:
    name = data.rpartition("/")[2]
    known = "://" in data or name.endswith(".json") or ("{" in name and name.endswith(".tar"))
    return known or (Path(data) / shards.INDEX_NAME).is_file()


def _files(data: str) -> list[tuple[str, bytes | Path]]:
    path = Path(data)
    if path.is_file() and path.suffix.lower() in images.SUFFIXES:
        return [(path.name, path)]
    return [(name, picture) for picture, name in images.list_pictures(path)]


def _by_place(folder: Path) -> dict[tuple[str, str], list[Path]]:
    """The pictures below a folder by (folder, stem), relative."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; expected a folder of LR pictures")
    found: dict[tuple[str, str], list[Path]] = {}
    for path in images.find(folder):
        place = path.parent.relative_to(folder).as_posix()
        found.setdefault((place, path.stem), []).append(path)
    return found


def _find_lr(
    given: Mapping[tuple[str, str], list[Path]], folder: Path, name: str, scale: int
) -> Path:
    place, stem = Path(name).parent.as_posix(), Path(name).stem
    wanted = (stem, f"{stem}x{scale}", f"{stem}_x{scale}")
    found = [path for its in wanted for path in given.get((place, its), [])]
    if len(found) == 1:
        return found[0]
    where = folder if place == "." else folder / place
    if found:
        listing = ", ".join(path.name for path in found)
        raise images.PictureError(f"{name} has several LR pictures in {where}: {listing}")
    raise images.PictureError(
        f"{name} has no LR picture in {where}: looked for {', '.join(wanted)}"
    )
