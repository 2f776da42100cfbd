"""launch/demo.py in a real browser."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sr_dist import generators
from tests.generators import build, describe
from tests.helpers import REPOSITORY, free_port, refuse, succeed

pytest.importorskip("gradio", reason="the extra demo is not installed")


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    made = []
    for name, channels, seed in (("colour", 3, 1), ("gray", 1, 2)):
        description = describe(scale=4, channels=channels, global_skip="bicubic")
        made.append(tmp_path / f"{name}.pth.tar")
        generators.save_published(build(description, seed), made[-1], description)
    return made


@pytest.fixture
def address(models: list[Path], tmp_path: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, str(REPOSITORY / "launch" / "demo.py"), "--checkpoint"]
    command += [*map(str, models), "--port", str(port), "--max-pixels", "20000"]
    command += ["--max-megabytes", "1"]
    # As in a hospital: a proxy, which does not reach this machine. And an unlucky environment.
    proxy = {"http_proxy": "http://127.0.0.1:9", "GRADIO_SHARE": "True"}
    with (
        open(tmp_path / "said.txt", "w") as said,
        subprocess.Popen(command, stdout=said, cwd=tmp_path, env={**os.environ, **proxy}) as server,
    ):
        deadline = time.monotonic() + 120
        while "open http" not in (tmp_path / "said.txt").read_text():
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        server.terminate()
    assert (tmp_path / "said.txt").read_text() == (
        f"open http://127.0.0.1:{port}/   (Ctrl-C ends it)\n"
    )


def test_a_picture_is_enlarged_compared_and_downloaded(
    address: str, browser: Any, models: list[Path], photographs: Path, tmp_path: Path
) -> None:
    small = tmp_path / "in" / "small.png"
    small.parent.mkdir()
    with Image.open(photographs / "coffee.png") as picture:
        picture.convert("RGB").resize((60, 40)).save(small)
        picture.resize((200, 150)).save(tmp_path / "large.png")
    words = ("--checkpoint", models[0], "--engine", "fp32", "--output", tmp_path / "expected")
    succeed("launch/upscale.py", "--input", small, *words)
    expected = np.asarray(Image.open(tmp_path / "expected" / "small.png"))

    page = browser.new_page(viewport={"width": 1300, "height": 900})
    page.set_default_timeout(60_000)
    page.goto(address)
    page.locator("input[type=file]").set_input_files(str(small))
    page.get_by_text("60x40 → 240x160. Left: bicubic. Right: colour.").wait_for()
    sides = page.locator(".slider-wrap img, [data-testid=imageslider] img, .image-container img")
    sides.first.wait_for()
    widths = [
        side.evaluate("img => img.decode().then(() => img.naturalWidth)") for side in sides.all()
    ]
    assert widths and set(widths) == {240} and len(widths) >= 2
    with page.expect_download() as downloading:
        page.get_by_text("Download the result").click()
    downloading.value.save_as(tmp_path / "downloaded.png")
    assert downloading.value.suggested_filename == "small_x4.png"
    assert np.array_equal(np.asarray(Image.open(tmp_path / "downloaded.png")), expected)

    page.get_by_text("LR, its pixels").click()
    page.get_by_text("Left: LR, its pixels. Right: colour.").wait_for()
    page.get_by_label("Model").click()
    page.get_by_role("option", name="gray").click()
    page.get_by_text("Right: gray.").wait_for()

    page.get_by_label("Remove").or_(page.get_by_label("Clear")).first.click()
    page.locator("input[type=file]").set_input_files(str(tmp_path / "large.png"))
    page.get_by_text("The picture has 30,000 pixels; at most 20,000 are enlarged").wait_for()
    page.get_by_label("Remove").or_(page.get_by_label("Clear")).first.click()
    (tmp_path / "heavy.png").write_bytes(small.read_bytes() + bytes(1_100_000))
    page.locator("input[type=file]").set_input_files(str(tmp_path / "heavy.png"))
    page.get_by_text("exceed").first.wait_for()
    page.close()
    with socket.socket() as outside:  # this machine by another address of its own
        port = int(address.rpartition(":")[2])
        assert outside.connect_ex(("127.0.0.2", port)) != 0, "it listens at 127.0.0.1 alone"


def test_what_the_demo_refuses(models: list[Path]) -> None:
    assert "--tile: expected 64 or more" in refuse("launch/demo.py", "--tile", 3)
    assert "nowhere does not exist" in refuse("launch/demo.py", "--checkpoint", "nowhere")
    for port in (0, 65536):
        message = refuse("launch/demo.py", "--checkpoint", models[0], "--port", port)
        assert f"--port: expected 1 to 65535, found {port}" in message
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refuse("launch/demo.py", "--checkpoint", models[0], "--port", port)
        assert f"cannot listen at 127.0.0.1, port {port}" in message
