from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sr_dist import dataset, images
from sr_dist.errors import UserError
from tests.runs import full_disk


def noise(path: Path, seed: int, side: int = 40) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(256, size=(side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def lists(folder: Path) -> tuple[set[str], set[str]]:
    train, val = (set((folder / f"{s}.txt").read_text().split()) for s in ("train", "val"))
    return train, val


def test_sample_holds_the_colour_photographs_and_no_chart_or_twin() -> None:
    names = {path.name for path in dataset.find_sample_photographs()}
    assert {"astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg"} <= names
    assert not names & {"color.png", "motorcycle_right.png", "logo.png", "camera.png", "horse.png"}


def test_collect_nested_folders_drops_duplicates_and_lists_the_bad(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    for seed, name in enumerate(("a.png", "deep/er/b.jpg", "c.webp", "d.tiff", "e.bmp")):
        noise(source / name, seed)
    (source / "deep" / "copy.png").write_bytes((source / "a.png").read_bytes())
    (source / "broken.png").write_bytes((source / "a.png").read_bytes()[:500])
    (source / "text.jpg").write_text("not a picture")
    (source / "readme.md").write_text("not looked at")
    (source / "astray.png").symlink_to(source / "nowhere.png")
    deep = np.full((40, 40), 40_000, np.uint16)
    Image.fromarray(deep).save(source / "deep.PNG")
    result = dataset.collect(dataset.find_pictures([source]), output)
    assert (result.copied, result.present, result.duplicates) == (6, 0, 1)
    reasons = {Path(path).name: reason for path, reason in result.rejects}
    assert set(reasons) == {"broken.png", "text.jpg", "astray.png"}
    assert reasons["astray.png"] == "cannot be read: No such file or directory"
    assert "cannot be decoded" in reasons["broken.png"]
    assert (output / "deep/er/b.jpg").read_bytes() == (source / "deep/er/b.jpg").read_bytes()

    noise(source / "new.png", 9)
    again = dataset.collect(dataset.find_pictures([source]), output)
    assert (again.copied, again.present, again.duplicates) == (1, 6, 1)


def test_collect_decodes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(tmp_path / "in" / "a.png", 1)
    decoded, real = [], PngImagePlugin.PngImageFile.load_end
    monkeypatch.setattr(
        PngImagePlugin.PngImageFile, "load_end", lambda image: (decoded.append(1), real(image))
    )
    dataset.collect(dataset.find_pictures([tmp_path / "in"]), tmp_path / "out")
    assert len(decoded) == 1


def test_collect_on_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    noise(tmp_path / "in" / "a.png", 1)
    with full_disk(1000), pytest.raises(OSError, match="File too large: .*out/a.png"):
        dataset.collect(dataset.find_pictures([tmp_path / "in"]), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_photographs_of_the_sample_are_large_and_of_many_colours(tmp_path: Path) -> None:
    for side, chosen in ((300, True), (255, False)):
        noise(tmp_path / "a.png", 1, side)
        assert dataset._is_sample_photograph(tmp_path / "a.png") == chosen
    Image.new("RGB", (300, 300), "red").save(tmp_path / "b.png")
    assert not dataset._is_sample_photograph(tmp_path / "b.png")


def test_a_folder_of_results_is_not_taken_for_pictures(tmp_path: Path) -> None:
    noise(tmp_path / "a.png", 1)
    noise(tmp_path / "results" / "a.png", 2)

    def names(apart_from: Path | None) -> list[str]:
        found = dataset.find_pictures([tmp_path], apart_from)
        return [relative.as_posix() for _, relative in found]

    assert names(None) == names(tmp_path) == ["a.png", "results/a.png"]
    assert names(tmp_path / "results") == ["a.png"]
    assert names(tmp_path.parent) == ["a.png", "results/a.png"], "results go above the pictures"


def test_collect_keeps_different_pictures_of_one_name(tmp_path: Path) -> None:
    noise(tmp_path / "x/a.png", 1)
    noise(tmp_path / "y/a.png", 2)
    found = dataset.find_pictures([tmp_path / "x", tmp_path / "y"])
    assert dataset.collect(found, tmp_path / "out").copied == 2
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_what_is_given_twice_is_there_once(tmp_path: Path) -> None:
    noise(tmp_path / "a.png", 1)
    noise(tmp_path / "in" / "a.png", 1)
    given = (tmp_path / "in", tmp_path / "in" / ".." / "in" / "a.png", tmp_path / "a.png")
    found = dataset.find_pictures(given)
    assert [path.resolve() for path, _ in found] == [tmp_path / "in/a.png", tmp_path / "a.png"]


def test_collect_of_nothing_usable(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no")
    with pytest.raises(UserError, match="none of 1 pictures can be used; first: .*a.png"):
        dataset.collect(dataset.find_pictures([tmp_path / "a.png"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="does not exist"):
        dataset.find_pictures([tmp_path / "nowhere"])


def test_split_moves_nothing_when_pictures_are_added(tmp_path: Path) -> None:
    for seed in range(30):
        noise(tmp_path / f"{seed}.png", seed, side=8)
    dataset.split(tmp_path, 0.2, seed=0)
    train, val = lists(tmp_path)
    assert len(train) + len(val) == 30 and 1 <= len(val) <= 14
    for seed in range(30, 60):
        noise(tmp_path / f"{seed}.png", seed, side=8)
    dataset.split(tmp_path, 0.2, seed=0)
    more_train, more_val = lists(tmp_path)
    assert train < more_train and val < more_val
    # Without the lists of before the hash alone decides, and comes to the same.
    for name in ("train.txt", "val.txt"):
        (tmp_path / name).unlink()
    dataset.split(tmp_path, 0.2, seed=0)
    assert lists(tmp_path) == (more_train, more_val)
    (tmp_path / "train.txt").unlink()
    (tmp_path / "val.txt").unlink()
    dataset.split(tmp_path, 0.2, seed=1)
    assert lists(tmp_path) != (more_train, more_val)


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_split_leaves_no_side_empty_and_keeps_what_crossed_over(
    tmp_path: Path, fraction: float
) -> None:
    for seed in range(3):
        noise(tmp_path / f"{seed}.png", seed, side=8)
    dataset.split(tmp_path, fraction, seed=0)
    train, val = lists(tmp_path)
    assert train and val and train | val == {"0.png", "1.png", "2.png"} and not train & val
    for seed in range(3, 40):
        noise(tmp_path / f"{seed}.png", seed, side=8)
    dataset.split(tmp_path, fraction, seed=0)
    more_train, more_val = lists(tmp_path)
    assert train <= more_train and val <= more_val


def test_split_never_moves_a_picture_that_was_trained_on(tmp_path: Path) -> None:
    for seed in range(6):
        noise(tmp_path / f"{seed}.png", seed, side=8)
    dataset.split(tmp_path, 0.001, seed=0)
    train, val = lists(tmp_path)
    assert len(val) == 1
    (tmp_path / val.pop()).unlink()
    with pytest.raises(UserError, match="no picture is left for validation"):
        dataset.split(tmp_path, 0.001, seed=0)
    assert lists(tmp_path)[0] == train
    noise(tmp_path / "new.png", 77, side=8)
    dataset.split(tmp_path, 0.001, seed=0)
    assert lists(tmp_path) == (train, {"new.png"})


def test_split_lists_elsewhere_hold_paths_from_there(tmp_path: Path) -> None:
    for seed in range(4):
        noise(tmp_path / "images" / f"{seed}.png", seed, side=8)
    dataset.split(tmp_path / "images", 0.3, 0, tmp_path / "lists" / "a")
    found = [
        picture.resolve().name
        for side in ("train", "val")
        for picture, _ in images.list_pictures(tmp_path / "lists" / "a" / f"{side}.txt")
    ]
    assert sorted(found) == ["0.png", "1.png", "2.png", "3.png"]
    assert not list((tmp_path / "images").glob("*.txt"))


def test_split_goes_by_content_and_not_by_name(tmp_path: Path) -> None:
    for seed in range(20):
        noise(tmp_path / "a" / f"{seed}.png", seed, side=8)
        noise(tmp_path / "b" / f"renamed-{99 - seed}.png", seed, side=8)
    sides = [dataset.split(tmp_path / folder, 0.4, seed=3) for folder in ("a", "b")]
    for first, second in zip(*sides, strict=True):
        hashes = [
            {dataset._hash(tmp_path / folder / name) for name in side}
            for folder, side in (("a", first), ("b", second))
        ]
        assert hashes[0] == hashes[1] and len(first) > 1


def test_copies_are_never_on_both_sides(tmp_path: Path) -> None:
    for name in ("a.png", "copy.png"):
        noise(tmp_path / name, 1)
    with pytest.raises(UserError, match="holds one picture, 2 times; two are needed"):
        dataset.split(tmp_path, 0.5, seed=0)
    noise(tmp_path / "other.png", 2)
    for seed in range(8):
        for fraction in (0.001, 0.5, 0.999):
            dataset.split(tmp_path, fraction, seed, tmp_path / f"{seed}-{fraction}")
            sides = [
                {Path(name).name for name in side}
                for side in lists(tmp_path / f"{seed}-{fraction}")
            ]
            assert {"a.png", "copy.png"} in sides and {"other.png"} in sides


def test_copies_of_listed_pictures_go_where_those_are(tmp_path: Path) -> None:
    for seed in range(12):
        noise(tmp_path / f"{seed}.png", seed, side=8)
    train, val = map(set, dataset.split(tmp_path, 0.3, seed=0))
    for name in train | val:
        (tmp_path / f"copy-{name}").write_bytes((tmp_path / name).read_bytes())
    for fraction in (0.3, 0.01, 0.99):
        sides = dataset.split(tmp_path, fraction, seed=0)
        for side, before in zip(sides, (train, val), strict=True):
            assert set(side) == before | {f"copy-{name}" for name in before}


def test_lists_behind_a_link_lead_to_the_pictures(tmp_path: Path) -> None:
    for seed in range(3):
        noise(tmp_path / "real" / "images" / f"{seed}.png", seed, side=8)
    (tmp_path / "else" / "where").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "else" / "where")
    dataset.split(tmp_path / "real" / "images", 0.3, 0, tmp_path / "link")
    for side in ("train", "val"):
        assert images.list_pictures(tmp_path / "link" / f"{side}.txt")


def test_split_refuses_what_cannot_be_split(tmp_path: Path) -> None:
    noise(tmp_path / "one.png", 1)
    with pytest.raises(UserError, match="holds 1 picture"):
        dataset.split(tmp_path, 0.1, seed=0)
    with pytest.raises(UserError, match="between 0 and 1"):
        dataset.split(tmp_path, 1.5, seed=0)
    with pytest.raises(UserError, match="does not exist"):
        dataset.split(tmp_path / "none", 0.1, seed=0)


def test_split_keeps_groups_together(tmp_path: Path) -> None:
    """Patients by the beginning of the name, also when pictures come later."""
    for seed in range(36):
        noise(tmp_path / f"scans/{seed % 12:03}_{seed}.png", seed, side=8)
    by = r"scans/(\d+)_"
    dataset.split(tmp_path, 0.3, seed=0, group_by=by)
    before = sides_of_groups(tmp_path)
    assert len(before) == 12 and set(before.values()) == {"train", "val"}
    for seed in range(36, 60):
        noise(tmp_path / f"scans/{seed % 20:03}_{seed}.png", seed, side=8)
    for again in (True, False):  # by the lists, and by the names alone
        dataset.split(tmp_path, 0.3, seed=0, group_by=by)
        after = sides_of_groups(tmp_path)
        assert len(after) == 20 and before.items() <= after.items()
        if again:
            for name in ("train.txt", "val.txt"):
                (tmp_path / name).unlink()
    dataset.split(tmp_path, 0.001, seed=1, output=tmp_path / "few", group_by=by)
    sides = sides_of_groups(tmp_path / "few")
    assert sorted(sides.values()) == ["train"] * 19 + ["val"], "a whole group crossed over"


def test_a_group_stays_on_its_side_when_its_pictures_have_other_names(tmp_path: Path) -> None:
    """Where the group had crossed over, so that its hash says otherwise."""
    for seed in range(40):
        folder = tmp_path / str(seed)
        for patient in range(4):
            noise(folder / f"{patient}_0.png", patient, side=8)
        dataset.split(folder, 0.01, seed=seed, group_by="^[0-9]+")
        (crossed,) = lists(folder)[1]
        (folder / crossed).rename(folder / crossed.replace("_0", "_1"))
        for patient in range(4, 7):
            noise(folder / f"{patient}_0.png", patient, side=8)
        dataset.split(folder, 0.01, seed=seed, group_by="^[0-9]+")
        assert crossed.replace("_0", "_1") in lists(folder)[1]


def sides_of_groups(folder: Path) -> dict[str, str]:
    """The one side of every group by the first three characters of names."""
    found: dict[str, set[str]] = {}
    for side, names in zip(("train", "val"), lists(folder), strict=True):
        for name in names:
            found.setdefault(Path(name).name[:3], set()).add(side)
    return {group: side for group, (side,) in found.items()}


def test_split_refuses_groups_that_cannot_be_kept_together(tmp_path: Path) -> None:
    for name, seed in (("a_1", 1), ("a_2", 2), ("b_1", 3), ("b_2", 4), ("c_1", 5)):
        noise(tmp_path / f"{name}.png", seed, side=8)
    for wrong, why in (("(", r"missing \)"), ("a{99999999999999999999}", "")):
        with pytest.raises(UserError, match=f"--group-by: .* is no regular expression: {why}"):
            dataset.split(tmp_path, 0.5, seed=0, group_by=wrong)
    with pytest.raises(UserError, match=r"'\\\\d\\\\d' finds nothing in a_1.png"):
        dataset.split(tmp_path, 0.5, seed=0, group_by=r"\d\d")
    with pytest.raises(UserError, match="holds one group by --group-by 'png', 5 times"):
        dataset.split(tmp_path, 0.5, seed=0, group_by="png")
    (tmp_path / "train.txt").write_text("a_1.png\n")
    (tmp_path / "val.txt").write_text("a_2.png\n")
    with pytest.raises(UserError, match="val.txt have both pictures of the group 'a' from before"):
        dataset.split(tmp_path, 0.5, seed=0, group_by="^[a-z]")
    (tmp_path / "val.txt").unlink()
    noise(tmp_path / "c_2.png", 3, side=8)
    with pytest.raises(UserError, match="b_1.png and c_2.png are the same picture, of the groups"):
        dataset.split(tmp_path, 0.5, seed=0, group_by="^[a-z]")
    assert not (tmp_path / "val.txt").exists()


def test_png_targets_never_collide() -> None:
    paths = [Path("a.jpg"), Path("a.png"), Path("b/a.jpg"), Path("c.webp")]
    assert dataset.png_targets(paths) == [
        Path("a.jpg.png"),
        Path("a.png.png"),
        Path("b/a.png"),
        Path("c.png"),
    ]
