"""report.html in a real browser."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sr_dist import evaluate, images, metrics, report

# The gray of each picture.
FLAT = {"LR": 10, "bicubic": 60, "A": 120, "B": 180, "HR": 240}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on two pictures of 200x160 pixels, each result of one gray."""
    folder = tmp_path_factory.mktemp("report")

    def flat(name: str, factor: int = 4) -> images.Picture:
        return np.full((40 * factor, 50 * factor, 3), FLAT[name], np.uint8)

    protocol = metrics.protocol("y", 4, lpips=True)
    models = ["A", "B"]
    writer = report.Writer(folder, data="some/set/HR", scale=4, protocol=protocol, models=models)
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
    page.add_style_tag(content=".slider .divide, .slider .spot { display: none }")
    shot = Image.open(io.BytesIO(slider.screenshot())).convert("L")
    row = np.asarray(shot)[shot.height // 2].astype(int)
    return row.tolist(), shot.width


def test_slider_shows_left_and_right_of_its_place(page: Any) -> None:
    slider = page.locator(".slider").first
    box = slider.bounding_box()
    for share in (0.25, 0.8):
        page.mouse.click(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
        line = page.locator(".divide").first.bounding_box()
        assert abs(line["x"] + 1 - box["x"] - share * box["width"]) <= 2
        row, width = grays(page, slider)
        page.reload()  # with the line
        assert width == 480, "small pictures are enlarged"
        cut = next(place for place, level in enumerate(row) if abs(level - FLAT["B"]) <= 3)
        assert cut == pytest.approx(share * width, abs=2)
        assert all(abs(level - FLAT["bicubic"]) <= 3 for level in row[: cut - 1])
        assert all(abs(level - FLAT["B"]) <= 3 for level in row[cut:])
    names = page.locator("section").first.locator(".name").all_inner_texts()
    assert names == ["bicubic", "B"], "said on the picture itself"


def test_slider_follows_the_pointer(page: Any) -> None:
    box = page.locator(".slider").first.bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 400, box["y"] + 60)
    page.mouse.up()
    page.mouse.move(box["x"] + 10, box["y"] + 60)
    line = page.locator(".divide").first.bounding_box()
    assert line["x"] + 1 == pytest.approx(box["x"] + 400, abs=2)


def test_any_two_pictures_can_be_compared(page: Any) -> None:
    section = page.locator("section").nth(1)
    section.locator(".left").select_option("A")
    section.locator(".right").select_option("HR")
    row, _ = grays(page, section.locator(".slider"))
    assert abs(row[10] - FLAT["A"]) <= 3 and abs(row[-10] - FLAT["HR"]) <= 3
    assert section.locator(".name").all_inner_texts() == ["A", "HR"]
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
    outline = "e => getComputedStyle(e.parentElement).outlineStyle"
    assert knob.evaluate(outline) == "solid", "who moves it by keys sees where they are"


def test_page_is_complete_and_needs_nothing_else(page: Any) -> None:
    assert page.complaints == []
    assert [url for url in page.asked if not url.startswith(("data:", "file:"))] == []
    assert sum(url.startswith("file:") for url in page.asked) == 1, "the page alone"
    titles = [title.splitlines()[0] for title in page.locator("h2").all_inner_texts()]
    assert [title.split(" 50 ")[0] for title in titles] == [
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
    assert page.locator("h1").inner_text() == "Super-resolution ×4: set/HR"
    assert page.locator("h2 small").first.inner_text() == "50 × 40 → 200 × 160"
    words = page.locator(".protocol").text_content()
    for said in ("BT.601 luma", "4 pixels at every border", "data range 255", "SqueezeNet"):
        assert said in words
    zooms = page.locator("section").first.locator(".zooms figcaption").all_inner_texts()
    assert zooms == ["LR", "bicubic", "A", "B", "HR"]
    place = page.locator("section").first.locator(".place").inner_text()
    assert place.endswith("where A and B differ most:"), "bicubic is further from B"
    shown = page.locator(".zooms img").first
    assert shown.evaluate("e => e.naturalWidth") == 64
    assert shown.bounding_box()["width"] >= 115, "enlarged"
    assert shown.evaluate("e => getComputedStyle(e).imageRendering") == "pixelated"
    for width in (900, 390, 320):
        page.set_viewport_size({"width": width, "height": 800})
        found = page.evaluate("document.documentElement.scrollWidth")
        assert found <= width, "nothing sticks out"


def test_dark_where_that_is_preferred(browser: Any, page_file: Path) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        opened = browser.new_page(color_scheme=scheme)
        opened.goto(page_file.as_uri())
        grounds.append(opened.evaluate("getComputedStyle(document.body).backgroundColor"))
        opened.close()
    assert grounds == ["rgb(255, 255, 255)", "rgb(20, 24, 28)"]


def test_pictures_of_the_page_are_near_the_exact_ones(photographs: Path) -> None:
    crop = images.decode(photographs / "coffee.png", 3)[100:300, 100:400]
    for exact, least in ((False, 34.0), (True, 99.0)):
        data = base64.b64decode(report._inline(crop, exact).partition(",")[2])
        psnr, _ = metrics.compare(images.decode(data, 3), crop, colour="rgb", border=0)
        assert psnr > least


def test_equal_values_are_both_the_best() -> None:
    rows = [evaluate.Mean("a", 30.001, 0.9, None), evaluate.Mean("b", 30.002, 0.8, None)]
    assert report._table(rows).count('<td class="best">30.00</td>') == 2
