"""Resident memory of a process that reads samples, after a tenth of them and after all."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks import measuring
from sr_dist import dataset, machine, shard_writer, shards, stream
from sr_dist.degradation import Degradation


def crops(
    index: shards.Index,
    *,
    batch_size: int,
    crop_size: int,
    scale: int,
    crops_per_image: int,
    steps: int | None = None,
) -> stream.CropStream:
    """What one process reads of `index`: `steps`, or one epoch."""
    plan = shards.make_plan(
        index,
        seed=0,
        global_batch_size=batch_size,
        crops_per_image=crops_per_image,
        crop_size=crop_size,
    )
    return stream.CropStream(
        index=index,
        plan=plan,
        scale=scale,
        channels=3,
        crop_size=crop_size,
        bits=16,
        degradation=Degradation(),
        rank=0,
        world_size=1,
        first_step=0,
        last_step=plan.steps_per_epoch if steps is None else steps,
    )


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    steps = arguments.samples // arguments.batch_size
    with tempfile.TemporaryDirectory() as folder:
        pictures = [(path, path.name) for path in dataset.find_sample_photographs()]
        with shard_writer.local_workers(2) as executor:
            options = shard_writer.Options(tile=128, samples_per_shard=100)
            shard_writer.write(pictures, Path(folder), options, executor=executor)
        source = crops(
            shards.read_index(folder),
            batch_size=arguments.batch_size,
            crop_size=arguments.crop_size,
            scale=arguments.scale,
            crops_per_image=1,
            steps=steps,
        )
        resident = [
            machine.megabytes_in_use()["resident"]
            for step, _ in enumerate(stream.batches(source, num_workers=0, pin_memory=False))
            if step + 1 in (max(1, steps // 10), steps)
        ]
    return {
        "what": "memory",
        "ours": round(resident[-1], 1),
        "reference": round(resident[0], 1),
        "ratio": round(resident[-1] / resident[0], 3),
        "unit": "MB resident",
        "samples": steps * arguments.batch_size,
        "epochs": steps // source.plan.steps_per_epoch,
        **measuring.about(torch.device("cpu")),
    }
