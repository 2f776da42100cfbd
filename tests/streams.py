"""Reading a stream in tests."""

from __future__ import annotations

from pathlib import Path

import torch

from sr_dist import shards, storage, stream
from sr_dist.degradation import Degradation

NONE = Degradation()


def read(
    folder: Path | str,
    *,
    first: int = 0,
    last: int = 6,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    crops: int = 2,
    batch: int = 6,
    window: int | None = None,
    seed: int = 3,
    channels: int = 3,
    bits: int = 16,
    degradation: Degradation = NONE,
    on_error: str = "stop",
    settings: storage.Settings = storage.DEFAULT,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of crops of 48 pixels from steps `first` to `last`, as (lr, hr)."""
    return [(batch.lr, batch.hr) for batch in read_batches(**locals())]


def read_batches(
    folder: Path | str,
    *,
    first: int,
    last: int,
    rank: int,
    world_size: int,
    num_workers: int,
    crops: int,
    batch: int,
    window: int | None,
    seed: int,
    channels: int,
    bits: int,
    degradation: Degradation,
    on_error: str,
    settings: storage.Settings,
) -> list[stream.Batch]:
    index = shards.read_index(str(folder), settings)
    plan = shards.make_plan(
        index, seed=seed, global_batch_size=batch, crops_per_image=crops, crop_size=48
    )
    if window:
        plan = shards.Plan(plan.counts, plan.seed, batch, crops, window)
    source = stream.CropStream(
        index=index,
        plan=plan,
        scale=4,
        channels=channels,
        crop_size=48,
        bits=bits,
        degradation=degradation,
        rank=rank,
        world_size=world_size,
        first_step=first,
        last_step=last,
        on_error=on_error,
        settings=settings,
    )
    return list(stream.batches(source, num_workers=num_workers, pin_memory=False))


def assert_equal(
    one: list[tuple[torch.Tensor, torch.Tensor]], other: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    assert len(one) == len(other)
    for (lr, hr), (other_lr, other_hr) in zip(one, other, strict=True):
        assert torch.equal(lr, other_lr) and torch.equal(hr, other_hr)
