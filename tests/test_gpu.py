"""What needs a CUDA device: pytest -m gpu. Where SR_DIST_GPU is set, a missing one is a failure."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sr_dist import (
    config,
    distributed,
    gan,
    images,
    loading,
    models,
    ranks,
    shard_writer,
    tensors,
    train,
    upscale,
)
from tests.helpers import REPOSITORY, succeed
from tests.runs import load, rows, saved
from tests.streams import read_batches, stream_of

pytestmark = pytest.mark.gpu

ADAMW = dataclasses.asdict(config.AdamW())
LOSS = dataclasses.asdict(
    config.Loss(content=config.Content(weights="none"), adversarial=config.Adversarial(kind="bce"))
)


@pytest.fixture(autouse=True)
def device() -> torch.device:
    if not torch.cuda.is_available():
        if os.environ.get("SR_DIST_GPU"):
            pytest.fail("no CUDA device is here, and SR_DIST_GPU is set")
        pytest.skip("no CUDA device is here")
    return torch.device("cuda")


@pytest.fixture(params=["no", "bf16", "fp16"])
def processes(request: pytest.FixtureRequest) -> Iterator[distributed.Processes]:
    with distributed.joined(request.param, seed=0) as joined:
        yield joined


def build(
    processes: distributed.Processes,
    compiled: bool = False,
    recorded: bool = False,
    discriminator: str = "swift_srgan",
) -> gan.Networks:
    return gan.build_networks(
        processes,
        generator={"name": "swift_srgan", "scale": 4, "channels": 3, "num_blocks": 2},
        discriminator={"name": discriminator, "channels": 3, "head": "gap"},
        optimizer={"generator": ADAMW, "discriminator": ADAMW},
        half_life=100,
        compiled=compiled,
        recorded=recorded,
    )


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    hr = torch.randint(256, (4, 3, 48, 48), generator=random, dtype=torch.uint8)
    return tensors.downscale(hr, 4), hr


def test_steps_learn_without_waiting_for_the_device(processes: distributed.Processes) -> None:
    networks = build(processes)
    assert processes.device.type == "cuda"
    weight = networks.generator.final_conv.pointwise.weight  # type: ignore[union-attr]
    assert weight.is_cuda
    laid_out: list[torch.Tensor] = []
    networks.generator.upsampler.register_forward_pre_hook(  # type: ignore[operator,union-attr]
        lambda module, inputs: laid_out.append(inputs[0])
    )
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.benchmark
    for optimizer in networks.optimizers.values():
        assert optimizer.param_groups[0]["fused"] is True
    objective = gan.build_objective(**LOSS, device=processes.device)
    lr, hr = (x.pin_memory() for x in batch())

    def step(number: int) -> gan.Scalars:
        return gan.training_step(
            processes, networks, objective, lr, hr, images_seen=4 * number, images=4
        )

    first = step(0)
    (features,) = laid_out  # a batch of many channels: in one layout alone
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert not features.is_contiguous()
    fp16 = processes.mixed_precision == "fp16"  # whose scaler looks at what it found in every step
    torch.cuda.set_sync_debug_mode("default" if fp16 else "error")
    try:
        for number in range(1, 12):
            last = step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0 < float(last["loss/pixel"]) < float(first["loss/pixel"])
    assert bool(processes.scaler_state()) == fp16


@pytest.mark.parametrize(
    ("precision", "parts", "kind", "r1"),
    [
        ("no", 1, "bce", 0.0),
        ("bf16", 1, "bce", 0.0),
        ("no", 2, "hinge", 0.0),
        ("no", 1, "bce", 1.0),
    ],
)
def test_recorded_steps_are_the_plain_ones(
    precision: str, parts: int, kind: str, r1: float
) -> None:
    """Through a warm-up and a ramp, on other pictures in each step; each from equal weights, since
    a difference in the last bit grows to percents within ten steps.
    """
    terms = dataclasses.asdict(
        config.Loss(
            content=config.Content(weights="none"),
            adversarial=config.Adversarial(kind=kind, weight=0.1, r1_weight=r1),
        )
    )
    random = torch.Generator().manual_seed(1)
    hr = torch.randint(256, (12, 4, 3, 48, 48), generator=random, dtype=torch.uint8)
    near = 3e-2 if precision == "bf16" else 1e-3
    with distributed.joined(precision, seed=0) as processes:
        objective = gan.build_objective(**terms, device=processes.device)
        name = "unet" if r1 else "swift_srgan"
        plain, recorded = (
            build(processes, recorded=each, discriminator=name) for each in (False, True)
        )
        for number in range(12):
            for key, module in recorded.weights.items():
                module.load_state_dict(plain.weights[key].state_dict())
            expected, found = (
                gan.training_step(
                    processes,
                    networks,
                    objective.at(4 * number, warmup_images=16, ramp_images=24),
                    tensors.downscale(hr[number], 4),
                    hr[number],
                    images_seen=4 * number,
                    images=4,
                    accumulation_steps=parts,
                )
                for networks in (plain, recorded)
            )
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert float(found[key]) == pytest.approx(float(value), rel=near, abs=1e-5), key
            trained = ["generator", "discriminator"] if number >= 4 else ["generator"]
            for key in trained:
                pairs = zip(
                    plain.weights[key].named_parameters(),
                    recorded.weights[key].parameters(),
                    strict=True,
                )
                for (parameter, theirs), mine in pairs:
                    assert (theirs.grad is None) == (mine.grad is None)
                    if theirs.grad is not None:
                        most = near * float(theirs.grad.abs().max())
                        torch.testing.assert_close(
                            mine.grad, theirs.grad, rtol=0, atol=most, msg=f"{key}.{parameter}"
                        )
        assert recorded.recorder is not None
        assert [len(its) for its in recorded.recorder._recorded.values()] == [1, 2]


def test_played_steps_do_not_wait_for_the_device() -> None:
    with distributed.joined("bf16", seed=0) as processes:
        networks = build(processes, recorded=True)
        objective = gan.build_objective(**LOSS, device=processes.device)
        lr, hr = (x.pin_memory() for x in batch())
        for number in range(8):
            torch.cuda.set_sync_debug_mode("error" if number > 3 else "default")
            try:
                gan.training_step(
                    processes, networks, objective, lr, hr, images_seen=4 * number, images=4
                )
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_a_factored_layer_has_the_gradients_of_a_plain_one(
    device: torch.device, precision: torch.dtype
) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(256, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1)).to(device)
    ours = copy.deepcopy(plain)
    assert ranks.factor(ours, ranks.Factors(4), ranks.Reductions(1, "none")) == [], (
        "nothing is sent"
    )
    ours[0] = ranks.FactoredLinear(ours[0], ranks.Reductions(1, "none"))
    found = []
    for module in (plain, ours):
        x = torch.linspace(-1, 1, 4 * 256, device=device).view(4, 256).requires_grad_()
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            out = module(x) + module(x.cos())
        out.float().square().sum().backward()
        found.append([x.grad, *(p.grad for p in module.parameters())])
    for mine, theirs in zip(*found, strict=True):
        most = 2e-2 * float(theirs.abs().max())
        torch.testing.assert_close(mine, theirs, rtol=0, atol=most)


def test_batches_are_copied_ahead(sharded: Path, device: torch.device) -> None:
    source = stream_of(sharded, last=12)
    expected = list(loading.batches(source, num_workers=0, pin_memory=False))
    ahead = loading.batches(source, num_workers=1, pin_memory=True)
    found = list(loading.on_device(ahead, device, 4))
    assert len(found) == len(expected) == 12
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.hr.device.type == mine.lr.device.type == "cuda"
        assert torch.equal(mine.hr.cpu(), theirs.hr) and torch.equal(mine.lr.cpu(), theirs.lr)


def test_jpegs_are_decoded_there(photographs: Path, tmp_path: Path, device: torch.device) -> None:
    options = shard_writer.Options(tile=96, encode="jpeg", samples_per_shard=20)
    shard_writer.write(images.list_pictures(photographs), tmp_path, options)
    expected = read_batches(tmp_path, last=6)
    source = stream_of(tmp_path, last=6, decode="nvjpeg")
    encoded = loading.batches(source, num_workers=1, pin_memory=True)
    for mine, theirs in zip(loading.on_device(encoded, device, 4), expected, strict=True):
        assert mine.hr.device.type == "cuda"
        difference = (mine.hr.cpu().int() - theirs.hr.int()).abs().float()
        assert difference.mean() < 1
        assert (mine.lr.cpu().int() - tensors.downscale(mine.hr.cpu(), 4).int()).abs().max() <= 1


@pytest.mark.slow
def test_compiled_networks_take_the_same_steps() -> None:
    with distributed.joined("no", seed=0) as processes:
        losses = {}
        for compiled in (False, True):
            torch.manual_seed(0)
            networks = build(processes, compiled)
            objective = gan.build_objective(**LOSS, device=processes.device)
            scalars = gan.training_step(
                processes, networks, objective, *batch(), images_seen=0, images=4
            )
            losses[compiled] = float(scalars["loss/generator"])
        assert losses[True] == pytest.approx(losses[False], rel=1e-2)


@pytest.mark.parametrize(
    "words", ["no", "bf16", "fp16", "no train.cuda_graphs=true", "bf16 train.cuda_graphs=true"]
)
def test_a_run_goes_on(recipe: Path, tmp_path: Path, words: str) -> None:
    precision, *others = words.split()
    settings = (f"train.mixed_precision={precision}", "train.epochs=2", *others)
    train.run(load(recipe, *settings, "train.epochs=1"))
    result = train.run(load(recipe, *settings))
    assert result is not None and result.means[-1].psnr > result.means[0].psnr - 3
    assert len(rows(result.folder)) == 2
    tensors, meta = saved(result.folder)
    assert meta["step"] == 36
    assert all(torch.isfinite(value).all() for value in tensors.values())


def test_upscaling_is_that_of_a_cpu(device: torch.device, picture: images.Picture) -> None:
    torch.manual_seed(0)
    generator = models.build_generator("swift_srgan", scale=4, channels=3, num_blocks=2).eval()
    expected = upscale.upscale(generator, picture, scale=4, tile=32)
    prepared = upscale.prepare(copy.deepcopy(generator), device)
    for engine, most in (("fp32", 1), ("bf16", 16)):
        found = upscale.upscale(prepared, picture, scale=4, tile=32, engine=engine)
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= most


@pytest.mark.multiprocess
def test_ranks_agree_after_reducing_gradients_there() -> None:
    """As views of their buckets; in bf16 for the way, if wanted."""
    number = torch.cuda.device_count()
    if number < 2:
        pytest.skip(f"needs 2 CUDA devices, {number} is here")
    found = {}
    for compression in ("none", "bf16"):
        words = ("launch", "--multi_gpu", "--num_processes", str(number))
        worker = REPOSITORY / "tests/workers/ranks_agree.py"
        done = succeed("accelerate", *words, worker, compression, timeout=300)
        found[compression] = json.loads(done.stdout.splitlines()[-1])
        assert found[compression]["world_size"] == number
        assert found[compression]["differing_parameters"] == []
        assert found[compression]["memories_of_gradients"] <= 4 < found[compression]["gradients"]
    lengths = [each["length"] for each in found.values()]
    assert lengths[0] != lengths[1] == pytest.approx(lengths[0], rel=1e-3)


@pytest.mark.parametrize(
    "words",
    ["single_gpu", "multi_gpu_bf16", "multi_gpu_fp16", "multi_gpu_bf16 train.cuda_graphs=true"],
)
def test_the_accelerate_files_train(recipe: Path, words: str) -> None:
    name, *others = words.split()
    path = REPOSITORY / "launch" / "accelerate" / f"{name}.yaml"
    given = () if name == "single_gpu" else ("--num_processes", str(torch.cuda.device_count()))
    launch = ("--config_file", path, *given, REPOSITORY / "launch" / "train.py", "--config", recipe)
    done = succeed("accelerate", "launch", *launch, "train.epochs=1", *others, timeout=300)
    precision = {"single_gpu": "no"}.get(name, name[-4:])
    assert f"on cuda, precision {precision}" in done.stderr


def test_benchmark_of_a_step() -> None:
    done = succeed("tools/benchmark.py", "step", "--repetitions", 3, timeout=300)
    assert "CPU" not in done.stdout.splitlines()[-1]
