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

To begin at a step, a lane opens the one shard that its window there lies in. Only where shards hold
fewer samples than four windows on average do windows reach across their borders: ended there, many
would be too small to mix what they hold.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import braceexpand
import numpy as np
import numpy.typing as npt

from sr_dist import remote, storage
from sr_dist.errors import UserError

INDEX_NAME = "index.json"
FORMAT = 1
_MARKS_PER_SHARD = 64
_MOST_MARKS = 200_000  # in an index, so that it stays small
_MOST_SAMPLES = 2**48  # in an index, so that places of samples and crops fit 64 bits
_WINDOW_BYTES = 4 * 2**20  # of samples, and of crops, that a lane may hold in memory


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Samples `first` to `last` of a shard, which lie from byte `start` to `end`."""

    first: int
    last: int
    start: int
    end: int | None  # None: to the end of the tar


@dataclasses.dataclass(frozen=True)
class Shard:
    name: str
    count: int  # samples that hold a picture
    bytes: int
    sha256: str
    # Where samples 0, n, 2n, … begin in the tar, so that reading can start near any of them.
    mark_every: int = 0
    marks: tuple[int, ...] = ()

    def stretch(self, sample: int) -> Stretch:
        """The one that holds `sample`."""
        if not self.marks:
            return Stretch(0, self.count, 0, None)
        number = sample // self.mark_every
        first = number * self.mark_every
        if number == len(self.marks) - 1:
            return Stretch(first, self.count, self.marks[number], None)
        return Stretch(first, first + self.mark_every, self.marks[number], self.marks[number + 1])


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
    def ours(self) -> bool:
        """Written by `shard_writer`: every sample's .json tells the CRC-32 of its picture."""
        return not self.options.get("indexed")

    @property
    def fingerprint(self) -> str:
        """A hash of what the shards hold, wherever they lie."""
        held = [(shard.name, shard.count, shard.bytes, shard.sha256) for shard in self.shards]
        return hashlib.sha256(json.dumps(held).encode()).hexdigest()[:16]

    def address(self, shard: int) -> str:
        return f"{self.root}/{self.shards[shard].name}"


def read_index(address: str, settings: storage.Settings = storage.DEFAULT) -> Index:
    """Read `index.json`, given itself, the folder (or address) that holds it, or a brace range.

    A brace range, `…/shard-{000000..000099}.tar`, names some of the shards of the index that lies
    beside them.

    Raises:
        UserError: it is missing, unreadable or of another format.
    """
    storage.check_address(address)
    names: list[str] | None = None
    place = address
    folder, slash, pattern = address.rpartition("/")
    if "{" in pattern:
        place = folder if slash else "."
        try:
            names = list(braceexpand.braceexpand(pattern))
        except ValueError:
            raise UserError(f"{address}: its braces do not pair") from None
    elif address.endswith(".tar"):
        raise UserError(
            f"{address} is a tar; expected the folder that holds its {INDEX_NAME}, or that file"
        )
    path = place if place.endswith(".json") else f"{place.rstrip('/')}/{INDEX_NAME}"
    index = _parse_index(path, _read_json(path, address, settings))
    return index if names is None else _some_of(index, names, address)


def _read_json(path: str, address: str, settings: storage.Settings) -> Any:
    # Of a server's short answer that agrees with itself, only the text tells.
    attempts = settings.attempts if storage.is_remote(path) else 1
    for attempt in itertools.count(1):
        data = _read(path, address, settings)
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            if attempt == attempts:
                raise UserError(f"{path} is not valid JSON ({error}); write it again") from None
        remote.pause(attempt)


def _read(path: str, address: str, settings: storage.Settings) -> bytes:
    try:
        return storage.read_bytes(path, settings)
    except UserError:
        raise
    except FileNotFoundError:
        if storage.is_remote(path):
            raise UserError(f"no shards at {address}: {path} does not exist") from None
        raise UserError(
            f"no shards at {address}: {path} does not exist. Make shards with "
            "'python tools/make_shards.py --images DIR --output DIR', or index existing tars with "
            "'python tools/make_shards.py index DIR'."
        ) from None
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        reason = str(error) if path in str(error) else f"cannot read {path}: {error}"
        raise UserError(reason) from None


