from __future__ import annotations

import io
import itertools
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from sr_dist import images, shards, stream


def read(
    folder: Path,
    *,
    first: int = 0,
    last: int = 6,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    crops: int = 2,
    batch: int = 6,
    window: int | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    index = shards.read_index(str(folder))
    plan = shards.make_plan(
        index, seed=3, global_batch_size=batch, crops_per_image=crops, crop_size=48
    )
    if window:
        plan = shards.Plan(plan.counts, plan.seed, batch, crops, window)
    source = stream.CropStream(
        index=index,
        plan=plan,
        scale=4,
        channels=3,
        crop_size=48,
        rank=rank,
        world_size=world_size,
        first_step=first,
        last_step=last,
    )
    return list(stream.batches(source, num_workers=num_workers, pin_memory=False))


def assert_equal(
    one: list[tuple[torch.Tensor, torch.Tensor]], other: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    assert len(one) == len(other)
    for (lr, hr), (other_lr, other_hr) in zip(one, other, strict=True):
        assert torch.equal(lr, other_lr) and torch.equal(hr, other_hr)


def test_batches_are_uint8_channels_last_and_lr_is_the_downscaled_hr(sharded: Path) -> None:
    for lr, hr in read(sharded):
        assert (lr.shape, hr.shape) == ((6, 3, 12, 12), (6, 3, 48, 48))
        assert lr.dtype == hr.dtype == torch.uint8
        assert hr.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(lr, images.downscale(hr, 4))


def test_crops_are_those_that_the_plan_names(sharded: Path) -> None:
    index = shards.read_index(str(sharded))
    plan = shards.make_plan(index, seed=3, global_batch_size=6, crops_per_image=2, crop_size=48)
    firsts = np.concatenate([[0], np.cumsum(plan.counts)])
    for step, (_, hr) in enumerate(read(sharded)):
        for row, (shard, sample, crop) in enumerate(shards.samples_of_step(plan, step)):
            data = list(shards.read_samples(index.address(shard)))[sample]["picture"]
            random = np.random.default_rng([3, 0, int(firsts[shard]) + sample, crop])
            expected = images.random_crop(images.decode(data, 3), 48, random)
            assert np.array_equal(images.to_pictures(hr)[row], expected)


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_workers_do_not_change_the_batches(sharded: Path, num_workers: int) -> None:
    assert_equal(read(sharded), read(sharded, num_workers=num_workers))


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_hold_the_rows_of_the_one_batch(sharded: Path, world_size: int) -> None:
    of_ranks = [read(sharded, rank=r, world_size=world_size) for r in range(world_size)]
    joined = [
        (torch.cat([lr for lr, _ in parts]), torch.cat([hr for _, hr in parts]))
        for parts in zip(*of_ranks, strict=True)
    ]
    assert_equal(joined, read(sharded))


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
    index = shards.read_index(str(sharded))
    plan = shards.make_plan(index, seed=3, global_batch_size=6, crops_per_image=2, crop_size=48)
    source = stream.CropStream(
        index=index,
        plan=plan,
        scale=4,
        channels=3,
        crop_size=48,
        rank=0,
        world_size=1,
        first_step=0,
        last_step=5,
    )
    for crop in itertools.islice(source._lane(0), 5):
        assert crop.base is None and crop.nbytes == 48 * 48 * 3


def damaged(sharded: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "damaged"
    shutil.copytree(sharded, folder)
    return folder


def rewrite(tar: Path, change: dict[str, bytes]) -> None:
    """Replace members of a tar by name."""
    old = tar.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(old)) as source, tarfile.open(tar, "w") as target:
        for member in source:
            file = source.extractfile(member)
            assert file is not None
            data = change.get(member.name, file.read())
            member.size = len(data)
            target.addfile(member, io.BytesIO(data))


def members(tar: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(tar) as opened:
        return opened.getmembers()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_truncated_shard_is_named(sharded: Path, tmp_path: Path, num_workers: int) -> None:
    folder = damaged(sharded, tmp_path)
    for tar in folder.glob("*.tar"):
        fourth = members(tar)[6]
        # At a member's header the tar reader itself sees nothing wrong.
        tar.write_bytes(tar.read_bytes()[: fourth.offset])
    with pytest.raises(stream.DataError, match=r"shard-00000\d.tar is damaged: it ends after 3 of"):
        read(folder, num_workers=num_workers, last=40)


def test_undecodable_and_small_pictures_are_named(sharded: Path, tmp_path: Path) -> None:
    folder = damaged(sharded, tmp_path)
    for tar in folder.glob("*.tar"):
        names = [member.name for member in members(tar) if member.name.endswith("webp")]
        rewrite(tar, {name: b"RIFF nonsense" for name in names})
    with pytest.raises(stream.DataError, match="is damaged: sample 0000000.. no picture"):
        read(folder)
    small = images.encode(np.zeros((20, 90, 3), np.uint8), "webp")
    for tar in folder.glob("*.tar"):
        rewrite(tar, {name.name: small for name in members(tar) if name.name.endswith("webp")})
    with pytest.raises(stream.DataError, match="is 90x20 pixels, smaller than data.crop_size 48"):
        read(folder)


def test_missing_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    folder = damaged(sharded, tmp_path)
    for tar in folder.glob("*.tar"):
        tar.unlink()
    with pytest.raises(stream.DataError, match="shard-000002.tar is gone"):
        read(folder)
