from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sr_dist import (
    evaluate,
    generators,
    images,
    metrics,
    models,
    report,
    storage,
    tensors,
    tracking,
    upscale,
    validation,
)
from sr_dist.errors import UserError
from tests.helpers import contents, refuse, succeed


def read(data: object, **options: object) -> list[evaluate.Pair]:
    arguments = {"scale": 4, "channels": 3, **options}
    return list(evaluate.read_pairs(str(data), **arguments))  # type: ignore[arg-type]


def test_pairs_of_a_folder_are_cut_to_the_scale(photographs: Path) -> None:
    pairs = {pair.name: pair for pair in read(photographs)}
    assert list(pairs) == ["astronaut.png", "chelsea.png", "coffee.png"]
    chelsea = pairs["chelsea.png"]
    assert chelsea.hr.shape == (300, 448, 3) and chelsea.lr.shape == (75, 112, 3)
    lr = tensors.downscale(tensors.to_batch([chelsea.hr]), 4)
    assert np.array_equal(tensors.to_pictures(lr)[0], chelsea.lr)


def test_pairs_of_a_list_a_file_and_shards(
    photographs: Path, sharded: Path, tmp_path: Path
) -> None:
    assert [p.name for p in read(photographs / "coffee.png")] == ["coffee.png"]
    (photographs / "some.txt").write_text("coffee.png\n")
    assert [p.name for p in read(photographs / "some.txt")] == ["coffee.png"]
    (photographs / "some.txt").unlink()
    from_shards = read(sharded)
    assert len(from_shards) == evaluate.check(str(sharded), scale=4, channels=3).pictures
    assert len(from_shards) > 50
    assert from_shards[0].name == "shard-000000/000000000"
    assert len({pair.name for pair in from_shards}) == len(from_shards)


def test_given_lr_pictures_are_found_and_checked(photographs: Path, tmp_path: Path) -> None:
    lr = tmp_path / "lr"
    lr.mkdir()
    for pair in read(photographs):
        stem = Path(pair.name).stem
        name = {"astronaut": "astronaut", "coffee": "coffeex4", "chelsea": "chelsea_x4"}[stem]
        images.save(pair.lr[:-1], lr / f"{name}.png")  # a row less than could be
    with pytest.raises(UserError, match="times 4 is not the size of astronaut.png"):
        read(photographs, lr_folder=lr, scale=4)
    for path in lr.iterdir():
        path.unlink()
    for pair in read(photographs):
        images.save(pair.lr, lr / f"{Path(pair.name).stem}x4.png")
    for given, made in zip(read(photographs, lr_folder=lr), read(photographs), strict=True):
        assert np.array_equal(given.lr, made.lr) and np.array_equal(given.hr, made.hr)
    (lr / "coffeex4.png").unlink()
    images.save(read(photographs)[2].lr, lr / "coffeex4_more.png")  # not coffee's
    with pytest.raises(
        UserError, match="coffee.png has no LR picture in .*: looked for coffee, coffeex4"
    ):
        read(photographs, lr_folder=lr)
    images.save(read(photographs)[2].lr, lr / "coffee.png")
    images.save(read(photographs)[2].lr, lr / "coffee_x4.png")
    with pytest.raises(
        UserError, match="coffee.png has several LR pictures in .*: coffee.png, coffee_"
    ):
        read(photographs, lr_folder=lr)


def test_lr_pictures_of_nested_folders_are_those_of_their_place(
    photographs: Path, tmp_path: Path
) -> None:
    for folder, source in (("a", "coffee.png"), ("b", "chelsea.png")):
        pair = read(photographs / source)[0]
        for side, picture in (("hr", pair.hr), ("lr", pair.lr)):
            (tmp_path / side / folder).mkdir(parents=True)
            images.save(picture, tmp_path / side / folder / "1.png")
    pairs = read(tmp_path / "hr", lr_folder=tmp_path / "lr")
    assert [pair.name for pair in pairs] == ["a/1.png", "b/1.png"]
    for pair in pairs:
        made = tensors.downscale(tensors.to_batch([pair.hr]), 4)
        assert np.array_equal(pair.lr, tensors.to_pictures(made)[0])


