from __future__ import annotations

import contextlib
import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

from sr_dist import gan
from sr_dist.distributed import joined
from tests.helpers import REPOSITORY, refuse, succeed

sys.path.insert(0, str(REPOSITORY / "tools"))
from benchmarks import curve, measuring, original, step  # noqa: E402


def test_step_prints_one_json_object_last() -> None:
    done = succeed(
        *("tools/benchmark.py", "step", "--batch-size", 2, "--crop-size", 32),
        *("--repetitions", 3),
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["what"] == "step" and result["unit"] == "images/s"
    assert result["ratio"] == pytest.approx(result["ours"] / result["reference"], rel=1e-3)
    for name in ("ours", "reference"):
        least, most = result["spread"][name]
        assert 0 < least <= result[name] <= most
    assert result["config"]["batch_size"] == 2 and result["versions"]["torch"]


def test_flops_are_counted_of_each_group() -> None:
    """Six channels by themselves, 3x3, 10x10 pixels: multiplications and additions, both ways."""
    network, x = torch.nn.Conv2d(6, 6, 3, padding=1, groups=6), torch.rand(2, 6, 10, 10)
    forward = 2 * 2 * 6 * 100 * 9
    assert step.count_flops(lambda: network(x)) == forward
    assert step.count_flops(lambda: network(x).sum().backward()) == 2 * forward
    x.requires_grad_(True)
    assert step.count_flops(lambda: network(x).sum().backward()) == 3 * forward


def test_memory_is_flat() -> None:
    done = succeed("tools/benchmark.py", "memory", "--samples", 4000)
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["samples"], result["what"]) == (4000, "memory") and result["epochs"] == 2
    assert result["tiles"] > 1.5 * result["tiles_in_windows"], "what was read is not all held"
    assert result["reference"] > 50 and result["ratio"] < 1.03


def test_impossible_sizes_are_refused() -> None:
    command = ("tools/benchmark.py", "step")
    assert "--repetitions: expected 1 or more" in refuse(*command, "--repetitions", 0)
    assert "--crop-size: expected a multiple of 4" in refuse(*command, "--crop-size", 50)


def test_the_reference_does_the_same_mathematics() -> None:
    """The generator's gradients of the first step, behind an update of the discriminator."""
    lr, hr = step.random_batch(3, 48, 4)
    with joined("no", seed=0) as processes:
        networks = step.build_networks(processes, 4, len(lr))
        objective = gan.build_objective(**step.LOSSES, device=processes.device)
        assert objective.content is not None
        theirs = original.Networks(
            processes.device,
            4,
            generator=copy.deepcopy(networks.generator).to(memory_format=torch.contiguous_format),
            features=copy.deepcopy(objective.content.features.features),  # type: ignore
        )
        assert networks.discriminator is not None
        theirs.discriminator.load_state_dict(networks.discriminator.state_dict())
        scalars = step.our_step(processes, networks, objective)(lr, hr)
        loss_d, loss_g, real, fake = original.step(theirs, processes.device)(
            *step.as_floats((lr, hr))
        )
        ours = {name: p.grad for name, p in networks.generator.named_parameters()}
    assert float(scalars["loss/discriminator"]) == pytest.approx(loss_d, rel=1e-4)
    assert float(scalars["loss/generator"]) == pytest.approx(loss_g, rel=1e-4)
    assert float(scalars["score/hr"]) == pytest.approx(real, rel=1e-4)
    compared = 0
    for name, parameter in theirs.generator.named_parameters():
        if ours[name] is not None:
            assert parameter.grad is not None
            largest = float(parameter.grad.abs().max())
            assert largest > 0
            assert torch.allclose(ours[name], parameter.grad, rtol=1e-2, atol=1e-3 * largest), name
            compared += 1
    assert compared > 100


@contextlib.contextmanager
def contender(name: str, folder: str) -> Iterator[Callable[[], object]]:
    """Notes its turns, and the process that they are in."""

    def turn() -> None:
        with open(f"{folder}/turns", "a") as file:
            file.write(f"{name} {os.getpid()}\n")
        time.sleep(0.02 if name == "ours" else 0.06)

    yield turn


def test_contenders_take_turns_in_processes_of_their_own(tmp_path: object) -> None:
    makers = {name: (contender, (name, str(tmp_path))) for name in ("ours", "reference")}
    timings = measuring.take_turns_in_processes(makers, repetitions=3)
    lines = [line.split() for line in open(f"{tmp_path}/turns").read().splitlines()]
    assert [name for name, _ in lines] == ["ours", "reference"] * 5, "two of five are not timed"
    processes = {(name, process) for name, process in lines}
    assert len(processes) == 2 and str(os.getpid()) not in dict(processes).values()
    assert [len(its) for its in timings.values()] == [3, 3]
    assert 0.02 <= min(timings["ours"]) and 0.06 <= min(timings["reference"])


