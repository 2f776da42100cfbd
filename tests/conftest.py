from __future__ import annotations

import fcntl
import gc
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

from sr_dist import dataset, images, shard_writer, shards
from tests import local_server, runs
from tests.helpers import SHARED

# More threads than idle cores wait for each other at every layer; the networks here are tiny.
torch.set_num_threads(1)

# How long an example takes says nothing beside other tests.
hypothesis.settings.register_profile("sr_dist", deadline=None)
hypothesis.settings.load_profile("sr_dist")

# A shell's background jobs ignore SIGINT, and would hand that on to what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test first: begun last, it would run on alone."""
    items.sort(key=lambda item: item.path.stem != "test_soak")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(7200))


def pytest_collection_finish() -> None:
    """What is loaded by now stays: each look for garbage in it takes a quarter of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Benchmark pictures and published weights that lie beside the project on some machines."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} (benchmark pictures and published weights) is not here")
    return SHARED


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium, the system's."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if found is None:
        pytest.skip("no Chromium is here (on Debian: apt install chromium)")
    with playwright.sync_playwright() as engine:
        opened = engine.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu"]
        )
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three real photographs: astronaut, coffee and chelsea."""
    folder = tmp_path_factory.mktemp("photographs")
    wanted = ("astronaut.png", "chelsea.png", "coffee.png")
    for path in dataset.find_sample_photographs():
        if path.name in wanted:
            (folder / path.name).write_bytes(path.read_bytes())
    assert len(list(folder.iterdir())) == 3
    return folder


@pytest.fixture(scope="session")
def sharded(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs in tiles of 64 pixels, in several shards of unequal counts."""
    folder = tmp_path_factory.mktemp("sharded") / "shards"
    options = shard_writer.Options(tile=64, samples_per_shard=30, min_size=48)
    shard_writer.write(images.list_pictures(photographs), folder, options)
    index = shards.read_index(str(folder))
    assert len(index.shards) == 3 and len({shard.count for shard in index.shards}) > 1
    return folder


@pytest.fixture
def picture() -> images.Picture:
    """A smooth picture with some structure, (64, 80, 3)."""
    y, x = np.mgrid[0:64, 0:80]
    channels = [127 + 100 * np.sin(x / 7 + k) * np.cos(y / 5 - k) for k in range(3)]
    return np.stack(channels, axis=2).round().astype(np.uint8)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[local_server.Server]:
    """A web server on this machine; no proxy stands before it."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    running = local_server.start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def recipe(sharded: Path, photographs: Path, tmp_path: Path) -> Path:
    """A small GAN that warms up for an epoch of 18 steps.

    Without content loss; `loss.content.weight=0.006` adds it, of random features.
    """
    return _write_recipe(tmp_path, sharded, photographs)


@pytest.fixture(scope="session")
def trained_on_two(
    sharded: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run of `recipe` by two processes of `accelerate launch` that nothing disturbed.

    Trained once for all of pytest's own processes.
    """
    place = tmp_path_factory.getbasetemp()
    place = (place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "trained_on_two"
    place.mkdir(exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "done").exists():
            runs.train_on_two(_write_recipe(place, sharded, photographs), launched=True)
            (place / "done").touch()
    return place / "runs" / "small"


def _write_recipe(folder: Path, sharded: Path, photographs: Path) -> Path:
    # A part of it: it is measured and shown in every epoch of every run.
    part = images.decode(photographs / "chelsea.png", 3)[60:188, 120:280]
    images.save(part, folder / "chelsea.png")
    (folder / "val.txt").write_text("chelsea.png\n")
    path = folder / "recipe.yaml"
    path.write_text(
        f"""
run: {{name: small, output_dir: {folder}/runs}}
data:
  {{train: {sharded}, validation: {folder}/val.txt, crop_size: 32, crops_per_image: 1,
    num_workers: 1}}
model:
  generator: {{num_channels: 8, num_blocks: 1, global_skip: bicubic}}
  discriminator: {{head: gap}}
loss:
  pixel: {{kind: l1}}
  content: {{weights: none, weight: 0}}
  adversarial: {{kind: bce}}
train: {{epochs: 2, global_batch_size: 8, warmup_images: 144, ema_half_life: 40}}
tracking: {{log_every_steps: 4}}
"""
    )
    return path