def _parse_index(path: str, values: Any) -> Index:
    try:
        if values["format"] != FORMAT:
            raise UserError(
                f"{path} has format {values['format']}; this version reads {FORMAT}. Write the "
                "shards again with this version's tools/make_shards.py."
            )
        index = Index(
            root=path.rpartition("/")[0] or ".",
            channels=_whole_number(values["channels"]),
            smallest_side=_whole_number(values["smallest_side"]),
            shards=tuple(_parse_shard(shard) for shard in values["shards"]),
            options=dict(values["options"]),
        )
        if index.channels not in (1, 3):
            raise ValueError(f"expected 1 or 3 channels, found {index.channels}")
        if len({shard.name for shard in index.shards}) < len(index.shards):
            raise ValueError("a shard is listed twice")
        if index.samples > _MOST_SAMPLES:
            raise ValueError(f"{index.samples} samples are more than can be numbered")
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not an index of shards: {error!r}") from None
    if not index.samples:
        raise UserError(f"{path} lists no sample")
    return index


def _parse_shard(values: Any) -> Shard:
    """
    Raises:
        KeyError, TypeError, ValueError: it is no description of a shard.
    """
    marks = tuple(values.get("marks", ()))
    shard = Shard(**{**values, "marks": marks})
    for number in (shard.count, shard.bytes, shard.mark_every, *marks):
        _whole_number(number)
    name = shard.name
    if not isinstance(name, str) or not name.isprintable() or set(name) & set("/\\?#"):
        raise ValueError(f"expected the name of a file beside the index, found {name!r}")
    if name in ("", ".", "..") or not isinstance(shard.sha256, str):
        raise ValueError(f"{name!r} is described wrongly")
    if marks and not (
        list(marks) == sorted(set(marks))
        and marks[-1] < shard.bytes
        and shard.mark_every > 0
        and len(marks) == -(-shard.count // shard.mark_every)
    ):
        raise ValueError(f"the marks of {name} do not fit its {shard.count} samples")
    return shard


def _whole_number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"expected a whole number from 0, found {value!r:.40}")
    return value


def _some_of(index: Index, names: list[str], address: str) -> Index:
    by_name = {shard.name: shard for shard in index.shards}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise UserError(
            f"{address}: {index.root}/{INDEX_NAME} lists no {missing[0]} ({len(missing)} of "
            f"{len(names)} are missing); it has {index.shards[0].name} to {index.shards[-1].name}"
        )
    some = dataclasses.replace(index, shards=tuple(by_name[name] for name in names))
    if not some.samples:
        raise UserError(f"{address} names no sample")
    return some


