"""Gather pictures into a folder, and divide them into training and validation."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sr_dist import files, images, storage
from sr_dist.errors import UserError

log = logging.getLogger(__name__)

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]  # (items, what, total) → items

# In scikit-image's folder, but a colour chart, and the other half of a stereo pair: a network that
# trained on one half has seen most of the other.
_NOT_SAMPLED = ("color.png", "motorcycle_right.png")
_LEAST_SIDE = 256
_LEAST_COLOURS = 10_000  # photographs have more, drawings and renderings of data fewer


@dataclasses.dataclass(frozen=True)
class Collected:
    copied: int
    present: int  # in the output folder already
    duplicates: int
    rejects: list[tuple[str, str]]  # (path, reason)


def find_sample_photographs() -> list[Path]:
    """The colour photographs that ship inside the installed scikit-image package.

    Raises:
        UserError: scikit-image is not installed, or holds none.
    """
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        raise UserError(
            "the sample photographs ship inside scikit-image, which is not installed: "
            "pip install 'sr_dist[sample]'"
        )
    folder = Path(found.origin).parent / "data"
    chosen = [path for path in images.find(folder) if _is_sample_photograph(path)]
    if not chosen:
        raise UserError(f"{folder} holds no colour photographs; install another scikit-image")
    return chosen


def _is_sample_photograph(path: Path) -> bool:
    if path.name in _NOT_SAMPLED:
        return False
    try:
        with Image.open(path, formats=images.FORMATS) as image:
            if image.mode != "RGB" or min(image.size) < _LEAST_SIDE:
                return False
        picture = images.decode(path, 3)
    except (OSError, images.PictureError):
        return False
    colours = np.unique(picture.astype(np.int32) @ np.array([65536, 256, 1]))
    return len(colours) >= _LEAST_COLOURS


def find_pictures(
    inputs: Sequence[Path], apart_from: Path | None = None
) -> list[tuple[Path, Path]]:
    """(path, relative target) of the pictures in folders and files, nested ones included.

    What is given twice, as `folder/a.png` and in `folder`, is there once.

    `apart_from`: a folder in one of those, whose pictures are left out.

    Raises:
        UserError: an input is missing or holds no picture.
    """
    found: list[tuple[Path, Path]] = []
    for given in inputs:
        if given.is_file():
            found.append((given, Path(given.name)))
        elif given.is_dir():
            apart = apart_from.resolve() if apart_from is not None else None
            if apart is not None and given.resolve() not in apart.parents:
                apart = None
            inside = [
                (path, path.relative_to(given))
                for path in images.find(given, broken_links=True)
                if apart is None or apart not in path.resolve().parents
            ]
            if not inside:
                raise images.no_pictures(given)
            found += inside
        else:
            raise UserError(f"{given} does not exist; expected a folder of pictures or a picture")
    return list({(path.resolve(), target): (path, target) for path, target in found}.values())


def passed_over(inputs: Sequence[Path], output: Path) -> Iterator[str]:
    """A line for each input folder with files that are named as no picture is."""
    for given in inputs:
        if others := images.other_files(given, apart_from=output):
            yield f"{given}: not looked at, by the endings of their names: {others}"


def png_targets(relatives: Sequence[Path]) -> list[Path]:
    """`NAME.png` for each path; where two would be one, their old endings go into the names."""
    plain = [path.with_suffix(".png") for path in relatives]
    counts = Counter(plain)
    targets = [
        target if counts[target] == 1 else path.with_name(f"{path.name}.png")
        for path, target in zip(relatives, plain, strict=True)
    ]
    for target, count in Counter(targets).items():
        if count > 1:
            raise UserError(f"{count} of the pictures would become {target}; enlarge them apart")
    return targets


def collect(
    pictures: Sequence[tuple[Path, Path]],
    output: Path,
    progress: Progress = lambda items, what, total: items,
) -> Collected:
    """Copy pictures into `output`, each decoded once, exact duplicates (same bytes) dropped.

    `pictures`: (path, target relative to `output`). Where two different pictures claim one target,
    the later gets part of its hash in its name. Running again copies only what is not there.
    """
    seen: dict[str, str] = {}  # sha256 of what lies in output → name
    for path in images.find(output) if output.is_dir() else []:
        seen[_hash(path)] = path.relative_to(output).as_posix()
    earlier = set(seen)
    copied = present = duplicates = 0
    rejects: list[tuple[str, str]] = []
    for path, relative in progress(pictures, "collecting", len(pictures)):
        try:
            images.decode(path, None)
            digest = _hash(path)
        except images.PictureError as error:
            rejects.append((str(path), str(error)))
            continue
        except OSError as error:
            rejects.append((str(path), f"cannot be read: {error.strerror}"))
            continue
        if digest in seen:
            present += digest in earlier
            duplicates += digest not in earlier
            earlier.discard(digest)  # another of the same bytes is a duplicate
            continue
        target = output / relative
        if target.exists():
            target = target.with_name(f"{target.stem}-{digest[:8]}{target.suffix}")
        with path.open("rb") as original, files.whole(target) as copy:
            shutil.copyfileobj(original, copy)
        seen[digest] = relative.as_posix()
        copied += 1
    if not seen:
        first = f"{rejects[0][0]} {rejects[0][1]}"
        raise UserError(f"none of {len(pictures)} pictures can be used; first: {first}")
    return Collected(copied, present, duplicates, rejects)


def split(
    folder: Path,
    val_fraction: float,
    seed: int,
    output: Path | None = None,
    group_by: str | None = None,
) -> tuple[list[str], list[str]]:
    """Write `train.txt` and `val.txt` into `output` (or `folder`), and return what they list.

    A picture belongs where the hash of `seed` and its bytes says, whatever else is there; one that
    an earlier run listed stays where it is, and copies go where their original is. Neither list is
    ever empty. Paths are relative to the lists.

    `group_by`: a regular expression, found in the path of every picture below `folder`. Pictures
    for which it finds the same (its first group, where it has one) go together.

    Raises:
        UserError: fewer than two different pictures or groups, a fraction that is not between 0
            and 1, no picture left for one side, or groups that cannot be kept together.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"--val-fraction: expected a number between 0 and 1, found {val_fraction}")
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {found}; expected a folder of pictures")
    output = folder if output is None else output
    paths = images.find(folder)
    if len(paths) < 2:
        raise UserError(
            f"{folder} holds {len(paths)} picture(s); two are needed, one for each side"
        )
    # Without links, behind which `..` would lead elsewhere.
    start, place = folder.resolve(), output.resolve()
    full = [start / path.relative_to(folder) for path in paths]
    names = [Path(os.path.relpath(path, place)).as_posix() for path in full]
    listed = {
        name: side for side in ("train", "val") for name in _read_list(output / f"{side}.txt")
    }
    together = hashes = {name: _hash(path) for name, path in zip(names, paths, strict=True)}
    if group_by is not None:
        # Of what was listed and is gone too: others of its group may come.
        every = dict.fromkeys([*names, *listed])
        below = {name: os.path.relpath(place / name, start) for name in every}
        together = _groups(below, group_by, required=names)
        _check_groups(together, hashes, listed, output)
        groups = {together[name] for name in names}
        log.info("--group-by finds %d groups in %d pictures", len(groups), len(names))
    of_others = {together[name]: side for name, side in listed.items() if name in together}
    earlier = {name: listed.get(name, of_others.get(together[name])) for name in names}
    shares = {name: _share(together[name], seed) for name in names}
    validation = {
        name
        for name in names
        if earlier[name] == "val" or (earlier[name] is None and shares[name] < val_fraction)
    }
    # A small folder may hash to one side alone; the nearest picture then crosses over, but never
    # one that an earlier run has listed: it may have been trained on.
    if len(validation) in (0, len(names)):
        movable = [name for name in names if earlier[name] is None]
        if not movable:
            side = "validation" if not validation else "training"
            raise UserError(
                f"no picture is left for {side}: all are listed for the other side. Add pictures, "
                f"or delete {output}/train.txt and val.txt to divide afresh."
            )
        nearest = (max if validation else min)(shares[name] for name in movable)
        moved = {name for name in movable if shares[name] == nearest}  # copies, or a group
        if len(moved) == len(names):
            one = "picture" if group_by is None else f"group by --group-by {group_by!r}"
            raise UserError(
                f"{folder} holds one {one}, {len(names)} times; two are needed, one for each side"
            )
        validation ^= moved
    sides = ([name for name in names if name not in validation], sorted(validation))
    for side, members in zip(("train", "val"), sides, strict=True):
        files.write_whole(output / f"{side}.txt", "".join(f"{name}\n" for name in members))
    return sides


