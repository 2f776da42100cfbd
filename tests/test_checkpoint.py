from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sr_dist import checkpoint, export, generators, models, resuming, weights
from sr_dist.errors import UserError
from tests.generators import build
from tests.runs import full_disk

ARGUMENTS = {
    "name": "swift_srgan",
    "scale": 2,
    "channels": 3,
    "num_channels": 8,
    "num_blocks": 1,
    "norm": "batch",
    "global_skip": "bicubic",
}


def generator(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    built = models.build_generator(**ARGUMENTS)  # type: ignore[arg-type]
    for tensor in built.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_()
    return built.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def save(
    folder: Path,
    step: int,
    keep: int = 9,
    best: str | None = None,
    metrics: dict[str, float] | None = None,
    **modules: nn.Module,
) -> Path:
    held = checkpoint.snapshot(
        step,
        modules or {"generator": generator(step)},
        {"optimizers": {}, "number": step, "tensor": torch.arange(3)},
        {"generator": ARGUMENTS, "epoch": 1, "metrics": metrics or {}},
    )
    return checkpoint.write(folder, held, keep=keep, best=best)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_checkpoint_reads_back(tmp_path: Path) -> None:
    saved = generator(7)
    folder = save(tmp_path, 1000, generator=saved, ema=generator(8))
    assert folder.name == "step-00001000"
    assert {path.name for path in folder.iterdir()} == {
        "generator.safetensors",
        "ema.safetensors",
        "training.pt",
        "meta.json",
    }
    found = checkpoint.find_newest(tmp_path)
    assert found is not None and found.step == 1000
    assert found.networks() == {"generator", "ema"}
    again = generator(0)
    again.load_state_dict(found.weights("generator"))
    assert_same(again, saved)
    training = found.training()
    assert training["number"] == 1000 and training["tensor"].tolist() == [0, 1, 2]


def test_newest_is_by_number_and_old_ones_go(tmp_path: Path) -> None:
    for step in (900, 1000, 99_999_999, 100_000_000):
        save(tmp_path, step, keep=3)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00001000", "step-100000000", "step-99999999"]
    found = checkpoint.find_newest(tmp_path)
    assert found is not None and found.step == 100_000_000


def test_pruning_keeps_what_was_just_saved(tmp_path: Path) -> None:
    for step in (12, 24, 36):
        save(tmp_path, step)
    (tmp_path / "step-00000036" / "generator.safetensors").write_bytes(b"damaged")
    (tmp_path / "step-00000024" / "meta.json").unlink()
    assert save(tmp_path, 18, keep=1).is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000018"]


def test_the_best_of_what_a_run_went_back_from_goes_too(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 9, keep=3, best="psnr")
    save(folder, 36, keep=3, best="psnr", metrics={"psnr": 30.0})
    assert (tmp_path / "best").resolve() == folder / "step-00000036"
    save(folder, 12, keep=3, best="psnr")
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000009", "step-00000012"]
    assert not (tmp_path / "best").is_symlink()


def test_one_that_is_saved_again_is_there_whenever_the_writer_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also between the old one's way out and the new one's way in."""
    save(tmp_path, 3, generator=generator(1))
    real, names = os.rename, []

    def rename(source: Path, target: Path) -> None:
        names.append(target.name)
        if len(names) == 2:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", rename)
        save(tmp_path, 3, generator=generator(2))
    assert not (tmp_path / "step-00000003").exists() and len(names) == 2
    found = checkpoint.find_newest(tmp_path)
    assert found is not None and found.step == 3
    again = generator(0)
    again.load_state_dict(found.weights("generator"))
    assert_same(again, generator(1))
    save(tmp_path, 4, generator=generator(4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    again.load_state_dict(checkpoint.verify(tmp_path / "step-00000003").weights("generator"))
    assert_same(again, generator(1))
    save(tmp_path, 3, keep=1, generator=generator(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    found = checkpoint.find_newest(tmp_path)
    assert found is not None
    again.load_state_dict(found.weights("generator"))
    assert_same(again, generator(2))


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "meta", "no meta"])
def test_damaged_checkpoint_is_passed_over_by_name(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    weights = newest / "generator.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    if damage == "flip":
        weights.write_bytes(data)
    elif damage == "truncate":
        weights.write_bytes(data[:-100])
    elif damage == "delete":
        (newest / "training.pt").unlink()
    elif damage == "meta":
        (newest / "meta.json").write_text("{")
    else:
        (newest / "meta.json").unlink()
    with caplog.at_level(logging.WARNING):
        found = checkpoint.find_newest(tmp_path)
    assert found is not None and found.step == 1
    (told,) = caplog.messages
    assert told.startswith(f"passed over a checkpoint: {newest} is no whole checkpoint: ")
    assert told.endswith(f"; {tmp_path / 'step-00000001'} is taken instead")


def test_a_disk_that_does_not_answer_says_nothing_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that took it for damaged would begin anew, and remove it."""
    save(tmp_path, 1)

    def read_text(self: Path, **_: object) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint.find_newest(tmp_path)


def test_an_old_one_that_cannot_be_removed_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path / ".nfs0001"))

    save(tmp_path, 1, keep=1)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    save(tmp_path, 2, keep=1)
    assert "step-00000001.old.tmp cannot be removed: Directory not empty" in caplog.text
    found = checkpoint.find_newest(tmp_path)
    assert found is not None and found.step == 2
    monkeypatch.undo()
    save(tmp_path, 3, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("resume", ["auto", "PATH"])
def test_a_run_whose_checkpoints_are_all_damaged_says_where_it_begins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, resume: str
) -> None:
    folder = tmp_path / "own"
    for step in (1, 2):
        (save(folder, step) / "training.pt").write_bytes(b"")
    if resume == "PATH":
        resume = str(save(tmp_path / "other", 3))
    with caplog.at_level(logging.WARNING):
        found = resuming.find_start(folder, resume, {"generator": ARGUMENTS})
    (told,) = caplog.messages
    assert f"{folder}/step-00000002 is no" in told and f"{folder}/step-00000001 is no" in told
    if resume == "auto":
        assert found is None and told.endswith("none is whole: the run starts anew, from step 0")
    else:
        assert found is not None and found.step == 3 and told.endswith("; none is whole")


