"""Crops from shards: open, skip to the position, decode, crop, downscale.

The position is a step number: a stream that begins at step t gives the batches that an unbroken one
gives from step t on, on any number of ranks and workers (see `shards`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import resource
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sr_dist import images, shard_reader, shards, storage, tars, tensors
from sr_dist.degradation import Degradation, degrade
from sr_dist.errors import UserError

_JPEG = b"\xff\xd8\xff"  # how one begins


class Batch(NamedTuple):
    lr: Tensor  # (B, C, H, W) uint8
    hr: Tensor  # (B, C, sH, sW) uint8
    skipped: tuple[str, ...]  # samples that gave way to others, and why


class EncodedCrop(NamedTuple):
    """A crop of a JPEG that has not been decoded."""

    data: bytes
    crop: images.Crop
    where: str  # shard and sample


class Encoded(NamedTuple):
    """What becomes a `Batch` on the device, see `loading.on_device`."""

    crops: tuple[EncodedCrop, ...]
    skipped: tuple[str, ...]


class DataError(UserError):
    """A shard that does not hold what its index says, or a loader that ended."""


Item = Batch | Encoded | DataError


@dataclasses.dataclass(frozen=True)
class CropStream:
    """The rows of global steps `first_step` to `last_step` that belong to one rank.

    Make batches of them with `loading.batches`.
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
    on_error: str = "stop"  # or skip: another sample takes the place of one that cannot be used
    settings: storage.Settings = storage.DEFAULT
    decode: str = "cpu"  # or nvjpeg: JPEGs are left for the device to decode

    def items(self, worker: int = 0, num_workers: int = 1) -> Generator[Item, None, None]:
        """Those of one loader worker: of each step a `Batch`, `Encoded` where nvJPEG decodes.

        A `DataError` comes in place of being raised: processes hand on what they yield.
        """
        rows = shards.rows_of_worker(
            self.plan.global_batch_size, self.rank, self.world_size, worker, num_workers
        )
        _allow_open_files()
        reader = _Reader(self)
        lanes = [reader.lane(row) for row in rows]
        try:
            for _ in range(self.first_step, self.last_step):
                crops = [next(lane) for lane in lanes]
                if self.decode == "nvjpeg":
                    yield Encoded(tuple(crop.hr for crop in crops), reader.report())
                    continue
                hr = tensors.to_batch([crop.hr for crop in crops])
                if self.degradation.does_something:
                    lr = tensors.to_batch(
                        [degrade(c.hr, self.scale, self.degradation, c.random) for c in crops]
                    )
                else:
                    lr = tensors.downscale(hr, self.scale)
                yield Batch(lr, hr, reader.report())
        except UserError as error:
            yield error if isinstance(error, DataError) else DataError(str(error))


@dataclasses.dataclass(frozen=True)
class _Crop:
    hr: Any  # a picture (size, size, C), or an EncodedCrop
    random: np.random.Generator  # for what else is drawn for this crop


@dataclasses.dataclass(frozen=True)
class _Jpeg:
    data: bytes
    where: str
    height: int
    width: int


@dataclasses.dataclass(frozen=True)
class _Member:
    """An undecoded sample, or why there is none, and where it lies."""

    shard: int
    number: int  # in its shard
    sample: tars.Sample


_Decoded = images.Picture | images.DeepPicture | _Jpeg


