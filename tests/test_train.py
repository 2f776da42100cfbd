from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from sr_dist import (
    config,
    distributed,
    evaluate,
    finite,
    gan,
    generators,
    images,
    loading,
    machine,
    models,
    remote,
    shard_reader,
    shard_writer,
    shards,
    storage,
    stream,
    train,
)
from sr_dist.errors import UserError
from sr_dist.ranks import Factors
from sr_dist.train import building, checks
from tests.helpers import REPOSITORY, refuse, run, run_ranks, succeed
from tests.local_server import Server, data, status
from tests.runs import (
    TWO_PROCESSES,
    assert_same_run,
    full_once,
    launch,
    load,
    of_first_shard,
    rows,
    saved,
    scalars,
    stop_at,
    train_on_two,
)


def test_a_run_leaves_what_the_design_says(recipe: Path) -> None:
    content = "loss.content.weight=0.006"
    result = train.run(load(recipe, content))
    folder = result.folder
    steps = shards.read_index(load(recipe).data.train).samples // 8
    assert steps == 18

    assert [mean.upscaler for mean in result.means] == ["bicubic", "SR"]
    assert result.means[1].psnr > result.means[0].psnr - 0.5
    assert config.load(folder / "config.yaml") == load(recipe, content)

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
    evaluated, description = generators.load(folder / "models" / "netG_4x_epoch2.pth.tar")
    for key, value in evaluated.state_dict().items():
        assert torch.equal(value, tensors[f"ema/{key}"])
    last = "final_conv.pointwise.weight"
    assert not torch.equal(tensors[f"ema/{last}"], tensors[f"generator/{last}"])
    assert tensors[f"generator/{last}"].abs().max() > 1e-3, "it starts at zero"
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
    shown = events.Images("samples/chelsea")
    assert [image.step for image in shown] == [18, 36]
    assert len({(image.width, image.height) for image in shown}) == 1
    assert "config/text_summary" in events.Tags()["tensors"]
    lines = charts(events, set(points))
    assert lines["PSNR"] == {"psnr/bicubic", "psnr/SR"}, "both in one chart"
    assert lines["SSIM"] == {"ssim/bicubic", "ssim/SR"}
    assert lines["learning rates"] == {"learning_rate/generator", "learning_rate/discriminator"}
    assert lines["memory, MB"] == {"memory/resident"}
    assert "LPIPS" not in lines, "no chart without lines"
    assert all(lines.values()) and {"pictures/s", "share of time waited for data"} <= set(lines)


def charts(events: EventAccumulator, tags: set[str]) -> dict[str, set[str]]:
    """The scalars that each chart of the page CUSTOM SCALARS shows."""
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {
        chart.title: {
            tag
            for tag in tags
            if any(re.fullmatch(pattern, tag) for pattern in chart.multiline.tag)
        }
        for category in layout.category
        for chart in category.chart
    }


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
    real = loading.batches

    def slow(*arguments: object, **options: object) -> Iterator[stream.Batch]:
        for batch in real(*arguments, **options):  # type: ignore[arg-type]
            time.sleep(0.05)
            yield batch

    monkeypatch.setattr(loading, "batches", slow)
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
    shares, speeds = points["speed/data_wait_share"], points["speed/pictures_per_second"]
    for (_, share), (_, speed) in list(zip(shares, speeds, strict=True))[1:]:
        assert 0.05 < share * 8 / speed < 1, "seconds waited in a step"


