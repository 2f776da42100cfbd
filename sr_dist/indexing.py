"""Index shards that others made, and verify any against their index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sr_dist import files, images, shard_reader, shards, storage, tars
from sr_dist.errors import UserError

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]  # (items, what, total) → items


def index(
    paths: Sequence[Path],
    progress: Progress = lambda items, what, total: items,
    *,
    min_size: int = 1,
) -> tuple[Path, list[str]]:
    """Write `index.json` beside tars that others made.

    Every sample with a jpg, jpeg, png or webp member counts; others are passed over. Returns the
    index's path, and the samples that cannot be used, each with the reason: its picture cannot be
    read, or its short side is below `min_size` pixels. They are in the index all the same, since
    samples are counted; training says so, or leaves them out with `stream.on_error=skip`.

    Raises:
        UserError: the tars are not in one folder, an index is there, a tar cannot be read to its
            end, or no sample can be used.
    """
    paths = sorted(set(paths))
    folders = {path.parent for path in paths}
    if len(folders) != 1:
        raise UserError(
            "expected tars of one folder (index.json lies beside them), found "
            + (", ".join(sorted(map(str, folders))) or "none")
        )
    target = folders.pop() / shards.INDEX_NAME
    if target.exists():
        raise UserError(f"{target} exists already; delete it to index the folder again")
    listed, channels, unusable = [], 1, []
    smallest: tuple[int, str] | None = None  # short side in pixels, and which sample has it
    deep: list[str] = []  # samples that only a set of gray pictures can use
    for tar in progress(paths, "indexing", len(paths)):
        offsets = []
        try:
            for sample in shard_reader.read_samples(str(tar)):
                offsets.append(sample.offset)
                try:
                    header = _header(sample, min_size)
                    side = min(header.height, header.width)
                    if smallest is None or side < smallest[0]:
                        smallest = side, f"{tar.name}: sample {sample.key}"
                    channels = max(channels, header.channels)
                    if header.deep:
                        deep.append(
                            f"{tar}: sample {sample.key} is 16-bit gray, others have colour"
                        )
                except images.PictureError as error:
                    unusable.append(f"{tar}: sample {sample.key} {error}")
        except shard_reader.DamagedShard as error:
            raise UserError(f"{tar} {error}") from None
        digest, size = storage.sha256_of_file(str(tar))
        shard = shards.Shard(tar.name, len(offsets), size, digest)
        listed.append(shards.mark(shard, offsets))
    if smallest is None:
        first = f"; first: {unusable[0]}" if unusable else ""
        raise UserError(f"no sample with a usable picture in {len(paths)} tars{first}")
    unusable += deep if channels == 3 else []
    options = {"indexed": True, "smallest": smallest[1]}
    text = shards.index_text(channels, smallest[0], listed, options)
    files.write_whole(target, text)
    return target, unusable


def _header(sample: tars.Sample, least: int) -> images.Header:
    """That of a sample's picture.

    Raises:
        PictureError: it cannot be used.
    """
    if sample.problem:
        raise images.PictureError(sample.problem)
    header = images.header(sample.picture)
    if min(header.height, header.width) < least:
        size = f"{header.width}x{header.height}"
        raise images.PictureError(f"is {size} pixels; expected {least} on a side")
    return header


def verify(
    address: str, progress: Progress = lambda items, what, total: items, min_size: int = 1
) -> list[str]:
    """All that is wrong with the shards of an index: files, bytes, hashes, counts and pictures.

    Every picture is decoded; one with a side shorter than `min_size` is wrong too. Of a damaged
    tar, what lies behind the damage is looked at too.
    """
    found = shards.read_index(address)
    problems = []
    for number, shard in enumerate(progress(found.shards, "verifying", len(found.shards))):
        where = found.address(number)
        try:
            digest, size = storage.sha256_of_file(where)
        except OSError as error:
            problems.append(f"{where}: cannot be read: {error.strerror or error}")
            continue
        if size != shard.bytes:
            problems.append(f"{where}: {size} bytes, the index says {shard.bytes}")
        elif digest != shard.sha256:
            problems.append(f"{where}: its sha256 is not the index's; its bytes were changed")
        lost: dict[str, list[int]] = {}
        samples = shard_reader.read_range(found, number, 0, shard.count, storage.DEFAULT)
        try:
            for place, sample in enumerate(samples):
                if sample.key:
                    problems += _picture_problems(where, sample, found, min_size)
                else:
                    lost.setdefault(sample.problem, []).append(place)
        except shard_reader.UnreadableShard as error:
            problems.append(f"{where} {error}")
        problems += [
            f"{where} {problem}; {len(places)} of {shard.count} samples are lost by it, from "
            f"number {places[0]} to {places[-1]}"
            for problem, places in lost.items()
        ]
    return problems


def _picture_problems(
    where: str, sample: tars.Sample, found: shards.Index, min_size: int
) -> Iterator[str]:
    if sample.problem:
        yield f"{where}: sample {sample.key} {sample.problem}"
    try:
        picture = images.decode(sample.picture, found.channels)
    except images.PictureError as error:
        yield f"{where}: sample {sample.key} {error}"
        return
    side = min(picture.shape[:2])
    if side < found.smallest_side:
        yield f"{where}: sample {sample.key}: {side} pixels, below the index's smallest side"
    elif side < min_size:
        yield f"{where}: sample {sample.key}: {side} pixels, below --min-size {min_size}"