def mark(shard: Shard, offsets: Sequence[int], most: int = _MARKS_PER_SHARD) -> Shard:
    """The shard with `most` marks at most, from where its samples (or its marks so far) begin."""
    each = max(1, shard.mark_every)  # samples from one of `offsets` to the next
    step = max(1, -(-len(offsets) // most))
    return dataclasses.replace(shard, mark_every=each * step, marks=tuple(offsets[::step]))


def index_text(
    channels: int, smallest_side: int, shards: Sequence[Shard], options: dict[str, Any]
) -> str:
    """The content of `index.json`, a line a shard."""
    most = max(1, min(_MARKS_PER_SHARD, _MOST_MARKS // max(1, len(shards))))
    head = {
        "format": FORMAT,
        "channels": channels,
        "smallest_side": smallest_side,
        "samples": sum(shard.count for shard in shards),
        "options": options,
    }
    lines = ",\n".join(
        "  " + json.dumps(dataclasses.asdict(mark(shard, shard.marks, most))) for shard in shards
    )
    return json.dumps(head, indent=1)[:-2] + f',\n "shards": [\n{lines}\n ]\n}}\n'


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: counts may be many
class Plan:
    """The order of samples, a pure function of these numbers (and of nothing else)."""

    counts: tuple[int, ...]  # samples of each shard, in the order of the index
    seed: int
    global_batch_size: int  # rows of a batch over all ranks, and so the number of lanes
    crops_per_image: int
    window: int  # neighbouring samples shuffled among themselves

    @functools.cached_property
    def samples_per_lane(self) -> int:
        return sum(self.counts) // self.global_batch_size

    @property
    def steps_per_epoch(self) -> int:
        return self.samples_per_lane * self.crops_per_image

    @functools.cached_property
    def cuts_at_borders(self) -> bool:
        """Whether a window lies in one shard, since shards hold windows enough."""
        return sum(self.counts) >= 4 * self.window * sum(count > 0 for count in self.counts)

    @property
    def left_out_per_epoch(self) -> int:
        """Samples an epoch leaves out because they would not fill a batch; others each epoch."""
        return sum(self.counts) - self.samples_per_lane * self.global_batch_size


def check_size(index: Index, crop_size: int) -> None:
    """Whether a crop fits into every picture, as it must where none is to be skipped.

    Raises:
        UserError: it does not.
    """
    if index.smallest_side >= crop_size:
        return
    smallest = index.options.get("smallest")  # where tars of others were indexed
    known = isinstance(smallest, str) and smallest.isprintable()
    advice = "Lower data.crop_size, leave such pictures out with stream.on_error=skip, or "
    if index.ours:
        advice += f"make the shards with --min-size {crop_size} and --tile {crop_size} or more."
    else:
        advice += (
            f"delete {INDEX_NAME} and see which they are with "
            f"'python tools/make_shards.py index --min-size {crop_size} …'."
        )
    raise UserError(
        f"data.crop_size is {crop_size}, but {index.root} holds pictures of {index.smallest_side} "
        f"pixels{f', such as {smallest}' if known else ''}. {advice}"
    )


def make_plan(
    index: Index, *, seed: int, global_batch_size: int, crops_per_image: int, crop_size: int
) -> Plan:
    """The plan for an index.

    Raises:
        UserError: fewer samples than rows in a batch.
    """
    if index.samples < global_batch_size:
        raise UserError(
            f"{index.root} holds {index.samples} samples; a global batch needs {global_batch_size} "
            "different ones. Make more samples (a smaller --tile, more pictures) or lower "
            "train.global_batch_size."
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
def _epoch_line(plan: Plan, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """The permuted shards, the place where each begins, and the offset where the line begins."""
    random = np.random.default_rng([plan.seed, epoch])
    order = random.permutation(len(plan.counts))
    ends = np.cumsum(np.asarray(plan.counts, dtype=np.int64)[order])
    return order, np.concatenate([[0], ends]), int(random.integers(ends[-1]))


def segments(plan: Plan, epoch: int, lane: int, first: int = 0) -> Iterator[Segment]:
    """Where the samples of a lane lie, from its sample number `first` on, in reading order."""
    order, starts, offset = _epoch_line(plan, epoch)
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
    first_sample = first_step // crops
    number = max(0, (first_sample - first_size) // plan.window + 1)
    start = 0 if number == 0 else first_size + (number - 1) * plan.window
    while start < length:
        whole = min(first_size if number == 0 else plan.window, length - start)
        for size in _parts(plan, epoch, lane, start, whole):
            if start + size > first_sample:
                random = np.random.default_rng([plan.seed, epoch, lane, start])
                rounds = [
                    np.stack([random.permutation(size), np.full(size, crop)], axis=1)
                    for crop in range(crops)
                ]
                yield Window(start, size, np.concatenate(rounds))
            start += size
        number += 1


def _parts(plan: Plan, epoch: int, lane: int, first: int, size: int) -> Iterator[int]:
    """How many of a lane's `size` samples from `first` on become a window each."""
    if not plan.cuts_at_borders:
        yield size
        return
    for segment in segments(plan, epoch, lane, first):
        part = min(size, segment.stop - segment.start)
        yield part
        size -= part
        if not size:
            return


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
