"""The results of an evaluation as files: metrics.json, metrics.csv, pictures and report.html."""

from __future__ import annotations

import base64
import contextlib
import csv
import datetime
import html
import io
import itertools
import json
import shutil
import string
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sr_dist import evaluate, files, images
from sr_dist.errors import UserError

_ZOOM_SIDE = 64  # HR pixels of the enlarged detail
_LEAST_WIDTH = 480  # of a slider, pixels of the page; smaller pictures are enlarged to it
_WEBP_MOST = 16383  # pixels on a side
_METRICS, _TABLE, _REPORT, _PICTURES = "metrics.json", "metrics.csv", "report.html", "pictures"
_PARTIAL = f".{_PICTURES}.part"

Summary = dict[str, Any]


class Writer:
    """Collects pictures as they are evaluated (`add`), then writes the rest (`finish`).

    A context manager: what an earlier evaluation wrote goes when all is there to take its place,
    and where that does not come to be, nothing new stays.
    """

    def __init__(
        self,
        folder: Path,
        *,
        data: str,
        scale: int,
        protocol: dict[str, object],
        models: Collection[str] = (),
    ) -> None:
        self.folder = folder
        self.partial = folder / _PARTIAL  # what is written, until all is there
        self.found = folder.exists()
        self.data = data  # what is measured on, as it was named
        self.scale = scale
        self.protocol = protocol
        self.models = models  # those of the results that are no classical method's
        self.sections: list[tuple[str, str, str, str]] = []  # picture, its sizes; HTML
        self.files: set[str] = set()  # names of pictures written, without ending
        shutil.rmtree(self.partial, ignore_errors=True)  # of one that was killed

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        if not self.found:
            with contextlib.suppress(OSError):  # it was not made, or holds the results
                self.folder.rmdir()

    def add(self, pair: evaluate.Pair, results: Mapping[str, images.Picture]) -> None:
        """Write the side-by-side picture; keep what the report shows of it."""
        name = _file_name(pair.name, self.files)
        images.save(evaluate.side_by_side(pair, results), self.partial / _PICTURES / name)
        shown = {
            "LR": images.enlarge(pair.lr, self.scale, "nearest"),
            **results,
            "HR": pair.hr,
        }
        height, width = pair.hr.shape[:2]
        size = f"{width // self.scale} × {height // self.scale} → {width} × {height}"
        detail, frame = _detail(results, shown, self.models)
        self.sections.append((pair.name, size, _slider(pair.name, results, shown, frame), detail))

    def finish(self, rows: Sequence[evaluate.Row]) -> Summary:
        """Write the metrics and the report. Returns the content of metrics.json."""
        means = evaluate.averages(rows)
        summary = {
            "scale": self.scale,
            "protocol": self.protocol,
            "images": len(self.sections),
            "results": [
                {
                    "name": mean.upscaler,
                    "psnr": round(mean.psnr, 4),
                    "ssim": round(mean.ssim, 6),
                    **({} if mean.lpips is None else {"lpips": round(mean.lpips, 4)}),
                }
                for mean in means
            ],
        }
        files.write_whole(self.partial / _METRICS, json.dumps(summary, indent=1) + "\n")
        files.write_whole(self.partial / _TABLE, _csv(rows))
        files.write_whole(self.partial / _REPORT, self._html(rows, means))
        for path in _earlier_pictures(self.folder):
            path.unlink(missing_ok=True)
        (self.folder / _PICTURES).mkdir(exist_ok=True)
        for path in [*(self.partial / _PICTURES).iterdir(), *self.partial.glob("*.*")]:
            path.replace(self.folder / path.relative_to(self.partial))
        return summary

    def _html(self, rows: Sequence[evaluate.Row], means: Sequence[evaluate.Mean]) -> str:
        of_picture: dict[str, list[evaluate.Row]] = {}
        for row in rows:
            of_picture.setdefault(row.picture, []).append(row)
        sections = "".join(
            f"<section><h2>{html.escape(name)} <small>{size}</small></h2>"
            f'<div class="view">{slider}<div class="facts">{_table(of_picture[name])}{detail}</div>'
            "</div></section>"
            for name, size, slider, detail in self.sections
        )
        page = string.Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))
        number, named = len(self.sections), "/".join(Path(self.data).parts[-2:])
        return page.substitute(
            title=html.escape(f"Super-resolution ×{self.scale}: {named}"),
            about=f"{datetime.date.today().isoformat()} · {_briefly(self.protocol)} · pictures "
            f'side by side, exact, and beside this file: <a href="{_PICTURES}/">{_PICTURES}/</a> · '
            f'<a href="{_TABLE}">{_TABLE}</a>',
            count=f"{number} pictures" if number != 1 else "1 picture",
            means=_table(means),
            protocol=html.escape(_in_words(self.protocol, self.scale)),
            sections=sections,
        )


