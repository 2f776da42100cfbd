from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from sr_dist import (
    images,
    indexing,
    loading,
    shard_reader,
    shard_writer,
    shards,
    stream,
    tars,
    tensors,
)
from sr_dist.degradation import Degradation
from sr_dist.errors import UserError
from tests.streams import assert_equal, joined, read, read_batches, stream_of


def test_batches_are_uint8_channels_last_and_lr_is_the_downscaled_hr(sharded: Path) -> None:
    for lr, hr in read(sharded):
        assert (lr.shape, hr.shape) == ((6, 3, 12, 12), (6, 3, 48, 48))
        assert lr.dtype == hr.dtype == torch.uint8
        assert hr.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(lr, tensors.downscale(hr, 4))


def test_crops_are_those_that_the_plan_names(sharded: Path) -> None:
    index = shards.read_index(str(sharded))
    plan = shards.make_plan(index, seed=3, global_batch_size=6, crops_per_image=2, crop_size=48)
    firsts = np.concatenate([[0], np.cumsum(plan.counts)])
    for step, (_, hr) in enumerate(read(sharded)):
        for row, (shard, sample, crop) in enumerate(shards.samples_of_step(plan, step)):
            data = list(shard_reader.read_samples(index.address(shard)))[sample].picture
            random = np.random.default_rng([3, 0, int(firsts[shard]) + sample, crop])
            picture = images.decode(data, 3)
            expected = images.random_crop(*picture.shape[:2], 48, random).of(picture)
            assert np.array_equal(tensors.to_pictures(hr)[row], expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_jpegs_can_be_left_for_the_device_to_decode(
    photographs: Path, tmp_path: Path, num_workers: int
) -> None:
    """Here the CPU: the same crops, as torchvision decodes them."""
    options = shard_writer.Options(tile=96, encode="jpeg", samples_per_shard=20)
    shard_writer.write(images.list_pictures(photographs), tmp_path, options)
    expected = read_batches(tmp_path)
    source = stream_of(tmp_path, decode="nvjpeg")
    encoded = list(loading.batches(source, num_workers=num_workers, pin_memory=False))
    assert all(isinstance(batch, stream.Encoded) and len(batch.crops) == 6 for batch in encoded)
    found = list(loading.on_device(iter(encoded), torch.device("cpu"), 4))
    assert len(found) == len(expected) == 6
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.hr.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(mine.lr, tensors.downscale(mine.hr, 4))
        difference = (mine.hr.int() - theirs.hr.int()).abs()
        assert difference.max() <= 3 and difference.float().mean() < 0.1
    crop = encoded[0].crops[0]
    broken = stream.Encoded((crop._replace(data=crop.data[:200]),), ())
    named = r"shard-00000\d\.tar: sample 0000000\d\d cannot be decoded: "
    with pytest.raises(stream.DataError, match=named):
        loading.decoded(broken, torch.device("cpu"), 4)


def test_turned_jpegs_cannot_be_left_for_it(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "turned").mkdir()
    with Image.open(photographs / "coffee.png") as picture:
        exif = picture.getexif()
        exif[0x0112] = 6
        picture.convert("RGB").save(tmp_path / "turned" / "coffee.jpg", exif=exif)
    options = shard_writer.Options(tile=0, encode="keep")
    found = images.list_pictures(tmp_path / "turned")
    shard_writer.write(found, tmp_path / "shards", options)
    with pytest.raises(UserError, match="is stored turned"):
        read_batches(tmp_path / "shards", decode="nvjpeg", batch=1, crops=1, last=1)


def test_other_pictures_cannot_be_left_for_it(sharded: Path) -> None:
    with pytest.raises(UserError, match="is no JPEG, which data.decode=nvjpeg needs"):
        read_batches(sharded, decode="nvjpeg")


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_workers_do_not_change_the_batches(sharded: Path, num_workers: int) -> None:
    assert_equal(read(sharded), read(sharded, num_workers=num_workers))


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_hold_the_rows_of_the_one_batch(sharded: Path, world_size: int) -> None:
    of_ranks = [read(sharded, rank=r, world_size=world_size) for r in range(world_size)]
    whole = read(sharded)
    assert_equal(joined(of_ranks), whole)
    for first in (3, 4):  # going on on others than it began on; of each picture there are two crops
        rest = [
            read(sharded, first=first, rank=r, world_size=world_size) for r in range(world_size)
        ]
        assert_equal(joined(rest), whole[first:])


@pytest.mark.parametrize("window", [None, 1, 3])
def test_going_on_from_any_step_gives_the_batches_of_the_unbroken_run(
    sharded: Path, window: int | None
) -> None:
    plan_steps = shards.read_index(str(sharded)).samples // 6 * 2
    last = plan_steps + 7  # into the second epoch
    whole = read(sharded, last=last, window=window)
    for first in (1, 5, plan_steps - 1, plan_steps, plan_steps + 3):
        rest = read(sharded, first=first, last=last, window=window, num_workers=first % 3)
        assert_equal(rest, whole[first:])


def test_going_on_decodes_nothing_that_it_passes(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    real = images.decode
    monkeypatch.setattr(
        images, "decode", lambda data, channels: decoded.append(data) or real(data, channels)
    )
    read(sharded, first=31, last=32)
    assert len(decoded) == 6, "one for each row"
    index, plan = (getattr(stream_of(sharded), name) for name in ("index", "plan"))
    rows = shards.samples_of_step(plan, 31)
    held = [list(shard_reader.read_samples(index.address(n))) for n in range(3)]
    assert decoded == [held[shard][sample].picture for shard, sample, _ in rows]


def test_going_on_in_an_epoch_of_a_billion_opens_a_shard_a_lane(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the stream itself: shards of which the reader alone is told."""
    listed = tuple(shards.Shard(f"{n}.tar", 9_000 + n % 2_001, 10**9, "0") for n in range(100_000))
    index = shards.Index("nowhere", 3, 128, listed, {})
    plan = shards.make_plan(index, seed=0, global_batch_size=4096, crops_per_image=4, crop_size=96)
    first = 3 * plan.steps_per_epoch + plan.steps_per_epoch // 2
    opened: list[tuple[int, int, int]] = []  # shard, and the samples read of it
    decoded: list[tuple[int, int]] = []

    def reading(
        index: shards.Index, shard: int, start: int, stop: int, _: object
    ) -> Iterator[tars.Sample]:
        opened.append((shard, start, start))
        for number in range(start, stop):
            opened[-1] = (shard, start, number + 1)
            yield tars.Sample(str(number), 0, "png", b"", {})

    def decoding(self: object, member: stream._Member) -> images.Picture:
        decoded.append((member.shard, member.number))
        return np.zeros((128, 128, 3), np.uint8)

    monkeypatch.setattr(shard_reader, "read_range", reading)
    monkeypatch.setattr(stream._Reader, "_decode", decoding)
    source = dataclasses.replace(
        stream_of(sharded), index=index, plan=plan, first_step=first, crop_size=96
    )
    reader, cut = stream._Reader(source), 0
    rows = shards.samples_of_step(plan, first)
    for row in range(0, 4096, 4):
        shard, sample, _ = rows[row]
        opened.clear()
        decoded.clear()
        next(reader.lane(row))
        assert decoded == [(shard, sample)]
        ((_, start, stop),) = opened
        if stop - start != plan.window:  # from there on, and not from the shard's beginning
            assert start == 0 or stop == listed[shard].count, "smaller at a border only"
            cut += 1
    assert plan.window == 37 and 0 < cut < 20


def test_epochs_crop_differently(sharded: Path) -> None:
    steps = shards.read_index(str(sharded)).samples // 6
    crops = [
        {bytes(row.contiguous().numpy().tobytes()) for _, hr in part for row in hr}
        for part in (
            read(sharded, last=steps, crops=1),
            read(sharded, first=steps, last=2 * steps, crops=1),
        )
    ]
    assert len(crops[0]) > 0.95 * steps * 6  # nearly all different (few tiles are uniform)
    assert len(crops[0] & crops[1]) < 0.05 * steps * 6


def test_crops_do_not_keep_their_pictures_in_memory(sharded: Path) -> None:
    for crop in itertools.islice(stream._Reader(stream_of(sharded)).lane(0), 5):
        assert crop.hr.base is None and crop.hr.nbytes == 48 * 48 * 3


def test_degraded_lr_is_seeded_like_the_crops(sharded: Path) -> None:
    worse = Degradation(blur_sigma=(0.5, 2), noise_sigma=(2, 10), jpeg_quality=(40, 90))
    plain, degraded = read(sharded), read(sharded, degradation=worse)
    for (lr, hr), (worse_lr, same_hr) in zip(plain, degraded, strict=True):
        assert torch.equal(hr, same_hr)
        assert (lr.int() - worse_lr.int()).abs().float().mean() > 2
    assert_equal(degraded, read(sharded, degradation=worse, num_workers=3))
    assert_equal(degraded[2:], read(sharded, degradation=worse, first=2))
    parts = [read(sharded, degradation=worse, rank=rank, world_size=2) for rank in range(2)]
    assert_equal(degraded, joined(parts))


def test_every_crop_has_noise_of_its_own(sharded: Path) -> None:
    (plain, _), (noisy, _) = (
        read(sharded, last=1, degradation=Degradation(noise_sigma=(sigma, sigma)))[0]
        for sigma in (0.0, 4.0)
    )
    noise = (noisy.double() - plain.double()).flatten(1)
    likeness = torch.corrcoef(noise).fill_diagonal_(0)
    assert noise.std() > 2 and likeness.abs().max() < 0.3


def test_16_bit_gray_is_kept_up_to_the_crop(tmp_path: Path) -> None:
    """12-bit values in a 16-bit file: 8-bit crops of what was stored, scaled by 4095."""
    y, x = np.mgrid[0:128, 0:192]
    deep = (x * 17 + y * 5).astype(np.uint16)[..., None]
    assert 255 < deep.max() < 4096
    (tmp_path / "in").mkdir()
    for name in ("0.tif", "1.png", "2.png"):
        images.save(deep, tmp_path / "in" / name)
    options = shard_writer.Options(tile=64, channels=1, encode="webp", min_size=48)
    summary = shard_writer.write(
        images.list_pictures(tmp_path / "in"), tmp_path / "shards", options
    )
    assert (summary.samples, summary.rejects) == (18, [])
    assert indexing.verify(str(tmp_path / "shards")) == []
    scaled = (deep[..., 0] * (255 / 4095)).round().astype(np.uint8)
    windows = {
        view.tobytes()
        for view in np.lib.stride_tricks.sliding_window_view(scaled, (48, 48)).reshape(-1, 48, 48)
    }
    for _, hr in read(tmp_path / "shards", channels=1, bits=12):
        for crop in hr[:, 0].numpy():
            turned = [t for k in range(4) for t in (np.rot90(crop, k), np.rot90(crop.T, k))]
            assert any(np.ascontiguousarray(t).tobytes() in windows for t in turned)
    with pytest.raises(stream.DataError, match=r"up to \d+, for which data.bits 10 are too few"):
        read(tmp_path / "shards", channels=1, bits=10)


def test_16_bit_gray_is_no_colour_picture(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    images.save(np.zeros((64, 64, 1), np.uint16), tmp_path / "in" / "deep.png")
    with pytest.raises(UserError, match="deep.png is 16-bit gray, which is read as one channel"):
        shard_writer.write(
            images.list_pictures(tmp_path / "in"),
            tmp_path / "shards",
            shard_writer.Options(min_size=48),
        )


def test_whole_pictures_are_crops_too(sharded: Path, photographs: Path, tmp_path: Path) -> None:
    for number in range(4):
        cut = images.decode(photographs / "astronaut.png", 3)[:128, number : number + 128]
        images.save(np.ascontiguousarray(cut), tmp_path / f"{number}.png")
    options = shard_writer.Options(tile=0, min_size=48)
    shard_writer.write(images.list_pictures(tmp_path), tmp_path / "shards", options)
    batches = read_batches(tmp_path / "shards", last=2, crops=1, batch=2, crop_size=128)
    sums = sorted(int(picture.sum()) for batch in batches for picture in batch.hr)
    files = sorted(int(images.decode(path, 3).sum()) for path in tmp_path.glob("*.png"))
    assert sums == files, "each picture once, whole, in one of its symmetries"
    assert batches[0].lr.shape == (2, 3, 32, 32)


def test_foreign_shards_can_be_trained_on(photographs: Path, tmp_path: Path) -> None:
    """As img2dataset lays them out: jpg, json and txt, and samples without a picture."""
    astronaut = images.decode(photographs / "astronaut.png", 3)
    written = set()
    for shard in range(2):
        path = tmp_path / f"{shard:05d}.tar"
        with webdataset.TarWriter(str(path), encoder=False) as tar:
            for number in range(7):
                top = 20 * (7 * shard + number)
                picture = images.encode(astronaut[top : top + 48, :48].copy(), "jpeg")
                written.add(images.decode(picture, 3).tobytes())
                about = b'{"url": "http://x", "status": "success"}'
                key = f"{shard:05d}{number:04d}"
                tar.write({"__key__": key, "jpg": picture, "txt": b"words", "json": about})
                tar.write({"__key__": key + "x", "txt": b"", "json": b'{"status": "failed"}'})
    indexing.index(sorted(tmp_path.glob("*.tar")))
    batches = read(tmp_path, last=2, crops=1, num_workers=1)
    rows = [row.permute(1, 2, 0).numpy() for _, hr in batches for row in hr]
    assert len(rows) == 12
    seen = set()
    for row in rows:
        turned = [np.rot90(r, k) for r in (row, row.transpose(1, 0, 2)) for k in range(4)]
        found = {np.ascontiguousarray(t).tobytes() for t in turned} & written
        assert len(found) == 1
        seen |= found
    assert len(seen) == 12, "each sample once"
