"""Memory of a training rank's reading, after a tenth of the samples and after all.

Of a process and its loader worker together, over more tiles than the shuffle windows hold, so that
what they keep has to go for what comes.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks import measuring
from sr_dist import dataset, images, loading, pool, shard_writer, shards, stream
from sr_dist.degradation import Degradation
from sr_dist.errors import UserError


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


_SHIFTED = 5  # copies of each photograph, cut into tiles elsewhere


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    steps = arguments.samples // arguments.batch_size
    with tempfile.TemporaryDirectory() as name:
        index = shards.read_index(str(_write_shards(Path(name), arguments.crop_size)))
        source = crops(
            index,
            batch_size=arguments.batch_size,
            crop_size=arguments.crop_size,
            scale=arguments.scale,
            crops_per_image=1,
            steps=2 * steps,  # the worker, which ends when it has made all, is measured at work
        )
        held = source.plan.window * arguments.batch_size
        if index.samples <= held:
            raise UserError(
                f"the shuffle windows hold {held} samples, and {index.samples} are all there are; "
                "lower --batch-size, or raise --crop-size"
            )
        # Not before the second epoch is well begun: the windows are full by then.
        begun = min(steps, max(steps // 10, source.plan.steps_per_epoch * 5 // 4))
        with contextlib.closing(loading.batches(source, 1, pin_memory=False)) as batches:
            used = [
                _megabytes()
                for step, _ in enumerate(itertools.islice(batches, steps))
                if step + 1 in (begun, steps)
            ]
    return {
        "what": "memory",
        "ours": round(used[-1], 1),
        "reference": round(used[0], 1),
        "ratio": round(used[-1] / used[0], 3),
        "unit": "MB resident",
        "samples": steps * arguments.batch_size,
        "epochs": steps // source.plan.steps_per_epoch,
        "tiles": index.samples,
        "tiles_in_windows": held,
        **measuring.about(torch.device("cpu")),
    }


def _write_shards(folder: Path, tile: int) -> Path:
    """A few thousand tiles of the sample photographs."""
    listed = []
    for number, path in enumerate(dataset.find_sample_photographs()):
        picture = images.decode(path, 3)
        for shift in range(_SHIFTED):
            start = shift * tile // _SHIFTED
            target = folder / f"{number}_{shift}.png"
            images.to_pillow(np.ascontiguousarray(picture[start:, start:])).save(
                target, compress_level=0
            )
            listed.append((target, target.name))
    with pool.local_workers(2) as executor:
        options = shard_writer.Options(tile=tile, min_size=tile, samples_per_shard=100)
        shard_writer.write(listed, folder / "shards", options, executor=executor)
    return folder / "shards"


def _megabytes() -> float:
    """Resident, of this process and those it started; what a fork shares is counted for each.

    (Divided among them, it would seem to grow as it comes apart.) Without the pages of files,
    libraries' that is: of those, other processes have their parts, and come and go.
    """
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    total = 0
    for pid in pids:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        kinds = ("Anonymous:", "Pss_Shmem:")
        total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith(kinds))
    return total * 1024 / 1e6
