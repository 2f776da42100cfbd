"""Checkpoints that appear whole or not at all.

`checkpoints/step-00001000/` holds safetensors of the weights, `training.pt` with what else a run
needs to go on, and `meta.json` with the hash of each file; `meta.json` is written last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Collection, Container, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sr_dist import storage
from sr_dist import weights as weight_files
from sr_dist.errors import UserError

log = logging.getLogger(__name__)

META = "meta.json"
TRAINING = "training.pt"
_BEFORE = ".before.tmp"  # ends the name of one that is being replaced
_CHECKSUM = "checksum"  # in meta.json, of the rest of it; older versions wrote none
_GENERATORS = ("ema.safetensors", "generator.safetensors")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were found to be what its `meta.json` says."""

    folder: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.meta["step"])

    @property
    def run(self) -> Path:
        """The folder of the run that it is of."""
        folder = self.folder.resolve() if self.folder.is_symlink() else self.folder  # `best`
        return folder.parent.parent

    def weights(self, name: str) -> dict[str, Tensor]:
        """The state dict of `generator`, `discriminator` or `ema`."""
        return safetensors.torch.load_file(self.folder / f"{name}.safetensors")

    def networks(self) -> set[str]:
        """Which of those it holds."""
        names = map(Path, self.meta["sha256"])
        return {name.stem for name in names if name.suffix == ".safetensors"}

    def training(self) -> dict[str, Any]:
        values: dict[str, Any] = torch.load(
            self.folder / TRAINING, map_location="cpu", weights_only=True
        )
        return values


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a checkpoint shall hold, copied to the CPU, so that the training can go on."""

    step: int
    weights: dict[str, dict[str, Tensor]]  # state dicts by file name
    training: dict[str, Any]  # tensors and plain numbers
    meta: dict[str, Any]  # what meta.json says beside the step and the hashes


def snapshot(
    step: int, modules: Mapping[str, nn.Module], training: dict[str, Any], meta: dict[str, Any]
) -> Snapshot:
    """`modules`: whose weights, by file name."""
    weights = {
        name: {key: value.clone() for key, value in weight_files.contiguous(module).items()}
        for name, module in modules.items()
    }
    return Snapshot(step, weights, _copied(training), meta)


def _copied(value: Any) -> Any:
    """Tensors on the CPU, in memory of their own; containers anew.

    Strides stay: the fused optimiser pairs its state with the weights by their order in memory.
    """
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value


def write(folder: Path, held: Snapshot, *, keep: int, best: str | None = None) -> Path:
    """Write `folder/step-N`, whole or not at all; then remove old ones. For rank 0 alone.

    `keep` remain, the newest, and the one whose `metrics` in meta.json are the best by `best`
    (psnr, ssim, lpips; None for none), which a link `best` beside the folder names; those that were
    measured on the newest one's `validation` pictures are compared. Later ones are removed too:
    this run did not come from them, because they were found damaged.
    """
    target = folder / f"step-{held.step:08d}"
    partial = target.with_suffix(".tmp")
    for stale in folder.glob("step-*.tmp"):  # of a run that was killed while it wrote
        whole = stale.with_name(stale.name.removesuffix(_BEFORE))
        if stale.name.endswith(_BEFORE) and not whole.exists():  # between the renames below
            os.rename(stale, whole)
        else:
            _remove(stale)
    partial.mkdir(parents=True)
    # Through memory: written by torch itself, a full disk would be an error like any other.
    training = io.BytesIO()
    torch.save(held.training, training)
    hashes = {TRAINING: _write_file(partial / TRAINING, training.getbuffer())}
    for name, state in held.weights.items():
        path = partial / f"{name}.safetensors"
        hashes[path.name] = _write_file(path, safetensors.torch.save(state))
    meta = json.loads(json.dumps({"step": held.step, **held.meta, "sha256": hashes}))
    text = json.dumps({**meta, _CHECKSUM: _checksum(meta)}, indent=1) + "\n"
    _write_file(partial / META, text.encode("utf-8"))
    _sync_folder(partial)
    before = folder / f"step-{held.step:08d}{_BEFORE}"
    if target.exists():  # of a stopped run that passed here before
        os.rename(target, before)
    os.rename(partial, target)
    shutil.rmtree(before, ignore_errors=True)
    _sync_folder(folder)
    _prune(folder, target, keep, best)
    return target


def _checksum(meta: Mapping[str, Any]) -> str:
    """Of what meta.json says beside it."""
    said = {key: value for key, value in meta.items() if key != _CHECKSUM}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def expected_bytes(modules: Mapping[str, nn.Module], trained: Collection[str]) -> int:
    """About the size of a checkpoint of `modules`, AdamW's state of those `trained` included."""
    total = 0
    for name, module in modules.items():
        size = sum(value.numel() * value.element_size() for value in module.state_dict().values())
        total += size * (3 if name in trained else 1)
    return total