class _Reader:
    """The lanes of one worker: what to read is the stream's, kept is what was skipped."""

    def __init__(self, stream: CropStream) -> None:
        self.stream, self.plan = stream, stream.plan
        self.skipped: list[str] = []
        self.first_of_shard = np.concatenate([[0], np.cumsum(self.plan.counts)])
        self.spare = functools.lru_cache(maxsize=4)(self._spare)

    def report(self) -> tuple[str, ...]:
        """What was skipped since the last report."""
        skipped, self.skipped = tuple(self.skipped), []
        return skipped

    def lane(self, lane: int) -> Iterator[_Crop]:
        """The crops of one lane, epoch after epoch."""
        plan = self.plan
        epoch, step = divmod(self.stream.first_step, plan.steps_per_epoch)
        while True:
            first = next(shards.windows(plan, epoch, lane, step)).first
            samples = self._read(shards.segments(plan, epoch, lane, first))
            for window in shards.windows(plan, epoch, lane, step):
                members = list(itertools.islice(samples, window.size))
                done = max(0, step - window.first * plan.crops_per_image)
                yield from self._crops(epoch, members, window.order[done:])
            epoch, step = epoch + 1, 0

    def _crops(
        self, epoch: int, members: list[_Member], order: npt.NDArray[np.int64]
    ) -> Iterator[_Crop]:
        """Crops in `order`; a member is decoded when its first crop is due, its others kept."""
        kept: dict[tuple[int, int], _Crop] = {}
        for sample, crop in order.tolist():
            if (sample, crop) not in kept:
                # Told at its first crop alone: a resumed run begins behind it.
                picture = self._picture(members, sample, told=crop == 0)
                number = int(self.first_of_shard[members[sample].shard]) + members[sample].number
                for later in range(crop, self.plan.crops_per_image):
                    random = np.random.default_rng([self.plan.seed, epoch, number, later])
                    kept[sample, later] = self._cut(picture, random)
            yield kept.pop((sample, crop))

    def _cut(self, picture: _Decoded, random: np.random.Generator) -> _Crop:
        size = self.stream.crop_size
        if isinstance(picture, _Jpeg):
            crop = images.random_crop(picture.height, picture.width, size, random)
            return _Crop(EncodedCrop(picture.data, crop, picture.where), random)
        crop = images.random_crop(picture.shape[0], picture.shape[1], size, random)
        # A copy, since a view would keep the whole picture.
        return _Crop(images.to_8_bits(crop.of(picture).copy(), self.stream.bits), random)

    def _picture(self, members: list[_Member], sample: int, told: bool) -> _Decoded:
        """A member's picture, or in its place the next one's of the window, or another shard's.

        Which one depends on nothing but the plan and the bytes of the shards. `told`: a member that
        gives way is put on the list of what was skipped.

        Raises:
            DataError: it cannot be used, and the stream stops at errors; or none at all can.
        """
        try:
            return self._decode(members[sample])
        except DataError as error:
            if self.stream.on_error == "stop":
                raise
            if told:
                self.skipped.append(str(error))
        for other in [*members[sample + 1 :], *members[:sample]]:
            try:
                return self._decode(other)
            except DataError:
                continue
        member = members[sample]
        spare = self.spare(member.shard)
        return self._decode(spare[member.number % len(spare)])

    def _spare(self, shard: int) -> list[_Member]:
        """The usable ones among the first samples of the first shard after `shard` that has any."""
        others, first = self.stream.index.shards, ""
        for other in [*range(shard + 1, len(others)), *range(shard + 1)]:
            count = min(others[other].count, self.plan.window)
            found = []
            segments = [shards.Segment(other, 0, count)] if count else []
            for member in self._read(iter(segments)):
                try:
                    self._decode(member)
                except DataError as error:
                    first = first or str(error)
                    continue
                found.append(member)
            if found:
                return found
        raise DataError(f"no sample of {self.stream.index.root} can be used; one of them: {first}")

    def _read(self, segments: Iterator[shards.Segment]) -> Iterator[_Member]:
        """The samples of `segments`, those that cannot be read without a key.

        Raises:
            DataError: a shard is not there, or the way to it is to blame. Never skipped: what took
                its place would depend on the weather.
        """
        index = self.stream.index
        for segment in segments:
            samples = shard_reader.read_range(
                index, segment.shard, segment.start, segment.stop, self.stream.settings
            )
            try:
                for number, sample in enumerate(samples, segment.start):
                    yield _Member(segment.shard, number, sample)
            except shard_reader.UnreadableShard as error:
                raise DataError(
                    f"shard {index.address(segment.shard)} {error}. Run the same command to go on "
                    "from the last checkpoint."
                ) from None

    def _decode(self, member: _Member) -> _Decoded:
        """A member's picture; of a JPEG that the device is to decode, its size.

        Raises:
            DataError: the sample cannot be used.
        """
        sample, stream = member.sample, self.stream
        if sample.problem:
            raise self._error(member, sample.problem)
        try:
            if stream.decode == "nvjpeg":
                jpeg = self._jpeg(member)
                self._check_size(member, jpeg.height, jpeg.width)
                return jpeg
            picture = images.decode(sample.picture, stream.channels)
        except images.PictureError as error:
            raise self._error(member, str(error)) from None
        if picture.dtype != np.uint8 and int(picture.max()) >= 2**stream.bits:
            what = (
                f"holds values up to {picture.max()}, for which data.bits {stream.bits} are too few"
            )
            raise self._error(member, what)
        self._check_size(member, picture.shape[0], picture.shape[1])
        return picture

    def _jpeg(self, member: _Member) -> _Jpeg:
        data = member.sample.picture
        if not data.startswith(_JPEG):
            what = "is no JPEG, which data.decode=nvjpeg needs (make_shards.py --encode jpeg)"
            raise self._error(member, what)
        header = images.header(data)
        if header.channels != 3:
            raise self._error(member, "is gray, which data.decode=nvjpeg does not take")
        if not header.upright:
            raise self._error(member, "is stored turned (EXIF), which nvJPEG does not undo")
        where = f"shard {self.stream.index.address(member.shard)}: sample {member.sample.key}"
        return _Jpeg(data, where, header.height, header.width)

    def _check_size(self, member: _Member, height: int, width: int) -> None:
        least = self.stream.crop_size
        if min(height, width) < least:
            what = f"is {width}x{height} pixels, smaller than data.crop_size {least}"
            raise self._error(member, what)

    def _error(self, member: _Member, what: str) -> DataError:
        """
        Raises:
            UserError: not the shard is damaged, but its copy in the cache. Never skipped.
        """
        index, described = self.stream.index, self.stream.index.shards[member.shard]
        storage.check_cached(
            self.stream.settings, index.address(member.shard), described.bytes, described.sha256
        )
        key = member.sample.key
        number = member.number
        said = f": sample {key} {what}" if key else f" {what}; its sample number {number} is lost"
        advice = (
            ". 'python tools/make_shards.py verify' lists all that is wrong; write the shard "
            "again, or train without such samples with stream.on_error=skip."
        )
        address = index.address(member.shard)
        return DataError(f"shard {address}{said}" + advice * (self.stream.on_error == "stop"))


def _allow_open_files() -> None:
    """Each lane keeps a shard open; systems allow more files than they do at first."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
