"""Stopping, going on, going back, and what may change on the way."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sr_dist import (
    checkpoint,
    distributed,
    files,
    gan,
    generators,
    images,
    shard_reader,
    shard_writer,
    shards,
    train,
    validation,
    watch,
)
from sr_dist.errors import Stopped, UserError, exit_on_user_error
from sr_dist.models import folding
from tests.helpers import popen, run_ranks, succeed
from tests.runs import (
    SLOW_STEPS,
    assert_same_run,
    full_disk,
    load,
    of_first_shard,
    rows,
    saved,
    scalars,
    stop_at,
    train_on_two,
    wait_for_step,
)
from tests.streams import read_batches


def test_a_stopped_run_ends_bit_identical(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One before its first checkpoint, and one in step 11, again in 19, and again in 31."""
    settings = ("checkpoint.every_steps=4", "optimizer.generator.schedule=cosine")
    unbroken = train.run(load(recipe, *settings, "run.name=unbroken"))
    for name, stops in (("early", [3]), ("late", [11, 19 - 8, 31 - 18])):
        for stop in stops:  # counted from the checkpoint that it goes on from
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                stop_at(patch, stop)
                train.run(load(recipe, *settings, f"run.name={name}"))
        again = train.run(load(recipe, *settings, f"run.name={name}"))
        expected, _ = saved(unbroken.folder)
        found, _ = saved(again.folder)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), key
        assert rows(again.folder) == rows(unbroken.folder)
        assert again.means == unbroken.means
        one, other = scalars(unbroken.folder), scalars(again.folder)
        for tag in one:
            if not tag.startswith(("speed/", "memory/")):
                assert other[tag] == one[tag], f"{tag}: no point is lost or doubled"


