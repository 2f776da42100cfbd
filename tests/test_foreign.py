"""Training on tars that others made, as img2dataset lays them out, pictures of any size in them."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import pytest
import webdataset

from sr_dist import images, indexing, train
from sr_dist.errors import UserError
from tests.runs import load, scalars
from tests.streams import assert_equal, joined, read_batches

SMALL = "000000007"


@pytest.fixture
def foreign(photographs: Path, tmp_path: Path) -> Path:
    """Two tars of 20 pictures: 64 x 64 pixels, but one that is 64 x 40."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    astronaut = images.decode(photographs / "astronaut.png", 3)
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar"), encoder=False) as tar:
            for number in range(10):
                key = f"{shard:05d}{number:04d}"
                height = 40 if key == SMALL else 64
                cut = astronaut[20 * number :][:height, 200 * shard :][:, :64].copy()
                about = b'{"url": "http://x", "status": "success"}'
                picture = images.encode(cut, "jpeg")
                tar.write({"__key__": key, "jpg": picture, "txt": b"words", "json": about})
    return folder


def overrides(folder: Path, on_error: str) -> list[str]:
    given = [f"data.train={folder}", f"stream.on_error={on_error}", "train.global_batch_size=4"]
    return [*given, "data.crop_size=48", "train.epochs=2", "train.warmup_images=0"]


def test_a_picture_smaller_than_the_crop_stops_a_run_before_it_begins(
    recipe: Path, foreign: Path, tmp_path: Path
) -> None:
    target, _ = indexing.index(sorted(foreign.glob("*.tar")))
    message = f"holds pictures of 40 pixels, such as 00000.tar: sample {SMALL}"
    with pytest.raises(UserError, match=message) as refused:
        train.run(load(recipe, *overrides(foreign, "stop")), dry=True)
    assert "--min-size 48" in str(refused.value) and "--tile" not in str(refused.value)
    small = [each for each in indexing.verify(str(foreign), min_size=48) if SMALL in each]
    assert [each.partition(": ")[2] for each in small] == [
        f"sample {SMALL}: 40 pixels, below --min-size 48"
    ]
    assert not [each for each in indexing.verify(str(foreign)) if SMALL in each]
    target.unlink()  # as it advises
    _, unusable = indexing.index(sorted(foreign.glob("*.tar")), min_size=48)
    named = f"sample {SMALL} is 64x40 pixels"
    assert [named in each for each in unusable] == [True]
    with pytest.raises(UserError, match=f"00000.tar: {named}, smaller than data.crop_size 48"):
        train.run(load(recipe, *overrides(foreign, "stop"), "data.num_workers=0"))


def test_a_picture_smaller_than_the_crop_gives_way_to_another(recipe: Path, foreign: Path) -> None:
    indexing.index(sorted(foreign.glob("*.tar")))
    result = train.run(load(recipe, *overrides(foreign, "skip")))
    assert result is not None and result.skipped == 2, "once an epoch"
    assert scalars(result.folder)["data/skipped"][-1] == (10, 2)
    options = {"last": 10, "crops": 1, "batch": 4, "seed": 0, "on_error": "skip"}
    whole = read_batches(foreign, **options)
    ranks = [read_batches(foreign, rank=rank, world_size=2, **options) for rank in range(2)]
    assert_equal([b[:2] for b in whole], joined([[b[:2] for b in its] for its in ranks]))
    for batches in (whole, ranks[0] + ranks[1]):
        skipped = [each for batch in batches for each in batch.skipped]
        assert len(skipped) == 2
        assert all(f"sample {SMALL} is 64x40 pixels, smaller than" in each for each in skipped)


def test_pictures_that_are_all_too_small_are_said_to_be(recipe: Path, foreign: Path) -> None:
    indexing.index(sorted(foreign.glob("*.tar")))
    message = "no sample of .*foreign can be used; one of them: .* pixels, smaller than .* 96"
    with pytest.raises(UserError, match=message):
        train.run(load(recipe, *overrides(foreign, "skip"), "data.crop_size=96"))


class _Touches:
    """An object whose unpickling leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_pickled_members_are_never_opened(photographs: Path, tmp_path: Path) -> None:
    trap, folder = tmp_path / "executed", tmp_path / "shards"
    pickled = pickle.dumps(_Touches(trap))
    pickle.loads(pickled)
    assert trap.exists(), "or this is no test"
    trap.unlink()
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number in range(6):
            for ending, data in (
                *((each, pickled) for each in ("pkl", "pickle", "pyd", "pth")),
                ("png", (photographs / "chelsea.png").read_bytes()),
            ):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    indexing.index([folder / "00000.tar"])
    assert indexing.verify(str(folder)) == []
    batches = read_batches(folder, last=2, batch=2, crops=1)
    assert [batch.hr.shape for batch in batches] == [(2, 3, 48, 48)] * 2
    assert not trap.exists()