def _groups(paths: dict[str, str], group_by: str, required: Sequence[str]) -> dict[str, str]:
    """What `group_by` finds in the path of every name; it must in those of `required`."""
    try:
        pattern = re.compile(group_by)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"--group-by: {group_by!r} is no regular expression: {error}") from None
    found = {name: pattern.search(Path(path).as_posix()) for name, path in paths.items()}
    for name in required:
        if found[name] is None:
            raise UserError(f"--group-by: {group_by!r} finds nothing in {paths[name]}")
    which = min(1, pattern.groups)
    return {name: match[which] or "" for name, match in found.items() if match is not None}


def _check_groups(
    groups: dict[str, str], hashes: dict[str, str], listed: dict[str, str], output: Path
) -> None:
    """Refuse what would put pictures of one group, or copies of one picture, on both sides."""
    sides: dict[str, str] = {}
    for name, side in listed.items():
        if name in groups and sides.setdefault(groups[name], side) != side:
            raise UserError(
                f"{output}/train.txt and val.txt have both pictures of the group {groups[name]!r} "
                "from before; delete them to divide afresh"
            )
    holders: dict[str, str] = {}
    for name, digest in hashes.items():
        first = holders.setdefault(digest, name)
        if groups[first] != groups[name]:
            raise UserError(
                f"{first} and {name} are the same picture, of the groups {groups[first]!r} and "
                f"{groups[name]!r}; leave one of them out"
            )


def _share(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on the seed and on `key`, the hash of a file or a group."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).hexdigest()
    return int(digest[:12], 16) / 16**12


def _hash(path: Path) -> str:
    return storage.sha256_of_file(str(path))[0]


def _read_list(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
