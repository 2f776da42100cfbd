"""Shards damaged in every way: found, named, and skipped where that is asked for."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sr_dist import (
    config,
    images,
    indexing,
    shard_reader,
    shards,
    storage,
    stream,
    tars,
    train,
)
from sr_dist.errors import UserError
from tests.streams import assert_equal, joined, read, read_batches


def samples(tar: Path) -> list[tars.Sample]:
    return list(shard_reader.read_samples(str(tar)))


def rewrite(tar: Path, key: str, **members: bytes | None) -> None:
    """Replace or leave out members of one sample; the others stay at their places."""
    with tarfile.open(tar) as source:
        kept = {info.name: source.extractfile(info).read() for info in source}  # type: ignore
    names = [name for name in kept if name.partition(".")[0] == key]
    space = sum(512 + -(-len(kept[name]) // 512) * 512 for name in names)
    changed = {f"{key}.{ending}": data for ending, data in members.items()}
    with tarfile.open(tar, "w") as target:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            target.addfile(info, io.BytesIO(data))

        for name, data in kept.items():
            if name not in names:
                add(name, data)
            elif name == names[0]:
                begin = target.offset
                for one, content in {**{n: kept[n] for n in names}, **changed}.items():
                    if content is not None:
                        add(one, content)
                fill = begin + space - target.offset - 512
                add(f"{key}.txt", bytes(fill))


def cut(place: Callable[[tars.Sample], int]) -> Callable[[Path], None]:
    """Cut the tar at a place that is counted from its fifth sample."""

    def damage(tar: Path) -> None:
        fifth = samples(tar)[4]
        tar.write_bytes(tar.read_bytes()[: place(fifth)])

    return damage


def flip(place: Callable[[tars.Sample], int]) -> Callable[[Path], None]:
    def damage(tar: Path) -> None:
        data = bytearray(tar.read_bytes())
        data[place(samples(tar)[4])] ^= 0x40
        tar.write_bytes(data)

    return damage


def about(picture: bytes) -> bytes:
    return json.dumps({"crc32": zlib.crc32(picture)}).encode()


def replace(tar: Path, key: str, ending: str, picture: bytes) -> None:
    """Another picture, as if it had been written so."""
    rewrite(tar, key, **{"webp": None, ending: picture, "json": about(picture)})


def small(tar: Path) -> None:
    picture = images.encode(np.zeros((20, 90, 3), np.uint8), "png")
    replace(tar, samples(tar)[4].key, "png", picture)


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 40,000 pixels wide and high."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BOMB = bomb()

CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut in a header": (cut(lambda s: s.offset + 100), "it is cut off "),
    "cut between members": (cut(lambda s: s.offset), "it is cut off at byte"),
    "cut in a payload": (cut(lambda s: s.offset + 600), "it is cut off "),
    "flipped in a payload": (
        flip(lambda s: s.offset + 512 + len(s.picture) // 2),
        r"sample 0000000\d\d does not have the bytes that its .json tells of",
    ),
    "flipped in a header": (flip(lambda s: s.offset + 3), "there is no tar header at byte"),
    "empty": (lambda tar: tar.write_bytes(b"") and None, "it is cut off at byte"),
    "a picture missing": (
        lambda tar: rewrite(tar, samples(tar)[4].key, webp=None),
        r"it holds \d+ samples from byte \d+ on, where the index has \d+",
    ),
    "an undecodable picture": (
        lambda tar: replace(tar, samples(tar)[4].key, "webp", b"RIFF nonsense"),
        r"sample 0000000\d\d is no picture",
    ),
    "a decompression bomb": (
        lambda tar: replace(tar, samples(tar)[4].key, "png", BOMB),
        r"sample 0000000\d\d .*exceeds limit",
    ),
    "a small picture": (small, "is 90x20 pixels, smaller than data.crop_size 48"),
}


def copy_with_marks(sharded: Path, folder: Path, most: int) -> Path:
    """The shards, with `most` marks in each at most."""
    shutil.copytree(sharded, folder)
    index = shards.read_index(str(sharded))
    marked = [shards.mark(shard, shard.marks, most) for shard in index.shards]
    assert all(shard.mark_every > 1 and len(shard.marks) > 3 for shard in marked)
    text = shards.index_text(index.channels, index.smallest_side, marked, index.options)
    (folder / "index.json").write_text(text)
    return folder


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(
    request: pytest.FixtureRequest, sharded: Path, tmp_path: Path
) -> tuple[Path, str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A folder with one damaged shard, what is said of it, and the batches of the whole one."""
    damage, message = CASES[request.param]
    folder = copy_with_marks(sharded, tmp_path / "damaged", most=6)
    damage(folder / "shard-000001.tar")
    return folder, message, read(sharded, last=LAST, crops=1)


