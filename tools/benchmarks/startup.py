"""From the command to the first step, against importing the libraries; and with many shards."""

from __future__ import annotations

import argparse
import io
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import webdataset
from PIL import Image

from benchmarks import measuring
from sr_dist import images, indexing, shard_writer

REPOSITORY = Path(__file__).resolve().parents[2]
IMPORTS = "import torch, torchvision, accelerate"
MANY, FEW = 10_000, 10  # shards
_SAMPLES = 10_000  # in all, however many shards
_RECIPE = """
run: {{name: {name}, output_dir: {folder}/runs}}
data:
  {{train: {shards}, validation: {folder}/val, crop_size: 48, crops_per_image: 1, num_workers: 0}}
model:
  generator: {{num_channels: 8, num_blocks: 1}}
loss: {{content: {{weight: 0}}, adversarial: {{weight: 0}}}}
train: {{epochs: 1, global_batch_size: 8}}
checkpoint: {{every_steps: 5}}
tracking: {{log_every_steps: 1}}
"""


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few, many = (_shards(folder / str(n), n) for n in (FEW, MANY))
        (folder / "val").mkdir()
        picture = measuring.photographs(None, 128)[0]
        images.save(picture, folder / "val" / "picture.png")
        stopped = _recipe(folder, "stopped", few)
        _time_to_step(stopped, ends_after=7)  # leaves a checkpoint at step 5 of 1250
        kept = folder / "kept"
        shutil.copytree(folder / "runs" / "stopped", kept)
        found: dict[str, list[tuple[float, float]]] = {
            n: [] for n in ("imports", "fresh", "resumed", "many")
        }
        for _ in range(1 + arguments.repetitions):
            shutil.rmtree(folder / "runs", ignore_errors=True)
            shutil.copytree(kept, folder / "runs" / "stopped")
            found["imports"].append((_time_imports(), 0.0))
            found["fresh"].append(_time_to_step(_recipe(folder, "fresh", few)))
            found["resumed"].append(_time_to_step(stopped))
            found["many"].append(_time_to_step(_recipe(folder, "many", many)))
    seconds = {n: [s for s, _ in its[1:]] for n, its in found.items()}  # the first warms the disk
    megabytes = {n: [m for _, m in its[1:]] for n, its in found.items()}
    cases = {"startup": (seconds["fresh"], seconds["imports"])}
    medians = {name: statistics.median(its) for name, its in seconds.items()}
    grown = [statistics.median(megabytes[name]) for name in ("many", "fresh")]
    return {
        # How many times as long as the imports, and not how many times better.
        **measuring.summary("startup", cases, "seconds", more_is_better=True),
        "resumed_minus_fresh_seconds": round(medians["resumed"] - medians["fresh"], 3),
        "shards": {
            "few": FEW,
            "many": MANY,
            "many_minus_few_seconds": round(medians["many"] - medians["fresh"], 3),
            "resident_megabytes": {"few": round(grown[1], 1), "many": round(grown[0], 1)},
            "resident_ratio": round(grown[0] / grown[1], 4),
        },
        **measuring.about(torch.device("cpu")),
    }


def _shards(folder: Path, number: int) -> Path:
    """So many shards of small pictures, _SAMPLES in all."""
    folder.mkdir()
    picture = io.BytesIO()
    Image.effect_noise((64, 64), 60).convert("RGB").save(picture, "PNG")
    member = picture.getvalue()
    each = _SAMPLES // number
    for shard in range(number):
        with webdataset.TarWriter(str(folder / f"{shard:06d}.tar"), encoder=False) as tar:
            for sample in range(each):
                tar.write({"__key__": f"{shard * each + sample:09d}", "png": member})
    indexing.index(sorted(folder.glob("*.tar")), min_size=shard_writer.Options.tile // 8)
    return folder


def _recipe(folder: Path, name: str, shards: Path) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(_RECIPE.format(name=name, folder=folder, shards=shards))
    return path


def _time_imports() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    return time.perf_counter() - began


def _time_to_step(recipe: Path, ends_after: int = 1) -> tuple[float, float]:
    """Seconds from the command to the end of its first step, and resident megabytes then.

    The process is killed after `ends_after` steps.
    """
    began = time.perf_counter()
    command = [sys.executable, REPOSITORY / "launch" / "train.py", "--config", recipe]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines, steps, seconds = [], 0, 0.0
        for line in process.stderr:
            lines.append(line)
            if line.startswith("epoch "):
                steps += 1
                seconds = seconds or time.perf_counter() - began
                if steps == ends_after:
                    break
        megabytes = _resident(process.pid) if steps else 0.0
        process.send_signal(signal.SIGKILL)
    if not steps:
        raise RuntimeError(f"no step came:\n{''.join(lines)}")
    return seconds, megabytes


def _resident(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1000
    raise RuntimeError(f"process {pid} is gone")
