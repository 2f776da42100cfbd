"""Training small runs in tests, and looking at what they leave."""

from __future__ import annotations

import contextlib
import csv
import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sr_dist import (
    checkpoint,
    config,
    gan,
)
from tests.helpers import REPOSITORY, Done, run, run_ranks

TWO_PROCESSES = REPOSITORY / "launch" / "accelerate" / "cpu_2_processes.yaml"
ONE_PROCESS = REPOSITORY / "launch" / "accelerate" / "cpu.yaml"
SLOW_STEPS = REPOSITORY / "tests" / "workers" / "slow_steps.py"


def load(recipe: Path, *overrides: str) -> config.Config:
    return config.load(recipe, overrides)


def of_first_shard(recipe: Path) -> str:
    """The override for a shorter epoch: 6 steps of 8."""
    return f"data.train={load(recipe).data.train}/shard-{{000000..000000}}.tar"


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "logs" / "metrics_1_train_results.csv").open() as file:
        return list(csv.DictReader(file))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def saved(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """All tensors of the newest checkpoint, and its meta.json."""
    found = checkpoint.find_newest(folder / "checkpoints")
    assert found is not None
    tensors = {
        f"{path.stem}/{key}": value
        for path in sorted(found.folder.glob("*.safetensors"))
        for key, value in safetensors.torch.load_file(path).items()
    }
    for name, optimizer in found.training()["optimizers"].items():
        for number, state in optimizer["state"].items():
            tensors |= {f"optimizer/{name}/{number}/{k}": v for k, v in state.items()}
    return tensors, found.meta


@contextlib.contextmanager
def full_disk(most: int = 20_000) -> Iterator[None]:
    """No file can grow beyond `most` bytes, which a checkpoint's do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The first file with `name` in its name finds the disk full; there is room for all others."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("/proc, which tells what file is written, is not on this system")
    real, struck = os.fsync, []

    def fsync(file: int) -> None:
        path = os.readlink(f"/proc/self/fd/{file}")
        if name in path and not struck:
            struck.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    real, calls = gan.training_step, []

    def stopping(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(gan, "training_step", stopping)


def launch(processes: Path, script: str | Path, *words: str | Path) -> Done:
    """`accelerate launch` of a script of the repository, by a file of launch/accelerate/."""
    return run(
        *("accelerate", "launch", "--config_file", processes, REPOSITORY / script, *words),
        timeout=240,
    )


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    """For what tests/workers/slow_steps.py says, under a launcher."""
    assert process.stdout is not None
    assert any(line.strip() == f"step {step}" for line in process.stdout), "it ended before"


def train_on_two(recipe: Path, *overrides: str, launched: bool = False) -> Done:
    words = ("launch/train.py", "--config", recipe, *overrides)
    done = launch(TWO_PROCESSES, *words) if launched else run_ranks(2, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Run folder: ") == 1, "the result is said once"
    assert "Grad strides do not match" not in done.stderr, (
        "a gradient is not laid out as its weight"
    )
    return done


def assert_same_run(one: Path, other: Path) -> None:
    """Two runs came to the same, bit for bit: weights, optimisers, CSV, TensorBoard."""
    (expected, _), (found, _) = saved(one), saved(other)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert rows(other) == rows(one)
    points, other_points = scalars(one), scalars(other)
    for tag in points:
        if not tag.startswith(("speed/", "memory/")):
            assert other_points[tag] == points[tag], f"{tag}: no point is lost or doubled"