def test_pictures_that_cannot_be_measured(tmp_path: Path) -> None:
    images.save(np.zeros((16, 90, 3), np.uint8), tmp_path / "flat.png")
    with pytest.raises(UserError, match="flat.png is 90x16 pixels; the metrics need 19 "):
        read(tmp_path)
    (tmp_path / "flat.png").write_text("no")
    with pytest.raises(UserError, match="flat.png is no picture"):
        read(tmp_path)
    (tmp_path / "flat.png").unlink()
    with pytest.raises(UserError, match="holds no pictures"):
        evaluate.check(str(tmp_path), scale=4, channels=3)


def test_pictures_too_small_for_lpips_are_named_beforehand(tmp_path: Path, shared: Path) -> None:
    small = np.zeros((16, 90, 3), np.uint8)
    images.save(small, tmp_path / "data" / "flat.png")
    assert read(tmp_path / "data", scale=2)[0].hr.shape == small.shape
    message = refuse(
        *("launch/evaluate.py", "--data", tmp_path / "data", "--method", "bicubic", "--scale", 2),
        *("--lpips", shared / "weights" / "squeezenet1_1_imagenet.pth", "--output"),
        tmp_path / "out",
    )
    assert "data: flat.png is 90x16 pixels; the metrics need 17 on each side" in message
    assert not (tmp_path / "out").exists()


def test_averages_are_means_of_pictures() -> None:
    rows = [
        evaluate.Row("a", "x", 20.0, 0.5),
        evaluate.Row("a", "y", 1.0, 0.1),
        evaluate.Row("b", "x", 30.0, 0.9),
    ]
    means = evaluate.averages(rows)
    assert means == [evaluate.Mean("x", 25.0, pytest.approx(0.7)), evaluate.Mean("y", 1.0, 0.1)]


def test_identical_pictures_count_as_100_db(picture: images.Picture) -> None:
    pair = evaluate.Pair("p", picture[::4, ::4], picture)
    rows = evaluate.evaluate({"same": lambda lr: picture}, [pair], colour="y", border=4)
    assert rows[0].psnr == 100.0


def test_side_by_side_shows_all_panels(picture: images.Picture) -> None:
    pair = evaluate.Pair("p", np.ascontiguousarray(picture[::4, ::4]), picture)
    panels = evaluate.side_by_side(pair, {"bicubic": picture, "SR": 255 - picture})
    assert panels.shape == (64 + 20, 4 * (80 + 4) - 4, 3)
    assert np.array_equal(panels[20:, -80:], picture)
    assert np.array_equal(panels[20:, 2 * 84 : 2 * 84 + 80], 255 - picture)


def test_middle_of_large_pictures(picture: images.Picture) -> None:
    pair = evaluate.Pair("p", np.ascontiguousarray(picture[::4, ::4]), picture)
    part, results = evaluate.middle(pair, {"SR": 255 - picture}, 40)
    assert np.array_equal(part.hr, picture[12:52, 20:60])
    assert np.array_equal(part.lr, pair.lr[3:13, 5:15])
    assert np.array_equal(results["SR"], 255 - part.hr)
    whole, _ = evaluate.middle(pair, {}, 512)
    assert np.array_equal(whole.hr, picture)


