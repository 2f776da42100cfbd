"""Every command: its help, and what it says to bad input."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sr_dist import generators, images, models
from tests.helpers import REPOSITORY, refuse, run, succeed

COMMANDS = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for folder in ("launch", "tools")
    for path in (REPOSITORY / folder).glob("*.py")
)
GENERATOR = {"name": "swift_srgan", "scale": 4, "channels": 3, "num_channels": 8}
GENERATOR |= {"num_blocks": 1, "norm": "batch", "global_skip": "bicubic"}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published") / "small.pth.tar"
    built = models.build_generator(**GENERATOR)  # type: ignore[arg-type]
    generators.save_published(built, path, GENERATOR)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_whose_options_exist(command: str) -> None:
    text = succeed(command, "--help").stdout
    examples = text.replace("\\\n", " ")
    lines = [line.strip() for line in examples.splitlines() if f"{command} " in line]
    lines = [line for line in lines if not line.startswith("usage")]
    assert lines, "an example"
    for line in lines:
        for word in shlex.split(line.partition(command)[2]):
            if word.startswith("--"):
                assert re.search(rf"(^|[\s\[]){word}\b", text.partition("example")[0]), word


def test_make_dataset_refuses(tmp_path: Path) -> None:
    output = tmp_path / "out"
    folder = ("tools/make_dataset.py", "--source", "folder", "--output", output)
    assert "needs --input DIR" in refuse(*folder)
    assert "nowhere does not exist" in refuse(*folder, "--input", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty holds no pictures (.jpg" in refuse(*folder, "--input", tmp_path / "empty")
    for name in ("a.dcm", "sub/b.DCM", "LICENSE", ".hidden"):
        (tmp_path / "scans" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "scans" / name).touch()
    message = refuse(*folder, "--input", tmp_path / "scans")
    assert "by the endings of their names, its files are: 2 .dcm, 1 without" in message
    assert not output.exists()


def test_make_dataset_says_what_it_passed_over_whatever_it_is_called(
    photographs: Path, tmp_path: Path
) -> None:
    """Neither a name that is no text ends it, nor are its own lists counted."""
    source = Path(shutil.copytree(photographs, tmp_path / "in"))
    Path(os.fsdecode(bytes(source) + b"/scan.\xff\xfe")).touch()
    (source / "images").mkdir()
    (source / "images" / "train.txt").touch()
    words = ("--source", "folder", "--input", source, "--output", source / "images")
    done = succeed("tools/make_dataset.py", *words, PYTHONIOENCODING="utf-8:strict")
    assert "in: not looked at, by the endings of their names: 1 .\\udcff\\udcfe\n" in done.stdout


def test_split_dataset_refuses(tmp_path: Path) -> None:
    assert "does not exist" in refuse("tools/split_dataset.py", "--images", tmp_path / "nowhere")
    assert "holds 0 picture" in refuse("tools/split_dataset.py", "--images", tmp_path)
    assert not list(tmp_path.iterdir())


def test_make_shards_refuses(tmp_path: Path, photographs: Path) -> None:
    output = tmp_path / "out"
    common = ("tools/make_shards.py", "--output", output, "--images")
    assert "nowhere does not exist" in refuse(*common, tmp_path / "nowhere")
    assert "holds no pictures" in refuse(*common, tmp_path)
    assert "leave --tile out" in refuse(*common, photographs, "--encode", "keep", "--tile", 256)
    assert "--workers: expected 1 or more, found 0" in refuse(*common, photographs, "--workers", 0)
    assert "none of 3 pictures can be used" in refuse(*common, photographs, "--min-size", 5000)
    assert not output.exists()
    assert "nowhere does not exist" in refuse("tools/make_shards.py", "index", tmp_path / "nowhere")
    assert "no tars in" in refuse("tools/make_shards.py", "index", tmp_path)
    assert "unknown command 'indx'; expected index" in refuse("tools/make_shards.py", "indx", "x")
    assert "no shards at" in refuse("tools/make_shards.py", "verify", tmp_path)


def test_make_shards_index_and_verify(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "shards"))
    assert " shard(s), all whole" in succeed("tools/make_shards.py", "verify", folder).stdout
    (folder / "index.json").unlink()
    done = succeed("tools/make_shards.py", "index", *sorted(folder.glob("*.tar")))
    assert "3 shard(s)" in done.stdout
    with (folder / "shard-000001.tar").open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    message = refuse("tools/make_shards.py", "verify", folder)
    assert "shard-000001.tar: its sha256 is not the index's" in message


def test_upscale_files_and_folders(
    picture: images.Picture, published: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    (source / "deep").mkdir(parents=True)
    images.save(picture, source / "a.png")
    images.save(picture, source / "a.bmp")
    images.save(picture[..., :1], source / "deep" / "gray.png")
    (source / "bad.png").write_text("no picture")
    output = tmp_path / "out"
    message = refuse(
        *("launch/upscale.py", "--checkpoint", published),
        *("--input", source, source / "deep" / "gray.png", "--output", output),
    )
    assert "1 picture(s) could not be used" in message and "bad.png is no picture" in message
    written = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert written == {"a.png.png", "a.bmp.png", "deep/gray.png", "gray.png"}
    assert images.header(output / "deep/gray.png")[:2] == (256, 320)
    assert np.array_equal(
        images.decode(output / "gray.png", 1), images.decode(output / "deep/gray.png", 1)
    )
    # An untrained generator with a bicubic skip is the bicubic enlargement.
    enlarged = images.enlarge(picture, 4, "bicubic").astype(int)
    assert np.abs(images.decode(output / "a.png.png", 3) - enlarged).max() <= 1


def test_upscale_takes_the_bits_that_the_model_was_trained_with(
    picture: images.Picture, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    gray = {**GENERATOR, "channels": 1}
    generators.save_published(
        models.build_generator(**gray), tmp_path / "netG.pth.tar", gray, bits=12
    )
    images.save(picture[..., :1].astype(np.uint16) * 16, tmp_path / "in" / "deep.png")
    images.save((picture[..., :1] * (16 * 255 / 4095)).round().astype(np.uint8), tmp_path / "8.png")
    command = ("launch/upscale.py", "--checkpoint", tmp_path / "netG.pth.tar", "--output")
    succeed(*command, tmp_path / "out", "--input", tmp_path / "in", tmp_path / "8.png")
    found = images.decode(tmp_path / "out" / "deep.png", 1)
    assert np.array_equal(found, images.decode(tmp_path / "out" / "8.png", 1))
    (tmp_path / "out" / "8.png").unlink()
    (tmp_path / "in" / "clip.mp4").touch()
    done = succeed(*command, tmp_path / "out", "--input", tmp_path / "in", tmp_path / "8.png")
    assert "in: not looked at, by the endings of their names: 1 .mp4\n" in done.stdout
    assert "2 picture(s) in" in done.stdout and ", of which 1 replaced what was" in done.stdout
    assert found.max() > 100


def test_upscale_takes_16_bit_gray_through_a_colour_model_by_any_engine(
    picture: images.Picture, published: Path, tmp_path: Path
) -> None:
    images.save(picture[..., :1].astype(np.uint16) * 257, tmp_path / "deep.png")
    common = ("launch/upscale.py", "--checkpoint", published, "--input", tmp_path / "deep.png")
    for engine in ("auto", "fp32", "bf16"):
        done = succeed(*common, "--engine", engine, "--output", tmp_path / engine)
        assert ("--engine auto takes" in done.stderr) == (engine == "auto")
    exact, near, chosen = (
        images.decode(tmp_path / engine / "deep.png", 1).astype(int)
        for engine in ("fp32", "bf16", "auto")
    )
    assert exact.shape == (256, 320, 1) and np.abs(exact - near).max() <= 8
    assert np.array_equal(chosen, exact) or np.array_equal(chosen, near)


def test_upscale_refuses(picture: images.Picture, published: Path, tmp_path: Path) -> None:
    images.save(picture, tmp_path / "a.png")
    output = tmp_path / "out"
    common = ("launch/upscale.py", "--output", output)
    nowhere = tmp_path / "nowhere"
    message = refuse(*common, "--checkpoint", nowhere, "--input", tmp_path / "a.png")
    assert "nowhere does not exist; expected a run's folder" in message
    message = refuse(*common, "--checkpoint", published, "--input", nowhere)
    assert "nowhere does not exist; expected a folder of pictures or a picture" in message
    torch.save({"model": {"conv.weight": torch.zeros(1)}}, tmp_path / "other.pth.tar")
    message = refuse(
        *(*common, "--checkpoint", tmp_path / "other.pth.tar", "--input", tmp_path / "a.png")
    )
    assert "no generator known here" in message
    (tmp_path / "model.onnx").touch()
    words = (*common, "--checkpoint", tmp_path / "model.onnx", "--input", tmp_path / "a.png")
    assert "model.onnx is for use elsewhere, and is not read back" in refuse(*words)
    single = ("--output", tmp_path / "b.PNG", "--input", tmp_path / "a.png")
    assert "--output: expected a folder, found " in refuse("launch/upscale.py", *single)
    assert not output.exists()


def test_unknown_options_end_with_status_2() -> None:
    done = run("launch/upscale.py", "--chekpoint", "x")
    assert done.returncode == 2 and "usage" in done.stderr
