"""The shard format, and which sample comes when.

A shard is a WebDataset tar: members `KEY.webp` (or png, jpg, jpeg) and `KEY.json` side by side.
`index.json` lists the shards of a folder with their counts, so that the whole order of an epoch is
arithmetic:

* the shards are permuted by (seed, epoch) and their samples laid end to end, turned by a random
  offset;
* that line is cut into as many equal *lanes* as a global batch has rows, and row j of every batch
  comes from lane j. Ranks and loader workers own rows, so neither changes what a batch holds;
* inside a lane, windows of neighbouring samples are shuffled. A sample gives its several crops in
  separate rounds of its window, so its crops are apart and it is decoded once.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import fsspec
import numpy as np
import numpy.typing as npt
import webdataset.tariterators as tariterators

from sr_dist.errors import UserError

INDEX_NAME = "index.json"
FORMAT = 1
PICTURE_MEMBERS = ("webp", "png", "jpg", "jpeg")
_WINDOW_BYTES = 4 * 2**20  # of samples, and of crops, that a lane may hold in memory


@dataclasses.dataclass(frozen=True)
class Shard:
    name: str
    count: int  # samples that hold a picture
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Index:
    """What `index.json` says, and where it lay."""

    root: str  # folder or address of the shards
    channels: int
    smallest_side: int  # pixels, over all pictures
    shards: tuple[Shard, ...]
    options: dict[str, Any]

    @property
    def samples(self) -> int:
        return sum(shard.count for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """A hash of what the shards hold, wherever they lie."""
        held = [(shard.name, shard.count, shard.bytes, shard.sha256) for shard in self.shards]
        return hashlib.sha256(json.dumps(held).encode()).hexdigest()[:16]

    def address(self, shard: int) -> str:
        return f"{self.root}/{self.shards[shard].name}"


def read_index(address: str) -> Index:
    """Read `index.json`, given itself or the folder (or address) that holds it.

    Raises:
        UserError: it is missing, unreadable or of another format.
    """
    if address.endswith(".tar"):
        raise UserError(
            f"{address} is a tar; expected the folder that holds its {INDEX_NAME}, or that file"
        )
    path = address if address.endswith(".json") else f"{address.rstrip('/')}/{INDEX_NAME}"
    root = path.rpartition("/")[0] or "."
    try:
        with open_address(path) as file:
            values = json.loads(file.read())
    except FileNotFoundError as error:
        if "://" in path:
            raise UserError(f"cannot read {path}: {error.__cause__ or error}") from None
        raise UserError(
            f"no shards at {address}: {path} does not exist. Make shards with "
            "'python tools/make_shards.py --images DIR --output DIR', or index existing tars with "
            "'python tools/make_shards.py index DIR'."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); write it again") from None
    except UserError:
        raise
    except Exception as error:  # each of fsspec's file systems raises its own
        raise UserError(f"cannot read {path}: {error!r}") from None
    try:
        if values["format"] != FORMAT:
            raise UserError(
                f"{path} has format {values['format']}; this version reads {FORMAT}. Write the "
                "shards again with this version's tools/make_shards.py."
            )
        index = Index(
            root=root,
            channels=int(values["channels"]),
            smallest_side=int(values["smallest_side"]),
            shards=tuple(Shard(**shard) for shard in values["shards"]),
            options=dict(values["options"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not an index of shards: {error!r}") from None
    if not index.samples:
        raise UserError(f"{path} lists no sample")
    return index


def index_text(
    channels: int, smallest_side: int, shards: list[Shard], options: dict[str, Any]
) -> str:
    """The content of `index.json`."""
    values = {
        "format": FORMAT,
        "channels": channels,
        "smallest_side": smallest_side,
        "samples": sum(shard.count for shard in shards),
        "options": options,
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    return json.dumps(values, indent=1) + "\n"


def open_address(address: str) -> BinaryIO:
    """Open a local path or an address of any scheme fsspec knows, for reading bytes."""
    try:
        file: BinaryIO = fsspec.open(address, "rb").open()
    except (ValueError, ImportError) as error:  # unknown scheme, or its package is missing
        raise UserError(f"cannot open {address}: {error}") from None
    return file


class DamagedShard(ValueError):
    """A tar that cannot be read to its end; the message is the reason, without the tar's name."""


def read_samples(address: str) -> Iterator[dict[str, Any]]:
    """The samples of a tar that hold a picture: dictionaries of member bytes by ending.

    A sample is the neighbouring members that share a name up to its first dot; its picture is the
    member whose last ending is that of one. Adds `__key__`, and
    `picture` with the picture's bytes. A tar cut off between two members just ends: count.

    Raises:
        DamagedShard: after the samples that could be read.
    """
    count = 0
    try:
        with open_address(address) as file:
            members = tariterators.tar_file_expander([{"url": address, "stream": file}])
            for sample in tariterators.group_by_keys(members):
                found = {ending.rpartition(".")[2]: ending for ending in sample}
                kind = next((kind for kind in PICTURE_MEMBERS if kind in found), None)
                if kind is not None:
                    count += 1
                    yield {**sample, "picture": sample[found[kind]]}
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        else:  # webdataset adds what it had open to the message
            reason = str(error.args[0]).partition(" @ ")[0] if error.args else repr(error)
        raise DamagedShard(f"{reason}, after {count} samples") from error