def test_names_of_files() -> None:
    assert evaluate.file_name("a/b.c.png") == "a_b.c"
    assert evaluate.file_name("../x.jpg") == "x"
    assert evaluate.unused_name("a", {"a", "a 2"}) == "a 3"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small x4 generator in the published format."""
    torch.manual_seed(0)
    arguments = {"name": "swift_srgan", "scale": 4, "channels": 3, "num_channels": 8}
    arguments |= {"num_blocks": 1, "norm": "batch", "global_skip": "bicubic"}
    built = models.build_generator(**arguments)  # type: ignore[arg-type]
    path = tmp_path_factory.mktemp("published") / "small.pth.tar"
    generators.save_published(built, path, arguments)
    return path


def test_command_writes_all_results(photographs: Path, published: Path, tmp_path: Path) -> None:
    done = succeed(
        "launch/evaluate.py",
        *("--data", photographs, "--method", "bicubic", "--method", "nearest"),
        *("--checkpoint", published, "--scale", 4, "--output", tmp_path / "out"),
    )
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (summary["scale"], summary["images"]) == (4, 3)
    assert summary["protocol"] == {
        "colour": "y",
        "border": 4,
        "data_range": 255,
        "ssim": "gaussian 11, sigma 1.5",
    }
    results = {result["name"]: result for result in summary["results"]}
    assert list(results) == ["bicubic", "nearest", "small"]
    # The untrained generator is the bicubic enlargement, computed in floating point.
    assert results["small"]["psnr"] == pytest.approx(results["bicubic"]["psnr"], abs=0.02)
    assert results["bicubic"]["psnr"] > results["nearest"]["psnr"] + 0.5

    expected = []
    for pair in read(photographs):
        sr = images.enlarge(pair.lr, 4, "bicubic")
        expected.append(metrics.compare(sr, pair.hr, colour="y", border=4))
    assert results["bicubic"]["psnr"] == pytest.approx(np.mean([p for p, _ in expected]), abs=1e-3)
    with (tmp_path / "out" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["picture"] for row in rows] == ["astronaut.png", "chelsea.png", "coffee.png"]
    assert float(rows[1]["bicubic psnr"]) == pytest.approx(expected[1][0], abs=1e-3)
    assert float(rows[1]["bicubic ssim"]) == pytest.approx(expected[1][1], abs=1e-5)
    pictures = {path.name for path in (tmp_path / "out" / "pictures").iterdir()}
    assert pictures == {"astronaut.png", "chelsea.png", "coffee.png"}

    report = (tmp_path / "out" / "report.html").read_text()
    assert report.count("<section>") == 3 and report.count('type="range"') == 3
    assert "BT.601 luma" in report and "4 pixels at every border" in report
    assert not re.findall(r'src="(?!data:)', report), "self-contained"


def test_command_by_the_rgb_protocol(photographs: Path, tmp_path: Path) -> None:
    done = succeed(
        "launch/evaluate.py",
        *("--data", photographs / "coffee.png", "--method", "bicubic", "--protocol", "rgb"),
        *("--scale", 4, "--output", tmp_path / "out"),
    )
    summary = json.loads(done.stdout.splitlines()[-1])
    pair = read(photographs / "coffee.png")[0]
    psnr, ssim = metrics.compare(
        images.enlarge(pair.lr, 4, "bicubic"), pair.hr, colour="rgb", border=4
    )
    assert summary["results"][0]["psnr"] == pytest.approx(psnr, abs=1e-4)
    assert summary["results"][0]["ssim"] == pytest.approx(ssim, abs=1e-6)


def test_pictures_of_one_name_each_get_their_file(photographs: Path, tmp_path: Path) -> None:
    coffee = images.decode(photographs / "coffee.png", 3)
    images.save(coffee, tmp_path / "in.png")
    (tmp_path / "data").mkdir()
    images.save(coffee, tmp_path / "data" / "a.png")
    images.save(coffee, tmp_path / "data" / "a.bmp")
    succeed(
        *("launch/evaluate.py", "--data", tmp_path / "data", "--method", "bicubic"),
        *("--scale", 2, "--output", tmp_path / "out"),
    )
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["protocol"]["border"] == 2


def test_report_enlarges_where_the_results_differ() -> None:
    a = np.zeros((100, 200, 3), np.uint8)
    b = a.copy()
    b[30:60, 130:160] = 90
    left, top, side = report._most_different(a, b)
    assert top <= 30 and 60 <= top + side and left <= 130 and 160 <= left + side


def test_command_refuses(photographs: Path, published: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    common = ("launch/evaluate.py", "--data", photographs, "--output", output)
    message = refuse(*common, "--checkpoint", published, "--scale", 2)
    assert "enlarges 4 times, but --scale is 2" in message
    message = refuse(*common, "--scale", 2)
    assert f"{generators.DEFAULT} enlarges 4 times, but --scale is 2" in message
    message = refuse(*common, "--method", "bicubic", "--scale", 4, "--tile", -5)
    assert "--tile: expected 64 or more, found -5" in message
    torch.manual_seed(0)
    gray = {"name": "swift_srgan", "scale": 4, "channels": 1, "num_channels": 8, "num_blocks": 1}
    built = models.build_generator(**gray)  # type: ignore[arg-type]
    generators.save_published(built, tmp_path / "gray.pth.tar", gray)
    message = refuse(
        *(*common, "--checkpoint", published, "--checkpoint", tmp_path / "gray.pth.tar"),
        *("--scale", 4),
    )
    assert "models of different numbers of channels" in message
    bad = tmp_path / "bad"
    bad.mkdir()
    images.save(images.decode(photographs / "coffee.png", 3), bad / "a.png")
    (bad / "b.png").write_text("no")
    images.save(np.zeros((9, 99, 3), np.uint8), bad / "c.png")
    message = refuse(
        *("launch/evaluate.py", "--data", bad, "--output", output, "--method", "bicubic"),
        *("--scale", 4),
    )
    assert "2 of 3 pictures cannot be measured; take them out:\n  b.png is no picture" in message
    assert "\n  c.png is 99x9 pixels" in message
    images.save(np.zeros((99, 9, 3), np.uint8), bad / "b.png")
    (bad / "a.png").unlink()
    message = refuse(
        *("launch/evaluate.py", "--data", bad, "--output", output, "--method", "bicubic"),
        *("--scale", 4),
    )
    assert "2 of 2 pictures cannot be measured; mend what is given:\n" in message
    assert "give --scale" in refuse(*common, "--method", "bicubic")
    assert not output.exists()


def test_gray_pictures(
    photographs: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Methods measure them as they are, 16 bits too; a model for colour is refused."""
    deep = images.decode(photographs / "coffee.png", 1).astype(np.uint16) * 16
    images.save(deep, tmp_path / "gray" / "a.png")
    assert evaluate.is_gray(str(tmp_path / "gray")) and not evaluate.is_gray(str(photographs))
    torch.manual_seed(0)
    gray = {"name": "swift_srgan", "scale": 4, "channels": 1, "num_channels": 8, "num_blocks": 1}
    for bits in (10, 12):
        path = tmp_path / f"{bits}.pth.tar"
        generators.save_published(models.build_generator(**gray), path, gray, bits)  # type: ignore
    common = ("launch/evaluate.py", "--data", tmp_path / "gray", "--method", "bicubic")
    model = ("--checkpoint", tmp_path / "12.pth.tar")
    done = succeed(*common, *model, "--output", tmp_path / "out")
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["protocol"]["bits"] == 12, "those that the model was trained with"
    assert "scaled to 8 bits from 12 significant" in (tmp_path / "out/report.html").read_text()
    classical = summary["results"][0]
    other = ("--checkpoint", tmp_path / "10.pth.tar", "--output", tmp_path / "none")
    assert "10.pth.tar has 10; choose with --bits" in refuse(*common, *model, *other)
    eight = np.rint(deep * (255 / 4095)).astype(np.uint8)
    images.save(eight, tmp_path / "eight" / "a.png")
    rows = evaluate.evaluate(
        {"bicubic": evaluate.classical("bicubic", 4)},
        read(tmp_path / "eight", channels=1),
        colour="y",
        border=4,
    )
    assert classical["psnr"] == pytest.approx(rows[0].psnr, abs=1e-4)
    message = refuse(*common, "--checkpoint", published, "--output", tmp_path / "none")
    assert "holds gray pictures alone, and" in message and "was made for colour" in message
    assert not (tmp_path / "none").exists()
    # The package's own model, which is taken where none is named, enlarges gray in upscale.py too.
    done = succeed(*common[:3], "--output", tmp_path / "out", "--bits", 12)
    first, second = json.loads(done.stdout.splitlines()[-1])["results"]
    assert (first["name"], second["name"]) == ("bicubic", generators.DEFAULT)
    assert first["psnr"] == classical["psnr"]
    pair = read(tmp_path / "eight", channels=1)[0]
    images.save(pair.lr, tmp_path / "lr.png")
    generator, options = generators.load(generators.DEFAULT)[0], {"scale": 4, "channels": 3}
    sr = upscale.upscale_any(generator, tmp_path / "lr.png", **options, tile=256)
    expected, _ = metrics.compare(sr, pair.hr, colour="y", border=4)
    assert second["psnr"] == pytest.approx(expected, abs=0.001)
    assert expected > first["psnr"] + 1