LAST = 44  # two epochs of 22 steps and so every sample


def test_damage_stops_and_is_named(case: tuple[Path, str, object]) -> None:
    folder, message, _ = case
    for num_workers in (0, 2):
        with pytest.raises(stream.DataError, match=rf"shard .*shard-000001.tar:? .*{message}"):
            read(folder, last=LAST, crops=1, num_workers=num_workers)


def test_damage_is_skipped_alike_everywhere(
    case: tuple[Path, str, list[tuple[torch.Tensor, torch.Tensor]]],
) -> None:
    folder, message, whole = case
    skipping = read(folder, last=LAST, crops=1, on_error="skip")
    assert len(skipping) == len(whole)
    rows = torch.stack([(a[1] == b[1]).all() for a, b in zip(
        [(None, r) for _, hr in skipping for r in hr],
        [(None, r) for _, hr in whole for r in hr], strict=True)])  # fmt: skip
    assert 0 < int((~rows).sum()) and int(rows.sum()) > 0.4 * len(rows), "the others are as before"
    assert_equal(skipping, read(folder, last=LAST, crops=1, on_error="skip", num_workers=3))
    for first in range(1, LAST):  # also behind the damage
        rest = read(folder, first=first, last=first + 1, crops=1, on_error="skip")
        assert_equal(skipping[first : first + 1], rest)
    halves = [
        read(folder, last=LAST, crops=1, on_error="skip", rank=rank, world_size=2)
        for rank in range(2)
    ]
    assert_equal(skipping, joined(halves))


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_missing_shard_is_never_skipped(sharded: Path, tmp_path: Path, on_error: str) -> None:
    """It may be on its way: who trains on the rest must say so with another index."""
    folder = Path(shutil.copytree(sharded, tmp_path / "out"))
    (folder / "shard-000001.tar").unlink()
    message = "shard-000001.tar is not there, though its index.json lists it. Run the same command"
    with pytest.raises(stream.DataError, match=message):
        read(folder, last=LAST, crops=1, on_error=on_error)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("fault", ["missing", "unreadable"])
def test_shards_that_cannot_be_read_are_told_before_a_run(
    recipe: Path, sharded: Path, tmp_path: Path, on_error: str, fault: str
) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "out"))
    tar = folder / "shard-000001.tar"
    tar.unlink()
    message = "shard-000001.tar is not there, though its index.json lists it"
    if fault == "unreadable":
        tar.mkdir()  # as a file without rights is to all but root: there, and not to be opened
        message = "shard-000001.tar cannot be read: Is a directory"
    overrides = (f"data.train={folder}", f"stream.on_error={on_error}")
    with pytest.raises(UserError, match=message + ".* Such shards are never skipped"):
        train.run(config.load(recipe, overrides), dry=True)


def test_a_longer_file_is_read_as_far_as_the_index_says(sharded: Path, tmp_path: Path) -> None:
    """As from afar, where no more is asked for."""
    folder = Path(shutil.copytree(sharded, tmp_path / "out"))
    tar = folder / "shard-000001.tar"
    index = shards.read_index(str(folder))
    shorter = dataclasses.replace(index.shards[1], bytes=index.shards[1].marks[5] + 700, marks=())
    shorter = dataclasses.replace(shorter, mark_every=0)
    held = dataclasses.replace(index, shards=(shorter,), root=str(folder))
    found = [s.key for s in shard_reader.read_range(held, 0, 0, shorter.count, storage.DEFAULT)]
    whole = [sample.key for sample in samples(tar)]
    assert found[:5] == whole[:5] and not any(found[6:]) and len(found) == len(whole)


