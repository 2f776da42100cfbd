"""Enlarging pictures, against the generator as it was published, eager and traced."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from benchmarks import measuring
from sr_dist import evaluate, generators, images, machine, models, tensors, tiles, upscale

REPOSITORY = Path(__file__).resolve().parents[2]
_TOLERANCE = 1e-5  # between our fp32 and the published form, of outputs in [0, 1]
_TRAINED = "swift_srgan_x4_psnr"  # of the package
_LARGE = (("4K", 540, 960), ("8K", 1080, 1920))  # results of x4, and what they are made of


@dataclasses.dataclass(frozen=True)
class Job:
    """One picture to enlarge."""

    height: int
    width: int
    scale: int
    checkpoint: Path | None
    engine: str = "fp32"
    traced: bool = False

    def picture(self) -> images.Picture:
        side = max(self.height, self.width)
        return measuring.photographs(None, side)[0][: self.height, : self.width]

    def generator(self) -> nn.Module:
        if self.checkpoint is not None:
            return generators.load(self.checkpoint)[0]
        torch.manual_seed(0)
        return models.build_generator("swift_srgan", scale=self.scale, channels=3).eval()


@contextlib.contextmanager
def ours(job: Job) -> Iterator[Callable[[], object]]:
    generator = upscale.prepare(job.generator(), _device())
    picture = job.picture()
    yield lambda: upscale.upscale(
        generator, picture, scale=job.scale, tile=tiles.SIDE, engine=job.engine
    )


@contextlib.contextmanager
def reference(job: Job) -> Iterator[Callable[[], object]]:
    """The whole picture at once, NCHW in fp32, BatchNorm in its place."""
    generator = job.generator().to(_device())
    lr = torch.from_numpy(job.picture()).permute(2, 0, 1)[None].contiguous().to(_device())
    run: Callable[[torch.Tensor], torch.Tensor] = generator
    with torch.inference_mode(), warnings.catch_warnings():
        if job.traced:
            warnings.simplefilter("ignore")  # torch.jit is deprecated, and was the published way
            run = torch.jit.trace(generator, lr.float() / 255, check_trace=False)
        yield lambda: tensors.to_pictures(run(lr.float() / 255))


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    cases, scale_4 = {}, arguments.checkpoint
    engines = [each for each in upscale.ENGINES if each != "bf16" or machine.has_bf16(_device())]
    references = {"eager": False, "trace": True}
    for name, job in {
        "256x256 to 1024x1024": Job(256, 256, 4, scale_4),
        "1920x1080 to 3840x2160": Job(1080, 1920, 2, None),
    }.items():
        timings = measuring.take_turns_in_processes(
            {
                **{each: (ours, (dataclasses.replace(job, engine=each),)) for each in engines},
                **{
                    each: (reference, (dataclasses.replace(job, traced=traced),))
                    for each, traced in references.items()
                },
            },
            arguments.repetitions,
        )
        rates = {name: measuring.rates(its, 1) for name, its in timings.items()}
        faster = max(references, key=lambda its: statistics.median(rates[its]))
        references = {faster: references[faster]}  # the frame takes it minutes
        for engine in engines:
            cases[f"{name}, {engine}"] = (rates[engine], rates[faster])
    return {
        **measuring.summary("upscale", cases, "pictures/s", more_is_better=True),
        "difference": difference(Job(96, 96, 4, scale_4)),
        "psnr_db": psnr(arguments.checkpoint, engines),
        "peak_megabytes": peaks(arguments.checkpoint),
        "config": {
            "tile": tiles.SIDE,
            "checkpoint": str(arguments.checkpoint or "random weights"),
            "engines": engines,
            "reference": f"{faster}, the faster of the eager generator and its trace",
        },
        **measuring.about(_device()),
    }


def difference(job: Job) -> float:
    """The greatest between ours in fp32 and the published form, in [0, 1].

    Raises:
        AssertionError: ours computes something else.
    """
    generator, picture = job.generator().to(_device()), job.picture()
    lr = tensors.to_float(tensors.to_batch([picture]).to(_device()))
    # GPUs round what convolutions multiply to TF32, ours and the other; not here.
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        greatest = float((upscale.prepare(generator, lr.device)(lr) - generator(lr)).abs().max())
    assert greatest <= _TOLERANCE, greatest
    return greatest


def psnr(checkpoint: Path | None, engines: list[str]) -> dict[str, float]:
    """What each engine reaches on the sample photographs (luma, a border of `scale`), in dB.

    Of a trained model, since it is what rounding costs that is asked.
    """
    generator, description = generators.load(checkpoint or _TRAINED)
    generator, scale = upscale.prepare(generator, _device()), description["scale"]
    upscalers = {
        engine: functools.partial(
            upscale.upscale, generator, scale=scale, tile=tiles.SIDE, engine=engine
        )
        for engine in engines
    }
    pairs = (
        evaluate.Pair(str(number), tensors.reduce(hr, scale), hr)
        for number, hr in enumerate(measuring.photographs(None, 512))
    )
    rows = evaluate.evaluate(upscalers, pairs, colour="y", border=scale)
    return {mean.upscaler: round(mean.psnr, 3) for mean in evaluate.averages(rows)}


def peaks(checkpoint: Path | None) -> dict[str, float]:
    """Peak megabytes of a 3840x2160 and a 7680x4320 result: of tensors on a GPU; on a CPU resident
    ones of launch/upscale.py.

    Those are medians of three runs: how well blocks fit in between what stays differs a little.
    """
    found = {}
    if _device().type == "cuda":
        for result, height, width in _LARGE:
            torch.cuda.reset_peak_memory_stats()
            with ours(Job(height, width, 4, checkpoint)) as run:
                run()
            found[result] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
        return {**found, "ratio": round(found["8K"] / found["4K"], 3)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if checkpoint is None:
            checkpoint = folder / "random.pth.tar"
            description = {"name": "swift_srgan", "scale": 4, "channels": 3}
            generators.save_published(Job(1, 1, 4, None).generator(), checkpoint, description)
        for result, height, width in _LARGE:
            images.save(Job(height, width, 4, None).picture(), folder / f"{result}.png")
            words = (
                *(REPOSITORY / "launch" / "upscale.py", "--checkpoint", checkpoint),
                *("--input", folder / f"{result}.png", "--output", folder / "out"),
                *("--engine", "fp32"),
            )
            # Of a shell of its own, so that the child it waits for is this one alone.
            code = (
                "import resource, subprocess, sys;"
                "subprocess.run(sys.argv[1:], check=True, stdout=2);"
                "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000)"
            )
            command = [sys.executable, "-c", code, sys.executable, *map(str, words)]
            runs = [
                subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                for _ in range(3)
            ]
            found[result] = round(statistics.median(map(float, runs)), 1)
    return {**found, "ratio": round(found["8K"] / found["4K"], 3)}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