def test_a_save_that_stopped_half_way_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, keep=1)
    monkeypatch.undo()
    found = checkpoint.find_newest(tmp_path)
    assert found is not None and found.step == 1, "the old one is pruned only after the new one"
    save(tmp_path, 2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta | {"step": 2},
        lambda meta: meta | {"sha256": {}},
        lambda meta: meta | {"sha256": []},
        lambda meta: {key: value for key, value in meta.items() if key != "generator"},
    ],
    ids=["another step", "no files", "a list of files", "a key less"],
)
def test_what_meta_says_is_checked_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Callable[[Any], Any]
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 3)
    path = tmp_path / "step-00000003" / "meta.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    found = checkpoint.find_newest(tmp_path)
    assert found is not None and found.step == 1
    assert "passed over a checkpoint" in caplog.text and "step-00000003" in caplog.text


def test_room_for_what_is_still_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=150))
    with pytest.raises(UserError, match=r"5 checkpoint\(s\) of 0 MB would not fit"):
        checkpoint.check_room(tmp_path, 100, 3)
    for step in range(1, 5):
        save(tmp_path / "checkpoints", step, keep=9)
    assert checkpoint.check_room(tmp_path, 100, 3) == 150, "four are there, and one is written"


def test_start_is_refused_for_another_model_or_data(tmp_path: Path) -> None:
    save(tmp_path, 3)
    same = resuming.find_start(tmp_path, "auto", {"generator": ARGUMENTS})
    assert same is not None and same.step == 3
    assert resuming.find_start(tmp_path / "none", "never", {}) is None
    with pytest.raises(UserError, match="model.generator.num_channels was 8, is 16"):
        resuming.find_start(tmp_path, "auto", {"generator": {**ARGUMENTS, "num_channels": 16}})
    with pytest.raises(UserError, match="it has no discriminator"):
        resuming.find_start(tmp_path, "auto", {"discriminator": {"head": "gap"}})
    with pytest.raises(UserError, match="got to step 3, and run.resume is never"):
        resuming.find_start(tmp_path, "never", {})


def test_a_course_counts_steps_pictures_and_epochs() -> None:
    """Gone on with after 10 steps, 4 of 6 into the second epoch of a changed batch."""
    position = resuming.Position(10, 96, 10, False)
    course = resuming.Course(position, steps_per_epoch=6, epochs=3, batch_size=8)
    assert (course.last_step, course.total_images) == (18, 96 + 8 * 8)
    assert course.steps == range(11, 19)
    assert course.at(13) == resuming.Position(13, 120, 13)
    assert [course.epoch(step) for step in (11, 12, 13, 18)] == [2, 2, 3, 3]
    assert [step for step in course.steps if course.ends_epoch(step)] == [12, 18]
    assert course.epochs_done == 1


@pytest.mark.parametrize(("done", "place"), [(0, 8), (9, 10), (17, 11)])
def test_a_changed_batch_leaves_an_epoch_its_last_step(
    tmp_path: Path, done: int, place: int
) -> None:
    """Of 18 steps then and 4 now: the results of an epoch come with its last."""
    position = {"epochs": 2, "step_in_epoch": done, "steps_per_epoch": 18}
    start = checkpoint.Checkpoint(tmp_path, {"step": 7, "images_seen": 8, "position": position})
    plan: Any = types.SimpleNamespace(steps_per_epoch=4)
    assert resuming.position_of(start, plan) == resuming.Position(7, 8, place)


