#!/usr/bin/env python
"""Measure sr_dist against the plain way of doing the same; the last line is one JSON object."""

import argparse
import dataclasses
import json
import platform
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from sr_dist import config, dataset, gan, losses, models, shard_writer, shards, stream
from sr_dist.degradation import Degradation
from sr_dist.distributed import Processes, joined
from sr_dist.errors import UserError, exit_on_user_error

EXAMPLE = """
example:
  python tools/benchmark.py step --batch-size 8 --crop-size 96

memory: resident memory of a process that reads samples from shards of the scikit-image photographs,
after a tenth of them and after all (the reference is the tenth).

step: pictures/s of a training step of Swift-SRGAN with all four losses. The reference is the loop
of the original scripts: two forwards of the generator, NCHW, the discriminator's backward through
the generator's graph, discriminator gradients in the generator's step, AdamW as it comes, every
loss read back in every step. Ours and the reference take turns; medians are reported.
"""

ADAMW = dataclasses.asdict(config.AdamW())
LOSSES = dataclasses.asdict(
    config.Loss(
        content=config.Content(weights="none", normalize=False),
        total_variation=config.TotalVariation(kind="l2"),
    )
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("step", "memory"))
    parser.add_argument(
        "--samples", type=int, default=50_000, metavar="N", help="memory: samples read"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N")
    parser.add_argument("--crop-size", type=int, default=96, metavar="N")
    parser.add_argument("--scale", type=int, default=4, choices=(2, 4, 8))
    parser.add_argument("--repetitions", type=int, default=10, metavar="N", help="timed steps each")
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    return parser.parse_args()


def networks_for_step(processes: Processes, scale: int) -> gan.Networks:
    return gan.build_networks(
        processes,
        generator={"name": "swift_srgan", "scale": scale, "channels": 3},
        discriminator={"name": "swift_srgan", "channels": 3},
        optimizer={"generator": ADAMW, "discriminator": ADAMW},
        half_life=0,
    )


def our_step(processes: Processes, scale: int) -> Callable[[Tensor, Tensor], object]:
    """One `gan.training_step` on uint8 batches."""
    networks = networks_for_step(processes, scale)
    objective = gan.build_objective(**LOSSES, device=processes.device)

    def step(lr: Tensor, hr: Tensor) -> object:
        return gan.training_step(
            processes, networks, objective, lr, hr, images_seen=0, images=len(lr)
        )

    return step


def reference_step(device: torch.device, scale: int) -> Callable[[Tensor, Tensor], object]:
    """One iteration as the original scripts have it, on uint8 batches.

    Its losses are the same as ours, so that both do the same work; the original reached no weight
    with two of them.
    """
    generator = models.build_generator("swift_srgan", scale=scale, channels=3).to(device)
    discriminator = models.build_discriminator("swift_srgan", channels=3).to(device)
    features = torchvision.models.mobilenet_v2(weights=None).features.eval().requires_grad_(False)
    features.to(device)
    optimizer_g = torch.optim.AdamW(generator.parameters(), lr=1e-3, foreach=False)
    optimizer_d = torch.optim.AdamW(discriminator.parameters(), lr=1e-3, foreach=False)
    mse = nn.MSELoss()

    def step(lr: Tensor, hr: Tensor) -> object:
        lr, hr = (batch.contiguous().to(device).float() / 255 for batch in (lr, hr))
        sr = generator(lr)
        discriminator.zero_grad()
        real = torch.sigmoid(discriminator(hr)).mean()
        fake = torch.sigmoid(discriminator(sr)).mean()
        loss_d = 1 - real + fake
        loss_d.backward(retain_graph=True)
        optimizer_d.step()
        generator.zero_grad()
        sr = generator(lr)
        fake = torch.sigmoid(discriminator(sr)).mean()
        adversarial = 1 - fake
        content = mse(features(sr), features(hr))
        pixel = mse(sr, hr)
        variation = losses.total_variation(sr, "l2")
        loss_g = pixel + 0.001 * adversarial + 0.006 * content + 2e-8 * variation
        loss_g.backward()
        optimizer_g.step()
        return loss_d.item(), loss_g.item(), real.item(), fake.item()

    return step


def take_turns(
    ours: Callable[[], object],
    reference: Callable[[], object],
    repetitions: int,
    synchronize: Callable[[], object],
) -> tuple[list[float], list[float]]:
    """Seconds of each, alternating, after two untimed turns."""
    timings: tuple[list[float], list[float]] = ([], [])
    for turn in range(2 + repetitions):
        for run, times in zip((ours, reference), timings, strict=True):
            synchronize()
            began = time.perf_counter()
            run()
            synchronize()
            if turn >= 2:
                times.append(time.perf_counter() - began)
    return timings


def measure_step(arguments: argparse.Namespace) -> dict[str, object]:
    with joined(arguments.mixed_precision, seed=0) as processes:
        return measure_step_on(processes, arguments)


def measure_step_on(processes: Processes, arguments: argparse.Namespace) -> dict[str, object]:
    hr_side, lr_side = arguments.crop_size, arguments.crop_size // arguments.scale
    random = torch.Generator().manual_seed(0)

    def batch(side: int) -> Tensor:
        shape = (arguments.batch_size, side, side, 3)
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=random)
        return pixels.permute(0, 3, 1, 2)

    lr, hr = batch(lr_side), batch(hr_side)
    ours = our_step(processes, arguments.scale)
    reference = reference_step(processes.device, arguments.scale)
    on_gpu = processes.device.type == "cuda"
    times = take_turns(
        lambda: ours(lr, hr),
        lambda: reference(lr, hr),
        arguments.repetitions,
        torch.cuda.synchronize if on_gpu else lambda: None,
    )
    rates = [[arguments.batch_size / seconds for seconds in its] for its in times]
    ours_rate, reference_rate = (statistics.median(its) for its in rates)
    return {
        "what": "step",
        "ours": round(ours_rate, 3),
        "reference": round(reference_rate, 3),
        "ratio": round(ours_rate / reference_rate, 3),
        "unit": "images/s",
        "spread": {
            name: [round(min(its), 3), round(max(its), 3)]
            for name, its in zip(("ours", "reference"), rates, strict=True)
        },
        "repetitions": arguments.repetitions,
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "world_size": processes.world_size,
        "config": {
            "batch_size": arguments.batch_size,
            "crop_size": arguments.crop_size,
            "scale": arguments.scale,
            "mixed_precision": processes.mixed_precision,
            "losses": LOSSES,
        },
        **about_this_checkout(),
    }


