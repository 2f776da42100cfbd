"""The samples of shards that lie anywhere and may be damaged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import BinaryIO

from sr_dist import shards, storage, tars
from sr_dist.errors import UserError


class DamagedShard(ValueError):
    """A tar that cannot be read to its end; the message goes on from its name."""


class UnreadableShard(DamagedShard):
    """A tar that is not there, or that the way to it did not let be read: it may well be whole."""


def read_samples(address: str) -> Iterator[tars.Sample]:
    """`tars.read_samples` of a file anywhere.

    Raises:
        DamagedShard: after the samples that could be read.
    """
    with _told_apart(), storage.open_file(address) as file:
        yield from tars.read_samples(file)


def read_range(
    index: shards.Index, shard: int, start: int, stop: int, settings: storage.Settings
) -> Iterator[tars.Sample]:
    """Samples `start` to `stop` of a shard, all of them, in order.

    Those that cannot be read have no key, and their `problem` goes on from the shard's name. Each
    stretch is read by itself, from its mark on: what is lost of a damaged shard does not depend on
    where reading starts.

    Raises:
        UnreadableShard: it is not there, or not the shard is to blame.
    """
    described, address, number = index.shards[shard], index.address(shard), start
    with (
        _told_apart(),
        storage.open_file(address, settings, size=described.bytes, sha256=described.sha256) as file,
    ):
        while number < stop:
            for sample in _read_stretch(file, described.stretch(number), number, stop):
                yield sample
                number += 1


def _read_stretch(
    file: BinaryIO, stretch: shards.Stretch, start: int, stop: int
) -> Iterator[tars.Sample]:
    """Samples `start` to `stop` of a stretch, or to its end; lost ones as `read_range` has them."""
    number, expected = stretch.first, stretch.last - stretch.first
    file.seek(stretch.start)
    samples = tars.read_samples(file, passed_over=start - number, end=stretch.end)
    try:
        for sample in samples:
            # The last one is given out once it is known to be the last.
            if number == stretch.last - 1 and next(samples, None) is not None:
                raise tars.DamagedTar(f"it holds more than the {expected} samples of the index")
            if number >= start:
                yield sample
            number += 1
            if number == min(stop, stretch.last):
                return
        raise tars.DamagedTar(
            f"it holds {number - stretch.first} samples from byte {stretch.start} on, where the "
            f"index has {expected}"
        )
    except tars.DamagedTar as error:
        problem = f"is damaged: {error}"
    for _ in range(max(number, start), min(stop, stretch.last)):
        yield tars.Sample("", 0, "", b"", {}, problem)


@contextlib.contextmanager
def _told_apart() -> Iterator[None]:
    """Raise what is wrong with a tar, and what with the way to it, each as its own error."""
    try:
        yield
    except tars.DamagedTar as error:
        raise DamagedShard(f"is damaged: {error}") from error
    except FileNotFoundError as error:
        raise UnreadableShard("is not there, though its index.json lists it") from error
    except OSError as error:
        raise UnreadableShard(f"cannot be read: {error.strerror or error}") from error


def check_files(index: shards.Index, settings: storage.Settings = storage.DEFAULT) -> list[str]:
    """What is wrong with the files of an index, by their sizes; of remote ones the first alone.

    Raises:
        UserError: they do not fit into the cache.
    """
    problems = []
    remote = storage.is_remote(index.root)
    largest = max(index.shards, key=lambda shard: shard.bytes)
    if remote and settings.cache_dir is not None and largest.bytes > settings.cache_bytes:
        raise UserError(
            f"stream.cache_bytes is {settings.cache_bytes}, but {largest.name} has "
            f"{largest.bytes} bytes; allow more, or leave stream.cache_dir out"
        )
    for number, shard in enumerate(index.shards[:1] if remote else index.shards):
        address = index.address(number)
        try:
            size = storage.size_of(address, settings)
        except OSError as error:
            problems.append(f"{address} cannot be read: {error.strerror or error}")
            continue
        if size != shard.bytes:
            problems.append(f"{address} has {size} bytes, the index says {shard.bytes}")
    if remote:
        storage.check_cache(settings)
    if remote and settings.cache_dir is None:  # whether parts of a file can be had
        try:
            next(read_range(index, 0, 0, 1, settings), None)
        except DamagedShard as error:
            problems.append(f"{index.address(0)} {error}")
    return problems
