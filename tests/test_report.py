"""report.html in a real browser."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sr_dist import evaluate, images, metrics, report

FLAT = {"LR": 10, "bicubic": 60, "A": 120, "B": 180, "HR": 240}  # the gray of each picture


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on two pictures of 200x160 pixels, each result of one gray."""
    folder = tmp_path_factory.mktemp("report")

    def flat(name: str, factor: int = 4) -> images.Picture:
        return np.full((40 * factor, 50 * factor, 3), FLAT[name], np.uint8)

    protocol = metrics.protocol("y", 4, lpips=True)
    writer = report.Writer(folder, scale=4, protocol=protocol)
    rows = []
    for number, picture in enumerate(("first.png", "second <b>.png")):
        pair = evaluate.Pair(picture, flat("LR", 1), flat("HR"))
        writer.add(pair, {name: flat(name) for name in ("bicubic", "A", "B")})
        rows += [
            evaluate.Row(picture, name, 20.0 + place + number, 0.5 + place / 10, 0.3 - place / 10)
            for place, name in enumerate(("bicubic", "A", "B"))
        ]
    writer.finish(rows)
    return folder / "report.html"


@pytest.fixture
def page(browser: Any, page_file: Path) -> Any:
    opened = browser.new_page(viewport={"width": 900, "height": 1000})
    opened.asked, opened.complaints = [], []
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.on("console", lambda message: opened.complaints.append(message.text))
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.goto(page_file.as_uri())
    yield opened
    opened.close()


def grays(page: Any, slider: Any) -> tuple[list[int], int]:
    """The levels along the middle row of a slider, the dividing line blanked, and its width."""
    page.add_style_tag(content=".slider .line { display: none }")
    shot = Image.open(io.BytesIO(slider.screenshot())).convert("L")
    row = np.asarray(shot)[shot.height // 2].astype(int)
    return row.tolist(), shot.width


def test_slider_shows_left_and_right_of_its_place(page: Any) -> None:
    slider = page.locator(".slider").first
    box = slider.bounding_box()
    for share in (0.25, 0.8):
        page.mouse.click(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
        row, width = grays(page, slider)
        assert width == 200
        cut = next(place for place, level in enumerate(row) if abs(level - FLAT["B"]) <= 3)
        assert cut == pytest.approx(share * width, abs=8)  # a range input's thumb has a width
        assert all(abs(level - FLAT["bicubic"]) <= 3 for level in row[: cut - 1])
        assert all(abs(level - FLAT["B"]) <= 3 for level in row[cut:])


def test_any_two_pictures_can_be_compared(page: Any) -> None:
    section = page.locator("section").nth(1)
    section.locator(".left").select_option("A")
    section.locator(".right").select_option("HR")
    row, _ = grays(page, section.locator(".slider"))
    assert abs(row[10] - FLAT["A"]) <= 3 and abs(row[-10] - FLAT["HR"]) <= 3
    first, _ = grays(page, page.locator(".slider").first)
    assert abs(first[10] - FLAT["bicubic"]) <= 3, "the other sliders are as they were"
    section.locator(".right").select_option("A")
    row, _ = grays(page, section.locator(".slider"))
    assert all(abs(level - FLAT["A"]) <= 3 for level in row)


def test_keys_move_the_slider(page: Any) -> None:
    knob = page.locator(".slider input").first
    knob.focus()
    before = int(knob.input_value())
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    assert int(knob.input_value()) == before + 20


def test_page_is_complete_and_needs_nothing_else(page: Any) -> None:
    assert page.complaints == []
    assert [url for url in page.asked if not url.startswith(("data:", "file:"))] == []
    assert sum(url.startswith("file:") for url in page.asked) == 1, "the page alone"
    assert page.locator("h2").all_inner_texts() == [
        "Mean over 2 pictures",
        "first.png",
        "second <b>.png",
    ]
    table = page.locator("table").first.inner_text().split()
    assert table[:4] == ["PSNR", "dB", "SSIM", "LPIPS"]
    assert table[4:] == [
        *("bicubic", "20.50", "0.5000", "0.300"),
        *("A", "21.50", "0.6000", "0.200"),
        *("B", "22.50", "0.7000", "0.100"),
    ]
    assert page.locator("table").first.locator(".best").all_inner_texts() == [
        "22.50",
        "0.7000",
        "0.100",
    ]
    words = page.locator("p").first.inner_text()
    for said in ("BT.601 luma", "4 pixels at every border", "data range 255", "SqueezeNet"):
        assert said in words
    zooms = page.locator("section").first.locator(".zooms figcaption").all_inner_texts()
    assert zooms == ["LR", "bicubic", "A", "B", "HR"]
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 900, "nothing sticks out"