@pytest.mark.parametrize(
    "model",
    [
        (
            *("model.generator.name=srgan", "model.discriminator.name=srgan"),
            "model.discriminator.spectral_norm=true",
        ),
        ("model.discriminator.name=unet",),
    ],
    ids=["srgan", "unet"],
)
def test_a_stopped_run_of_other_networks_ends_bit_identical(
    recipe: Path,
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: tuple[str, ...],
) -> None:
    """Their kernels lie otherwise in memory than separable ones. In 7 steps: they are slow."""
    options = shard_writer.Options(tile=64, min_size=48)
    shard_writer.write([(photographs / "chelsea.png", "chelsea.png")], tmp_path / "few", options)
    settings = (*model, "checkpoint.every_steps=2", "train.epochs=1", "train.warmup_images=0")
    settings += ("train.global_batch_size=4", f"data.train={tmp_path}/few")
    unbroken = train.run(load(recipe, *settings, "run.name=unbroken"))
    assert saved(unbroken.folder)[1]["step"] == 7
    stop_at(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        train.run(load(recipe, *settings, "run.name=stopped"))
    monkeypatch.undo()
    again = train.run(load(recipe, *settings, "run.name=stopped"))
    expected, found = saved(unbroken.folder)[0], saved(again.folder)[0]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_stop_at_an_epochs_last_step_leaves_the_evaluation_for_later(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = train.run(load(recipe, "run.name=unbroken", "train.epochs=2"))
    with monkeypatch.context() as patch:
        patch.setattr(watch.Watch, "due", lambda self, what, step: (what, step) == ("stop", 18))
        patch.setattr(validation.Validation, "run", lambda *_: pytest.fail("it was evaluated"))
        with pytest.raises(Stopped, match="at step 18 of 36"):
            train.run(load(recipe, "train.epochs=2"))
    result = train.run(load(recipe, "train.epochs=2"))
    assert result is not None and unbroken is not None
    assert_same_run(unbroken.folder, result.folder)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_stop_in_an_evaluation_is_made_up_for(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    """The first of `epochs` ends in an evaluation of three pictures, left after the first."""
    for name in ("b.png", "c.png"):
        (tmp_path / name).write_bytes((tmp_path / "chelsea.png").read_bytes())
    (tmp_path / "val.txt").write_text("chelsea.png\nb.png\nc.png\n")
    wanted = (f"train.epochs={epochs}", "data.num_workers=0")
    unbroken = train.run(load(recipe, *wanted, "run.name=unbroken"))
    asked = []

    def wants(self: watch.Watch, what: str) -> bool:
        asked.append(what)
        return len(asked) == 2

    with monkeypatch.context() as patch:
        patch.setattr(watch.Watch, "wants", wants)
        with pytest.raises(Stopped, match="at step 18 of"):
            train.run(load(recipe, *wanted))
    assert asked == ["stop", "stop"], "the third picture was not looked at"
    folder = tmp_path / "runs" / "small"
    assert not (folder / "logs").exists() and not (folder / "models").exists()
    assert saved(folder)[1]["position"]["unmeasured"] is True  # type: ignore[index]
    result = train.run(load(recipe, *wanted))
    assert result is not None and unbroken is not None and result.means == unbroken.means
    assert_same_run(unbroken.folder, folder)
    assert saved(folder)[1]["position"]["unmeasured"] is False  # type: ignore[index]


def test_a_complete_run_says_so_and_can_be_prolonged(
    recipe: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train.run(load(recipe))
    before, _ = saved(first.folder)
    averages, real = [], distributed.Processes.averaged_buffers
    with caplog.at_level("INFO"), monkeypatch.context() as patch:
        patch.setattr(
            distributed.Processes,
            "averaged_buffers",
            lambda *given: averages.append(1) or real(*given),
        )
        again = train.run(load(recipe))
    assert caplog.messages[-1].startswith("epoch 2  SR  ")
    assert averages, "ranks whose BatchNorm differs measure the network that was saved"
    assert "has its 2 epoch(s); raise train.epochs" in caplog.text
    assert again.means == first.means
    after, _ = saved(first.folder)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert len(rows(first.folder)) == 2
    caplog.clear()
    with caplog.at_level("INFO"), monkeypatch.context() as patch:
        patch.setattr(validation.Validation, "run", None)
        assert train.run(load(recipe), dry=True) is None
        assert f"{first.folder} has its 2 epoch(s); raise train.epochs" in caplog.messages[-1]
        assert train.run(load(recipe, "train.epochs=3"), dry=True) is None
        assert caplog.messages[-1].endswith(f"folder is {first.folder}, and it is as it was")
        branch = ("run.name=branch", f"run.resume={first.folder}")
        assert train.run(load(recipe, *branch), dry=True) is None
        assert f"{first.folder} has its 2 epoch(s); raise train.epochs" in caplog.messages[-1]
        assert train.run(load(recipe, "train.epochs=3", *branch), dry=True) is None
        assert caplog.messages[-1].endswith("/branch, and it has not been begun")
    assert len(rows(first.folder)) == 2
    caplog.clear()
    with caplog.at_level("INFO"):
        changed = ("optimizer.generator.learning_rate=1e-4", "train.ema_half_life=0")
        train.run(load(recipe, "train.epochs=3", *changed))
    changes = [message for message in caplog.messages if message.startswith("changed since")]
    assert changes == [
        "changed since its last start: optimizer.generator.learning_rate was 0.001, is 0.0001",
        "changed since its last start: train.epochs was 2, is 3",
        "changed since its last start: train.ema_half_life was 40.0, is 0.0",
    ]
    assert [row["Epoch"] for row in rows(first.folder)] == ["1", "2", "3"]
    settings = (first.folder / "config.yaml").read_text()
    caplog.clear()
    with caplog.at_level("INFO"):
        train.run(load(recipe, "train.epochs=1"))
    assert "has its 3 epoch(s)" in caplog.text
    assert (first.folder / "config.yaml").read_text() == settings, "left as it is"


def test_what_another_command_trained_meanwhile_is_not_trained_over(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the choice of the checkpoint and the claim of the folder."""
    real = files.claimed

    def claimed(folder: Path) -> contextlib.AbstractContextManager[None]:
        (folder / "checkpoints" / "step-00000099").mkdir(parents=True)
        return real(folder)

    monkeypatch.setattr(files, "claimed", claimed)
    with pytest.raises(UserError, match="another command has trained .*small meanwhile"):
        train.run(load(recipe))
    assert [
        path.name for path in Path(load(recipe).run.output_dir).rglob("*") if path.is_file()
    ] == [".lock"]


def test_changes_that_a_run_cannot_follow(recipe: Path) -> None:
    train.run(load(recipe, "train.epochs=1"))
    for override, message in (
        ("model.generator.num_channels=16", "model.generator.num_channels was 8, is 16. Set that"),
        ("data.scale=2", "data.scale was 4, is 2"),
        ("loss.adversarial.weight=0", "it has a discriminator"),
        ("run.resume=never", "run.resume is never"),
        ("run.seed=1", "run.seed was 0, is 1. .* train.start_from=.*step-00000018"),
    ):
        with pytest.raises(UserError, match=message):
            train.run(load(recipe, override))


def test_other_validation_pictures_begin_the_choice_of_the_best_anew(
    recipe: Path, photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = train.run(load(recipe, "train.epochs=1")).folder
    meta = folder / "best" / "meta.json"
    values = json.loads(meta.read_text())
    values.pop("checksum")
    meta.write_text(json.dumps({**values, "metrics": {"psnr": 99.0}}))  # pictures as easy as that
    (tmp_path / "coffee.png").write_bytes((photographs / "coffee.png").read_bytes())
    (tmp_path / "val.txt").write_text("chelsea.png\ncoffee.png\n")
    with caplog.at_level("INFO"):
        train.run(load(recipe, "checkpoint.every_steps=9"))
    assert "the validation pictures, or their protocol, are others than before" in caplog.text
    assert os.readlink(folder / "best") == "checkpoints/step-00000036"
    caplog.clear()
    with caplog.at_level("INFO"):
        train.run(load(recipe, "train.epochs=3", "checkpoint.keep=1"))
    assert "the validation pictures" not in caplog.text


def test_a_run_can_start_from_another(recipe: Path, tmp_path: Path) -> None:
    first = train.run(load(recipe, "train.epochs=1"))
    average, _ = saved(first.folder)
    settings = ("run.name=second", f"train.start_from={first.folder}", "train.epochs=1")
    frozen = ("optimizer.generator.learning_rate=1e-12", "optimizer.generator.weight_decay=0")
    second = train.run(load(recipe, *settings, *frozen))
    started, meta = saved(second.folder)
    assert meta["step"] == 18
    for name, value in started.items():
        if name.startswith("generator/") and "running" not in name and value.is_floating_point():
            expected = average[name.replace("generator/", "ema/")]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-8, msg=name)
    # Going on, the second run stands on its own checkpoint.
    third = train.run(load(recipe, *settings[:2], *frozen, "train.epochs=2"))
    assert saved(third.folder)[1]["step"] == 36
    without = ("model.generator.norm=none", "run.name=without", *settings[1:])
    folded, meta = saved(train.run(load(recipe, *without, *frozen)).folder)
    assert meta["generator"]["norm"] == "none"
    expected = folding.fold_batch_norm(generators.load(first.folder)[0]).state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(folded[f"generator/{name}"], value, rtol=0, atol=1e-8, msg=name)
    with pytest.raises(UserError, match="another generator: norm none instead of batch"):
        other = f"train.start_from={tmp_path / 'runs' / 'without'}"
        train.run(load(recipe, other, "run.name=x"))
    with pytest.raises(UserError, match="does not exist; .* package .*swift_srgan_x4_psnr"):
        train.run(load(recipe, "train.start_from=no/such", "run.name=x"))
    packaged = "train.start_from=swift_srgan_x4_psnr"
    with pytest.raises(UserError, match="shipped/swift_srgan_x4_psnr holds another generator"):
        train.run(load(recipe, packaged, "run.name=x"))
    with pytest.raises(UserError, match="another generator: num_channels 8 instead of 16"):
        train.run(load(recipe, *settings[1:], "model.generator.num_channels=16", "run.name=x"))
    with pytest.raises(UserError, match="another generator: channels 3 instead of 1"):
        train.run(load(recipe, *settings[1:], "data.channels=1", "run.name=x"))


def test_a_run_can_go_back_and_another_can_go_on(
    recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    often = ("checkpoint.every_steps=9", "checkpoint.keep=9")
    first = train.run(load(recipe, *often))
    expected, _ = saved(first.folder)
    middle = first.folder / "checkpoints" / "step-00000027"
    with caplog.at_level("INFO"):
        train.run(load(recipe, *often, f"run.resume={middle}"))
    assert f"going on from {middle}, step 27 of 36" in caplog.text
    again, _ = saved(first.folder)
    assert all(torch.equal(again[name], value) for name, value in expected.items())
    assert [row["Epoch"] for row in rows(first.folder)] == ["1", "2"]

    branch = ("run.name=branch", f"run.resume={middle}")
    caplog.clear()
    with caplog.at_level("INFO"):
        other = train.run(load(recipe, *branch))
    assert [m for m in caplog.messages if m.startswith("changed since its last start: ")] == [
        "changed since its last start: run.name was small, is branch",
        "changed since its last start: checkpoint.every_steps was 9, is None",
        "changed since its last start: checkpoint.keep was 9, is 3",
    ]
    branched, _ = saved(other.folder)
    assert all(torch.equal(branched[name], value) for name, value in expected.items())
    caplog.clear()
    with caplog.at_level("INFO"):
        train.run(load(recipe, *branch))
    assert "branch has its 2 epoch(s)" in caplog.text, "its own checkpoints come first"
    with pytest.raises(UserError, match="nowhere holds no whole checkpoint"):
        train.run(load(recipe, "run.name=x", "run.resume=nowhere"))


def test_a_run_that_went_back_goes_on_by_the_same_command(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    often = ("checkpoint.every_steps=4", "checkpoint.keep=2", "train.epochs=1")
    folder = train.run(load(recipe, *often)).folder
    back = (*often, f"run.resume={folder}/checkpoints/step-00000016")
    stop_at(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        train.run(load(recipe, *back, "train.epochs=2"))
    monkeypatch.undo()
    stop_at(monkeypatch, 13)  # pruned meanwhile
    with pytest.raises(KeyboardInterrupt):
        train.run(load(recipe, *back, "train.epochs=2"))
    monkeypatch.undo()
    assert not (folder / "checkpoints" / "step-00000016").exists()
    with caplog.at_level("INFO"):
        train.run(load(recipe, *back, "train.epochs=2"))
    assert f"going on from {folder}/checkpoints/step-00000028, step 28 of 36" in caplog.text


def test_batch_and_crops_can_change_on_the_way(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At the end of an epoch, and in its middle, where the same share of it is taken as done."""
    first = train.run(load(recipe, "train.epochs=1"))
    cosine = "optimizer.generator.schedule=cosine"
    with caplog.at_level("INFO"):
        train.run(load(recipe, "train.global_batch_size=4", cosine))
    assert "changed since its last start: train.global_batch_size was 8, is 4" in caplog.messages
    meta = saved(first.folder)[1]
    samples = shards.read_index(load(recipe).data.train).samples
    assert (meta["step"], meta["images_seen"]) == (18 + samples // 4, 8 * 18 + samples // 4 * 4)
    assert [row["Epoch"] for row in rows(first.folder)] == ["1", "2"]
    rates = [value for step, value in scalars(first.folder)["learning_rate/generator"] if step > 18]
    total = 144 + samples // 4 * 4
    settings = {"learning_rate": 1e-3, "schedule": "cosine"}
    assert rates[0] == pytest.approx(gan.learning_rate(settings, 144 + 4, total), rel=1e-4)

    stop_at(monkeypatch, 10)
    halved = ("run.name=halved", "checkpoint.every_steps=9", "train.epochs=1")
    with pytest.raises(KeyboardInterrupt):
        train.run(load(recipe, *halved))
    monkeypatch.undo()
    folder = train.run(load(recipe, *halved, "train.global_batch_size=4")).folder
    steps = samples // 4
    assert saved(folder)[1]["step"] == 9 + steps - round(steps / 2)
    assert [row["Epoch"] for row in rows(folder)] == ["1"]


def test_checkpoints_by_the_clock_and_the_best_of_them(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = gan.training_step, []

    def slow(*arguments: Any, **options: Any) -> object:
        calls.append(1)
        time.sleep(0.05)
        return real(*arguments, **options)

    monkeypatch.setattr(gan, "training_step", slow)
    written = []
    real_write = checkpoint.write
    monkeypatch.setattr(
        checkpoint,
        "write",
        lambda folder, held, **options: (
            written.append(held.step),
            real_write(folder, held, **options),
        ),
    )
    folder = train.run(load(recipe, "checkpoint.every_minutes=0.005", "checkpoint.keep=1")).folder
    assert 18 in written and 36 in written and 6 <= len(written) < 30
    psnr = [float(row["PSNR"]) for row in rows(folder)]
    best = 18 if psnr[0] > psnr[1] else 36
    assert os.readlink(folder / "best") == f"checkpoints/step-000000{best}"
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert left == sorted({f"step-000000{best}", "step-00000036"})
    meta = json.loads((folder / "best" / "meta.json").read_text())
    assert meta["metrics"]["psnr"] == pytest.approx(max(psnr))


def test_a_checkpoint_that_cannot_be_written_stops_the_run(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, held = gan.training_step, contextlib.ExitStack()

    def filling(*arguments: object, **options: object) -> object:
        if options["images_seen"] == 10 * 8:
            held.enter_context(full_disk())
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(gan, "training_step", filling)
    with held, pytest.raises(OSError, match="File too large"):
        train.run(load(recipe, "checkpoint.every_steps=4"))
    monkeypatch.undo()
    tensors, meta = saved(Path(load(recipe).run.output_dir) / "small")
    assert meta["step"] == 8
    assert saved(train.run(load(recipe, "checkpoint.every_steps=4")).folder)[1]["step"] == 36


def obey_modes() -> None:
    """Take from a process that is root's, before it begins, the right to pass them over."""
    if os.geteuid() == 0 and ctypes.CDLL(None).prctl(24, 1, 0, 0, 0):  # PR_CAPBSET_DROP
        raise OSError("CAP_DAC_OVERRIDE cannot be dropped")


def test_a_folder_that_may_not_be_written_to_any_more_stops_the_run(
    recipe: Path, tmp_path: Path
) -> None:
    try:
        subprocess.run(["true"], preexec_fn=obey_modes, check=True)
    except subprocess.SubprocessError:
        pytest.skip("root here may not give up its right to write anywhere")
    settings = ("train.epochs=1", "checkpoint.every_steps=8")
    checkpoints = tmp_path / "runs" / "small" / "checkpoints"
    with popen(
        [sys.executable, str(SLOW_STEPS), str(recipe), *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=obey_modes,
    ) as running:
        wait_for_step(running, 8)
        while not (checkpoints / "step-00000008").exists():  # it is written beside the next steps
            assert running.poll() is None
            time.sleep(0.01)
        checkpoints.chmod(0o555)
        said = running.communicate(timeout=60)[1]
    checkpoints.chmod(0o755)
    assert running.returncode == 2 and "Traceback" not in said
    partial = checkpoints / "step-00000016.tmp"
    assert said.strip() == f"error: cannot use {partial}: Permission denied"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000008"]
    assert saved(train.run(load(recipe, *settings)).folder)[1]["step"] == 18


def test_a_file_system_that_became_read_only_stops_the_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As the kernel remounts one after errors of its disk: no folder can be made there."""
    settings = ("train.epochs=1", "checkpoint.every_steps=4")
    real = Path.mkdir

    def mkdir(self: Path, *words: Any, **options: Any) -> None:
        if self.name == "step-00000008.tmp":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        real(self, *words, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", mkdir)
        with pytest.raises(SystemExit) as caught, exit_on_user_error():
            train.run(load(recipe, *settings))
    assert caught.value.code == 2
    partial = tmp_path / "runs/small/checkpoints/step-00000008.tmp"
    assert f"error: cannot use {partial}: Read-only file system" in capsys.readouterr().err
    assert saved(tmp_path / "runs/small")[1]["step"] == 4
    assert saved(train.run(load(recipe, *settings)).folder)[1]["step"] == 18


def test_other_shards_of_the_same_number_of_samples_are_refused(
    recipe: Path, photographs: Path, tmp_path: Path
) -> None:
    train.run(load(recipe, "train.epochs=1"))
    options = shard_writer.Options(tile=64, samples_per_shard=60, min_size=48, seed=5)
    shard_writer.write(images.list_pictures(photographs), tmp_path / "other", options)
    with pytest.raises(UserError, match="data.train names other shards than it was trained on"):
        train.run(load(recipe, f"data.train={tmp_path}/other"))


@pytest.mark.multiprocess
def test_two_processes_go_on_as_one_and_the_other_way_round(recipe: Path, tmp_path: Path) -> None:
    words = ("launch/train.py", "--config", recipe, of_first_shard(recipe))
    for epochs, number in ((1, 2), (2, 1), (3, 2)):
        done = run_ranks(number, *words, f"train.epochs={epochs}")
        assert done.returncode == 0, done.stderr
    assert "changed since its last start: the number of processes was 1, is 2" in done.stderr
    assert "mixed precision was" not in done.stderr
    launcher = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    done = succeed(*words, "train.epochs=4", "--dry-run", **launcher)
    assert "changed since its last start: mixed precision was no, is bf16" in done.stderr
    assert [row["Epoch"] for row in rows(tmp_path / "runs/small")] == ["1", "2", "3"]
    assert saved(tmp_path / "runs/small")[1]["world_size"] == 2


@pytest.mark.multiprocess
def test_saving_changes_nothing_of_the_training(
    recipe: Path, tmp_path: Path, trained_on_two: Path
) -> None:
    """BatchNorm's statistics differ between ranks, which keep them; checkpoints hold the mean."""
    train_on_two(recipe, "checkpoint.every_steps=5")
    assert_same_run(trained_on_two, tmp_path / "runs/small")


@pytest.mark.multiprocess
def test_ranks_that_would_start_apart_are_told_so(recipe: Path, tmp_path: Path) -> None:
    train.run(load(recipe, "train.epochs=1"))
    done = run_ranks(2, "tests/workers/start_apart.py", recipe)
    assert done.returncode != 0
    assert "must lie on storage that all machines share" in done.stderr


@pytest.mark.multiprocess
def test_skipped_samples_are_counted_once_through_a_stop_and_on_any_number_of_processes(
    recipe: Path, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = Path(shutil.copytree(sharded, tmp_path / "damaged"))
    for tar in damaged.glob("*.tar"):
        data = bytearray(tar.read_bytes())
        for sample in list(shard_reader.read_samples(str(tar)))[3:20:4]:
            data[sample.offset + 512 + len(sample.picture) // 2] ^= 1
        tar.write_bytes(data)
    overrides = (f"data.train={damaged}", "stream.on_error=skip")
    options = {"last": 36, "crops": 1, "batch": 8, "seed": 0, "on_error": "skip"}
    expected = sum(len(batch.skipped) for batch in read_batches(damaged, **options))
    assert expected > 20
    whole = train.run(load(recipe, *overrides))
    assert whole is not None and whole.skipped == expected
    assert scalars(whole.folder)["data/skipped"][-1] == (36, expected)

    overrides = (*overrides, "run.name=stopped", "checkpoint.every_steps=5")
    with monkeypatch.context() as patch:
        stop_at(patch, 23)
        with pytest.raises(KeyboardInterrupt):
            train.run(load(recipe, *overrides))
    done = train_on_two(recipe, *overrides)
    assert "going on from" in done.stderr and "step 20 of 36" in done.stderr
    assert f"{expected} sample(s) could not be used; others took their places" in done.stdout
    counted = scalars(tmp_path / "runs" / "stopped")["data/skipped"]
    assert counted == scalars(whole.folder)["data/skipped"]
