from __future__ import annotations

import csv
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sr_dist import (
    checkpoint,
    config,
    evaluate,
    gan,
    images,
    models,
    shard_writer,
    shards,
    stream,
    train,
)
from sr_dist.errors import UserError
from tests.helpers import REPOSITORY, refuse, run, succeed
from tests.test_storage import free_port

TWO_PROCESSES = REPOSITORY / "launch" / "accelerate" / "cpu_2_processes.yaml"
ONE_PROCESS = REPOSITORY / "launch" / "accelerate" / "cpu.yaml"


@pytest.fixture
def recipe(sharded: Path, photographs: Path, tmp_path: Path) -> Path:
    """A small GAN that warms up for an epoch of 18 steps; random content features."""
    (tmp_path / "chelsea.png").write_bytes((photographs / "chelsea.png").read_bytes())
    (tmp_path / "val.txt").write_text("chelsea.png\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
run: {{name: small, output_dir: {tmp_path}/runs}}
data:
  {{train: {sharded}, validation: {tmp_path}/val.txt, crop_size: 48, crops_per_image: 1,
    num_workers: 1}}
model:
  generator: {{num_channels: 8, num_blocks: 1, global_skip: bicubic}}
  discriminator: {{head: gap}}
loss:
  pixel: {{kind: l1}}
  content: {{weights: none}}
  adversarial: {{kind: bce}}
train: {{epochs: 2, global_batch_size: 8, warmup_images: 144, ema_half_life: 40}}
tracking: {{log_every_steps: 4}}
"""
    )
    return path


def load(recipe: Path, *overrides: str) -> config.Config:
    return config.load(recipe, overrides)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "logs" / "metrics_1_train_results.csv").open() as file:
        return list(csv.DictReader(file))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def saved(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """All tensors of the newest checkpoint, and its meta.json."""
    found = checkpoint.find_newest(folder / "checkpoints")
    assert found is not None
    tensors = {
        f"{path.stem}/{key}": value
        for path in sorted(found.folder.glob("*.safetensors"))
        for key, value in safetensors.torch.load_file(path).items()
    }
    for name, optimizer in found.training()["optimizers"].items():
        for number, state in optimizer["state"].items():
            tensors |= {f"optimizer/{name}/{number}/{k}": v for k, v in state.items()}
    return tensors, found.meta


def test_a_run_leaves_what_the_design_says(recipe: Path) -> None:
    result = train.run(load(recipe))
    folder = result.folder
    steps = shards.read_index(load(recipe).data.train).samples // 8
    assert steps == 18

    assert [mean.upscaler for mean in result.means] == ["bicubic", "SR"]
    assert result.means[1].psnr > result.means[0].psnr - 0.5
    assert config.load(folder / "config.yaml") == load(recipe)

    tensors, meta = saved(folder)
    assert {name.split("/")[0] for name in tensors} == {
        "generator",
        "discriminator",
        "ema",
        "optimizer",
    }
    assert (meta["step"], meta["epoch"], meta["images_seen"], meta["world_size"]) == (36, 2, 288, 1)
    assert all(torch.isfinite(value).all() for value in tensors.values())

    first, second = rows(folder)
    assert list(first) == ["Epoch", "Loss_D", "Loss_G", "Score_D", "Score_G", "PSNR", "SSIM"]
    assert (first["Epoch"], second["Epoch"]) == ("1", "2")
    assert first["Loss_D"] == "" and float(second["Loss_D"]) > 0, "the first epoch warms up"
    assert 0 < float(second["Score_D"]) < 1
    assert float(second["PSNR"]) == pytest.approx(result.means[1].psnr)

    names = {path.name for path in (folder / "models").iterdir()}
    assert names == {f"net{n}_4x_epoch{e}.pth.tar" for n in "GD" for e in (1, 2)}
    evaluated, description = checkpoint.load_generator(folder / "models" / "netG_4x_epoch2.pth.tar")
    for key, value in evaluated.state_dict().items():
        assert torch.equal(value, tensors[f"ema/{key}"])
    last = "final_conv.pointwise.weight"
    assert not torch.equal(tensors[f"ema/{last}"], tensors[f"generator/{last}"])
    discriminator = models.build_discriminator("swift_srgan", channels=3, head="gap")
    published = torch.load(folder / "models" / "netD_4x_epoch2.pth.tar", weights_only=True)
    discriminator.load_state_dict(published["model"], strict=True)
    assert (folder / "samples" / "epoch_2" / "chelsea.png").is_file()

    points = scalars(folder)
    assert [step for step, _ in points["loss/pixel"]] == [4, 8, 12, 16, 18, 20, 24, 28, 32, 36]
    assert [step for step, _ in points["loss/adversarial"]] == [20, 24, 28, 32, 36]
    assert [step for step, _ in points["psnr/SR"]] == [18, 36]
    assert points["psnr/SR"][-1][1] == pytest.approx(result.means[1].psnr, rel=1e-5)
    assert {
        "loss/discriminator",
        "loss/content",
        "loss/total_variation",
        "score/hr",
        "score/sr",
        "psnr/bicubic",
        "ssim/SR",
        "learning_rate/generator",
        "speed/pictures_per_second",
        "speed/data_wait_share",
    } <= set(points)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert events.Tags()["images"] == ["samples/chelsea"]
    assert "config/text_summary" in events.Tags()["tensors"]


def test_the_discriminator_waits_for_the_warm_up(recipe: Path) -> None:
    torch.manual_seed(0)
    models.build_generator("swift_srgan", scale=4, channels=3, num_channels=8, num_blocks=1)
    untouched = models.build_discriminator("swift_srgan", channels=3, head="gap").state_dict()
    folder = train.run(load(recipe, "train.epochs=1")).folder
    after_warm_up, _ = saved(folder)
    train.run(load(recipe, "train.epochs=2"))
    later, _ = saved(folder)
    for name, value in untouched.items():
        assert torch.equal(after_warm_up[f"discriminator/{name}"], value), name
    assert not torch.equal(
        later["discriminator/classifier.2.weight"], untouched["classifier.2.weight"]
    )
    assert not any(key.startswith("optimizer/discriminator/") for key in after_warm_up)
    assert any(key.startswith("optimizer/discriminator/") for key in later)


def test_schedule_warm_up_and_waiting_as_tensorboard_shows_them(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stream.batches

    def slow(*arguments: object, **options: object) -> Iterator[stream.Batch]:
        for batch in real(*arguments, **options):  # type: ignore[arg-type]
            time.sleep(0.05)
            yield batch

    monkeypatch.setattr(stream, "batches", slow)
    result = train.run(
        load(recipe, "tracking.log_every_steps=1", "optimizer.generator.schedule=cosine")
    )
    points = scalars(result.folder)
    rates = [value for _, value in points["learning_rate/generator"]]
    settings = {"learning_rate": 1e-3, "schedule": "cosine"}
    assert rates == pytest.approx(
        [gan.learning_rate(settings, 8 * step, 8 * 36) for step in range(36)], rel=1e-5
    )
    rates = [value for _, value in points["learning_rate/discriminator"]]
    assert rates == pytest.approx([1e-3] * len(rates), rel=1e-5)
    assert [step for step, _ in points["loss/adversarial"]] == list(range(19, 37))
    for (_, share), (_, speed) in zip(
        points["speed/data_wait_share"], points["speed/pictures_per_second"], strict=True
    ):
        assert 0.05 < share * 8 / speed < 1, "seconds waited in a step"


@pytest.mark.parametrize("colour", ["y", "rgb"])
def test_evaluation_is_by_the_configured_protocol(
    recipe: Path, photographs: Path, colour: str
) -> None:
    result = train.run(
        load(recipe, "train.epochs=1", "loss.content.weight=0", f"evaluation.protocol={colour}")
    )
    pairs = evaluate.read_pairs(str(photographs / "chelsea.png"), scale=4, channels=3)
    rows = evaluate.evaluate(
        {"bicubic": evaluate.classical("bicubic", 4)}, pairs, colour=colour, border=4
    )
    assert result.means[0] == evaluate.averages(rows)[0]
    assert (result.protocol["colour"], result.protocol["border"]) == (colour, 4)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    real, calls = gan.training_step, []

    def stopping(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(gan, "training_step", stopping)


@pytest.mark.parametrize("stopped_at", [3, 19, 22, 31], ids=lambda step: f"step {step}")
def test_a_stopped_run_ends_bit_identical(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: int
) -> None:
    settings = ("checkpoint.every_steps=4", "optimizer.generator.schedule=cosine")
    unbroken = train.run(load(recipe, *settings, "run.name=unbroken"))
    stop_at(monkeypatch, stopped_at)
    with pytest.raises(KeyboardInterrupt):
        train.run(load(recipe, *settings, "run.name=stopped"))
    monkeypatch.undo()
    again = train.run(load(recipe, *settings, "run.name=stopped"))

    expected, expected_meta = saved(unbroken.folder)
    found, found_meta = saved(again.folder)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert rows(again.folder) == rows(unbroken.folder)
    assert again.means == unbroken.means
    one, other = scalars(unbroken.folder), scalars(again.folder)
    for tag in one:
        if not tag.startswith("speed/"):
            assert other[tag] == one[tag], f"{tag}: no point is lost or doubled"


@pytest.mark.parametrize(
    "model",
    [
        ("model.generator.name=srgan", "model.discriminator.name=srgan"),
        ("model.discriminator.name=unet", "model.discriminator.spectral_norm=true"),
    ],
    ids=["srgan", "unet"],
)
def test_a_stopped_run_of_other_networks_ends_bit_identical(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, model: tuple[str, ...]
) -> None:
    """Their kernels lie otherwise in memory than separable ones."""
    settings = (*model, "checkpoint.every_steps=4", "train.epochs=1", "train.warmup_images=0")
    unbroken = train.run(load(recipe, *settings, "run.name=unbroken"))
    stop_at(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        train.run(load(recipe, *settings, "run.name=stopped"))
    monkeypatch.undo()
    again = train.run(load(recipe, *settings, "run.name=stopped"))
    expected, found = saved(unbroken.folder)[0], saved(again.folder)[0]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_complete_run_says_so_and_can_be_prolonged(
    recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = train.run(load(recipe))
    before, _ = saved(first.folder)
    with caplog.at_level("INFO"):
        again = train.run(load(recipe))
    assert "has its 2 epochs; raise train.epochs" in caplog.text
    assert again.means == first.means
    after, _ = saved(first.folder)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert len(rows(first.folder)) == 2
    caplog.clear()
    with caplog.at_level("INFO"):
        train.run(load(recipe, "train.epochs=3", "optimizer.generator.learning_rate=1e-4"))
    changes = [message for message in caplog.messages if message.startswith("changed since")]
    assert changes == [
        "changed since: optimizer.generator.learning_rate was 0.001, is 0.0001",
        "changed since: train.epochs was 2, is 3",
    ]
    assert [row["Epoch"] for row in rows(first.folder)] == ["1", "2", "3"]
    settings = (first.folder / "config.yaml").read_text()
    caplog.clear()
    with caplog.at_level("INFO"):
        train.run(load(recipe, "train.epochs=1"))
    assert "has its 3 epochs" in caplog.text
    assert (first.folder / "config.yaml").read_text() == settings, "left as it is"


def test_evaluation_can_be_rarer(recipe: Path) -> None:
    result = train.run(load(recipe, "train.epochs=3", "evaluation.every_epochs=2"))
    assert [bool(row["PSNR"]) for row in rows(result.folder)] == [False, True, True]


def test_changes_that_a_run_cannot_follow(recipe: Path) -> None:
    train.run(load(recipe, "train.epochs=1"))
    for override, message in (
        ("model.generator.num_channels=16", "another generator: num_channels was 8, is 16"),
        ("data.scale=2", "another generator: scale was 4, is 2"),
        ("loss.adversarial.weight=0", "it was trained with a discriminator"),
        ("run.resume=never", "run.resume is never"),
        ("run.seed=1", "another data: seed was 0, is 1"),
    ):
        with pytest.raises(UserError, match=message):
            train.run(load(recipe, override))


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
    with pytest.raises(UserError, match="another generator: num_channels 8 instead of 16"):
        train.run(load(recipe, *settings[1:], "model.generator.num_channels=16", "run.name=x"))
    with pytest.raises(UserError, match="another generator: channels 3 instead of 1"):
        train.run(load(recipe, *settings[1:], "data.channels=1", "run.name=x"))


def test_lpips_is_measured_where_it_is_asked_for(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "s.pth")
    result = train.run(load(recipe, "train.epochs=1", f"evaluation.lpips={tmp_path}/s.pth"))
    points = scalars(result.folder)
    assert points["lpips/SR"][0][1] == pytest.approx(result.means[1].lpips, rel=1e-5)
    assert points["lpips/bicubic"][0][1] > 0


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
    other = train.run(load(recipe, *branch))
    branched, _ = saved(other.folder)
    assert all(torch.equal(branched[name], value) for name, value in expected.items())
    caplog.clear()
    with caplog.at_level("INFO"):
        train.run(load(recipe, *branch))
    assert "branch has its 2 epochs" in caplog.text, "its own checkpoints come first"
    with pytest.raises(UserError, match="nowhere holds no whole checkpoint"):
        train.run(load(recipe, "run.name=x", "run.resume=nowhere"))


def test_batch_and_crops_can_change_on_the_way(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At the end of an epoch, and in its middle, where the same share of it is taken as done."""
    first = train.run(load(recipe, "train.epochs=1"))
    cosine = "optimizer.generator.schedule=cosine"
    with caplog.at_level("INFO"):
        train.run(load(recipe, "train.global_batch_size=4", cosine))
    assert "changed since: train.global_batch_size was 8, is 4" in caplog.messages
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
    real, calls = torch.save, []

    def full(value: object, path: object) -> None:
        calls.append(path)
        if "step-" in str(path) and len([p for p in calls if "step-" in str(p)]) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(value, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        train.run(load(recipe, "checkpoint.every_steps=4"))
    monkeypatch.undo()
    tensors, meta = saved(Path(load(recipe).run.output_dir) / "small")
    assert meta["step"] == 8
    assert saved(train.run(load(recipe, "checkpoint.every_steps=4")).folder)[1]["step"] == 36


def test_other_shards_of_the_same_number_of_samples_are_refused(
    recipe: Path, photographs: Path, tmp_path: Path
) -> None:
    train.run(load(recipe, "train.epochs=1"))
    options = shard_writer.Options(tile=64, samples_per_shard=60, min_size=48, seed=5)
    shard_writer.write(images.list_pictures(photographs), tmp_path / "other", options)
    with pytest.raises(UserError, match="another data: shards was"):
        train.run(load(recipe, f"data.train={tmp_path}/other"))


def test_a_failed_evaluation_takes_no_training_with_it(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(evaluate, "evaluate", failing)
    with pytest.raises(MemoryError):
        train.run(load(recipe))
    monkeypatch.undo()
    assert saved(Path(load(recipe).run.output_dir) / "small")[1]["step"] == 18
    assert [row["Epoch"] for row in rows(train.run(load(recipe)).folder)] == ["2"]


def test_nothing_is_written_before_all_is_checked(recipe: Path, tmp_path: Path) -> None:
    for override, message in (
        ("data.train=nowhere", "no shards at nowhere"),
        ("data.validation=nowhere", "nowhere does not exist"),
        ("data.crop_size=96", "crop_size is 96, but .* pictures of 64 pixels"),
        ("train.global_batch_size=1000", "a global batch needs 1000"),
        ("loss.content.weights=nowhere.pth", "nowhere.pth does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            train.run(load(recipe, override))
    images.save(np.zeros((16, 90, 3), np.uint8), tmp_path / "chelsea.png")
    with pytest.raises(UserError, match="chelsea.png is 88x16 pixels"):
        train.run(load(recipe))
    (tmp_path / "chelsea.png").write_text("no picture")
    with pytest.raises(UserError, match="chelsea.png no picture"):
        train.run(load(recipe))
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_says_what_would_be_done_and_does_nothing(recipe: Path, tmp_path: Path) -> None:
    done = succeed("launch/train.py", "--config", recipe, "--dry-run", "loss.content.weight=0")
    assert not (tmp_path / "runs").exists()
    assert "1 process on cpu, precision no; 2,201 parameters" in done.stderr
    assert re.search(r"checkpoints of about [1-9]\d* MB, \d+ GB free", done.stderr)
    assert "18 steps of 8 crops an epoch; validation on 1 pictures" in done.stderr
    assert done.stdout == ""


def test_files_room_and_processes_are_checked_before_the_first_step(
    recipe: Path, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="run.processes is 2, but the launcher started 1"):
        train.run(load(recipe, "run.processes=2"))
    folder = tmp_path / "damaged"
    shutil.copytree(sharded, folder)
    tar = folder / "shard-000002.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    size = tar.stat().st_size
    message = f"shard .*shard-000002.tar has {size} bytes, the index says {size + 512}; write"
    with pytest.raises(UserError, match=message):
        train.run(load(recipe, f"data.train={folder}"))
    tar.unlink()
    with pytest.raises(UserError, match="shard-000002.tar cannot be read: No such file"):
        train.run(load(recipe, f"data.train={folder}"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is no folder that can be written to"):
        train.run(load(recipe, f"run.output_dir={tmp_path}/file"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    with pytest.raises(UserError, match=r"has 1 MB free; 5 checkpoints of \d+ MB would not fit"):
        train.run(load(recipe))
    assert not (tmp_path / "runs").exists()


def test_weights_that_are_not_finite_are_never_saved(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("checkpoint.every_steps=2", "tracking.log_every_steps=1000")
    real, calls = gan.training_step, []

    def poisoned(*arguments: Any, **options: Any) -> object:
        calls.append(1)
        scalars = real(*arguments, **options)
        if len(calls) == 5:
            arguments[1].generator.initial.act.weight.data.fill_(float("nan"))
        return scalars

    monkeypatch.setattr(gan, "training_step", poisoned)
    with pytest.raises(UserError, match=r"generator\.\S+ is not finite at step 6"):
        train.run(load(recipe, *settings))
    monkeypatch.undo()
    tensors, meta = saved(Path(load(recipe).run.output_dir) / "small")
    assert meta["step"] == 4 and all(torch.isfinite(value).all() for value in tensors.values())
    assert saved(train.run(load(recipe, *settings)).folder)[1]["step"] == 36


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make the pixel loss of some steps NaN, as a number that overflows does."""
    real, calls = gan.generator_terms, []

    def poisoned(*arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
        calls.append(1)
        terms = real(*arguments, **options)
        if len(calls) in steps:
            terms["pixel"] = terms["pixel"] * float("nan")
        return terms

    monkeypatch.setattr(gan, "generator_terms", poisoned)


def test_a_loss_that_is_not_finite_stops_the_run_and_touches_nothing(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("checkpoint.every_steps=4", "tracking.log_every_steps=4")
    poison(monkeypatch, 6)
    with pytest.raises(UserError) as caught:
        train.run(load(recipe, *settings))
    message = str(caught.value)
    assert (
        "not finite at step 6: loss/generator, loss/pixel of rank 0, on samples shard-" in message
    )
    index = shards.read_index(load(recipe).data.train)
    plan = shards.make_plan(index, seed=0, global_batch_size=8, crops_per_image=1, crop_size=48)
    names = shards.names_of_step(index, plan, 5)
    assert len(names) == 8 and ", ".join(names) in message
    shard, key = names[0].split("/")
    keys = [s.key for s in shards.read_samples(f"{index.root}/{shard}")]
    assert key in keys
    assert saved(Path(load(recipe).run.output_dir) / "small")[1]["step"] == 4
    monkeypatch.undo()
    assert saved(train.run(load(recipe, *settings)).folder)[1]["step"] == 36


def test_skipping_goes_on_as_if_the_step_had_not_been(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("train.on_nonfinite=skip", "loss.adversarial.weight=0", "train.epochs=1")
    poison(monkeypatch, 3, 7, 8)
    result = train.run(load(recipe, *settings, "tracking.log_every_steps=1"))
    points = scalars(result.folder)
    left_out = [int(value) for _, value in points["gradient/left_out"]]
    assert left_out == [0, 0, 1, 1, 1, 1, 2, 3] + [3] * 10
    tensors, _ = saved(result.folder)
    assert all(torch.isfinite(value).all() for value in tensors.values())
    assert tensors["optimizer/generator/0/step"] == 15, "18 steps, three of them left out"
    assert 0 < float(rows(result.folder)[0]["Loss_G"]) < 1

    monkeypatch.undo()
    poison(monkeypatch, *range(5, 9))
    many = ("train.nonfinite_in_a_row=4", "run.name=many")
    with pytest.raises(UserError, match="4 steps in a row were not finite, the first at step 5: "):
        train.run(load(recipe, *settings, *many))


@pytest.mark.multiprocess
def test_what_is_not_finite_on_one_rank_is_left_out_on_all(recipe: Path, tmp_path: Path) -> None:
    done = run(
        *("accelerate", "launch", "--config_file", TWO_PROCESSES),
        *(REPOSITORY / "tests" / "workers" / "poisoned_rank.py", recipe, "run.name=skips"),
        *("train.on_nonfinite=skip", "train.epochs=1"),
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    tensors, _ = saved(tmp_path / "runs/skips")
    assert tensors["optimizer/generator/0/step"] == 17
    assert all(torch.isfinite(value).all() for value in tensors.values())
    done = run(
        *("accelerate", "launch", "--config_file", TWO_PROCESSES),
        *(REPOSITORY / "tests" / "workers" / "poisoned_rank.py", recipe, "run.name=stops"),
        timeout=180,
    )
    assert done.returncode != 0
    assert done.stderr.count("not finite at step 5: loss/generator, loss/pixel of rank 1, on") == 1
    assert 'poisoned_rank.py", line' not in done.stderr, "no traceback of ours"


def test_command_with_the_original_options(recipe: Path, tmp_path: Path) -> None:
    done = succeed(
        *("launch/train.py", "--config", recipe, "train.warmup_images=0", "--num_epochs", 1),
        *("--batch_size", 4, "--upscale_factor", 2, "loss.content.weight=0"),
    )
    meta = saved(tmp_path / "runs" / "small")[1]
    assert meta["images_seen"] == 4 * meta["step"]  # type: ignore[operator]
    assert meta["generator"]["scale"] == 2  # type: ignore[index]
    assert (tmp_path / "runs" / "small" / "models" / "netG_2x_epoch1.pth.tar").exists()
    table = done.stdout.splitlines()
    assert "colour y, border 2, range 255, SSIM gaussian 11, sigma 1.5" in done.stdout
    assert any(line.split()[:1] == ["bicubic"] for line in table)
    assert any(line.split()[:1] == ["SR"] for line in table)
    assert "pictures/s" in done.stderr and "data wait" in done.stderr and "left" in done.stderr


def test_ctrl_c_ends_in_one_line(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "launch" / "train.py"), "--config", str(recipe)]
    overrides = ["train.epochs=50", "loss.content.weight=0", "tracking.log_every_steps=1"]
    with subprocess.Popen(
        [*command, *overrides],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    ) as running:
        assert running.stderr is not None
        for line in running.stderr:  # until its second epoch: one checkpoint is there
            if line.startswith("epoch 2/"):
                break
        os.killpg(running.pid, signal.SIGINT)  # as a terminal sends it, workers included
        _, said = running.communicate(timeout=60)
    assert running.returncode == 75
    assert "Traceback" not in said
    assert re.search(
        r"stopped by SIGINT at step \d+ of 900; the same command goes on from there", said
    )
    assert "going on from" in succeed("launch/train.py", "--config", recipe).stderr


def test_command_refuses_in_one_message(recipe: Path) -> None:
    message = refuse("launch/train.py", "--config", recipe, "trian.epochs=1")
    assert "trian: unknown key; did you mean train?" in message
    message = refuse("launch/train.py", "--config", recipe, "train.mixed_precision=fp16")
    assert "fp16 needs a GPU" in message


def test_bf16(recipe: Path, tmp_path: Path) -> None:
    for precision in ("no", "bf16"):
        succeed(
            *("launch/train.py", "--config", recipe, f"run.name=in_{precision}"),
            *(f"train.mixed_precision={precision}", "train.epochs=1", "train.warmup_images=0"),
        )
    exact, _ = saved(tmp_path / "runs" / "in_no")
    rounded, _ = saved(tmp_path / "runs" / "in_bf16")
    differences = [
        (exact[name] - rounded[name]).abs().max().item()
        for name in exact
        if name.startswith("generator/") and exact[name].is_floating_point()
    ]
    assert 0 < max(differences) < 0.1
    losses = [float(rows(tmp_path / "runs" / f"in_{p}")[0]["Loss_G"]) for p in ("no", "bf16")]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.multiprocess
def test_two_processes_train_the_run_of_one(recipe: Path, tmp_path: Path) -> None:
    """Without BatchNorm, 2 ranks of 4 crops do what 1 rank of 8 does, to float tolerance."""
    overrides = ("model.generator.norm=none", "loss.adversarial.weight=0", "train.epochs=1")
    for name, launcher in (("one", ONE_PROCESS), ("two", TWO_PROCESSES)):
        done = run(
            *("accelerate", "launch", "--config_file", launcher, REPOSITORY / "launch/train.py"),
            *("--config", recipe, f"run.name={name}", "train.warmup_images=0", *overrides),
            timeout=180,
        )
        assert done.returncode == 0, done.stderr
        assert {"one": "1 process on cpu", "two": "2 processes on cpu"}[name] in done.stderr
        assert done.stdout.count("PSNR dB") == 1, "rank 0 alone speaks"
    (one, one_meta), (two, two_meta) = saved(tmp_path / "runs/one"), saved(tmp_path / "runs/two")
    assert (one_meta["world_size"], two_meta["world_size"]) == (1, 2)
    assert one_meta["step"] == two_meta["step"] == 18
    for name, value in one.items():
        if name.startswith(("generator/", "ema/")):
            torch.testing.assert_close(two[name], value, rtol=0, atol=2e-5, msg=name)
    a, b = rows(tmp_path / "runs/one"), rows(tmp_path / "runs/two")
    assert float(a[0]["Loss_G"]) == pytest.approx(float(b[0]["Loss_G"]), rel=1e-4)


@pytest.mark.multiprocess
def test_two_processes_go_on_as_one_and_the_other_way_round(recipe: Path, tmp_path: Path) -> None:
    for epochs, launcher in ((1, TWO_PROCESSES), (2, ONE_PROCESS), (3, TWO_PROCESSES)):
        done = run(
            *("accelerate", "launch", "--config_file", launcher, REPOSITORY / "launch/train.py"),
            *("--config", recipe, f"train.epochs={epochs}"),
            timeout=180,
        )
        assert done.returncode == 0, done.stderr
    assert [row["Epoch"] for row in rows(tmp_path / "runs/small")] == ["1", "2", "3"]
    assert saved(tmp_path / "runs/small")[1]["world_size"] == 2


def train_on_two(recipe: Path, *overrides: str) -> None:
    done = run(
        *("accelerate", "launch", "--config_file", TWO_PROCESSES, REPOSITORY / "launch/train.py"),
        *("--config", recipe, *overrides),
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


def assert_same_run(one: Path, other: Path) -> None:
    """Two runs came to the same, bit for bit: weights, optimisers, CSV, TensorBoard."""
    (expected, _), (found, _) = saved(one), saved(other)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert rows(other) == rows(one)
    points, other_points = scalars(one), scalars(other)
    for tag in points:
        if not tag.startswith("speed/"):
            assert other_points[tag] == points[tag], f"{tag}: no point is lost or doubled"


@pytest.mark.multiprocess
def test_saving_changes_nothing_of_the_training(recipe: Path, tmp_path: Path) -> None:
    """BatchNorm's statistics differ between ranks, which keep them; checkpoints hold the mean."""
    train_on_two(recipe, "run.name=rarely")
    train_on_two(recipe, "run.name=often", "checkpoint.every_steps=5")
    assert_same_run(tmp_path / "runs/rarely", tmp_path / "runs/often")


def start_ranks(number: int, recipe: Path, *overrides: str) -> list[subprocess.Popen[str]]:
    """Ranks of one run, slow enough to be caught at a step, without a launcher above them."""
    worker = str(REPOSITORY / "tests" / "workers" / "slow_steps.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(number)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, worker, str(recipe), *overrides],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(number)
    ]


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout is not None
    assert any(line.strip() == f"step {step}" for line in process.stdout), "it ended before"


@pytest.mark.multiprocess
def test_a_signal_to_any_rank_stops_all_after_a_checkpoint(recipe: Path, tmp_path: Path) -> None:
    """Stopped three times, by three signals to one or the other rank: the run of one unbroken."""
    settings = ("train.epochs=4", "train.warmup_images=72")
    train_on_two(recipe, "run.name=unbroken", *settings)
    for number, rank, caught in (
        (signal.SIGUSR1, 1, 5),
        (signal.SIGTERM, 0, 25),
        (signal.SIGINT, 1, 46),
    ):
        ranks = start_ranks(2, recipe, "run.name=stopped", *settings)
        wait_for_step(ranks[rank], caught)
        ranks[rank].send_signal(number)
        said = [process.communicate(timeout=60)[1] for process in ranks]
        assert [process.returncode for process in ranks] == [75, 75], said
        step = saved(tmp_path / "runs/stopped")[1]["step"]
        assert f"at step {step} of 72; the same command goes on from there" in said[0]
        assert caught <= step < 72 and "Traceback" not in said[0] + said[1]  # type: ignore
    train_on_two(recipe, "run.name=stopped", *settings)
    assert_same_run(tmp_path / "runs/unbroken", tmp_path / "runs/stopped")


@pytest.mark.multiprocess
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_named_by_the_others(recipe: Path, killed: int) -> None:
    settings = ("train.global_batch_size=6", "train.epochs=50", "run.timeout_minutes=0.3")
    ranks = start_ranks(3, recipe, *settings)
    wait_for_step(ranks[killed], 3)
    ranks[killed].kill()
    for rank, process in enumerate(ranks):
        said = process.communicate(timeout=60)[1]
        if rank != killed:
            assert process.returncode == 1
            expected = [f"rank {killed} is gone; run the same command"]
            if killed == 0:  # which keeps the store as well, without a launcher
                expected.append("the process that keeps the ranks together is gone")
            assert any(message in said for message in expected) and "Traceback" not in said


@pytest.mark.multiprocess
def test_ranks_that_would_start_apart_are_told_so(recipe: Path, tmp_path: Path) -> None:
    train.run(load(recipe, "train.epochs=1"))
    done = run(
        *("accelerate", "launch", "--config_file", TWO_PROCESSES),
        *(REPOSITORY / "tests" / "workers" / "start_apart.py", recipe),
        timeout=180,
    )
    assert done.returncode != 0
    assert "must lie on storage that all machines share" in done.stderr


@pytest.mark.multiprocess
def test_a_mistake_that_one_rank_meets_is_said_once(recipe: Path) -> None:
    done = run(
        *("accelerate", "launch", "--config_file", TWO_PROCESSES),
        *(REPOSITORY / "tests" / "workers" / "one_mistake.py",),
        timeout=180,
    )
    assert done.stderr.count("error (rank 1): only here") == 1
    done = run(
        *("accelerate", "launch", "--config_file", TWO_PROCESSES),
        *(REPOSITORY / "tests" / "workers" / "one_mistake.py", "everywhere"),
        timeout=180,
    )
    assert done.stderr.count("everywhere alike") == 1


@pytest.mark.multiprocess
def test_ranks_agree_after_steps_on_different_data(tmp_path: Path) -> None:
    done = run(
        *("accelerate", "launch", "--config_file", TWO_PROCESSES),
        REPOSITORY / "tests" / "workers" / "ranks_agree.py",
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["world_size"] == 2
    assert found["differing_parameters"] == []
    assert found["differing_buffers_before_averaging"], (
        "local statistics differ, or this is no test"
    )
    assert found["differing_buffers"] == []
    assert found["differing_buffers_afterwards"] == found["differing_buffers_before_averaging"]
    assert found["means"] == {"rank": 0.5}


@pytest.mark.multiprocess
def test_batch_that_does_not_divide_is_refused(recipe: Path) -> None:
    done = run(
        *("accelerate", "launch", "--config_file", TWO_PROCESSES, REPOSITORY / "launch/train.py"),
        *("--config", recipe, "train.global_batch_size=7"),
        timeout=180,
    )
    assert done.returncode != 0
    assert done.stderr.count("global_batch_size 7 does not divide among 2 processes") == 1


def test_the_quickstart_recipe_runs_as_its_script_does(tmp_path: Path) -> None:
    """The commands of launch/quickstart.sh, on one epoch of one crop a tile."""
    script = (REPOSITORY / "launch" / "quickstart.sh").read_text()
    assert "--val-fraction 0.2 --seed 18" in script and "--tile 128" in script
    data = tmp_path / "data" / "quickstart"
    succeed("tools/make_dataset.py", "--source", "sample", "--output", data / "images")
    succeed(
        *("tools/split_dataset.py", "--images", data / "images"),
        *("--val-fraction", 0.2, "--seed", 18),
    )
    succeed(
        *("tools/make_shards.py", "--images", data / "images" / "train.txt"),
        *("--output", data / "shards", "--tile", 128),
    )
    done = succeed(
        *("launch/train.py", "--config", REPOSITORY / "configs" / "quickstart.yaml"),
        *("train.epochs=1", "data.crops_per_image=1", "train.warmup_images=80"),
        cwd=tmp_path,
    )
    bicubic, model = (
        float(line.split()[1])
        for line in done.stdout.splitlines()
        if line.split()[:1] in (["bicubic"], ["SR"])
    )
    assert model > bicubic - 0.5
    settings = yaml.safe_load((tmp_path / "runs" / "quickstart" / "config.yaml").read_text())
    assert settings["model"]["generator"]["global_skip"] == "bicubic"