def test_a_course_makes_up_for_an_evaluation_first() -> None:
    position = resuming.Position(20, 160, 12, True)  # of fewer steps than were done, before
    course = resuming.Course(position, steps_per_epoch=6, epochs=3, batch_size=8)
    assert course.steps == range(20, 27) and course.ends_epoch(20) and course.epoch(20) == 2
    assert course.epochs_done == 1


def test_generator_loads_from_run_checkpoint_and_published_file(tmp_path: Path) -> None:
    plain, average = generator(1), generator(2)
    run = tmp_path / "run"
    folder = save(run / "checkpoints", 5, generator=plain, ema=average)
    generators.save_published(average, run / "models" / "netG.pth.tar", ARGUMENTS)
    for path in (run, run / "checkpoints", folder, run / "models" / "netG.pth.tar"):
        loaded, description = generators.load(path)
        assert_same(loaded, average)
        assert description == ARGUMENTS and not loaded.training
    (folder / "ema.safetensors").unlink()
    meta = json.loads((folder / "meta.json").read_text())
    del meta["sha256"]["ema.safetensors"], meta["checksum"]
    (folder / "meta.json").write_text(json.dumps(meta))
    assert_same(generators.load(run)[0], plain)


def test_published_file_holds_a_model_state_dict(tmp_path: Path) -> None:
    saved = generator()
    generators.save_published(saved, tmp_path / "netG.pth.tar", ARGUMENTS)
    values = torch.load(tmp_path / "netG.pth.tar", weights_only=True)
    other = models.build_generator(**ARGUMENTS)  # type: ignore[arg-type]
    other.load_state_dict(values["model"], strict=True)
    assert_same(other, saved)


def test_files_of_others_are_read_by_their_shapes(tmp_path: Path) -> None:
    arguments = {**ARGUMENTS, "global_skip": "none"}
    plain = models.build_generator(**arguments)  # type: ignore[arg-type]
    path = tmp_path / "netG_2x.pth.tar"
    torch.save({"model": plain.state_dict(), "optim": {"state": {}}}, path)
    loaded, description = generators.load(path)
    assert description == arguments
    assert_same(loaded, plain)


def test_weights_of_a_checkpoint_are_of_the_network_that_it_names(tmp_path: Path) -> None:
    """Their shapes do not tell of the skip."""
    saved = generator(3)
    folder = save(tmp_path, 5, generator=saved)
    for path in (folder, folder / "generator.safetensors"):
        found, described = generators.load(path)
        assert described == ARGUMENTS
        assert_same(found, saved)


@pytest.mark.parametrize("value", [torch.zeros(5), "text"])
def test_a_weight_of_an_odd_shape_is_named(tmp_path: Path, value: object) -> None:
    key = "initial.cnn.pointwise.weight"
    torch.save({"model": {**generator().state_dict(), key: value}}, tmp_path / "bad.pth.tar")
    with pytest.raises(UserError, match=rf"bad.pth.tar: {key} (has shape \(5,\)|is no tensor)"):
        generators.load(tmp_path / "bad.pth.tar")


def test_the_bits_of_a_run_are_known(tmp_path: Path) -> None:
    held = checkpoint.snapshot(
        1, {"generator": generator()}, {}, {"generator": ARGUMENTS, "bits": 12}
    )
    folder = checkpoint.write(tmp_path / "run" / "checkpoints", held, keep=1, best=None)
    assert generators.bits_of(folder) == generators.bits_of(tmp_path / "run") == 12
    assert generators.bits_of(save(tmp_path, 3)) is None
    assert generators.bits_of(tmp_path / "x.pth.tar") is None
    assert generators.bits_of(folder / "generator.safetensors") == 12
    trained = build(ARGUMENTS)
    for number, bits in enumerate((None, 12)):
        path = tmp_path / f"{number}.pth.tar"
        generators.save_published(generator(), path, ARGUMENTS, bits)
        assert generators.bits_of(path) == bits
        assert generators.load(path)[1] == ARGUMENTS
        for name in (f"folder {number}", f"{number}.safetensors"):
            export.write_safetensors(trained, ARGUMENTS, tmp_path / name, None, bits)
            assert generators.bits_of(tmp_path / name) == bits