def test_what_is_reported_of_timings() -> None:
    cases = {"a": ([1.0, 4.0, 2.0], [1.0, 0.5, 9.0]), "b": ([3.0], [6.0])}
    found = measuring.summary("x", cases, "things/s", more_is_better=True)
    assert found["ours"] == {"a": 2.0, "b": 3.0} and found["reference"] == {"a": 1.0, "b": 6.0}
    assert found["ratio"] == {"a": 2.0, "b": 0.5} and found["unit"] == "things/s"
    assert found["spread"]["a"] == {"ours": [1.0, 4.0], "reference": [0.5, 9.0]}  # type: ignore[index]
    seconds = measuring.summary("x", {"x": ([2.0], [5.0])}, "s", more_is_better=False)
    assert (seconds["ours"], seconds["reference"], seconds["ratio"]) == (2.0, 5.0, 2.5)


def test_a_curve_is_read_between_its_points(tmp_path: Path) -> None:
    ours = [(1.0, 25.0), (3.0, 27.0), (5.0, 28.0), (9.5, 27.9)]
    reference = [(0.1, 5.0), (4.0, 26.5)]
    assert curve.reached(ours, 26.0) == 2.0 and curve.reached(ours, 27.5) == 4.0
    assert curve.reached(ours, 24.0) == 1.0, "before the first point nothing is known"
    assert curve.reached(reference, 27.0) is None
    curves = {"ours": ours, "reference": reference}
    assert curve.table(curves, 26.0).splitlines() == [
        "| minutes | 1 | 2 | 3 | 5 | 10 |",
        "|---|---|---|---|---|---|",
        "| ours | 25.00 | 25.00 | 27.00 | 28.00 | 28.00 |",
        "| reference | 5.00 | 5.00 | 5.00 | 26.50 |  |",
        "(bicubic: 26.00 dB)",
    ]
    curve.draw(curves, 26.0, tmp_path / "curve.svg")
    drawn = (tmp_path / "curve.svg").read_bytes()
    assert b"<svg" in drawn and len(drawn) > 5000
    curve.draw(curves, 26.0, tmp_path / "curve.svg")
    assert (tmp_path / "curve.svg").read_bytes() == drawn


@pytest.mark.slow
def test_a_recipe_is_measured_beside_the_original_loop(photographs: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: {train: '', validation: '', num_workers: 0}\n"
        "model: {generator: {num_blocks: 1, global_skip: bicubic}}\n"
        "loss: {content: {weight: 0}, adversarial: {weight: 0}}\n"
        "train: {epochs: 2, global_batch_size: 4}\n"
    )
    weights = tmp_path / "mobilenet_v2.pth"
    torch.save(torchvision.models.mobilenet_v2(weights=None).state_dict(), weights)
    half = tmp_path / "lr"
    half.mkdir()
    for path in photographs.iterdir():
        picture = Image.open(path)
        picture.resize((picture.width // 4, picture.height // 4)).save(half / path.name)
    command = ("tools/benchmark.py", "curve", "--config", recipe, "--output", tmp_path / "out")
    assert "curve needs --photographs" in refuse(*command)
    command += ("--photographs", photographs, "--hr", photographs, "--lr", half)
    command += ("--content-weights", weights, "--minutes", 0.2, "--every", 0.1)
    result = json.loads(succeed(*command, timeout=300).stdout.splitlines()[-1])
    ours = json.loads((tmp_path / "out" / "ours.json").read_text())
    assert len(ours) == 2 and 0 < ours[0][0] < ours[1][0] and ours[1][1] > 20
    reference = json.loads((tmp_path / "out" / "reference.json").read_text())
    assert reference[-1][0] >= 0.2 and not result["reference_got_there"]
    assert result["last"] == {"ours": ours[-1], "reference": reference[-1]}
    assert (tmp_path / "out" / "curve.svg").is_file()
    began = time.monotonic()
    again = json.loads(succeed(*command).stdout.splitlines()[-1])
    assert again["last"] == result["last"] and time.monotonic() - began < 20


@pytest.mark.slow
@pytest.mark.parametrize("what", ["data", "upscale", "scaling", "startup"])
def test_the_longer_measurements(what: str) -> None:
    """That they end, and hold what the contract says; how fast is for a quiet machine."""
    done = succeed("tools/benchmark.py", what, "--repetitions", 1, timeout=900)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["what"] == what and result["commit"] and result["device"]
    for field in ("ours", "reference", "ratio"):
        value = result[field]
        values = value.values() if isinstance(value, dict) else [value]
        assert values and all(number > 0 for number in values)
    if what == "scaling":
        assert result["sending_nothing"].keys() == result["ours"].keys()
        assert all(number > 0 for number in result["sending_nothing"].values())