@dataclasses.dataclass(frozen=True)
class Plan:
    """The order of samples, a pure function of these numbers (and of nothing else)."""

    counts: tuple[int, ...]  # samples of each shard, in the order of the index
    seed: int
    global_batch_size: int  # rows of a batch over all ranks, and so the number of lanes
    crops_per_image: int
    window: int  # neighbouring samples shuffled among themselves

    @property
    def samples_per_lane(self) -> int:
        return sum(self.counts) // self.global_batch_size

    @property
    def steps_per_epoch(self) -> int:
        return self.samples_per_lane * self.crops_per_image

    @property
    def left_out_per_epoch(self) -> int:
        """Samples an epoch leaves out because they would not fill a batch; others each epoch."""
        return sum(self.counts) - self.samples_per_lane * self.global_batch_size


def make_plan(
    index: Index, *, seed: int, global_batch_size: int, crops_per_image: int, crop_size: int
) -> Plan:
    """The plan for an index.

    Raises:
        UserError: fewer samples than rows in a batch, or the crop is larger than a sample.
    """
    if index.samples < global_batch_size:
        raise UserError(
            f"{index.root} holds {index.samples} samples; a global batch needs {global_batch_size} "
            "different ones. Make more samples (a smaller --tile, more pictures) or lower "
            "train.global_batch_size."
        )
    if index.smallest_side < crop_size:
        raise UserError(
            f"data.crop_size is {crop_size}, but {index.root} holds pictures of "
            f"{index.smallest_side} pixels. Lower data.crop_size, or make the shards with "
            f"--min-size {crop_size} and --tile {crop_size} or more."
        )
    # A lane holds the undecoded samples of a window and the crops of those it has decoded.
    crops_bytes = crop_size * crop_size * index.channels * crops_per_image
    sample_bytes = sum(shard.bytes for shard in index.shards) // index.samples
    window = max(4, min(256, _WINDOW_BYTES // max(crops_bytes, sample_bytes)))
    counts = tuple(shard.count for shard in index.shards)
    return Plan(counts, seed, global_batch_size, crops_per_image, window)


@dataclasses.dataclass(frozen=True)
class Segment:
    """Samples `start` to `stop` of a shard."""

    shard: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Window:
    """A stretch of a lane whose crops are shuffled among themselves."""

    first: int  # place in the lane of its first sample
    size: int  # samples
    order: npt.NDArray[np.int64]  # (size * crops_per_image, 2): sample in the window, crop number


@functools.lru_cache(maxsize=2)
def _epoch_line(
    counts: tuple[int, ...], seed: int, epoch: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """The permuted shards, the place where each begins, and the offset where the line begins."""
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(counts))
    ends = np.cumsum(np.asarray(counts, dtype=np.int64)[order])
    return order, np.concatenate([[0], ends]), int(random.integers(ends[-1]))


def segments(plan: Plan, epoch: int, lane: int, first: int = 0) -> Iterator[Segment]:
    """Where the samples of a lane lie, from its sample number `first` on, in reading order."""
    order, starts, offset = _epoch_line(plan.counts, plan.seed, epoch)
    total = int(starts[-1])
    place = (offset + lane * plan.samples_per_lane + first) % total
    left = plan.samples_per_lane - first
    at = int(np.searchsorted(starts, place, side="right")) - 1
    while left > 0:
        begin = place - int(starts[at])
        taken = min(left, int(starts[at + 1]) - place)
        if taken:  # an indexed shard may be empty
            yield Segment(int(order[at]), begin, begin + taken)
        left, place, at = left - taken, place + taken, at + 1
        if place == total:
            place, at = 0, 0


def windows(plan: Plan, epoch: int, lane: int, first_step: int = 0) -> Iterator[Window]:
    """The windows of a lane, from the one that holds step `first_step` of the epoch on.

    The first window of each lane has another size, so that lanes do not all decode at once.
    """
    length, crops = plan.samples_per_lane, plan.crops_per_image
    first_size = plan.window - plan.window * lane // plan.global_batch_size
    number = max(0, (first_step // crops - first_size) // plan.window + 1)
    start = 0 if number == 0 else first_size + (number - 1) * plan.window
    while start < length:
        size = min(first_size if number == 0 else plan.window, length - start)
        random = np.random.default_rng([plan.seed, epoch, lane, number])
        rounds = [
            np.stack([random.permutation(size), np.full(size, crop)], axis=1)
            for crop in range(crops)
        ]
        yield Window(start, size, np.concatenate(rounds))
        start, number = start + size, number + 1


def samples_of_step(plan: Plan, step: int) -> list[tuple[int, int, int]]:
    """(shard, sample in the shard, crop number) of every row of global step `step`, from 0."""
    epoch, step_in_epoch = divmod(step, plan.steps_per_epoch)
    rows = []
    for lane in range(plan.global_batch_size):
        window = next(windows(plan, epoch, lane, step_in_epoch))
        sample, crop = window.order[step_in_epoch - window.first * plan.crops_per_image]
        segment = next(segments(plan, epoch, lane, window.first + int(sample)))
        rows.append((segment.shard, segment.start, int(crop)))
    return rows


def rows_of_worker(
    global_batch_size: int, rank: int, world_size: int, worker: int, num_workers: int
) -> range:
    """The rows of every global batch that a loader worker of a rank makes."""
    assert global_batch_size % world_size == 0, "a batch divides evenly among the ranks"
    per_rank = global_batch_size // world_size
    start = rank * per_rank
    return range(
        start + per_rank * worker // num_workers, start + per_rank * (worker + 1) // num_workers
    )


def sha256_of_file(address: str) -> tuple[str, int]:
    """The hash and the number of bytes of a file."""
    digest, size = hashlib.sha256(), 0
    with open_address(address) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size
