"""The results of an evaluation as files: metrics.json, metrics.csv, pictures and report.html."""

from __future__ import annotations

import base64
import csv
import html
import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sr_dist import evaluate, files, images
from sr_dist.errors import UserError

_ZOOM_SIDE = 64  # HR pixels of the enlarged detail
_ZOOM = 4
_WEBP_MOST = 16383  # pixels on a side
_METRICS, _TABLE, _PICTURES = "metrics.json", "metrics.csv", "pictures"

Summary = dict[str, Any]


class Writer:
    """Collects pictures as they are evaluated (`add`), then writes the rest (`finish`)."""

    def __init__(self, folder: Path, *, scale: int, protocol: dict[str, object]) -> None:
        self.folder = folder
        self.scale = scale
        self.protocol = protocol
        self.sections: list[tuple[str, str]] = []  # (picture, HTML)
        self.files: set[str] = set()  # names of pictures written
        for picture in _earlier_pictures(folder):
            picture.unlink(missing_ok=True)

    def add(self, pair: evaluate.Pair, results: Mapping[str, images.Picture]) -> None:
        """Write the side-by-side picture; keep what the report shows of it."""
        path = _path_of(pair.name, self.folder, self.files)
        images.save(evaluate.side_by_side(pair, results), path)
        shown = {
            "LR": images.enlarge(pair.lr, self.scale, "nearest"),
            **results,
            "HR": pair.hr,
        }
        self.sections.append((pair.name, _section(pair, results, shown)))

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
        files.write_whole(self.folder / _METRICS, json.dumps(summary, indent=1) + "\n")
        files.write_whole(self.folder / _TABLE, _csv(rows))
        files.write_whole(self.folder / "report.html", self._html(rows, means))
        return summary

    def _html(self, rows: Sequence[evaluate.Row], means: Sequence[evaluate.Mean]) -> str:
        of_picture: dict[str, list[evaluate.Row]] = {}
        for row in rows:
            of_picture.setdefault(row.picture, []).append(row)
        sections = "".join(
            f"<section><h2>{html.escape(name)}</h2>{_table(of_picture[name])}{body}</section>"
            for name, body in self.sections
        )
        return _PAGE.format(
            title=f"Super-resolution ×{self.scale}",
            count=len(self.sections),
            protocol=html.escape(_in_words(self.protocol, self.scale)),
            means=_table(means),
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


def _path_of(picture: str, folder: Path, taken: set[str]) -> Path:
    """Where the side-by-side view of a picture goes; its name is added to `taken`."""
    name = evaluate.unused_name(evaluate.file_name(picture), taken)
    taken.add(name)
    return folder / _PICTURES / f"{name}.png"


def _earlier_pictures(folder: Path) -> list[Path]:
    """What an earlier evaluation wrote, by its table."""
    table = folder / _TABLE
    if not table.exists():
        return []
    taken: set[str] = set()
    with table.open(encoding="utf-8", newline="") as file:
        names = [row["picture"] for row in csv.DictReader(file) if row.get("picture")]
    return [_path_of(name, folder, taken) for name in names]


def _in_words(protocol: Mapping[str, object], scale: int) -> str:
    colour = {
        "y": "the BT.601 luma channel, 16 to 235 (of gray pictures as of equal colour channels)",
        "rgb": "all channels",
    }[str(protocol["colour"])]
    lpips = "LPIPS: SqueezeNet, all channels, whole pictures; lower is nearer to HR. "
    lpips *= "lpips" in protocol
    return (
        f"Results are rounded to 8 bits and compared with the HR picture on {colour}, leaving out "
        f"{protocol['border']} pixels at every border, data range {protocol['data_range']}. SSIM: "
        f"{protocol['ssim']}, over the places where the window fits. {lpips}All are computed for "
        f"each picture and then averaged. Enlargement ×{scale}. The pictures below are compressed "
        "for this page (WebP, quality 92); exact ones lie beside it in pictures/."
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
    """A row an upscaler, the best value of each column set off."""
    columns = [("PSNR dB", "psnr", ".2f", max), ("SSIM", "ssim", ".4f", max)]
    if rows[0].lpips is not None:
        columns.append(("LPIPS", "lpips", ".3f", min))
    best = {name: choose(getattr(row, name) for row in rows) for _, name, _, choose in columns}

    def cell(row: evaluate.Row | evaluate.Mean, name: str, form: str) -> str:
        value = getattr(row, name)
        mark = ' class="best"' if len(rows) > 1 and value == best[name] else ""
        return f"<td{mark}>{value:{form}}</td>"

    head = "".join(f"<th>{title}</th>" for title, *_ in columns)
    body = "".join(
        f"<tr><th>{html.escape(row.upscaler)}</th>"
        + "".join(cell(row, name, form) for _, name, form, _ in columns)
        + "</tr>"
        for row in rows
    )
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _section(
    pair: evaluate.Pair, results: Mapping[str, images.Picture], shown: Mapping[str, images.Picture]
) -> str:
    """The slider over two pictures of choice, and the detail where they differ most."""
    first, last = _furthest_apart(results) if len(results) > 1 else (next(iter(results)), "HR")
    layers = "".join(
        f'<img data-name="{html.escape(name)}" src="{_inline(picture)}" alt="{html.escape(name)}">'
        for name, picture in shown.items()
    )

    def options(chosen: str) -> str:
        return "".join(
            f"<option{' selected' if name == chosen else ''}>{html.escape(name)}</option>"
            for name in shown
        )

    top, left, side = _most_different(shown[first], shown[last])
    zooms = "".join(
        f'<figure><img src="{_inline(picture[top : top + side, left : left + side], exact=True)}" '
        f'width="{side * _ZOOM}" alt=""><figcaption>{html.escape(name)}</figcaption></figure>'
        for name, picture in shown.items()
    )
    height, width = pair.hr.shape[:2]
    return (
        f'<div class="slider" style="max-width:{width}px;aspect-ratio:{width}/{height}">{layers}'
        '<div class="line"></div>'
        '<input type="range" min="0" max="1000" value="500" aria-label="divide"></div>'
        f'<p class="choice">left <select class="left">{options(first)}</select> '
        f'right <select class="right">{options(last)}</select></p>'
        f'<div class="zooms">{zooms}</div>'
        f'<p class="place">detail at x {left}, y {top}, {side} pixels wide, where '
        f"{html.escape(first)} and {html.escape(last)} differ most</p>"
    )


def _furthest_apart(results: Mapping[str, images.Picture]) -> tuple[str, str]:
    """The two results with the largest squared error between them."""

    def distance(pair: tuple[str, str]) -> float:
        a, b = (results[name].astype(np.float32) for name in pair)
        return float(np.square(a - b).mean())

    return max(itertools.combinations(results, 2), key=distance)


def _most_different(a: images.Picture, b: images.Picture) -> tuple[int, int, int]:
    """(top, left, side) of the square of `_ZOOM_SIDE` pixels with the largest squared error."""
    error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean(axis=2)
    side = min(_ZOOM_SIDE, *error.shape)
    total = np.pad(error, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    sums = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    top, left = np.unravel_index(int(sums.argmax()), sums.shape)
    return int(top), int(left), side


def _inline(picture: images.Picture, exact: bool = False) -> str:
    """As a data address; WebP, or JPEG where a side is too long for that."""
    kind = "webp" if max(picture.shape) <= _WEBP_MOST else "jpeg"
    options = {"lossless": True, "quality": 50} if exact else {"quality": 92}
    buffer = io.BytesIO()
    images.to_pillow(np.ascontiguousarray(picture)).save(buffer, format=kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem;
  color: #222; background: #fafafa }}
table {{ border-collapse: collapse; margin: .5rem 0 }}
th, td {{ padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child {{ text-align: left }}
section {{ margin: 3rem 0 }}
.slider {{ position: relative; width: 100%; overflow: hidden; background: #ddd }}
.slider img {{ position: absolute; inset: 0; width: 100%; height: 100%; visibility: hidden }}
.slider .line {{ position: absolute; top: 0; bottom: 0; width: 2px; background: #fff;
  box-shadow: 0 0 3px #000; pointer-events: none }}
.slider input {{ position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0;
  cursor: ew-resize }}
.zooms {{ display: flex; flex-wrap: wrap; gap: .6rem }}
.zooms img {{ image-rendering: pixelated; display: block }}
figure {{ margin: 0 }} figcaption, .place, .choice {{ color: #666; font-size: 13px }}
.best {{ font-weight: 600 }}
</style>
<h1>{title}</h1>
<p>{protocol}</p>
<h2>Mean over {count} pictures</h2>
{means}
{sections}
<script>
for (const section of document.querySelectorAll("section")) {{
  const slider = section.querySelector(".slider"), range = slider.querySelector("input");
  const left = section.querySelector(".left"), right = section.querySelector(".right");
  const draw = () => {{
    const share = range.value / 10;
    for (const img of slider.querySelectorAll("img")) {{
      const isLeft = img.dataset.name === left.value, isRight = img.dataset.name === right.value;
      img.style.visibility = isLeft || isRight ? "visible" : "hidden";
      img.style.zIndex = isLeft ? 1 : 0;
      img.style.clipPath = isLeft && !isRight ? `inset(0 ${{100 - share}}% 0 0)` : "none";
    }}
    const line = slider.querySelector(".line");
    line.style.left = `calc(${{share}}% - 1px)`; line.style.zIndex = 2; range.style.zIndex = 3;
  }};
  for (const part of [range, left, right]) part.addEventListener("input", draw);
  draw();
}}
</script>
</html>
"""