def check_room(folder: Path, size: int, keep: int) -> int:
    """Bytes that are free where `folder`, a run's, is or will be.

    Raises:
        UserError: fewer than `keep` checkpoints of `size` bytes, the best and the one being written
            need beyond what is there, or nothing can be written there.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    for each in (place, *(path for path in folder.glob("*") if path.is_dir())):
        try:
            tempfile.TemporaryFile(dir=each).close()
        except OSError as error:
            raise UserError(
                f"cannot use {folder}: in {each} nothing can be written: {error.strerror}"
            ) from None
    free = shutil.disk_usage(place).free
    needed = max(1, keep + 2 - len(_folders(folder / "checkpoints")))
    if free < needed * size:
        raise UserError(
            f"{place} has {free / 1e6:.0f} MB free; {needed} checkpoint(s) of {size / 1e6:.0f} MB "
            "would not fit. Make room, lower checkpoint.keep, or choose another run.output_dir."
        )
    return free


def _prune(folder: Path, newest: Path, keep: int, best: str | None) -> None:
    step = _step(newest)
    earlier = [other for other in _folders(folder) if _step(other) < step]
    kept = {newest, *earlier[: keep - 1]}
    if best is not None:
        validation = _meta(newest).get("validation")
        scores = {path: _score(path, best, validation) for path in (newest, *earlier)}
        known = {path: score for path, score in scores.items() if score is not None}
        link = folder.parent / "best"
        if known:
            leader = max(known, key=lambda path: known[path])
            kept.add(leader)
            fresh = folder.parent / ".best.part"
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(Path(folder.name) / leader.name)
            os.replace(fresh, link)
        elif link.is_symlink():
            before = folder / link.readlink().name
            if before in earlier:
                kept.add(before)
            else:  # a later one, or gone
                link.unlink()
    for old in _folders(folder):
        if old not in kept:
            leaving = old.with_name(f"{old.name}.old.tmp")  # no checkpoint any more
            os.rename(old, leaving)
            _remove(leaving)


def _remove(folder: Path) -> None:
    """Later, where it cannot be done now: NFS keeps what something still reads."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s cannot be removed: %s", folder, error.strerror)


def _meta(path: Path) -> dict[str, Any]:
    """What meta.json says; nothing where it is damaged."""
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _score(path: Path, metric: str, validation: str | None) -> float | None:
    """A checkpoint's metric, such that more is better; None where it was not measured there."""
    meta = _meta(path)
    try:
        value = float(meta["metrics"][metric])
    except (KeyError, TypeError, ValueError):
        return None
    if meta.get("validation", validation) != validation:  # older versions did not say
        return None
    return -value if metric == "lpips" else value


