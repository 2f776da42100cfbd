"""The loader: crops/s out of 1024x1024 photographs, against the original scripts' loader."""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import measuring, memory, original, step
from sr_dist import gan, images, loading, pool, shard_writer, shards, stream
from sr_dist.distributed import joined

SIDE = 1024  # of the photographs
_KINDS = {"png": "png", "jpeg": "jpg"}  # of the sources, and their files' ending
_PER_DECODE = (4, 1)
_BATCHES = 100  # a turn of ours has as many at least
_BATCHES_OF_REFERENCE = 4
_AHEAD = 6  # batches that a worker may have ready when its turn comes; they are not timed
_TRAINED = 40  # steps in which waiting for data is measured


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    cases, shares = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, ending in _KINDS.items():
            paths = _write_photographs(folder / kind, arguments.photographs, kind, ending)
            listed = [(path, path.name) for path in paths]
            target = folder / f"{kind}_shards"
            options = shard_writer.Options(tile=256)
            with pool.local_workers(2) as executor:
                shard_writer.write(listed, target, options, executor=executor)
            index = shards.read_index(str(target))
            reference = _endless(lambda paths=paths: _original(paths, arguments))
            for per_decode in _PER_DECODE:
                source = _source(index, per_decode, arguments)
                # Whole epochs, which begin with tiles to decode and end with crops of those kept.
                epoch = source.plan.steps_per_epoch
                ours = loading.batches(source, num_workers=1, pin_memory=False)
                cases[f"{kind}, {per_decode} crop(s) a decode"] = _take_turns(
                    (ours, -(-_BATCHES // epoch) * epoch),
                    (reference, _BATCHES_OF_REFERENCE),
                    arguments,
                )
            shares[kind] = round(_waiting(index, arguments), 4)
    return {
        **measuring.summary("data", cases, "crops/s", more_is_better=True),
        "wait_share_of_a_training_step": shares,
        "config": {
            "photographs": len(paths),
            "side": SIDE,
            "tile": 256,
            "batch_size": arguments.batch_size,
            "crop_size": arguments.crop_size,
            "scale": arguments.scale,
            "num_workers": 1,
        },
        **measuring.about(torch.device("cpu")),
    }


def _write_photographs(folder: Path, given: Path | None, kind: str, ending: str) -> list[Path]:
    folder.mkdir()
    paths = []
    for number, picture in enumerate(measuring.photographs(given, SIDE)):
        paths.append(folder / f"{number:04d}.{ending}")
        paths[-1].write_bytes(images.encode(picture, kind))
    return paths


def _source(
    index: shards.Index, crops_per_image: int, arguments: argparse.Namespace
) -> stream.CropStream:
    return memory.crops(
        index,
        batch_size=arguments.batch_size,
        crop_size=arguments.crop_size,
        scale=arguments.scale,
        crops_per_image=crops_per_image,
        steps=10**9,
    )


def _original(paths: list[Path], arguments: argparse.Namespace) -> Iterator[object]:
    return iter(
        original.loader(
            paths,
            crop_size=arguments.crop_size,
            scale=arguments.scale,
            batch_size=arguments.batch_size,
            length=arguments.batch_size * 10**6,
            num_workers=1,
        )
    )


def _endless(make: Callable[[], Iterator[object]]) -> Iterator[object]:
    """What an iterator gives, begun at the first use."""
    yield from make()


def _take_turns(
    ours: tuple[Iterator[object], int],
    reference: tuple[Iterator[object], int],
    arguments: argparse.Namespace,
) -> tuple[list[float], list[float]]:
    """Crops/s of two loaders, in turns of so many batches.

    What a worker made ready while the other had its turn is taken off first.
    """
    found: tuple[list[float], list[float]] = [], []
    for turn in range(1 + arguments.repetitions):  # the first is a warm-up
        for rates, (loader, batches) in zip(found, (ours, reference), strict=True):
            for _ in itertools.islice(loader, _AHEAD):
                pass
            began = time.perf_counter()
            for _ in itertools.islice(loader, batches):
                pass
            seconds = time.perf_counter() - began
            if turn:
                rates.append(batches * arguments.batch_size / seconds)
    return found


def _waiting(index: shards.Index, arguments: argparse.Namespace) -> float:
    """The share of training steps in which the next batch was waited for, with one worker."""
    with joined("no", seed=0) as processes:
        objective = gan.build_objective(**step.LOSSES, device=processes.device)
        networks = step.build_networks(processes, arguments.scale, arguments.batch_size)
        run = step.our_step(processes, networks, objective)
        source = _source(index, 4, arguments)
        batches = loading.batches(source, num_workers=1, pin_memory=False)
        waited = 0.0
        for number in range(2 + _TRAINED):
            if number == 2:
                began, waited = time.perf_counter(), 0.0
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            assert isinstance(batch, stream.Batch)
            run(batch.lr, batch.hr)
        return waited / (time.perf_counter() - began)
