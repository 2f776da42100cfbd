#!/usr/bin/env python
"""Measure sr_dist against the plain way of doing the same; the last line is one JSON object."""

import argparse
import importlib
import json
from pathlib import Path

from sr_dist import workers
from sr_dist.errors import UserError, exit_on_user_error

EXAMPLE = """
examples:
  python tools/benchmark.py step
  python tools/benchmark.py upscale --checkpoint runs/swift_srgan_x4
  python tools/benchmark.py step --mixed-precision bf16      # ours; the reference stays as it was
  python tools/benchmark.py curve --photographs photos --hr Set14/HR --lr Set14/LR \\
      --content-weights mobilenet_v2.pth --output curve

step      pictures/s of a training step of Swift-SRGAN with all four losses. The reference is the
          loop of the original scripts: two forwards of the generator, NCHW, the discriminator's
          backward through the generator's graph, discriminator gradients in the generator's step,
          AdamW as it comes, every loss read back in every step. --profile says where time goes.
data      crops/s of the loader, with one worker, from photographs of 1024x1024. The reference is
          the original scripts' loader, which decodes the whole picture for every crop.
upscale   pictures/s of enlarging 256x256 to 1024x1024 and a 1920x1080 frame to 3840x2160. The
          reference is the generator as it was published, or its trace. Peak memory at 4K and 8K.
          bf16 where the machine computes in it, and the PSNR that each reaches.
scaling   pictures/s of two processes with one thread each against one, for both heads of the
          discriminator.
curve     dB on pictures never trained on against minutes, of a recipe and of the original scripts'
          loop and loader on the same photographs; a table and curve.svg. Takes twice as long as the
          recipe. `ours` and `reference` are minutes to 1 dB above bicubic.
startup   seconds from the command to the end of its first step, against importing torch,
          torchvision and accelerate alone (here ratio is how many times as long); the same when
          resuming in mid-epoch, and with 10,000 shards.
memory    resident memory of a process that reads samples through a loader worker, and of that one,
          after a tenth of them (or the first epoch) and after all. On Linux alone.

Ours and the reference take turns, A B A B; medians and spreads are reported. `ratio` is how many
times better ours is.
"""
PARTS = ("step", "data", "upscale", "scaling", "curve", "startup", "memory")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=PARTS)
    parser.add_argument(
        "--samples", type=int, default=50_000, metavar="N", help="memory: samples read"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N")
    parser.add_argument("--crop-size", type=int, default=96, metavar="N")
    parser.add_argument("--scale", type=int, default=4, choices=(2, 4, 8))
    parser.add_argument("--repetitions", type=int, default=10, metavar="N", help="timed turns each")
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument(
        "--photographs",
        type=Path,
        metavar="DIR",
        help="data: instead of scikit-image's; curve: to train on",
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE_OR_RUN", help="upscale: weights instead of random"
    )
    curve = parser.add_argument_group("curve")
    curve.add_argument("--hr", type=Path, metavar="DIR", help="pictures to measure on")
    curve.add_argument("--lr", type=Path, metavar="DIR", help="their low-resolution ones")
    curve.add_argument(
        "--content-weights", type=Path, metavar="FILE", help="MobileNetV2's, for the reference"
    )
    curve.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        default=Path(__file__).resolve().parents[1] / "configs" / "swift_srgan_x4_psnr.yaml",
        help="recipe of ours (default: configs/swift_srgan_x4_psnr.yaml)",
    )
    curve.add_argument(
        "--minutes", type=float, metavar="N", help="of the reference (default: what ours took)"
    )
    curve.add_argument(
        "--every", type=float, default=2, metavar="N", help="minutes between its points (default 2)"
    )
    curve.add_argument(
        "--output", type=Path, metavar="DIR", help="keeps what was measured; not done again"
    )
    parser.add_argument("--profile", action="store_true", help="step: print where time goes")
    parser.add_argument("--verbose", action="store_true", help="scaling: what the launcher says")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # scaling: one process
    return parser.parse_args()


def check(arguments: argparse.Namespace) -> None:
    for name in ("batch_size", "crop_size", "repetitions", "samples"):
        if getattr(arguments, name) < 1:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: expected 1 or more, found {getattr(arguments, name)}")
    if arguments.crop_size % arguments.scale or arguments.crop_size < 32:
        raise UserError(
            f"--crop-size: expected a multiple of {arguments.scale}, 32 or more, found "
            f"{arguments.crop_size}"
        )


def main() -> None:
    arguments = parse_arguments()
    workers.share_processors()  # as the commands do
    with exit_on_user_error():
        check(arguments)
        part = importlib.import_module(f"benchmarks.{arguments.what}")
        if arguments.worker:
            part.work(arguments)
            return
        result = part.measure(arguments)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
