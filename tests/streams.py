"""Reading a stream in tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from sr_dist import loading, shards, storage, stream
from sr_dist.degradation import Degradation

NONE = Degradation()


def stream_of(
    folder: Path | str,
    *,
    first: int = 0,
    last: int = 6,
    rank: int = 0,
    world_size: int = 1,
    crops: int = 2,
    batch: int = 6,
    window: int | None = None,
    seed: int = 3,
    channels: int = 3,
    crop_size: int = 48,
    bits: int = 16,
    degradation: Degradation = NONE,
    on_error: str = "stop",
    settings: storage.Settings = storage.DEFAULT,
    decode: str = "cpu",
) -> stream.CropStream:
    index = shards.read_index(str(folder), settings)
    plan = shards.make_plan(
        index, seed=seed, global_batch_size=batch, crops_per_image=crops, crop_size=crop_size
    )
    return stream.CropStream(
        index=index,
        plan=dataclasses.replace(plan, window=window) if window else plan,
        scale=4,
        channels=channels,
        crop_size=crop_size,
        bits=bits,
        degradation=degradation,
        rank=rank,
        world_size=world_size,
        first_step=first,
        last_step=last,
        on_error=on_error,
        settings=settings,
        decode=decode,
    )


def read_batches(folder: Path | str, *, num_workers: int = 0, **options: Any) -> list[stream.Batch]:
    """The batches of `stream_of(folder, **options)`."""
    source = stream_of(folder, **options)
    return list(loading.batches(source, num_workers=num_workers, pin_memory=False))


def read(folder: Path | str, **options: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of crops from steps `first` to `last`, as (lr, hr)."""
    return [(batch.lr, batch.hr) for batch in read_batches(folder, **options)]


def joined(
    of_ranks: list[list[tuple[torch.Tensor, torch.Tensor]]],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The global batches, from those of each rank."""
    return [
        (torch.cat([lr for lr, _ in parts]), torch.cat([hr for _, hr in parts]))
        for parts in zip(*of_ranks, strict=True)
    ]


def assert_equal(
    one: list[tuple[torch.Tensor, torch.Tensor]], other: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    assert len(one) == len(other)
    for (lr, hr), (other_lr, other_hr) in zip(one, other, strict=True):
        assert torch.equal(lr, other_lr) and torch.equal(hr, other_hr)
