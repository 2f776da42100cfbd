"""Shards damaged in every way: found, named, and skipped where that is asked for."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sr_dist import images, indexing, shards, stream, tars
from tests.streams import assert_equal, joined, read, read_batches


def samples(tar: Path) -> list[tars.Sample]:
    return list(shards.read_samples(str(tar)))


def rewrite(tar: Path, key: str, **members: bytes | None) -> None:
    """Replace or leave out members of one sample, and mark the samples afresh in the index."""
    with tarfile.open(tar) as source:
        kept = {info.name: source.extractfile(info).read() for info in source}  # type: ignore
    for ending, data in members.items():
        if data is None:
            del kept[f"{key}.{ending}"]
        else:
            kept[f"{key}.{ending}"] = data
    with tarfile.open(tar, "w") as target:
        for name, data in kept.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            target.addfile(info, io.BytesIO(data))
    index = json.loads((tar.parent / "index.json").read_text())
    for shard in index["shards"]:
        shard["marks"], shard["mark_every"] = [], 0
    (tar.parent / "index.json").write_text(json.dumps(index))


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


def small(tar: Path) -> None:
    picture = images.encode(np.zeros((20, 90, 3), np.uint8), "png")
    rewrite(tar, samples(tar)[4].key, webp=None, png=picture, json=b"{}")


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 40,000 pixels wide and high."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BOMB = bomb()

CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut in a header": (cut(lambda s: s.offset + 100), "it is cut off inside the header at byte"),
    "cut between members": (cut(lambda s: s.offset), "it is cut off at byte"),
    "cut in a payload": (cut(lambda s: s.offset + 600), "it is cut off inside 0000000"),
    "flipped in a payload": (
        flip(lambda s: s.offset + 512 + len(s.picture) // 2),
        r"sample 0000000\d\d does not have the bytes that its .json tells of",
    ),
    "flipped in a header": (flip(lambda s: s.offset + 3), "there is no tar header at byte"),
    "empty": (lambda tar: tar.write_bytes(b"") and None, "it is cut off at byte 0"),
    "gone": (lambda tar: tar.unlink(), "is gone; its folder"),
    "a picture missing": (
        lambda tar: rewrite(tar, samples(tar)[4].key, webp=None),
        "it ends after",
    ),
    "an undecodable picture": (
        lambda tar: rewrite(tar, samples(tar)[4].key, webp=b"RIFF nonsense", json=b"{}"),
        r"sample 0000000\d\d no picture",
    ),
    "a decompression bomb": (
        lambda tar: rewrite(tar, samples(tar)[4].key, webp=None, png=BOMB, json=b"{}"),
        r"sample 0000000\d\d .*exceeds limit",
    ),
    "a small picture": (small, "is 90x20 pixels, smaller than data.crop_size 48"),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(
    request: pytest.FixtureRequest, sharded: Path, tmp_path: Path
) -> tuple[Path, str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A folder with one damaged shard, what is said of it, and the batches of the whole one."""
    damage, message = CASES[request.param]
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in sharded.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    damage(folder / "shard-000001.tar")
    return folder, message, read(sharded, last=LAST, crops=1)


LAST = 44  # two epochs of 22 steps and so every sample


def test_damage_stops_and_is_named(case: tuple[Path, str, object]) -> None:
    folder, message, _ = case
    for num_workers in (0, 2):
        with pytest.raises(stream.DataError, match=rf"shard .*shard-000001.tar .*{message}"):
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
    assert_equal(skipping[13:], read(folder, first=13, last=LAST, crops=1, on_error="skip"))
    halves = [
        read(folder, last=LAST, crops=1, on_error="skip", rank=rank, world_size=2)
        for rank in range(2)
    ]
    assert_equal(skipping, joined(halves))


def test_verify_finds_it_beforehand(case: tuple[Path, str, object]) -> None:
    folder, _, _ = case
    problems = indexing.verify(str(folder))
    assert problems and all("shard-000001.tar" in problem for problem in problems)


def test_what_is_skipped_is_reported(sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in sharded.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tar = folder / "shard-000001.tar"
    bad = [sample.key for sample in samples(tar)[:3]]
    for key in bad:
        rewrite(tar, key, webp=b"RIFF nonsense", json=b"{}")
    batches = read_batches(folder, last=22, num_workers=2, on_error="skip")
    messages = [message for batch in batches for message in batch.skipped]
    assert messages and all("no picture" in message for message in messages)
    named = {key for key in bad for message in messages if f"sample {key} " in message}
    assert named <= set(bad) and len(messages) == len(named), "each once an epoch"


def test_nothing_usable_is_said(sharded: Path, tmp_path: Path) -> None:
    for path in sharded.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
        else:
            (tmp_path / path.name).write_bytes(b"")
    with pytest.raises(stream.DataError, match="no sample of .* can be used"):
        read(tmp_path, on_error="skip")
