"""A training step of Swift-SRGAN with all four losses, against the original scripts' loop."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measuring, original
from sr_dist import config, gan, ranks
from sr_dist.distributed import Processes, joined

ADAMW = dataclasses.asdict(config.AdamW())
LOSSES = dataclasses.asdict(
    config.Loss(
        content=config.Content(weights="none", normalize=False),
        total_variation=config.TotalVariation(kind="l2"),
    )
)
_PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MATRIX = 1536  # side of the matrices whose product shows what the machine can do


def build_networks(
    processes: Processes, scale: int, batch_size: int, head: str = "linear", recorded: bool = False
) -> gan.Networks:
    """`batch_size`: of a step, over all ranks."""
    return gan.build_networks(
        processes,
        generator={"name": "swift_srgan", "scale": scale, "channels": 3},
        discriminator={"name": "swift_srgan", "channels": 3, "head": head},
        optimizer={"generator": ADAMW, "discriminator": ADAMW},
        half_life=0,
        recorded=recorded,
        factors=None if recorded else ranks.Factors(batch_size),
    )


def our_step(
    processes: Processes, networks: gan.Networks, objective: gan.Objective
) -> Callable[[Tensor, Tensor], gan.Scalars]:
    """One `gan.training_step` on uint8 batches."""

    def run(lr: Tensor, hr: Tensor) -> gan.Scalars:
        return gan.training_step(
            processes, networks, objective, lr, hr, images_seen=0, images=len(lr)
        )

    return run


def random_batch(batch_size: int, crop_size: int, scale: int) -> tuple[Tensor, Tensor]:
    """Noise as (LR, HR) in uint8, channels last as the stream makes them."""
    random = torch.Generator().manual_seed(0)

    def pixels(side: int) -> Tensor:
        shape = (batch_size, side, side, 3)
        return torch.randint(256, shape, dtype=torch.uint8, generator=random).permute(0, 3, 1, 2)

    return pixels(crop_size // scale), pixels(crop_size)


def as_floats(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """As the original scripts' loader gives them: NCHW, in [0, 1]."""
    lr, hr = (pixels.contiguous().float() / 255 for pixels in batch)
    return lr, hr


@dataclasses.dataclass(frozen=True)
class Sizes:
    batch_size: int
    crop_size: int
    scale: int
    mixed_precision: str


@contextlib.contextmanager
def ours(sizes: Sizes, recorded: bool = False) -> Iterator[Callable[[], object]]:
    with joined(sizes.mixed_precision, seed=0) as processes:
        lr, hr = random_batch(sizes.batch_size, sizes.crop_size, sizes.scale)
        objective = gan.build_objective(**LOSSES, device=processes.device)
        networks = build_networks(processes, sizes.scale, sizes.batch_size, recorded=recorded)
        run = our_step(processes, networks, objective)
        synchronize = measuring.synchronizer(processes.device)
        yield lambda: (run(lr, hr), synchronize())


@contextlib.contextmanager
def reference(sizes: Sizes) -> Iterator[Callable[[], object]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lr, hr = as_floats(random_batch(sizes.batch_size, sizes.crop_size, sizes.scale))
    run = original.step(original.Networks(device, sizes.scale), device)
    yield lambda: run(lr, hr)  # which reads its losses back: the device has done them


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    batch_size, scale = arguments.batch_size, arguments.scale
    sizes = Sizes(batch_size, arguments.crop_size, scale, arguments.mixed_precision)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ways = {"step": (ours, (sizes,))}
    if device.type == "cuda" and sizes.mixed_precision != "fp16":
        ways["step, train.cuda_graphs"] = (ours, (sizes, True))
    timings = measuring.take_turns_in_processes(
        {**ways, "reference": (reference, (sizes,))}, arguments.repetitions
    )
    rates = {name: measuring.rates(its, batch_size) for name, its in timings.items()}
    cases = {name: (rates[name], rates["reference"]) for name in ways}
    result = measuring.summary("step", cases, "images/s", more_is_better=True)
    with ours(sizes) as run:
        flops = count_flops(run)
        if arguments.profile:
            print_profile(run, device)
    per_image = flops / batch_size
    precision = _PRECISIONS[arguments.mixed_precision]
    best = max(statistics.median(rates[name]) for name in ways)
    achieved, possible = per_image * best, matmul_flops(device, precision)
    return {
        **result,
        "gflop_per_image": round(per_image / 1e9, 3),
        "gflop_per_s": {
            "achieved": round(achieved / 1e9, 1),
            "matmul": round(possible / 1e9, 1),
            "share": round(achieved / possible, 3),
        },
        "config": {
            "batch_size": batch_size,
            "crop_size": arguments.crop_size,
            "scale": scale,
            "mixed_precision": arguments.mixed_precision,
            "reference_mixed_precision": "no",
            "losses": LOSSES,
        },
        **measuring.about(device),
    }


def count_flops(run: Callable[[], object]) -> int:
    """Of the matrix products and convolutions of `run`."""
    # torch's own formula takes the weight's gradient of a grouped convolution for a whole one's.
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return counter.get_total_flops()


def _convolution_backward_flops(
    gradient: Sequence[int], _x: Sequence[int], weight: Sequence[int], *others: Any, **_: Any
) -> int:
    """From shapes, as those of `FlopCounterMode`: each gradient costs what the forward does."""
    *_, wanted = others  # input, weight, bias
    return 2 * math.prod(gradient) * math.prod(weight[1:]) * sum(wanted[:2])


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two matrices, the best of several."""
    a, b = (torch.rand(_MATRIX, _MATRIX, device=device).to(dtype) for _ in range(2))
    synchronize = measuring.synchronizer(device)
    seconds = []
    for _ in range(8):
        synchronize()
        began = time.perf_counter()
        torch.mm(a, b)
        synchronize()
        seconds.append(time.perf_counter() - began)
    return float(2 * _MATRIX**3 / min(seconds))


def print_profile(run: Callable[[], object], device: torch.device, turns: int = 5) -> None:
    """Where the time of `run` goes, by operation and its side; to standard error."""
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        for _ in range(turns):
            run()
    spent: collections.Counter[str] = collections.Counter()
    for event in profile.key_averages(group_by_input_shape=True):
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        spent[_kind(event.key, event.input_shapes)] += own
    total = sum(spent.values())
    print("| operation | share of a step |\n|---|---|", file=sys.stderr)
    for name, microseconds in spent.most_common(12):
        print(f"| {name} | {microseconds / total:.1%} |", file=sys.stderr)
    others = sum(value for _, value in spent.most_common()[12:])
    print(f"| all others | {others / total:.1%} |", file=sys.stderr)


def _kind(name: str, shapes: list[list[int]]) -> str:
    """An operation as a person would call it; convolutions by their kernel and kind."""
    if "convolution" not in name:
        return name.removeprefix("aten::")
    weight = next((s for s in shapes[1:3] if len(s) == 4 and s[2] == s[3] and s[2] <= 11), None)
    weight = weight or next((s for s in shapes if len(s) == 4 and s[2] == s[3] <= 11), None)
    side = "backward" if "backward" in name else "forward"
    if weight is None:
        return f"convolution, {side}"
    depthwise = weight[1] == 1 and weight[2] > 1
    return f"{'depthwise ' * depthwise}convolution {weight[2]}x{weight[3]}, {side}"
