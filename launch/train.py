#!/usr/bin/env python
"""Train a super-resolution model, on as many processes as the launcher started."""

import argparse
import contextlib
import logging
import os
import sys

from sr_dist import signals, workers
from sr_dist.errors import UserError, exit_on_user_error

AGAIN = "The same command goes on from the last checkpoint, if there is one."
EXAMPLE = """
examples:
  python launch/train.py --config configs/quickstart.yaml
  accelerate launch --config_file launch/accelerate/cpu_2_processes.yaml \\
      launch/train.py --config configs/quickstart.yaml train.epochs=5
  accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 \\
      launch/train.py --config configs/swift_srgan_x4.yaml --batch_size 16

The same command again goes on from the newest checkpoint of the run: the end of an epoch, or every
checkpoint.every_steps steps. configs/README.md lists all settings; a misspelt one is refused, with
the nearest valid name.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a recipe (YAML)")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that differ from it"
    )
    parser.add_argument("--upscale_factor", type=int, metavar="N", help="the same as data.scale=N")
    parser.add_argument("--num_epochs", type=int, metavar="N", help="the same as train.epochs=N")
    parser.add_argument(
        "--batch_size",
        type=int,
        metavar="N",
        help="crops per process: sets train.global_batch_size to N times the processes",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="say nothing but warnings, and the result at the end"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, say what would be done, and end"
    )
    return parser.parse_intermixed_args()


def main() -> None:
    parent = os.getppid()  # now: it may be gone when all is loaded
    arguments = parse_arguments()
    workers.share_processors()
    with exit_on_user_error(AGAIN), contextlib.ExitStack() as loading:
        loading.enter_context(signals.left_at_once(AGAIN))
        from tqdm.contrib.logging import logging_redirect_tqdm

        from sr_dist import config, distributed, train

        with distributed.said_once():
            overrides = all_overrides(arguments, distributed.launched_world_size())
            settings = config.load(arguments.config, overrides)
        level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
        if arguments.quiet:
            level = max(level, logging.WARNING)
        logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
        logging.getLogger("sr_dist.skipped").setLevel(logging.WARNING)  # on every rank
        with logging_redirect_tqdm():  # messages above the live progress line, not through it
            result = train.run(
                settings,
                dry=arguments.dry_run,
                quiet=arguments.quiet,
                launcher=parent if distributed.launched_alone() else None,
                met=loading.close,
            )
    if result is not None and result.means:
        print_summary(result)


def all_overrides(arguments: argparse.Namespace, world_size: int) -> list[str]:
    """Those given as `section.key=value`, and those by options."""
    batch_size = None if arguments.batch_size is None else arguments.batch_size * world_size
    found = list(arguments.overrides)
    for option, key, value in (
        ("--upscale_factor", "data.scale", arguments.upscale_factor),
        ("--num_epochs", "train.epochs", arguments.num_epochs),
        ("--batch_size", "train.global_batch_size", batch_size),
    ):
        if value is not None:
            for override in arguments.overrides:
                if override.startswith(f"{key}="):
                    raise UserError(f"{option} sets {key}, and so does {override}; leave one out")
            found.append(f"{key}={value}")
    return found


def print_summary(result: "train.Result") -> None:  # noqa: F821
    protocol = result.protocol
    print(
        f"\nPSNR and SSIM on the validation pictures (colour {protocol['colour']}, border "
        f"{protocol['border']}, range {protocol['data_range']}, SSIM {protocol['ssim']})"
    )
    perceived = result.means[0].lpips is not None
    print(f"  {'':10} {'PSNR dB':>8} {'SSIM':>7}" + f" {'LPIPS':>7}" * perceived)
    for mean in result.means:
        lpips = f" {mean.lpips:7.4f}" if perceived else ""
        print(f"  {mean.upscaler:10} {mean.psnr:8.3f} {mean.ssim:7.4f}{lpips}")
    if result.skipped:
        print(f"\n{result.skipped} sample(s) could not be used; others took their places")
    print(f"\nRun folder: {result.folder}")


if __name__ == "__main__":
    main()
