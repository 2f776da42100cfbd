"""Two processes on this machine against one, each with one thread: pictures/s of training steps.

All is measured in the same two processes, in turns: in one both work on a batch of their own and
reduce their gradients, in the next rank 0 works alone and the other sleeps, in the third both work
and send nothing, which is what the machine has for two.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import measuring, step
from sr_dist import gan, ranks
from sr_dist.distributed import Processes, joined
from sr_dist.errors import UserError

HEADS = ("linear", "gap")
_STEPS = 2  # of a turn
_WARM_UP = 1


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Starts the two processes, of this same command."""
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        raise UserError(
            f"scaling compares two GPUs with one, and {torch.cuda.device_count()} is here; on the "
            "CPU: CUDA_VISIBLE_DEVICES= python tools/benchmark.py scaling"
        )
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        options = {
            "--batch-size": arguments.batch_size,
            "--crop-size": arguments.crop_size,
            "--scale": arguments.scale,
            "--repetitions": arguments.repetitions,
            "--mixed-precision": arguments.mixed_precision,
        }
        script = Path(__file__).resolve().parents[1] / "benchmark.py"
        subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run"),
                *("--standalone", "--nproc_per_node", "2"),
                *(script, "scaling", "--worker", result),
                *(str(word) for option in options.items() for word in option),
            ],
            check=True,
            # torchrun gives each process one thread, and says so.
            stderr=None if arguments.verbose else subprocess.DEVNULL,
        )
        found: dict[str, object] = json.loads(result.read_text())
        return found


def work(arguments: argparse.Namespace) -> None:
    """One of the two processes; rank 0 writes what was found."""
    torch.set_num_threads(1)
    with joined(arguments.mixed_precision, seed=0) as processes:
        cases = {head: _measure(processes, arguments, head) for head in HEADS}
        if not processes.is_main:
            return
        compared = {head: (turns["together"], turns["alone"]) for head, turns in cases.items()}
        result = {
            **measuring.summary("scaling", compared, "images/s", more_is_better=True),
            "sending_nothing": {
                head: round(statistics.median(turns["apart"]), 4) for head, turns in cases.items()
            },
            "world_size": processes.world_size,
            "config": {
                "batch_size_per_process": arguments.batch_size,
                "crop_size": arguments.crop_size,
                "scale": arguments.scale,
                "mixed_precision": processes.mixed_precision,
            },
            **measuring.about(processes.device),
        }
        arguments.worker.write_text(json.dumps(result))


class _Apart(Processes):
    """One of several processes that trains without the others."""

    def wrap(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, **options: Any
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        return super().wrap(module, optimizer, **{**options, "reduces": False})


def _measure(
    processes: Processes, arguments: argparse.Namespace, head: str
) -> dict[str, list[float]]:
    """Pictures/s of both together, of rank 0 alone, and of both apart, in turns."""
    lr, hr = step.random_batch(arguments.batch_size, arguments.crop_size, arguments.scale)
    objective = gan.build_objective(**step.LOSSES, device=processes.device)
    size, scale = arguments.batch_size * processes.world_size, arguments.scale
    together = step.our_step(
        processes, step.build_networks(processes, scale, size, head), objective
    )
    fields = {f.name: getattr(processes, f.name) for f in dataclasses.fields(processes)}
    single = _Apart(**{**fields, "world_size": 1, "reductions": ranks.Reductions(1, "none")})
    networks = step.build_networks(single, scale, arguments.batch_size, head)
    apart = step.our_step(single, networks, objective)
    synchronize = measuring.synchronizer(processes.device)
    found: dict[str, list[float]] = {"together": [], "alone": [], "apart": []}
    for turn in range(_WARM_UP + arguments.repetitions):
        for way, rates in found.items():
            processes.wait_for_all(f"{head} {turn} {way}")  # asleep, so that one has the machine
            torch.distributed.barrier()  # and begin at the same time, as the steps of a run do
            run = together if way == "together" else apart
            images = 0.0  # a second, on this rank
            if way != "alone" or processes.is_main:
                synchronize()
                began = time.perf_counter()
                for _ in range(_STEPS):
                    run(lr, hr)
                synchronize()
                images = arguments.batch_size * _STEPS / (time.perf_counter() - began)
            both = processes.sum(torch.tensor(images, device=processes.device))
            if turn >= _WARM_UP:
                rates.append(float(both))
    return found