def test_names_that_the_report_needs_itself(
    photographs: Path, published: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copy(published, tmp_path / "HR.pth.tar"))
    done = succeed(
        *("launch/evaluate.py", "--data", photographs / "chelsea.png", "--scale", 4),
        *("--checkpoint", other, "--output", tmp_path / "out"),
    )
    assert json.loads(done.stdout.splitlines()[-1])["results"][0]["name"] == "HR 2"


def test_models_are_called_by_the_end_of_their_paths_where_that_tells_them_apart() -> None:
    paths = [Path("runs/a"), Path("a"), Path("b/netG_4x.pth.tar"), Path("swift_srgan_x4")]
    assert generators.names(paths) == ["runs/a", "a", "netG_4x", "swift_srgan_x4"]
    homes = [Path("/home/of/x/model"), Path("/home/of/y/model"), Path("/home/of/x/model")]
    assert generators.names(homes) == ["x/model", "y/model", "x/model"], "no more than is needed"
    runs = [Path("runs/a/best"), Path("runs/b/checkpoints/step-00000012")]
    assert generators.names(runs) == ["a/best", "b/step-00000012"]
    assert generators.names([Path("best"), Path("..")]) == ["best", Path.cwd().parent.name]


def test_report_shows_the_two_results_that_are_furthest_apart(picture: images.Picture) -> None:
    results = {"a": picture, "b": 255 - picture, "c": picture // 2 + 60}
    assert report._furthest_apart(results, models=[]) == ("a", "b")
    assert report._furthest_apart(results, models=["a", "c"]) == ("a", "c"), "among models"
    assert report._furthest_apart(results, models=["c"]) == ("b", "c"), "what a model adds"


def test_report_holds_pictures_too_long_for_webp() -> None:
    long = np.zeros((4, 16384, 3), np.uint8)
    assert report._inline(long).startswith("data:image/jpeg;base64,")
    assert report._inline(long[:, 1:]).startswith("data:image/webp;base64,")


@pytest.mark.parametrize(
    ("name", "psnr", "perceived", "bicubic"),
    [("Set5", 30.005, 0.133, (28.43, 0.286)), ("Set14", 27.358, 0.206, (26.09, 0.371))],
)
def test_the_authors_model(
    shared: Path,
    tmp_path: Path,
    name: str,
    psnr: float,
    perceived: float,
    bicubic: tuple[float, float],
) -> None:
    folder = shared / "benchmarks" / name
    done = succeed(
        "launch/evaluate.py",
        *("--data", folder / "HR", "--lr", folder / "LR_bicubic" / "X4", "--scale", 4),
        *("--method", "bicubic"),
        *("--checkpoint", shared / "weights" / "swift_srgan_4x.pth.tar", "--output", tmp_path),
        *("--lpips", shared / "weights" / "squeezenet1_1_imagenet.pth"),
    )
    classical, model = json.loads(done.stdout.splitlines()[-1])["results"]
    assert model["psnr"] == pytest.approx(psnr, abs=0.01)
    assert model["lpips"] == pytest.approx(perceived, abs=0.001)
    assert classical["psnr"] == pytest.approx(bicubic[0], abs=0.01)
    assert classical["lpips"] == pytest.approx(bicubic[1], abs=0.001)
    page = (tmp_path / "report.html").read_text()
    assert "<th>LPIPS</th>" in page and "LPIPS: SqueezeNet, all channels" in page
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert header == (
        "picture,bicubic psnr,bicubic ssim,bicubic lpips,"
        "swift_srgan_4x psnr,swift_srgan_4x ssim,swift_srgan_4x lpips"
    )


def writer_to(folder: Path) -> report.Writer:
    return report.Writer(folder, data="a", scale=4, protocol=metrics.protocol("y", 4))


def test_earlier_results_stay_until_the_new_ones_are_complete(
    tmp_path: Path, picture: images.Picture
) -> None:
    pair = evaluate.Pair("a.png", np.ascontiguousarray(picture[::4, ::4]), picture)
    with pytest.raises(KeyboardInterrupt), writer_to(tmp_path / "out") as writer:
        writer.add(pair, {"SR": picture})
        raise KeyboardInterrupt
    assert not (tmp_path / "out").exists()
    with writer_to(tmp_path / "out") as writer:
        writer.add(pair, {"SR": picture})
        writer.finish([evaluate.Row("a.png", "SR", 30.0, 0.9)])
    before = contents(tmp_path / "out")
    assert set(before) == {"metrics.json", "metrics.csv", "report.html", "pictures/a.png"}
    with pytest.raises(KeyboardInterrupt), writer_to(tmp_path / "out") as writer:
        writer.add(pair, {"SR": 255 - picture})
        writer.add(dataclasses.replace(pair, name="b.png"), {"SR": picture})
        raise KeyboardInterrupt
    assert contents(tmp_path / "out") == before


def test_pictures_of_an_earlier_evaluation_go(tmp_path: Path, picture: images.Picture) -> None:
    pair = evaluate.Pair("a.png", np.ascontiguousarray(picture[::4, ::4]), picture)
    for name in ("a.png", "b.png"):
        with writer_to(tmp_path) as writer:
            writer.add(dataclasses.replace(pair, name=name), {"SR": picture})
            writer.finish([evaluate.Row(name, "SR", 30.0, 0.9)])
        if name == "a.png":
            (tmp_path / "pictures" / "mine.png").write_text("somebody's")
    found = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert found == ["b.png", "mine.png"]


def test_pictures_are_not_overwritten_by_results(photographs: Path, tmp_path: Path) -> None:
    shutil.copytree(photographs, tmp_path / "pictures")
    before = contents(tmp_path)
    words = ("--method", "nearest", "--scale", 4, "--output", tmp_path)
    lr = ("--data", photographs, "--lr", tmp_path / "pictures")
    for given in (("--data", tmp_path / "pictures"), lr):
        message = refuse("launch/evaluate.py", *given, *words)
        assert "lies where the results would be written; choose another --output" in message
    assert contents(tmp_path) == before


def test_an_index_by_its_name_is_shards(sharded: Path) -> None:
    assert evaluate.count(f"{sharded}/index.json") == evaluate.count(str(sharded)) > 20


def test_a_rank_that_cannot_count_the_pictures_lets_no_other_wait(
    photographs: Path, tmp_path: Path
) -> None:
    """What all ranks give to the sum that they meet at, and what each makes of it."""

    def run(data: Path, other: list[float]) -> None:
        validation.Validation(
            **{"data": str(data), "scale": 4, "channels": 3, "bits": 16, "tile": 64, "samples": 0},
            **{"reading": storage.DEFAULT, "colour": "y", "lpips": None, "ranks": 2},
            total=lambda values: values + torch.tensor(other, dtype=torch.float64),
        ).run(models.build_generator("swift_srgan", scale=4, channels=3), tracking.Silent(), 1, 1)

    with pytest.raises(UserError, match="gone does not exist"):
        run(tmp_path / "gone", [0, 3, 9])
    with pytest.raises(UserError, match="another rank could not evaluate; it says why"):
        run(photographs, [1, 0, 0])
    with pytest.raises(UserError, match=r"rank 0 finds 3 picture\(s\) in .*, others another nu"):
        run(photographs, [0, 2, 4])