class Saver:
    """Writes one checkpoint after the other, in a thread of its own, until its block ends."""

    def __init__(self, folder: Path, *, keep: int, best: str | None) -> None:
        self.folder, self.keep, self.best = folder, keep, best
        self.restart_clock()
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.finish()
        elif self.thread is not None:  # what ends the run is told, not what came of its last save
            self.thread.join()

    def start(self, held: Snapshot) -> None:
        """Begin to write, when the one before is done.

        Raises:
            OSError: that one could not be written.
        """
        self.finish()
        self.restart_clock()
        self.thread = threading.Thread(target=self._write, args=(held,), name="checkpoint")
        self.thread.start()

    def _write(self, held: Snapshot) -> None:
        try:
            write(self.folder, held, keep=self.keep, best=self.best)
        except BaseException as error:
            self.error = error

    def restart_clock(self) -> None:
        self.began = time.monotonic()

    def is_due(self, every_minutes: float | None) -> bool:
        """Whether the last one was begun, or the clock restarted, so long ago."""
        return every_minutes is not None and time.monotonic() - self.began >= 60 * every_minutes

    def check(self) -> None:
        """
        Raises:
            OSError: the last one could not be written; those before it are whole.
        """
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def finish(self) -> None:
        """Wait for what is being written, and `check`."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()


def find_newest(
    folder: Path, names: Container[str] | None = None, otherwise: str = "none is whole"
) -> Checkpoint | None:
    """The newest whole checkpoint below `folder`.

    Those passed over are logged with the reason and the one that is taken instead, in one warning.

    `names`: the files that matter; None for all. `otherwise`: what to say where none is whole.
    """
    found, problems = None, []
    for candidate in _folders(folder):
        try:
            found = verify(candidate, names)
            break
        except UserError as error:
            problems.append(str(error))
    if problems:
        instead = otherwise if found is None else f"{found.folder} is taken instead"
        log.warning("passed over a checkpoint: %s; %s", "; ".join(problems), instead)
    return found


def verify(folder: Path, names: Container[str] | None = None) -> Checkpoint:
    """Read `meta.json` and compare every file, or those of `names`, with its hash.

    Raises:
        UserError: a file is missing or altered.
        OSError: one cannot be read, which says nothing of what it holds.
    """
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        hashes = dict(meta["sha256"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no whole checkpoint: {META}: {error}") from None
    found = _checksum(meta)
    if meta.get(_CHECKSUM, found) != found or not hashes:
        raise UserError(f"{folder} is no whole checkpoint: {META} is not what was saved")
    for name, expected in hashes.items():
        if names is not None and name not in names:
            continue
        path = folder / name
        if not path.is_file():
            raise UserError(f"{folder} is no whole checkpoint: {name} is missing")
        if storage.sha256_of_file(str(path))[0] != expected:
            raise UserError(f"{folder} is no whole checkpoint: {name} is not what was saved")
    return Checkpoint(folder, meta)


def find_in(path: Path, names: Container[str] | None = _GENERATORS) -> Checkpoint:
    """The checkpoint that `path` is, or the newest of a run's folder.

    `names`: the files that matter; None for all.

    Raises:
        UserError: there is none that is whole.
    """
    if (path / META).exists():
        return verify(path, names)
    inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = find_newest(inside, names)
    if found is None:
        files = sorted(file.name for file in path.glob("netG_*.pth.tar"))
        hint = f", or a file in it, such as {files[-1]}" if files else ""
        runs = sorted(str(each.parent) for each in path.glob("*/checkpoints"))
        hint += f"; runs in it: {', '.join(runs)}" if runs else ""
        raise UserError(
            f"{path} holds no whole checkpoint; expected a run's folder or a checkpoint's{hint}"
        )
    return found


def listed(folder: Path) -> list[str]:
    """The names of checkpoints, whole or not, newest first."""
    return [path.name for path in _folders(folder)]


def _folders(folder: Path) -> list[Path]:
    """Checkpoints, newest first by number.

    One that was about to be replaced when its run was killed counts where nothing has its place.
    """
    names = {path.name for path in folder.glob("step-*")}
    found = [name for name in names if name.removesuffix(_BEFORE)[5:].isdigit()]
    found = [name for name in found if name.removesuffix(_BEFORE) not in names - {name}]
    return sorted((folder / name for name in found), key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removesuffix(_BEFORE)[5:])


def _write_file(path: Path, data: bytes | memoryview) -> str:
    """Write a file, onto the disk, and return its sha256.

    Raises:
        OSError: with the file's name, also where the disk is full.
    """
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)
        raise
    return hashlib.sha256(data).hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
