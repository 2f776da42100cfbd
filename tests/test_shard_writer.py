from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from sr_dist import (
    images,
    indexing,
    pool,
    shard_reader,
    shard_writer,
    shards,
    storage,
    stream,
    tars,
)
from sr_dist.errors import UserError
from sr_dist.shard_writer import Options
from tests.helpers import contents
from tests.runs import full_disk
from tests.streams import read, read_batches


def write(source: Path, output: Path, workers: int = 1, strict: bool = False, **options: object):
    with pool.local_workers(workers) as executor:
        return shard_writer.write(
            images.list_pictures(source),
            output,
            Options(**options),  # type: ignore[arg-type]
            executor=executor,
            strict=strict,
        )


def samples(folder: Path) -> list[tars.Sample]:
    found = []
    for tar in sorted(folder.glob("*.tar")):
        found += list(shard_reader.read_samples(str(tar)))
    return found


def test_bytes_do_not_depend_on_the_number_of_workers(photographs: Path, tmp_path: Path) -> None:
    options = {"tile": 64, "samples_per_shard": 40}
    write(photographs, tmp_path / "1", workers=1, **options)
    write(photographs, tmp_path / "3", workers=3, **options)
    copied = shutil.copytree(photographs, tmp_path / "copy")
    write(Path(copied), tmp_path / "moved", workers=2, **options)
    assert contents(tmp_path / "1") == contents(tmp_path / "3") == contents(tmp_path / "moved")
    write(photographs, tmp_path / "seed", **options, seed=1)
    assert contents(tmp_path / "1") != contents(tmp_path / "seed")


def test_tiles_make_up_the_picture(photographs: Path, tmp_path: Path) -> None:
    write(photographs, tmp_path / "out", tile=96)
    pictures = {path.name: images.decode(path, 3).astype(int) for path in photographs.iterdir()}
    painted = {name: np.full(picture.shape, -1) for name, picture in pictures.items()}
    for sample in samples(tmp_path / "out"):
        about = sample.about
        top, left, height, width = about["tile"]
        assert min(height, width) >= 96
        place = painted[about["source"]][top : top + height, left : left + width]
        assert (place == -1).all(), "no pixel is in two tiles"
        place[:] = images.decode(sample.picture, 3)
    for name, picture in pictures.items():
        assert np.array_equal(painted[name], picture)


def test_reduced_copies_are_whole_too(photographs: Path, tmp_path: Path) -> None:
    """chelsea is 451x300: a third of it is too small, and leaves two copies."""
    write(photographs, tmp_path / "out", tile=96, reductions=(1, 2, 3), min_size=128)
    found = [sample for sample in samples(tmp_path / "out")]
    painted = {}
    for path in photographs.iterdir():
        whole = Image.open(path).convert("RGB")
        for reduction in (1, 2, 3):
            size = (whole.width // reduction, whole.height // reduction)
            if min(size) < 128:
                continue
            box = (0, 0, size[0] * reduction, size[1] * reduction)
            smaller = whole.crop(box).resize(size, Image.Resampling.BICUBIC)
            painted[path.name, reduction] = np.asarray(smaller).astype(int)
    assert ("chelsea.png", 2) in painted and ("chelsea.png", 3) not in painted
    for sample in found:
        about = sample.about
        top, left, height, width = about["tile"]
        copy = painted[about["source"], about.get("reduction", 1)]
        copy[top : top + height, left : left + width] -= images.decode(sample.picture, 3)
    for name, difference in painted.items():
        assert np.abs(difference).max() <= 1, f"{name}: every pixel once, as Pillow has it"


def test_pictures_too_small_to_be_reduced_are_rejected(photographs: Path, tmp_path: Path) -> None:
    """chelsea is 300 pixels high; a half of it is less than 160."""
    write(photographs, tmp_path / "out", tile=0, reductions=(2,), min_size=160)
    assert {sample.about["source"] for sample in samples(tmp_path / "out")} == {
        *("astronaut.png", "coffee.png")
    }
    (line,) = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "source": "chelsea.png",
        "reason": "is 451x300 pixels; the short side must be 320 or more",
    }
    with pytest.raises(UserError, match="none of 3 pictures can be used"):
        write(photographs, tmp_path / "none", tile=0, reductions=(4,), min_size=160)