def measure_memory(arguments: argparse.Namespace) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        pictures = [(path, path.name) for path in dataset.find_sample_photographs()]
        with shard_writer.local_workers(2) as executor:
            options = shard_writer.Options(tile=128, samples_per_shard=100)
            shard_writer.write(pictures, Path(folder), options, executor=executor)
        index = shards.read_index(folder)
        plan = shards.make_plan(
            index,
            seed=0,
            global_batch_size=arguments.batch_size,
            crops_per_image=1,
            crop_size=arguments.crop_size,
        )
        steps = arguments.samples // arguments.batch_size
        source = stream.CropStream(
            index=index,
            plan=plan,
            scale=arguments.scale,
            channels=3,
            crop_size=arguments.crop_size,
            bits=16,
            degradation=Degradation(),
            rank=0,
            world_size=1,
            first_step=0,
            last_step=steps,
        )
        resident = [
            resident_megabytes()
            for step, _ in enumerate(stream.batches(source, num_workers=0, pin_memory=False))
            if step + 1 in (max(1, steps // 10), steps)
        ]
    return {
        "what": "memory",
        "ours": round(resident[-1], 1),
        "reference": round(resident[0], 1),
        "ratio": round(resident[-1] / resident[0], 3),
        "unit": "MB resident",
        "samples": steps * arguments.batch_size,
        "epochs": steps // plan.steps_per_epoch,
        **about_this_checkout(),
    }


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def about_this_checkout() -> dict[str, object]:
    here = Path(__file__).resolve().parent
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True
    )
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "commit": described.stdout.strip() or None,
    }


def main() -> None:
    arguments = parse_arguments()
    with exit_on_user_error():
        for name in ("batch_size", "crop_size", "repetitions", "samples"):
            if getattr(arguments, name) < 1:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option}: expected 1 or more, found {getattr(arguments, name)}")
        if arguments.crop_size % arguments.scale or arguments.crop_size < 32:
            raise UserError(
                f"--crop-size: expected a multiple of {arguments.scale}, 32 or more, found "
                f"{arguments.crop_size}"
            )
        measures = {"step": measure_step, "memory": measure_memory}
        result = measures[arguments.what](arguments)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
