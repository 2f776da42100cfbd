"""The samples of shards that lie anywhere and may be damaged."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from sr_dist import shards, storage, tars
from sr_dist.errors import UserError

_MOST_ASKED = 2000  # remote shards that are asked for before a run; some seconds' worth
_ASKED_AT_ONCE = 16

_File = tuple[str, int, str]  # address, bytes and sha256


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
            stretch = described.stretch(number)
            for sample in _read_stretch(file, stretch, number, stop, index.ours):
                yield sample
                number += 1


def _read_stretch(
    file: BinaryIO, stretch: shards.Stretch, start: int, stop: int, ours: bool
) -> Iterator[tars.Sample]:
    """Samples `start` to `stop` of a stretch, or to its end; lost ones as `read_range` has them."""
    number, expected = stretch.first, stretch.last - stretch.first
    file.seek(stretch.start)
    samples = tars.read_samples(file, passed_over=start - number, end=stretch.end, ours=ours)
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


def check_files(
    index: shards.Index, settings: storage.Settings = storage.DEFAULT, open_at_once: int = 0
) -> list[str]:
    """How the files of an index differ from what it says, as `look_at_files` finds it.

    Raises:
        UserError: one is not there or cannot be read, or the cache cannot be used.
    """
    unreadable, differing = look_at_files(index, settings, open_at_once)
    if unreadable:
        more = f" ({len(unreadable)} cannot be read)" if len(unreadable) > 1 else ""
        raise UserError(
            f"shard {unreadable[0]}{more}. Such shards are never skipped: bring it back, or name "
            f"those to train on, {index.root}/{{ONE.tar,OTHER.tar}}"
        )
    return differing


def look_at_files(
    index: shards.Index, settings: storage.Settings = storage.DEFAULT, open_at_once: int = 0
) -> tuple[list[str], list[str]]:
    """Which files of an index cannot be read and why, and which have another size than it says.

    Local ones are opened. Remote ones are asked for, but for those in the cache: of more than
    `_MOST_ASKED` so many, spread evenly, up to the first that cannot be read. `open_at_once`: see
    `storage.check_cache`.

    Raises:
        UserError: the cache cannot be used.
    """
    files = [
        (index.address(number), shard.bytes, shard.sha256)
        for number, shard in enumerate(index.shards)
    ]
    remote = storage.is_remote(index.root)
    if remote:
        storage.check_cache(settings, files, open_at_once)
        files = [file for file in files if not storage.is_cached(settings, *file)]
        files = files[:: max(1, -(-len(files) // _MOST_ASKED))]
    unreadable, differing = [], []
    for found in _looked_at(files, settings) if remote else map(_look, files):
        if isinstance(found, UnreadableShard):
            unreadable.append(str(found))
            if remote:  # the others may be asked for as long in vain
                break
        elif found:
            differing.append(found)
    if remote and settings.cache_dir is None and not unreadable:  # can parts of a file be had?
        try:
            next(read_range(index, 0, 0, 1, settings), None)
        except UnreadableShard as error:
            unreadable.append(f"{index.address(0)} {error}")
    return unreadable, differing


def _looked_at(files: list[_File], settings: storage.Settings) -> Iterator[str | UnreadableShard]:
    """What `_look` says of remote files, several at once."""
    look = functools.partial(_look, settings=settings)
    yield from map(look, files[:1])  # one alone, to a host that may not answer
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        yield from pool.map(look, files[1:])


def _look(file: _File, settings: storage.Settings = storage.DEFAULT) -> str | UnreadableShard:
    """How the size of a file differs from that of the index, or why it cannot be read."""
    address, expected, _ = file
    try:
        with _told_apart():
            if storage.is_remote(address):
                size = storage.size_of(address, settings)
                if size < expected and _reaches(address, expected, settings):
                    return ""  # a server that tells a wrong size, and sends the right bytes
            else:
                with storage.open_file(address) as opened:
                    size = os.fstat(opened.fileno()).st_size
    except UnreadableShard as error:
        return UnreadableShard(f"{address} {error}")
    return "" if size == expected else f"{address} has {size} bytes, the index says {expected}"


def _reaches(address: str, size: int, settings: storage.Settings) -> bool:
    """Whether the last of `size` bytes can be had."""
    try:
        with storage.open_file(address, settings, size=size) as file:
            file.seek(size - 1)
            return len(file.read(1)) == 1
    except OSError:
        return False
