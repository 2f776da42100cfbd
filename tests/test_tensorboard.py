"""What TensorBoard shows of a run, in a real browser."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sr_dist import train
from tests.helpers import free_port
from tests.runs import load


@pytest.fixture
def address(recipe: Path, tmp_path: Path) -> Iterator[str]:
    """TensorBoard on a run that was stopped after an epoch and went on to a second, and another."""
    train.run(load(recipe, "train.epochs=1"))
    train.run(load(recipe, "train.epochs=2", "optimizer.generator.learning_rate=5e-4"))
    other = ("run.name=other", "train.epochs=1", "optimizer.generator.learning_rate=0.002")
    train.run(load(recipe, *other, "train.warmup_images=0"))
    port = free_port()
    words = ["-m", "tensorboard.main", "--logdir", tmp_path / "runs", "--port", port]
    # Its own reader: the fast one is a program that is not there for every machine.
    words += ["--load_fast=false", "--reload_interval", "1"]
    with (
        open(tmp_path / "said.txt", "w") as said,
        subprocess.Popen([sys.executable, *map(str, words)], stderr=said) as server,
    ):
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def test_a_run_is_shown_with_its_charts_pictures_and_settings(address: str, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(60_000)

    def opened(place: str) -> None:
        for _ in range(60):  # until it listens
            try:
                page.goto(f"{address}/#{place}", wait_until="load")
                page.reload()
                return
            except Exception as error:
                if "ERR_CONNECTION_REFUSED" not in str(error):
                    raise
                page.wait_for_timeout(500)
        raise AssertionError("TensorBoard does not answer")

    opened("timeseries")
    page.get_by_text("small/tensorboard", exact=True).first.wait_for()
    for tag in ("loss/pixel", "psnr/SR"):
        page.get_by_text(tag.partition("/")[0], exact=True).first.wait_for()
    opened("custom_scalars")
    for group in ("quality", "losses", "scores", "training", "machine"):
        page.get_by_text(group, exact=True).first.wait_for()
    page.get_by_text("PSNR", exact=True).first.wait_for()
    opened("images")
    picture = page.locator("img[src*='individualImage']")
    picture.first.wait_for()
    assert picture.first.evaluate("img => img.decode().then(() => img.naturalWidth)") > 400
    opened("text")
    page.get_by_text("learning_rate: 0.0005").first.wait_for()
    opened("hparams")
    page.get_by_text("optimizer.generator.learning_rate").first.wait_for()
    for run in ("small", "other"):
        page.get_by_text(f"{run}/tensorboard").first.wait_for()
    page.close()