def without_its_crc(tar: Path) -> None:
    """A flipped bit in the name of the key, and one in the picture."""
    sample = samples(tar)[4]
    data = bytearray(tar.read_bytes())
    data[data.index(b"crc32", sample.offset) + 4] ^= 1
    data[data.index(sample.picture, sample.offset) + len(sample.picture) // 2] ^= 1
    tar.write_bytes(data)


def no_json(tar: Path) -> None:
    sample = samples(tar)[4]
    data = bytearray(tar.read_bytes())
    data[data.index(b'{"source"', sample.offset)] ^= 1
    tar.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [no_json, lambda tar: rewrite(tar, samples(tar)[4].key, json=None), without_its_crc],
    ids=["flipped", "missing", "key-and-picture"],
)
def test_our_own_shards_have_a_crc(
    sharded: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Without it, a changed picture would be read as if nothing were."""
    folder = copy_with_marks(sharded, tmp_path / "damaged", most=6)
    key = samples(folder / "shard-000001.tar")[4].key
    damage(folder / "shard-000001.tar")
    message = f"sample {key} has no .json that tells the CRC-32 of its picture"
    with pytest.raises(stream.DataError, match=message):
        read(folder, last=LAST, crops=1)
    batches = read_batches(folder, last=LAST // 2, crops=1, on_error="skip")
    assert [message in skipped for batch in batches for skipped in batch.skipped] == [True]
    assert any(message in problem for problem in indexing.verify(str(folder)))


def test_verify_finds_it_beforehand(case: tuple[Path, str, object]) -> None:
    folder, _, _ = case
    problems = indexing.verify(str(folder))
    assert problems and all("shard-000001.tar" in problem for problem in problems)


@pytest.mark.parametrize("crops", [1, 2])
def test_what_is_skipped_is_reported_once_an_epoch(
    sharded: Path, tmp_path: Path, crops: int
) -> None:
    folder = copy_with_marks(sharded, tmp_path / "damaged", most=6)
    tar = folder / "shard-000001.tar"
    bad = [sample.key for sample in samples(tar)[:3]]
    for key in bad:
        replace(tar, key, "webp", b"RIFF nonsense")
    last = 22 * crops
    options = {"crops": crops, "on_error": "skip", "num_workers": 2}
    batches = read_batches(folder, last=last, **options)
    messages = [message for batch in batches for message in batch.skipped]
    assert messages and all("no picture" in message for message in messages)
    named = {key for key in bad for message in messages if f"sample {key} " in message}
    assert named <= set(bad) and len(messages) == len(named)
    for stop in range(1, last, 3):  # a run that was stopped counts none twice
        parts = read_batches(folder, last=stop, **options)
        parts += read_batches(folder, first=stop, last=last, **options)
        assert [part.skipped for part in parts] == [batch.skipped for batch in batches]


def test_more_samples_than_the_index_has_are_noticed(sharded: Path, tmp_path: Path) -> None:
    """The last samples of a stretch are two where the index has one."""
    index = shards.read_index(str(sharded))
    shard = index.shards[1]
    coarse = shards.mark(shard, shard.marks[:4] + shard.marks[5:], most=6)
    coarse = dataclasses.replace(coarse, count=shard.count - 1)
    found = dataclasses.replace(index, shards=(coarse,))
    stretch = coarse.stretch(3)
    read = list(shard_reader.read_range(found, 0, 0, coarse.count, storage.DEFAULT))
    assert len(read) == coarse.count
    lost = [number for number, sample in enumerate(read) if not sample.key]
    assert lost == [stretch.last - 1]
    assert "holds more than the" in read[lost[0]].problem


def test_nothing_usable_is_said(sharded: Path, tmp_path: Path) -> None:
    for path in sharded.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
        else:
            (tmp_path / path.name).write_bytes(b"")
    with pytest.raises(stream.DataError, match="no sample of .* can be used"):
        read(tmp_path, on_error="skip")