def check_output(folder: Path, pictures: Iterable[Path]) -> None:
    """
    Raises:
        UserError: a picture that will be read lies where results are written.
    """
    place = (folder / _PICTURES).resolve()
    for picture in pictures:
        if picture.resolve().is_relative_to(place):
            raise UserError(
                f"{picture} lies where the results would be written; choose another --output"
            )


def _file_name(picture: str, taken: set[str]) -> str:
    """That of the side-by-side view of a picture; without its ending it is added to `taken`."""
    name = evaluate.unused_name(evaluate.file_name(picture), taken)
    taken.add(name)
    return f"{name}.png"


def _earlier_pictures(folder: Path) -> list[Path]:
    """What an earlier evaluation wrote, by its table."""
    table = folder / _TABLE
    if not table.exists():
        return []
    taken: set[str] = set()
    with table.open(encoding="utf-8", newline="") as file:
        names = [row["picture"] for row in csv.DictReader(file) if row.get("picture")]
    return [folder / _PICTURES / _file_name(name, taken) for name in names]


def _briefly(protocol: Mapping[str, object]) -> str:
    colour = {"y": "luma", "rgb": "RGB"}[str(protocol["colour"])]
    return f"{colour}, border {protocol['border']}, data range {protocol['data_range']}"


def _in_words(protocol: Mapping[str, object], scale: int) -> str:
    colour = {
        "y": "the BT.601 luma channel, 16 to 235 (of gray pictures as of equal colour channels)",
        "rgb": "all channels",
    }[str(protocol["colour"])]
    lpips = "LPIPS: SqueezeNet, all channels, whole pictures; lower is nearer to HR. "
    lpips *= "lpips" in protocol
    deep = ""
    if "bits" in protocol:
        deep = f"16-bit gray was scaled to 8 bits from {protocol['bits']} significant ones. "
    return (
        f"Results are rounded to 8 bits and compared with the HR picture on {colour}, leaving out "
        f"{protocol['border']} pixels at every border, data range {protocol['data_range']}. SSIM: "
        f"{protocol['ssim']}, over the places where the window fits. {lpips}{deep}All are computed "
        f"for each picture and then averaged. Enlargement ×{scale}. The pictures of this page are "
        f"compressed (WebP, quality 92), the details are not; exact ones lie in {_PICTURES}/."
    )


def _csv(rows: Sequence[evaluate.Row]) -> str:
    names = list(dict.fromkeys(row.upscaler for row in rows))
    measured = ["psnr", "ssim"] + ["lpips"] * (rows[0].lpips is not None)
    columns = ["picture", *(f"{name} {metric}" for name in names for metric in measured)]
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault(row.picture, {"picture": row.picture})
        line[f"{row.upscaler} psnr"] = f"{row.psnr:.4f}"
        line[f"{row.upscaler} ssim"] = f"{row.ssim:.6f}"
        if row.lpips is not None:
            line[f"{row.upscaler} lpips"] = f"{row.lpips:.4f}"
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines.values())
    return text.getvalue()


