"""Index shards that others made, and verify any against their index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sr_dist import files, images, shards, storage, tars
from sr_dist.errors import UserError

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]  # (items, what, total) → items


def index(tars: Sequence[Path], progress: Progress = lambda items, what, total: items) -> Path:
    """Write `index.json` beside tars that others made, and return its path.

    Every sample with a jpg, jpeg, png or webp member counts; others are passed over.

    Raises:
        UserError: the tars are not in one folder, an index is there, or a tar cannot be read.
    """
    tars = sorted(set(tars))
    folders = {tar.parent for tar in tars}
    if len(folders) != 1:
        raise UserError(
            "expected tars of one folder (index.json lies beside them), found "
            + (", ".join(sorted(map(str, folders))) or "none")
        )
    target = folders.pop() / shards.INDEX_NAME
    if target.exists():
        raise UserError(f"{target} exists already; delete it to index the folder again")
    listed, sides, channels = [], [], 1
    for tar in progress(tars, "indexing", len(tars)):
        offsets = []
        try:
            for sample in shards.read_samples(str(tar)):
                if sample.problem:
                    raise UserError(f"{tar}: sample {sample.key} {sample.problem}")
                offsets.append(sample.offset)
                sides.append(min(images.read_size(sample.picture)))
                channels = max(channels, images.own_channels(sample.picture))
        except shards.DamagedShard as error:
            raise UserError(f"{tar} {error}") from None
        except images.PictureError as error:
            raise UserError(f"{tar}: sample {sample.key} {error}") from None
        digest, size = storage.sha256_of_file(str(tar))
        shard = shards.Shard(tar.name, len(offsets), size, digest)
        listed.append(shards.mark(shard, offsets))
    if not sides:
        raise UserError(f"no sample with a picture in {len(tars)} tars")
    text = shards.index_text(channels, min(sides), listed, {"indexed": True})
    files.write_whole(target, text)
    return target


def verify(address: str, progress: Progress = lambda items, what, total: items) -> list[str]:
    """All that is wrong with the shards of an index: files, bytes, hashes, counts and pictures."""
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
        count = 0
        try:
            for sample in shards.read_samples(where):
                if shard.mark_every and count % shard.mark_every == 0:
                    problems += _mark_problems(where, shard, count, sample.offset)
                count += 1
                problems += _picture_problems(where, sample, found)
        except shards.DamagedShard as error:
            problems.append(f"{where} {error}, after {count} samples")
        if count != shard.count:
            problems.append(f"{where}: {count} samples, the index says {shard.count}")
    return problems


def _mark_problems(where: str, shard: shards.Shard, number: int, offset: int) -> Iterator[str]:
    marked = number // shard.mark_every
    if marked >= len(shard.marks) or shard.marks[marked] != offset:
        yield f"{where}: sample {number} begins at byte {offset}, which is not what the index says"


def _picture_problems(where: str, sample: tars.Sample, found: shards.Index) -> Iterator[str]:
    if sample.problem:
        yield f"{where}: sample {sample.key} {sample.problem}"
    try:
        picture = images.decode(sample.picture, found.channels)
    except images.PictureError as error:
        yield f"{where}: sample {sample.key} {error}"
        return
    if min(picture.shape[:2]) < found.smallest_side:
        side = min(picture.shape[:2])
        yield f"{where}: sample {sample.key}: {side} pixels, below the index's smallest side"