def test_files_that_hold_no_generator(tmp_path: Path) -> None:
    path = tmp_path / "x.pth.tar"
    with pytest.raises(UserError, match="does not exist; expected a run's folder"):
        generators.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read as weights"):
        generators.load(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match='expected {"model": state_dict}'):
        generators.load(path)
    torch.save({"model": {1: torch.zeros(1)}}, path)
    with pytest.raises(UserError, match="its weights have keys that are no names"):
        generators.load(path)
    discriminator = models.build_discriminator("swift_srgan", channels=3, head="gap")
    generators.save_published(discriminator, path, {"name": "swift_srgan", "head": "gap"})
    with pytest.raises(UserError, match="holds a discriminator"):
        generators.load(path)
    torch.save({"model": discriminator.state_dict()}, path)
    with pytest.raises(UserError, match="no generator known here"):
        generators.load(path)
    generators.save_published(discriminator, path, {**ARGUMENTS, "name": "unheard_of"})
    with pytest.raises(UserError, match="a model that this version does not know: 'unheard_of'"):
        generators.load(path)
    torch.save(torch.nn.Linear, path)  # a pickled object is not executed
    with pytest.raises(UserError, match="holds Python objects, which are not loaded"):
        generators.load(path)
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        generators.load(tmp_path)
    path.rename(tmp_path / "netG_4x_epoch3.pth.tar")
    with pytest.raises(UserError, match="or a file in it, such as netG_4x_epoch3.pth.tar"):
        generators.load(tmp_path)


def test_weights_that_do_not_fit_name_the_first_mismatch() -> None:
    own = generator()
    wide = models.build_generator(**{**ARGUMENTS, "num_channels": 16})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"initial.cnn.pointwise.weight has shape \(16, 3, 1, 1\)"):
        weights.load(own, wide.state_dict(), "there")
    deep = models.build_generator(**{**ARGUMENTS, "num_blocks": 2})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="hold residual.1.block1"):
        weights.load(own, deep.state_dict(), "there")
    with pytest.raises(UserError, match="lack residual.1.block1"):
        weights.load(deep, own.state_dict(), "there")


def test_moved_checkpoints_still_verify(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", 1)
    moved = shutil.move(folder, tmp_path / "elsewhere")
    assert checkpoint.verify(Path(moved)).step == 1


@pytest.mark.parametrize(("metric", "expected"), [("psnr", 2), ("ssim", 1), ("lpips", 3)])
def test_the_best_is_kept_and_named(tmp_path: Path, metric: str, expected: int) -> None:
    folder = tmp_path / "checkpoints"
    measured = [(30.0, 0.9, 0.3), (32.0, 0.8, 0.2), (31.0, 0.7, 0.1), (29.0, 0.6, 0.4)]
    for step, (psnr, ssim, lpips) in enumerate(measured, start=1):
        metrics = {"psnr": psnr, "ssim": ssim, "lpips": lpips}
        save(folder, 10 * step, keep=1, best=metric, metrics=metrics)
        save(folder, 10 * step + 5, keep=1, best=metric)  # within the epoch, not measured
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"step-000000{expected}0", "step-00000045"]
    assert (tmp_path / "best").resolve() == folder / names[0]
    loaded, _ = generators.load(tmp_path / "best")
    assert_same(loaded, generator(10 * expected))


def test_the_training_goes_on_while_a_snapshot_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = generator(1)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    optimizer = torch.optim.AdamW(trained.parameters(), fused=True)
    for parameter in trained.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, value in trained.state_dict().items():
        before[name] = value.clone()
    go, real = threading.Event(), checkpoint.write

    def slow(*arguments: object, **options: object) -> object:
        assert go.wait(20)
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "write", slow)
    saver = checkpoint.Saver(tmp_path, keep=3, best=None)
    state = {"optimizers": {"generator": optimizer.state_dict()}}
    saver.start(checkpoint.snapshot(1, {"generator": trained}, state, {}))
    optimizer.step()  # in place, while nothing has been written yet
    assert not list(tmp_path.iterdir())
    go.set()
    saver.finish()
    found = checkpoint.find_newest(tmp_path)
    assert found is not None
    for name, value in found.weights("generator").items():
        assert torch.equal(value, before[name]), name
    assert found.training()["optimizers"]["generator"]["state"][0]["step"] == 1


def test_a_disk_that_is_full_leaves_the_last_one_whole(tmp_path: Path) -> None:
    saver = checkpoint.Saver(tmp_path, keep=1, best=None)

    def begin(step: int) -> None:
        saver.start(checkpoint.snapshot(step, {"generator": generator(step)}, {}, {}))

    begin(1)
    saver.finish()
    with full_disk(1000):
        begin(2)
        with pytest.raises(OSError, match=r"File too large: .*step-00000002.tmp"):
            saver.finish()
    found = checkpoint.find_newest(tmp_path)
    assert found is not None and found.step == 1
    begin(3)
    saver.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"], "no remains"