def _table(rows: Sequence[evaluate.Row] | Sequence[evaluate.Mean]) -> str:
    """A row an upscaler, the best value of each column (as it is shown) set off."""
    columns = [("PSNR dB", "psnr", ".2f", max), ("SSIM", "ssim", ".4f", max)]
    if rows[0].lpips is not None:
        columns.append(("LPIPS", "lpips", ".3f", min))
    best = {
        name: format(choose(getattr(row, name) for row in rows), form)
        for _, name, form, choose in columns
    }

    def cell(row: evaluate.Row | evaluate.Mean, name: str, form: str) -> str:
        value = format(getattr(row, name), form)
        mark = ' class="best"' if len(rows) > 1 and value == best[name] else ""
        return f"<td{mark}>{value}</td>"

    head = "".join(f"<th>{title}</th>" for title, *_ in columns)
    body = "".join(
        f"<tr><th>{html.escape(row.upscaler)}</th>"
        + "".join(cell(row, name, form) for _, name, form, _ in columns)
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _slider(
    picture: str,
    results: Mapping[str, images.Picture],
    shown: Mapping[str, images.Picture],
    frame: tuple[int, int, int],
) -> str:
    """Two of what is shown, by choice, on either side of a line; `frame`: see `_most_different`."""
    names = list(results)
    left, right = (names[0], names[-1]) if len(names) > 1 else (names[0], "HR")
    layers = "".join(
        f'<img data-name="{html.escape(name)}" src="{_inline(pixels)}" alt="{html.escape(name)}">'
        for name, pixels in shown.items()
    )

    def options(chosen: str) -> str:
        return "".join(
            f'<option value="{html.escape(name)}"{" selected" if name == chosen else ""}>'
            f"{html.escape(name)}</option>"
            for name in shown
        )

    height, width = shown["HR"].shape[:2]
    x, y, side = frame
    spot = (
        f"left:{x / width:.3%};top:{y / height:.3%};width:{side / width:.3%};"
        f"height:{side / height:.3%}"
    )
    return (
        f'<div class="compare" style="max-width:{max(width, _LEAST_WIDTH)}px">'
        f'<div class="slider" style="aspect-ratio:{width}/{height}">{layers}'
        f'<div class="spot" style="{spot}"></div><div class="divide"></div>'
        '<span class="name of-left"></span><span class="name of-right"></span>'
        '<input type="range" min="0" max="1000" value="500" '
        f'aria-label="{html.escape(picture)}: divide between left and right"></div>'
        f'<p class="choice"><label>left <select class="left">{options(left)}</select></label>'
        f'<label>right <select class="right">{options(right)}</select></label></p></div>'
    )


def _detail(
    results: Mapping[str, images.Picture],
    shown: Mapping[str, images.Picture],
    models: Collection[str],
) -> tuple[str, tuple[int, int, int]]:
    """Where the results differ most, enlarged, and its place."""
    several = len(results) > 1
    a, b = _furthest_apart(results, models) if several else (next(iter(results)), "HR")
    x, y, side = _most_different(shown[a], shown[b])
    zooms = "".join(
        f'<figure><img src="{_inline(pixels[y : y + side, x : x + side], exact=True)}" '
        f'alt="detail of {html.escape(name)}"><figcaption>{html.escape(name)}</figcaption></figure>'
        for name, pixels in shown.items()
    )
    words = (
        f'<p class="place">{side} × {side} pixels at {x}, {y} (framed), where {html.escape(a)} and '
        f"{html.escape(b)} differ most:</p>"
    )
    return f'{words}<div class="zooms">{zooms}</div>', (x, y, side)


def _furthest_apart(
    results: Mapping[str, images.Picture], models: Collection[str]
) -> tuple[str, str]:
    """The two results with the largest squared error between them.

    Of two models, else of a model and another, else any: all models are far from bicubic, and in
    the same places.
    """
    pairs = list(itertools.combinations(results, 2))
    most = max(sum(name in models for name in pair) for pair in pairs)
    pairs = [pair for pair in pairs if sum(name in models for name in pair) == most]

    def distance(pair: tuple[str, str]) -> float:
        a, b = (results[name].astype(np.float32) for name in pair)
        return float(np.square(a - b).mean())

    return max(pairs, key=distance)


def _most_different(a: images.Picture, b: images.Picture) -> tuple[int, int, int]:
    """(left, top, side) of the square of `_ZOOM_SIDE` pixels with the largest squared error."""
    error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean(axis=2)
    side = min(_ZOOM_SIDE, *error.shape)
    total = np.pad(error, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    sums = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    top, left = np.unravel_index(int(sums.argmax()), sums.shape)
    return int(left), int(top), side


def _inline(picture: images.Picture, exact: bool = False) -> str:
    """As a data address; WebP, or JPEG where a side is too long for that."""
    kind = "webp" if max(picture.shape) <= _WEBP_MOST else "jpeg"
    options = {"lossless": True, "quality": 50} if exact else {"quality": 92}
    buffer = io.BytesIO()
    images.to_pillow(np.ascontiguousarray(picture)).save(buffer, format=kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
