"""Batches of crops from shards: open, skip to the position, decode, crop, downscale.

The position is a step number: `start` at step t gives the batches that an unbroken run gives from
step t on, on any number of ranks and workers (see `shards`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sr_dist import images, shards
from sr_dist.degradation import Degradation, degrade
from sr_dist.errors import UserError

Batch = tuple[Tensor, Tensor]  # lr (B, C, H, W), hr (B, C, sH, sW), uint8


class DataError(UserError):
    """A shard that does not hold what its index says."""


@dataclasses.dataclass(frozen=True)
class CropStream(IterableDataset[Any]):
    """Yields the rows of global steps `first_step` to `last_step` that belong to this worker.

    Each item is `(lr, hr)`, or a `DataError` in place of raising it: an exception that crosses
    processes loses its type. Make batches of them with `batches`.
    """

    index: shards.Index
    plan: shards.Plan
    scale: int
    channels: int
    crop_size: int
    bits: int  # significant ones of 16-bit gray
    degradation: Degradation
    rank: int
    world_size: int
    first_step: int
    last_step: int

    def __iter__(self) -> Iterator[Batch | DataError]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        rows = shards.rows_of_worker(
            self.plan.global_batch_size, self.rank, self.world_size, worker, num_workers
        )
        lanes = [self._lane(row) for row in rows]
        try:
            for _ in range(self.first_step, self.last_step):
                crops = [next(lane) for lane in lanes]
                hr = images.to_batch([crop.hr for crop in crops])
                if self.degradation.does_something:
                    lr = images.to_batch(
                        [degrade(c.hr, self.scale, self.degradation, c.random) for c in crops]
                    )
                else:
                    lr = images.downscale(hr, self.scale)
                yield lr, hr
        except DataError as error:
            yield error

    def _lane(self, lane: int) -> Iterator[_Crop]:
        """The crops of one lane, epoch after epoch."""
        plan = self.plan
        epoch, step = divmod(self.first_step, plan.steps_per_epoch)
        while True:
            first = next(shards.windows(plan, epoch, lane, step)).first
            samples = self._read(shards.segments(plan, epoch, lane, first))
            for window in shards.windows(plan, epoch, lane, step):
                members = list(itertools.islice(samples, window.size))
                done = max(0, step - window.first * plan.crops_per_image)
                yield from self._crops(epoch, members, window.order[done:])
            epoch, step = epoch + 1, 0

    def _crops(
        self, epoch: int, members: list[_Member], order: np.ndarray[Any, Any]
    ) -> Iterator[_Crop]:
        """Crops in `order`; a member is decoded when its first crop is due, its others kept."""
        kept: dict[tuple[int, int], _Crop] = {}
        for sample, crop in order.tolist():
            if (sample, crop) not in kept:
                member = members[sample]
                picture = member.decode(self.channels, self.crop_size)
                for number in range(crop, self.plan.crops_per_image):
                    random = np.random.default_rng([self.plan.seed, epoch, member.number, number])
                    cut = images.random_crop(picture, self.crop_size, random)
                    # A copy, since a view would keep the whole picture.
                    hr = member.to_8_bits(cut.copy(), self.bits)
                    kept[sample, number] = _Crop(hr, random)
            yield kept.pop((sample, crop))

    def _read(self, segments: Iterator[shards.Segment]) -> Iterator[_Member]:
        """The undecoded samples of `segments`."""
        firsts = np.concatenate([[0], np.cumsum(self.plan.counts)])
        for segment in segments:
            address = self.index.address(segment.shard)
            position = 0
            try:
                for sample in shards.read_samples(address):
                    if position >= segment.start:
                        number = int(firsts[segment.shard]) + position
                        yield _Member(address, sample["__key__"], number, sample["picture"])
                    position += 1
                    if position == segment.stop:
                        break
            except shards.DamagedShard as error:
                raise DataError(_damaged(address, str(error))) from None
            if position < segment.stop:
                count = self.plan.counts[segment.shard]
                raise DataError(
                    _damaged(address, f"it ends after {position} of {count} indexed samples")
                )


@dataclasses.dataclass(frozen=True)
class _Crop:
    hr: images.Picture
    random: np.random.Generator  # for what else is drawn for this crop


@dataclasses.dataclass(frozen=True)
class _Member:
    address: str
    key: str
    number: int  # of the sample, over all shards of the index
    data: bytes

    def to_8_bits(self, crop: images.Picture | images.DeepPicture, bits: int) -> images.Picture:
        try:
            return images.to_8_bits(crop, bits)
        except images.PictureError as error:
            raise DataError(
                f"shard {self.address}: sample {self.key} {error}; set data.bits"
            ) from None

    def decode(self, channels: int, crop_size: int) -> images.Picture | images.DeepPicture:
        try:
            picture = images.decode(self.data, channels)
        except images.PictureError as error:
            raise DataError(_damaged(self.address, f"sample {self.key} {error}")) from None
        if min(picture.shape[:2]) < crop_size:
            size = f"{picture.shape[1]}x{picture.shape[0]}"
            raise DataError(
                _damaged(
                    self.address,
                    f"sample {self.key} is {size} pixels, smaller than data.crop_size {crop_size}",
                )
            )
        return picture


def _damaged(address: str, what: str) -> str:
    if "://" not in address and not Path(address).exists():
        return f"shard {address} is gone; its folder's index.json still lists it. Put it back."
    return (
        f"shard {address} is damaged: {what}. 'python tools/make_shards.py verify' lists all that "
        "is wrong; write the shard again."
    )


def batches(stream: CropStream, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    """This rank's batches: one from the rows that each of its loader workers makes.

    Raises:
        DataError: a shard is damaged.
    """
    per_rank = stream.plan.global_batch_size // stream.world_size
    num_workers = min(num_workers, per_rank)
    loader = DataLoader(
        stream,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_one_thread,
    )
    parts = iter(loader)
    try:
        for _ in range(stream.first_step, stream.last_step):
            # Workers take turns, so consecutive items are the parts of one batch.
            rows = [_checked(next(parts)) for _ in range(max(1, num_workers))]
            lr, hr = rows[0]
            if len(rows) > 1:
                lr, hr = (torch.cat(part) for part in zip(*rows, strict=True))
            # Joining would undo what the loader pins.
            yield (lr.pin_memory(), hr.pin_memory()) if pin_memory else (lr, hr)
    finally:
        # Left to a traceback, the workers would be ended by the garbage collector, which closes
        # their queues first and then waits 5 s for each.
        del parts


def _checked(item: Batch | DataError) -> Batch:
    if isinstance(item, DataError):
        raise item
    return item


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