def test_reduced_deep_pictures_keep_their_depth(tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    ramp = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 15
    values = ramp.repeat(3, 0).repeat(3, 1)
    Image.fromarray(values).save(source / "scan.png")
    write(source, tmp_path / "out", tile=0, reductions=(3,), channels=1, min_size=32)
    (sample,) = samples(tmp_path / "out")
    found = images.decode(sample.picture, 1)
    assert found.dtype == np.uint16 and found.shape == (64, 64, 1)
    inside = (slice(2, -2), slice(2, -2), 0)
    assert np.abs(found[inside].astype(int) - ramp[2:-2, 2:-2].astype(int)).max() <= 2


def test_index_says_what_is_there(photographs: Path, tmp_path: Path) -> None:
    result = write(photographs, tmp_path / "out", tile=64, samples_per_shard=30)
    index = shards.read_index(str(tmp_path / "out"))
    keys = [sample.key for sample in samples(tmp_path / "out")]
    assert keys == [f"{number:09d}" for number in range(index.samples)]
    assert (result.samples, result.shards, result.rejects) == (len(keys), len(index.shards), [])
    for number, shard in enumerate(index.shards):
        digest, size = storage.sha256_of_file(index.address(number))
        assert (digest, size) == (shard.sha256, shard.bytes)
    assert index.smallest_side == 64
    assert set(contents(tmp_path / "out")) == {"index.json", *(s.name for s in index.shards)}
    assert indexing.verify(str(tmp_path / "out")) == []


def test_tiles_of_a_picture_are_apart_and_say_what_they_are_of(
    photographs: Path, tmp_path: Path
) -> None:
    write(photographs, tmp_path / "out", tile=64)
    about = [sample.about for sample in samples(tmp_path / "out")]
    for source in about:
        data = (photographs / source["source"]).read_bytes()
        assert source["sha256"] == hashlib.sha256(data).hexdigest()
    same = [a["source"] == b["source"] for a, b in zip(about, about[1:], strict=False)]
    assert sum(same) < 0.6 * len(same)


def test_pictures_are_shuffled(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(12):
        Image.new("RGB", (100, 100), (number, 0, 0)).save(tmp_path / "in" / f"{number:02}.png")
    write(tmp_path / "in", tmp_path / "out", samples_per_shard=1)
    order = [sample.about["source"] for sample in samples(tmp_path / "out")]
    assert len(order) == 12 and order != sorted(order)


def test_shards_are_closed_by_their_size_too(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "_SHARD_BYTES", 100_000)
    assert write(photographs, tmp_path / "whole", tile=0).shards == 3
    assert write(photographs, tmp_path / "kept", encode="keep", tile=0).shards == 3


@pytest.mark.parametrize(
    ("encode", "ending"), [("webp", "webp"), ("png", "png"), ("jpeg", "jpg"), ("keep", "png")]
)
def test_encodings(photographs: Path, tmp_path: Path, encode: str, ending: str) -> None:
    write(photographs, tmp_path / "out", encode=encode, tile=0)
    found = samples(tmp_path / "out")
    assert len(found) == 3
    for sample in found:
        source = photographs / sample.about["source"]
        if encode == "keep":
            assert sample.ending == ending and sample.picture == source.read_bytes()
        elif encode != "jpeg":
            assert np.array_equal(images.decode(sample.picture, 3), images.decode(source, 3))


def test_gray_shards_hold_one_channel(photographs: Path, tmp_path: Path) -> None:
    write(photographs, tmp_path / "out", channels=1, tile=0, encode="png")
    assert shards.read_index(str(tmp_path / "out")).channels == 1
    with Image.open(io.BytesIO(samples(tmp_path / "out")[0].picture)) as image:
        assert image.mode == "L"


def with_bad_pictures(photographs: Path, tmp_path: Path) -> Path:
    source = Path(shutil.copytree(photographs, tmp_path / "source"))
    Image.new("RGB", (300, 50)).save(source / "flat.png")
    data = (source / "coffee.png").read_bytes()
    (source / "half.png").write_bytes(data[: len(data) // 2])
    (source / "text.png").write_text("no picture")
    return source


def test_rejects_are_listed_with_the_reason(photographs: Path, tmp_path: Path) -> None:
    source = with_bad_pictures(photographs, tmp_path)
    result = write(source, tmp_path / "out", tile=64, samples_per_shard=30, workers=2)
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    ]
    assert [line["source"] for line in lines] == ["flat.png", "half.png", "text.png"]
    assert "is 300x50 pixels" in lines[0]["reason"]
    assert "cannot be decoded" in lines[1]["reason"]
    assert "no picture" in lines[2]["reason"]
    assert [reject.partition(" ")[0] for reject in result.rejects] == [
        *("flat.png", "half.png", "text.png")
    ]
    assert result.rejects[0] == f"flat.png {lines[0]['reason']}"
    again = write(source, tmp_path / "out", tile=64, samples_per_shard=30, workers=2)
    assert again.already_complete and again.rejects == result.rejects
    index = shards.read_index(str(tmp_path / "out"))
    assert index.samples == len(samples(tmp_path / "out"))
    assert indexing.verify(str(tmp_path / "out")) == []


@pytest.mark.parametrize("bad", ["flat.png", "half.png"])
def test_strict_leaves_nothing_behind(photographs: Path, tmp_path: Path, bad: str) -> None:
    source = with_bad_pictures(photographs, tmp_path)
    for name in {"flat.png", "half.png", "text.png"} - {bad}:
        (source / name).unlink()
    with pytest.raises(UserError, match=rf"{bad} .*\(--strict\)"):
        write(source, tmp_path / "out", strict=True, tile=64, samples_per_shard=1)
    assert not (tmp_path / "out").exists()


def test_no_usable_picture(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.png").write_text("no")
    with pytest.raises(UserError, match="none of 1 pictures can be used; first: a.png"):
        write(tmp_path / "source", tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_a_stopped_run_goes_on_and_comes_to_the_same(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"tile": 64, "samples_per_shard": 1}  # a shard per picture
    write(photographs, tmp_path / "whole", **options)
    real, calls = shard_writer._write_shard, []

    def stopping(job: shard_writer._Job) -> dict[str, object]:
        calls.append(job.number)
        if len(calls) == 3:
            (job.output / ".shard-000002.tar.0.part").write_bytes(b"half")
            raise KeyboardInterrupt
        return real(job)

    monkeypatch.setattr(shard_writer, "_write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        write(photographs, tmp_path / "out", **options)
    assert not (tmp_path / "out" / "index.json").exists()
    with pytest.raises(UserError, match="unfinished run with other pictures or options"):
        write(photographs, tmp_path / "out", tile=96)

    monkeypatch.undo()
    encoded = []
    monkeypatch.setattr(
        images, "encode", lambda *a, _real=images.encode: encoded.append(1) or _real(*a)
    )
    finished = tmp_path / "out" / "shard-000001.tar"
    finished.write_bytes(finished.read_bytes()[:-1000])  # a disk that lost its end
    write(photographs, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(encoded) < len(samples(tmp_path / "out")), "finished shards are not written again"


def test_complete_output_is_kept_and_never_overwritten(photographs: Path, tmp_path: Path) -> None:
    write(photographs, tmp_path / "out", tile=96)
    before = contents(tmp_path / "out")
    assert write(photographs, tmp_path / "out", tile=96).already_complete
    with pytest.raises(UserError, match="holds shards of other pictures or options"):
        write(photographs, tmp_path / "out", tile=128)
    assert contents(tmp_path / "out") == before


def test_shards_that_went_missing_are_told(photographs: Path, tmp_path: Path) -> None:
    write(photographs, tmp_path / "out", tile=64, samples_per_shard=30)
    (tmp_path / "out" / "shard-000001.tar").unlink()
    before = contents(tmp_path / "out")
    message = "shard-000001.tar is not there, .* lists it; delete .*/out, and run the same"
    with pytest.raises(UserError, match=message):
        write(photographs, tmp_path / "out", tile=64, samples_per_shard=30)
    assert contents(tmp_path / "out") == before


def test_a_stopped_run_is_not_gone_on_with_by_another_partition(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another version rejects a picture that the first one took."""

    def stopped(job: shard_writer._Job) -> dict[str, object]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "_write_shard", stopped)
        with pytest.raises(KeyboardInterrupt):
            write(photographs, tmp_path / "out")
    real = images.header

    def stricter(source: Path | bytes) -> images.Header:
        if "coffee" in str(source):
            raise images.PictureError("is not to my taste")
        return real(source)

    monkeypatch.setattr(images, "header", stricter)
    with pytest.raises(UserError, match="an unfinished run with other pictures or options"):
        write(photographs, tmp_path / "out")


def test_what_is_left_of_progress_is_removed(photographs: Path, tmp_path: Path) -> None:
    """Of a run that was killed after it had written the index."""
    write(photographs, tmp_path / "out")
    (tmp_path / "out" / ".progress").mkdir()
    (tmp_path / "out" / ".progress" / "inputs.json").write_text("{}")
    assert write(photographs, tmp_path / "out").already_complete
    assert not (tmp_path / "out" / ".progress").exists()


def test_shards_do_not_lie_among_pictures(photographs: Path) -> None:
    before = contents(photographs)
    with pytest.raises(UserError, match="holds pictures that are read; choose another --output"):
        write(photographs, photographs)
    assert contents(photographs) == before


def test_tars_of_others_are_not_mixed_with(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "film.tar").write_text("not ours")
    with pytest.raises(UserError, match="holds tars without an index.json; choose another"):
        write(photographs, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["film.tar"]


def test_a_full_disk_is_told_with_the_shard(photographs: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        with full_disk(), pytest.raises(OSError, match="File too large: .*shard-000000.tar"):
            write(photographs, tmp_path / "out", workers, tile=64)
        assert not list((tmp_path / "out").glob("*shard*"))


def test_changed_pictures_of_the_same_size_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (100, 100), "red").save(tmp_path / "in" / "a.bmp")
    write(tmp_path / "in", tmp_path / "out")
    Image.new("RGB", (100, 100), "blue").save(tmp_path / "in" / "a.bmp")
    with pytest.raises(UserError, match="holds shards of other pictures or options"):
        write(tmp_path / "in", tmp_path / "out")


def test_files_of_others_in_the_output_folder_stay(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "film.mkv.part").write_text("not ours")
    write(photographs, tmp_path / "out")
    assert (tmp_path / "out" / "film.mkv.part").read_text() == "not ours"
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file; expected a folder"):
        write(photographs, tmp_path / "file")


def test_names_with_several_dots_count(photographs: Path, tmp_path: Path) -> None:
    picture = images.encode(images.decode(photographs / "coffee.png", 3), "jpeg")
    with webdataset.TarWriter(str(tmp_path / "0.tar"), encoder=False) as tar:
        tar.write({"__key__": "a", "v2.jpg": picture, "v2.json": b"{}"})
        tar.write({"__key__": "b", "JPG": picture})
    indexing.index([tmp_path / "0.tar", tmp_path / "0.tar"])
    index = shards.read_index(str(tmp_path))
    assert (index.samples, len(index.shards)) == (2, 1)


def test_foreign_tars_can_be_indexed(photographs: Path, tmp_path: Path) -> None:
    # As img2dataset lays them out: jpg, json and txt; a failed download leaves no picture.
    with webdataset.TarWriter(str(tmp_path / "00000.tar"), encoder=False) as tar:
        for number, path in enumerate(sorted(photographs.iterdir())):
            picture = images.encode(images.decode(path, 3), "jpeg")
            tar.write({"__key__": f"{number:09d}", "jpg": picture, "txt": b"a", "json": b"{}"})
        tar.write({"__key__": "000000009", "json": b'{"status": "failed"}', "txt": b"b"})
    target, unusable = indexing.index([tmp_path / "00000.tar"])
    assert unusable == []
    index = shards.read_index(str(tmp_path))
    assert target == tmp_path / "index.json"
    assert (index.samples, index.smallest_side, index.channels) == (3, 300, 3)
    assert indexing.verify(str(tmp_path)) == []
    with pytest.raises(UserError, match="exists already"):
        indexing.index([tmp_path / "00000.tar"])


def test_pictures_that_cannot_be_used_are_told_and_indexed_all_the_same(
    photographs: Path, tmp_path: Path
) -> None:
    coffee = images.decode(photographs / "coffee.png", 3)
    tall = coffee[:90, :300].copy()
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        tar.write({"__key__": "0", "png": images.encode(coffee, "png")})
        tar.write({"__key__": "1", "jpg": b"an error page"})
        tar.write({"__key__": "2", "png": images.encode(tall, "png")})
        tar.write({"__key__": "3", "a.png": b"", "b.png": b""})
    target, unusable = indexing.index([tmp_path / "a.tar"], min_size=96)
    index = shards.read_index(str(target))
    assert (index.samples, index.smallest_side) == (4, 400)
    assert [problem.partition("a.tar: ")[2] for problem in unusable] == [
        "sample 1 is no picture: of no known format (BMP, JPEG, PNG, TIFF, WEBP), or its header is "
        "damaged",
        "sample 2 is 300x90 pixels; expected 96 on a side",
        "sample 3 has several pictures (a.png, b.png), and nothing says which one to take",
    ]
    with pytest.raises(
        stream.DataError, match="sample 1 is no picture|sample 2 is 300x90|sample 3"
    ):
        read(tmp_path, last=2, batch=2, crops=1)
    batches = read_batches(tmp_path, last=2, batch=2, crops=1, crop_size=96, on_error="skip")
    assert len(batches) == 2 and sum(len(batch.skipped) for batch in batches) == 3
    (tmp_path / "index.json").unlink()
    with pytest.raises(UserError, match="no sample with a usable picture in 1 tars; first: .*0 is"):
        indexing.index([tmp_path / "a.tar"], min_size=1000)


def test_what_an_encoding_cannot_hold_is_rejected(tmp_path: Path) -> None:
    images.save(np.zeros((96, 16384, 3), np.uint8), tmp_path / "in" / "long.png")
    images.save(np.zeros((96, 16383, 3), np.uint8), tmp_path / "in" / "most.png")
    result = write(tmp_path / "in", tmp_path / "out", tile=0)
    assert (result.samples, len(result.rejects)) == (1, 1)
    reject = json.loads((tmp_path / "out" / "rejects.jsonl").read_text())
    assert reject["reason"] == "is 16384x96 pixels; webp holds 16383 on a side"
    assert write(tmp_path / "in", tmp_path / "png", tile=0, encode="png").samples == 2


def test_verify_finds_all_kinds_of_damage(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "out"))
    first, second, third = sorted(folder.glob("*.tar"))
    data = bytearray(first.read_bytes())
    with tarfile.open(first) as tar:
        member = next(m for m in tar if m.name.endswith("webp"))
    data[member.offset_data + member.size // 2] ^= 0xFF
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:20_000])
    third.unlink()
    problems = indexing.verify(str(folder))
    assert any("shard-000000.tar: its sha256 is not" in problem for problem in problems)
    assert any("shard-000001.tar: 20000 bytes, the index says" in problem for problem in problems)
    assert any("samples are lost by it, from number" in problem for problem in problems)
    assert any("shard-000002.tar: cannot be read" in problem for problem in problems)


def test_verify_looks_behind_the_first_damage(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "out"))
    tar = folder / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    marks = shards.read_index(str(folder)).shards[0].marks
    for number in (4, 18):
        data[marks[number] + 3] ^= 0x40  # in a header
    tar.write_bytes(data)
    lost = [problem for problem in indexing.verify(str(folder)) if "are lost by it" in problem]
    assert len(lost) == 2
    assert "from number 4 to 4" in lost[0] and "from number 18 to 18" in lost[1]