def test_a_discriminator_that_saturates_is_told_once(
    recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ("train.warmup_images=0", "tracking.log_every_steps=1", "train.epochs=1")
    train.run(load(recipe, *settings, "run.name=fine"))
    assert "saturated" not in caplog.text
    rate = "optimizer.discriminator.learning_rate=1"
    train.run(load(recipe, *settings, rate, "loss.adversarial.kind=linear"))
    (told,) = [message for message in caplog.messages if "it has saturated" in message]
    assert "scores HR and SR alike, at" in told


@pytest.mark.parametrize("colour", ["y", "rgb"])
def test_evaluation_is_by_the_configured_protocol(recipe: Path, colour: str) -> None:
    result = train.run(load(recipe, "train.epochs=1", f"evaluation.protocol={colour}"))
    pairs = evaluate.read_pairs(str(recipe.with_name("chelsea.png")), scale=4, channels=3)
    rows = evaluate.evaluate(
        {"bicubic": evaluate.classical("bicubic", 4)}, pairs, colour=colour, border=4
    )
    assert result.means[0] == evaluate.averages(rows)[0]
    assert (result.protocol["colour"], result.protocol["border"]) == (colour, 4)


def test_evaluation_can_be_rarer(recipe: Path) -> None:
    result = train.run(load(recipe, "train.epochs=3", "evaluation.every_epochs=2"))
    assert [bool(row["PSNR"]) for row in rows(result.folder)] == [False, True, True]


def test_pictures_too_small_for_lpips_are_named_before_training(
    recipe: Path, tmp_path: Path
) -> None:
    images.save(np.zeros((16, 16, 3), np.uint8), tmp_path / "small" / "a.png")
    words = ("data.scale=2", f"data.validation={tmp_path}/small", "evaluation.lpips=any.pth")
    with pytest.raises(UserError, match="a.png is 16x16 pixels; the metrics need 17 on each side"):
        train.run(load(recipe, *words))


def test_lpips_is_measured_where_it_is_asked_for(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "s.pth")
    result = train.run(load(recipe, "train.epochs=1", f"evaluation.lpips={tmp_path}/s.pth"))
    points = scalars(result.folder)
    assert points["lpips/SR"][0][1] == pytest.approx(result.means[1].lpips, rel=1e-5)
    assert points["lpips/bicubic"][0][1] > 0


def test_a_failed_evaluation_is_made_up_for_and_takes_no_training_with_it(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it fails, each start ends with its error, and goes on from the same step."""
    settings = ("data.num_workers=0",)
    unbroken = train.run(load(recipe, *settings, "run.name=unbroken"))

    def failing(*_: object, **__: object) -> None:
        raise MemoryError("no room")

    folder = Path(load(recipe).run.output_dir) / "small"
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate", failing)
        for _ in range(2):
            with pytest.raises(MemoryError):
                train.run(load(recipe, *settings))
            assert saved(folder)[1]["step"] == 18
    assert not (folder / "logs").exists()
    result = train.run(load(recipe, *settings))
    assert result is not None and unbroken is not None
    assert_same_run(unbroken.folder, folder)


@pytest.mark.parametrize(("file", "every_epochs"), [("chelsea.png", 1), ("netD_", 3)])
def test_a_disk_that_is_full_at_the_end_of_an_epoch_loses_nothing_of_it(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, file: str, every_epochs: int
) -> None:
    settings = ("data.num_workers=0", "train.epochs=2")
    settings += (
        "data.crop_size=32",
        f"evaluation.every_epochs={every_epochs}",
    )
    unbroken = train.run(load(recipe, *settings, "run.name=unbroken"))
    with monkeypatch.context() as patch:
        full_once(patch, file)
        with pytest.raises(OSError, match=f"No space left on device: .*{file}") as caught:
            train.run(load(recipe, *settings))
        assert caught.value.filename is not None, "which the command names"
    result = train.run(load(recipe, *settings))
    assert result is not None and unbroken is not None and len(rows(result.folder)) == 2
    assert_same_run(unbroken.folder, result.folder)
    for kind in ("models", "samples"):
        names = [path.relative_to(unbroken.folder) for path in unbroken.folder.glob(f"{kind}/**/*")]
        assert all((result.folder / name).exists() for name in names) and names


def test_nothing_is_written_before_all_is_checked(recipe: Path, tmp_path: Path) -> None:
    for override, message in (
        ("data.train=nowhere", "no shards at nowhere"),
        ("data.validation=nowhere", "nowhere does not exist"),
        ("data.crop_size=96", "crop_size is 96, but .* pictures of 64 pixels"),
        ("train.global_batch_size=1000", "a global batch needs 1000"),
        ("loss.content.weights=nowhere.pth", "nowhere.pth does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            train.run(load(recipe, "loss.content.weight=0.006", override))
    images.save(np.zeros((16, 90, 3), np.uint8), tmp_path / "chelsea.png")
    with pytest.raises(UserError, match="chelsea.png is 90x16 pixels"):
        train.run(load(recipe))
    (tmp_path / "chelsea.png").write_text("no picture")
    with pytest.raises(UserError, match="chelsea.png is no picture"):
        train.run(load(recipe))
    images.save(np.zeros((64, 90, 1), np.uint8), tmp_path / "chelsea.png")
    with pytest.raises(UserError, match="holds gray pictures alone, but data.channels is 3; valid"):
        train.run(load(recipe))
    assert not (tmp_path / "runs").exists()


def pretend_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in fp32 and say that it is fp16, which needs a GPU."""
    real = distributed.joined

    @contextlib.contextmanager
    def half(*words: Any) -> Iterator[distributed.Processes]:
        with real("no", *words[1:]) as processes:
            yield dataclasses.replace(processes, mixed_precision="fp16")

    monkeypatch.setattr(distributed, "joined", half)


def test_a_penalty_that_fp16_would_lose_is_refused(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_fp16(monkeypatch)
    with pytest.raises(UserError, match="r1_weight loses its gradient in fp16; use bf16 or no"):
        train.run(load(recipe, "loss.adversarial.r1_weight=1"))


def test_shards_that_cannot_be_read_leave_no_run(
    recipe: Path, sharded: Path, tmp_path: Path
) -> None:
    for path in shutil.copytree(sharded, tmp_path / "damaged").glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match="shard .* is damaged"):
        train.run(load(recipe, f"data.train={tmp_path}/damaged", "data.num_workers=0"))
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_says_what_would_be_done_and_does_nothing(recipe: Path, tmp_path: Path) -> None:
    done = succeed("launch/train.py", "--config", recipe, "--dry-run")
    assert not (tmp_path / "runs").exists()
    assert "1 process on cpu, precision no; 2,201 parameters" in done.stderr
    assert re.search(r"checkpoints of about [1-9]\d* MB, \d+ GB free", done.stderr)
    assert "18 steps of 8 crops an epoch; validation on 1 picture(s)" in done.stderr
    assert f"folder is {tmp_path}/runs/small, and it has not been begun" in done.stderr
    assert done.stdout == ""


def test_a_launcher_that_starts_one_process_where_several_were_wanted_is_found_out(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("launch/train.py", "--config", recipe, "--dry-run")
    script = str(REPOSITORY / words[0])
    two = ("accelerate", "launch", "--cpu", "--num_processes", "2", script, *words[1:])
    done = run(*two)
    assert done.returncode != 0 and "was told of several processes and started one" in done.stderr
    assert "1 process on cpu" in succeed(*two, "run.processes=1").stderr

    ours = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND", "MASTER_ADDR")
    for name in ("RANK", "WORLD_SIZE", *ours):
        monkeypatch.delenv(name, raising=False)
    assert not distributed.lacks_processes(1)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert not distributed.lacks_processes(1), "no launcher was asked for anything"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert not distributed.launched_alone(), "people set that, too"
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert distributed.launched_alone() and distributed.lacks_processes(1)
    assert not distributed.lacks_processes(2), "as under mpirun"
    monkeypatch.setenv("RANK", "0")
    assert not distributed.lacks_processes(1)


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
    with pytest.raises(UserError, match="shard-000002.tar is not there"):
        train.run(load(recipe, f"data.train={folder}"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="in .*/file nothing can be written: Not a directory"):
        train.run(load(recipe, f"run.output_dir={tmp_path}/file"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    with pytest.raises(UserError, match=r"has 1 MB free; 5 checkpoint\(s\) of \d+ MB would"):
        train.run(load(recipe))
    assert not (tmp_path / "runs").exists()


def test_weights_that_are_not_finite_are_never_saved(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("checkpoint.every_steps=2", "tracking.log_every_steps=1000")
    settings += ("train.on_nonfinite=skip",)
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


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int, by: float = math.nan) -> None:
    """Add to the pixel loss of some steps; with infinity its gradient stays finite."""
    real_step, real_terms, begun = gan.training_step, gan.terms_without_discriminator, []

    def counting(*arguments: Any, **options: Any) -> Any:
        begun.append(1)
        return real_step(*arguments, **options)

    def poisoned(*arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
        terms = real_terms(*arguments, **options)
        if len(begun) in steps:
            terms["pixel"] = terms["pixel"] + by
        return terms

    monkeypatch.setattr(gan, "training_step", counting)
    monkeypatch.setattr(gan, "terms_without_discriminator", poisoned)


def samples_of(recipe: Path, step: int) -> tuple[shards.Index, list[str]]:
    index = shards.read_index(load(recipe).data.train)
    plan = shards.make_plan(index, seed=0, global_batch_size=8, crops_per_image=1, crop_size=32)
    return index, finite._names(index, plan, step - 1, storage.DEFAULT)


@pytest.mark.parametrize("by", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_touches_nothing(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, by: float
) -> None:
    """At the next checkpoint, so that those from before are still there."""
    settings = ("checkpoint.every_steps=4", "tracking.log_every_steps=1000", "checkpoint.keep=1")
    poison(monkeypatch, 6, by=by)
    with pytest.raises(UserError) as caught:
        train.run(load(recipe, *settings))
    message = str(caught.value)
    assert (
        "not finite at step 6: loss/generator, loss/pixel of rank 0, on samples shard-" in message
    )
    index, names = samples_of(recipe, step=6)
    assert len(names) == 8 and ", ".join(names) in message
    shard, key = names[0].split("/")
    keys = [s.key for s in shard_reader.read_samples(f"{index.root}/{shard}")]
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

    monkeypatch.undo()
    poison(monkeypatch, 2, *range(9, 13))
    with pytest.raises(UserError, match="first at step 9: loss/generator, loss/pixel of") as caught:
        train.run(load(recipe, *settings, many[0], "run.name=later"))
    _, names = samples_of(recipe, step=9)
    assert f"on samples {', '.join(names)}. No weight" in str(caught.value)


@pytest.mark.parametrize("tolerant", ["skip", "fp16"])
def test_what_was_left_out_before_does_not_stop_a_run_that_is_to_stop_at_once(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tolerant: str
) -> None:
    """The message of a stop recommends to change either. fp16 is but said to be: here is no GPU."""
    settings = ("loss.adversarial.weight=0", "train.epochs=1")
    settings += ("checkpoint.every_steps=6", "tracking.log_every_steps=2")
    with monkeypatch.context() as patch:
        poison(patch, 3)
        stop_at(patch, 9)
        if tolerant == "fp16":
            pretend_fp16(patch)
        with pytest.raises(KeyboardInterrupt):
            train.run(load(recipe, *settings, *["train.on_nonfinite=skip"] * (tolerant == "skip")))
    folder = Path(load(recipe).run.output_dir) / "small"
    assert saved(folder)[1]["step"] == 6
    with monkeypatch.context() as patch:
        poison(patch, 4)
        with pytest.raises(UserError, match="^not finite at step 10: loss/generator, loss/pixel"):
            train.run(load(recipe, *settings))
    result = train.run(load(recipe, *settings))
    assert result is not None and scalars(folder)["gradient/left_out"][-1] == (18, 1)


@pytest.mark.multiprocess
def test_what_is_not_finite_on_one_rank_is_left_out_on_all(recipe: Path, tmp_path: Path) -> None:
    done = run_ranks(
        2,
        "tests/workers/poisoned_rank.py",
        recipe,
        "run.name=skips",
        "train.on_nonfinite=skip",
        "train.epochs=1",
    )
    assert done.returncode == 0, done.stderr
    tensors, _ = saved(tmp_path / "runs/skips")
    assert tensors["optimizer/generator/0/step"] == 17
    assert all(torch.isfinite(value).all() for value in tensors.values())
    done = run_ranks(2, "tests/workers/poisoned_rank.py", recipe, "run.name=stops")
    assert done.returncode != 0
    its = ", ".join(samples_of(recipe, step=5)[1][4:])  # the second half of the batch
    what = f"not finite at step 5: loss/generator, loss/pixel of rank 1, on samples {its}. "
    assert done.stderr.count(what) == 1
    assert 'poisoned_rank.py", line' not in done.stderr, "no traceback of ours"


def test_command_with_the_original_options(recipe: Path, tmp_path: Path) -> None:
    done = succeed(
        *("launch/train.py", "--config", recipe, "train.warmup_images=0", "--num_epochs", 1),
        *("--batch_size", 4, "--upscale_factor", 2),
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


def test_command_refuses_in_one_message(recipe: Path) -> None:
    message = refuse("launch/train.py", "--config", recipe, "trian.epochs=1")
    assert "trian: unknown key; did you mean train?" in message
    both = ("--batch_size", 4, "train.global_batch_size=8")
    message = refuse("launch/train.py", "--config", recipe, *both)
    assert "--batch_size sets train.global_batch_size, and so does train.global_batch_" in message
    message = refuse("launch/train.py", "--config", recipe, "train.mixed_precision=fp16")
    assert "fp16 needs a GPU" in message
    message = refuse("launch/train.py", "--config", recipe, "train.cuda_graphs=true")
    assert "train.cuda_graphs needs a GPU, and none is here; or leave it off" in message


def test_a_gpu_that_is_too_small_is_told_what_to_lower(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nSee more")

    monkeypatch.setattr(gan, "training_step", step)
    with pytest.raises(UserError) as caught:
        train.run(load(recipe))
    assert str(caught.value).startswith("the GPU's memory does not do: CUDA out of memory. Tried")
    assert "9 GiB. Lower train.global_batch_size, " in str(caught.value)


def test_what_a_killed_run_left_half_written_goes(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "small"
    left = [folder / "models" / ".netG_4x.0123abcd.part", folder / ".config.yaml.0123abcd.part"]
    of_others = [folder / ".pictures.part", folder / "models" / ".my.part"]
    for path in (*left, *of_others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    train.run(load(recipe, "train.epochs=1", of_first_shard(recipe)))
    assert [path.exists() for path in (*left, *of_others)] == [False, False, True, True]


@pytest.mark.multiprocess
def test_two_processes_compute_in_bf16_where_their_launcher_is_told(
    recipe: Path, photographs: Path, tmp_path: Path
) -> None:
    told, text = tmp_path / "bf16.yaml", TWO_PROCESSES.read_text()
    assert 'mixed_precision: "no"' in text
    told.write_text(text.replace('mixed_precision: "no"', "mixed_precision: bf16"))
    words = ("launch/train.py", "--config", recipe, "train.epochs=1", "train.warmup_images=0")
    # Two steps alone, since a processor that emulates bf16 takes seconds for each.
    options = shard_writer.Options(tile=64, samples_per_shard=16, min_size=48)
    source = images.list_pictures(photographs)
    shard_writer.write(source, tmp_path / "few", options)
    words += (f"data.train={tmp_path}/few/shard-{{000000..000000}}.tar",)
    done = run_ranks(2, *words, "run.name=in_no")
    assert "2 processes on cpu, precision no; " in done.stderr
    for name, done in (
        ("set", run_ranks(2, *words, "run.name=set", "train.mixed_precision=bf16")),
        ("in_bf16", launch(told, *words, "run.name=in_bf16")),
    ):
        assert done.returncode == 0, done.stderr
        assert "2 processes on cpu, precision bf16; " in done.stderr, name
    assert_same_run(tmp_path / "runs" / "set", tmp_path / "runs" / "in_bf16")
    emulates = not machine.has_bf16(torch.device("cpu"))
    assert ("emulates it, slower than no (fp32)" in done.stderr) == emulates
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
    for number, name in ((1, "one"), (2, "two")):
        words = ("--config", recipe, f"run.name={name}", "train.warmup_images=0")
        done = run_ranks(number, "launch/train.py", *words, *overrides)
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


def test_settings_without_effect_are_told(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    def told(*overrides: str) -> list[str]:
        caplog.clear()
        with caplog.at_level("WARNING"):
            assert train.run(load(recipe, *overrides), dry=True) is None
        return [m.removeprefix("without effect: ") for m in caplog.messages if "effect" in m]

    assert told() == []
    assert told("train.warmup_images=288") == [
        "all losses but the pixel loss: the run ends after 288 images, and train.warmup_images "
        "is 288"
    ]
    none = ("loss.adversarial.weight=0", "train.ramp_images=9", "loss.adversarial.r1_weight=1")
    assert told(*none) == [
        "loss.adversarial.r1_weight, since weight is 0",
        "train.ramp_images, since loss.adversarial.weight is 0",
    ]
    assert told("train.warmup_images=288", "loss.adversarial.weight=0") == [
        "all losses but the pixel loss: the run ends after 288 images, and train.warmup_images "
        "is 288"
    ]
    late = ("optimizer.generator.schedule=multistep", "optimizer.generator.milestones=[9, 288]")
    assert told(*late) == ["optimizer.generator.milestones from 288 on, where the run ends"]


def test_shards_from_afar_are_read_as_configured(
    recipe: Path,
    sharded: Path,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Attempts, and the cache that a server without ranges needs; validation shards too."""
    pytest.importorskip("aiohttp", reason="aiohttp is not installed")
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.01)
    for path in sharded.iterdir():
        server.serve(f"/s/{path.name}", data(path.read_bytes(), ranges=False))
        server.sizes[f"/s/{path.name}"] = path.stat().st_size
    address = server.address("/s")
    overrides = [f"data.train={address}", f"data.validation={address}", "train.epochs=1"]
    overrides += [f"stream.cache_dir={tmp_path}/cache", "stream.attempts=3"]
    index = server.replies["/s/index.json"]
    server.replies["/s/index.json"] = [status(503), status(503), *index]
    result = train.run(load(recipe, *overrides))
    assert result is not None and len(result.means) == 2
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 3
    server.replies["/s/index.json"] = [status(503)] * 3 + index
    with pytest.raises(UserError, match=r"index.json cannot be read at byte 0 after 3 attempts"):
        train.run(load(recipe, *overrides, "run.name=other"))
    with pytest.raises(UserError, match="stream.cache_bytes is 9, but http.*shard-"):
        train.run(load(recipe, *overrides, "run.name=other", "stream.cache_bytes=9"))


def test_settings_reach_the_step_and_the_stream(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, steps, streams = gan.training_step, [], []

    def watched(*arguments: Any, **options: Any) -> Any:
        steps.append((arguments[2], options["accumulation_steps"], options["keep_statistics"]))
        return real(*arguments, **options)

    class Watched(stream.CropStream):
        def __init__(self, **options: Any) -> None:
            streams.append(options)
            super().__init__(**options)

    monkeypatch.setattr(gan, "training_step", watched)
    monkeypatch.setattr(stream, "CropStream", Watched)
    overrides = ["train.epochs=1", "train.accumulation_steps=2", "train.on_nonfinite=skip"]
    overrides += ["train.warmup_images=16", "train.ramp_images=80", "loss.adversarial.weight=0.5"]
    overrides += ["loss.total_variation.weight=0.25", "data.bits=12", "stream.on_error=skip"]
    overrides += ["data.degradation.noise_sigma=[1, 2]", "data.degradation.jpeg_quality=[30, 40]"]
    train.run(load(recipe, *overrides))
    assert {parts for _, parts, _ in steps} == {2} and {keeps for *_, keeps in steps} == {True}
    weights = [objective.adversarial_weight for objective, *_ in steps]
    assert weights[:2] == [0, 0] and 0 < weights[2] < 0.5 * 0.2 and weights[-1] == 0.5
    variations = [objective.total_variation_weight for objective, *_ in steps]
    assert variations[:3] == [0, 0, 0.25]
    (made,) = streams
    assert (made["bits"], made["on_error"], made["crop_size"]) == (12, "skip", 32)
    worse = made["degradation"]
    assert (worse.noise_sigma, worse.jpeg_quality) == ((1, 2), (30, 40))


@pytest.mark.multiprocess
def test_all_ranks_evaluate_to_the_same_numbers_as_one(
    recipe: Path, sharded: Path, photographs: Path, tmp_path: Path
) -> None:
    """83 pictures on two ranks, of which three are shown; and one that a rank cannot measure."""
    settings = (f"data.validation={sharded}", "train.epochs=1", "evaluation.samples=3")
    settings += (of_first_shard(recipe),)
    train_on_two(recipe, "run.name=main", *settings)
    train_on_two(recipe, "run.name=all", "evaluation.ranks=all", *settings)
    main, shared = (tmp_path / "runs" / name for name in ("main", "all"))
    one, other = scalars(main), scalars(shared)
    for tag in ("psnr/bicubic", "psnr/SR", "ssim/bicubic", "ssim/SR"):
        assert other[tag] == one[tag] and len(one[tag]) == 1
    assert rows(shared) == rows(main)
    assert saved(shared)[1]["metrics"] == saved(main)[1]["metrics"]

    (tmp_path / "val").mkdir()
    for number in range(4):
        shutil.copy(photographs / "chelsea.png", tmp_path / "val" / f"{number}.png")
    done = run_ranks(
        2,
        "tests/workers/loses_a_picture.py",
        tmp_path / "val" / "3.png",
        recipe,
        f"data.validation={tmp_path}/val",
        of_first_shard(recipe),
        "evaluation.ranks=all",
        "run.name=broken",
    )
    assert done.returncode != 0
    assert "3.png" in done.stderr and "another rank could not evaluate" in done.stderr
    assert saved(tmp_path / "runs" / "broken")[1]["step"] == 6, "the training is kept"


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", ["main", "all"])
def test_an_evaluation_may_take_longer_than_a_collective_waits(
    recipe: Path, tmp_path: Path, ranks: str
) -> None:
    settings = ("run.timeout_minutes=0.1", "train.epochs=1", of_first_shard(recipe))
    settings += (f"evaluation.ranks={ranks}",)
    done = run_ranks(2, "tests/workers/slow_evaluation.py", 8, recipe, *settings)
    assert done.returncode == 0, done.stderr
    assert saved(tmp_path / "runs" / "small")[1]["metrics"]


@pytest.mark.multiprocess
def test_a_mistake_that_one_rank_meets_is_said_once(recipe: Path) -> None:
    done = run_ranks(2, "tests/workers/one_mistake.py")
    assert done.stderr.count("error (rank 1): only here") == 1
    done = run_ranks(2, "tests/workers/one_mistake.py", "everywhere")
    assert done.stderr.count("everywhere alike") == 1


@pytest.mark.multiprocess
def test_ranks_agree_after_steps_on_different_data(tmp_path: Path) -> None:
    done = run_ranks(2, "tests/workers/ranks_agree.py")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["world_size"] == 2
    assert 2 <= found["memories_of_gradients"] <= 4 < found["gradients"], "views of buckets"
    assert found["differing_parameters"] == []
    assert found["differing_buffers_before_averaging"], (
        "local statistics differ, or this is no test"
    )
    assert found["differing_buffers"] == []
    assert found["differing_buffers_afterwards"] == found["differing_buffers_before_averaging"]
    assert found["means"] == {"rank": 0.5}
    assert found["averaged_otherwise"] == 0
    done = run_ranks(2, "tests/workers/ranks_agree.py", "bf16")
    compressed = json.loads(done.stdout.splitlines()[-1])
    assert compressed["differing_parameters"] == []
    assert compressed["averaged_otherwise"] == 0
    assert compressed["length"] != found["length"], "bf16 rounds"
    assert compressed["length"] == pytest.approx(found["length"], rel=1e-3)


@pytest.mark.multiprocess
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="MKL alone can be told to differ")
@pytest.mark.parametrize(("ranks", "expected"), [("alike", ["0.weight"]), ("unlike", [])])
def test_ranks_that_multiply_to_other_bits_make_no_product_of_their_own(
    ranks: str, expected: list[str]
) -> None:
    done = run_ranks(2, "tests/workers/factored_layers.py", ranks)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found == [[expected, expected]] * 2, "of few and of many rows, on both"


def test_nothing_is_read_back_between_log_points(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU would have to be waited for: losses, lengths and counts stay there up to the log."""
    now, read = [0], collections.Counter()
    real_step = gan.training_step

    def counting(*arguments: Any, **options: Any) -> Any:
        now[0] += 1
        return real_step(*arguments, **options)

    for name in ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        real = getattr(torch.Tensor, name)

        def noted(self: torch.Tensor, *arguments: Any, real: Any = real, **options: Any) -> Any:
            read[now[0]] += 1
            return real(self, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, noted)
    monkeypatch.setattr(gan, "training_step", counting)
    every = ("tracking.log_every_steps=5", "train.epochs=1", "train.warmup_images=16")
    clipped = ("optimizer.generator.clip_norm=1.0", "train.on_nonfinite=skip")
    train.run(load(recipe, *every, *clipped, "train.ema_half_life=40"))
    assert now[0] == 18
    # Before the first step all kinds of things are read; at the last one the epoch ends.
    assert {step for step in read if step} == {5, 10, 15, 18}


def test_a_torchvision_without_nvjpeg_is_told_of_before_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    checks._check_nvjpeg(cpu)  # which decodes JPEGs

    def refusing(*arguments: object, **options: object) -> None:
        raise RuntimeError("built without nvJPEG\nmore")

    monkeypatch.setattr(torchvision.io, "decode_jpeg", refusing)
    message = r"does not decode on the GPU \(built without nvJPEG\); use data.decode=cpu"
    with pytest.raises(UserError, match=message):
        checks._check_nvjpeg(cpu)


def test_evaluating_computes_no_more_at_once_than_training(recipe: Path) -> None:
    settings = ("data.crop_size=96", "train.global_batch_size=16")
    for ranks, parts in ((1, 1), (2, 1), (2, 2), (16, 1)):
        made = load(recipe, *settings, f"train.accumulation_steps={parts}")
        tile = building.evaluation_tile(made, ranks)
        most = 16 // ranks // parts * 96**2
        assert tile**2 <= most < (tile + 1) ** 2
    made = load(recipe, "data.crop_size=32", "train.global_batch_size=1")
    assert building.evaluation_tile(made, 1) == 64, "no less"


@pytest.mark.multiprocess
def test_batch_that_does_not_divide_is_refused(recipe: Path) -> None:
    done = run_ranks(2, "launch/train.py", "--config", recipe, "train.global_batch_size=7")
    assert done.returncode != 0
    assert done.stderr.count("global_batch_size 7 does not divide among 2 processes") == 1


def quickstart(folder: Path, *overrides: str) -> tuple[float, float]:
    """The commands of launch/quickstart.sh: PSNR of bicubic and of the model."""
    script = (REPOSITORY / "launch" / "quickstart.sh").read_text()
    assert "--val-fraction 0.2 --seed 18" in script and "--tile 128" in script
    data = folder / "data" / "quickstart"
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
        *("launch/train.py", "--config", REPOSITORY / "configs" / "quickstart.yaml", *overrides),
        cwd=folder,
        timeout=1800,
    )
    bicubic, model = (
        float(line.split()[1])
        for line in done.stdout.splitlines()
        if line.split()[:1] in (["bicubic"], ["SR"])
    )
    return bicubic, model


def test_the_quickstart_recipe_runs_as_its_script_does(tmp_path: Path) -> None:
    """In one epoch of small crops, with what lets so few steps show: 0.42 dB when measured."""
    small = ("data.crops_per_image=16", "data.crop_size=48", "train.warmup_images=1500")
    short = ("train.epochs=1", "optimizer.generator.schedule=constant", "train.ema_half_life=50")
    bicubic, model = quickstart(tmp_path, *small, *short)
    assert model > bicubic + 0.2
    settings = yaml.safe_load((tmp_path / "runs" / "quickstart" / "config.yaml").read_text())
    assert settings["model"]["generator"]["global_skip"] == "bicubic"


@pytest.mark.slow
def test_the_quickstart_beats_bicubic_by_what_was_asked_for(shared: Path, tmp_path: Path) -> None:
    """The whole of it: on the held-out photographs, and by 0.8 dB on Set5."""
    bicubic, model = quickstart(tmp_path)
    assert model > bicubic + 1
    folder = shared / "benchmarks" / "Set5"
    done = succeed(
        *("launch/evaluate.py", "--data", folder / "HR", "--lr", folder / "LR_bicubic" / "X4"),
        *("--method", "bicubic", "--checkpoint", tmp_path / "runs" / "quickstart"),
        *("--output", tmp_path / "results"),
    )
    classical, learned = json.loads(done.stdout.splitlines()[-1])["results"]
    assert classical["psnr"] == pytest.approx(28.43, abs=0.01)
    assert learned["psnr"] >= classical["psnr"] + 0.8


@pytest.mark.parametrize(
    ("mixed_precision", "changes", "expected"),
    [
        ("no", [], Factors(16, 1, 1.0)),
        ("bf16", [], Factors(16, 1, 0.5)),
        ("no", ["train.gradient_compression=bf16"], Factors(16, 1, 2.0)),
        ("fp16", ["train.gradient_compression=bf16"], Factors(16, 1, 1.0)),
        ("no", ["train.accumulation_steps=4"], Factors(16, 4, 1.0)),
        ("no", ["train.compile=true"], None),
        ("no", ["loss.adversarial.r1_weight=1"], None),
        ("no", ["train.cuda_graphs=true", "loss.content.shift=0"], None),
    ],
)
def test_which_factors_are_sent(
    mixed_precision: str,
    changes: list[str],
    expected: Factors | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    recipe = REPOSITORY / "configs/swift_srgan_x4.yaml"
    made = config.load(recipe, ["train.global_batch_size=16", *changes])
    assert building._factors(made, mixed_precision) == expected
