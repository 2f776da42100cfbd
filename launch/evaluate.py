#!/usr/bin/env python
"""Measure models and classical methods against HR pictures."""

import argparse
import functools
import json
import logging
import sys
from pathlib import Path

from sr_dist import signals, tiles, workers
from sr_dist.errors import UserError, exit_on_user_error

EXAMPLE = """
examples:
  python launch/evaluate.py --data photos/ --method bicubic --checkpoint runs/quickstart \\
      --scale 4 --output results/
  python launch/evaluate.py --data Set5/HR --lr Set5/LR_bicubic/X4 --checkpoint netG_4x.pth.tar \\
      --scale 4 --output results/

Writes metrics.json, metrics.csv (a row per picture), side-by-side pictures and report.html into the
output folder. The last line printed is the content of metrics.json. Gray pictures need a model of
one channel; those of the package are measured on them as launch/upscale.py uses them, which
enlarges gray as three equal channels with any model of colour.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="HR",
        help="HR pictures: a folder, one picture, a list, or shards",
    )
    parser.add_argument(
        "--lr", type=Path, metavar="DIR", help="given LR pictures (default: made by bicubic)"
    )
    parser.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        type=Path,
        metavar="FILE_OR_RUN",
        help="a run's folder, a checkpoint's, a .pth.tar file, an exported model, owner/name on "
        "Hugging Face, or a model of the package; may be given several times (default, where no "
        "--method is given either: bicubic and the package's x4 model)",
    )
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        choices=("nearest", "bilinear", "bicubic", "lanczos"),
        help="a classical method; may be given several times",
    )
    parser.add_argument(
        "--scale", type=int, metavar="N", help="enlargement (default: the first checkpoint's)"
    )
    parser.add_argument(
        "--protocol", choices=("y", "rgb"), default="y", help="luma (default) or rgb"
    )
    parser.add_argument(
        "--bits",
        type=int,
        metavar="N",
        help="significant bits of 16-bit gray pictures (default: those that the run was trained "
        "with, or 16)",
    )
    parser.add_argument(
        "--lpips",
        type=Path,
        metavar="FILE",
        help="measure LPIPS too; FILE: weights of torchvision's squeezenet1_1",
    )
    parser.add_argument(
        "--tile",
        type=int,
        default=tiles.SIDE,
        metavar="N",
        help="side of the tiles that bound the memory, LR pixels (default %(default)s)",
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="a folder for the results"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    workers.share_processors()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with exit_on_user_error():
        with signals.left_at_once():
            import torch
            from tqdm import tqdm

            from sr_dist import evaluate, generators, images, lpips, metrics, report, upscale

        scale = arguments.scale
        if not arguments.method and not arguments.checkpoint:
            logging.info("measuring bicubic and %s, a model of the package", generators.DEFAULT)
            arguments.method, arguments.checkpoint = ["bicubic"], [Path(generators.DEFAULT)]
        if scale is None and not arguments.checkpoint:
            raise UserError("classical methods enlarge any number of times: give --scale, as in 4")
        if scale is not None and scale < 2:
            raise UserError(f"--scale: expected 2 or more, found {scale}")
        if arguments.bits is not None and not 9 <= arguments.bits <= 16:
            raise UserError(f"--bits: expected 9 to 16, found {arguments.bits}")
        tiles.check(arguments.tile)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded = {path: generators.load(path) for path in arguments.checkpoint}
        for path, (_, description) in loaded.items():
            scale = scale or description["scale"]
            if description["scale"] != scale:
                other = "--scale is" if arguments.scale else f"{arguments.checkpoint[0]} enlarges"
                raise UserError(
                    f"{path} enlarges {description['scale']} times, but {other} {scale}; "
                    "measure models of one scale at a time"
                )
        upscalers = {name: evaluate.classical(name, scale) for name in arguments.method}
        channels, learned = {}, []
        for own, (path, (generator, description)) in zip(
            generators.names(list(loaded)), loaded.items(), strict=True
        ):
            channels[path] = description["channels"]
            generator.to(device=device, memory_format=torch.channels_last)
            name = evaluate.unused_name(own, {*upscalers, "LR", "HR"})
            learned.append(name)
            upscalers[name] = evaluate.learned(generator, scale=scale, tile=arguments.tile)
        if len(set(channels.values())) > 1:
            listing = ", ".join(f"{path} has {number}" for path, number in channels.items())
            raise UserError(
                f"models of different numbers of channels cannot be compared: {listing}"
            )
        given = evaluate.local_files(arguments.data)
        given += images.find(arguments.lr) if arguments.lr else []
        report.check_output(arguments.output, given)
        gray = evaluate.is_gray(arguments.data)
        wanted = next(iter(channels.values()), 1 if gray else 3)
        if gray and wanted == 3:
            for path in channels:
                if str(path) not in generators.shipped():
                    raise UserError(
                        f"{arguments.data} holds gray pictures alone, and {path} was made for "
                        "colour; measure a model with data.channels 1"
                    )
            logging.info("gray pictures are enlarged as launch/upscale.py does: as three channels")
            wanted = 1
            for name in learned:
                upscalers[name] = functools.partial(upscale.gray_as_colour, upscalers[name])
        if not gray and wanted == 1:
            logging.info("the model is of one channel: colour pictures are measured as luma")
        bits = {path: generators.bits_of(path) for path in channels}
        significant = arguments.bits or next(filter(None, bits.values()), 16)
        data = {
            "data": arguments.data,
            "scale": scale,
            "channels": wanted,
            "lr_folder": arguments.lr,
            "bits": significant,
            "least": lpips.LEAST if arguments.lpips else 0,
        }
        distance = lpips.build(arguments.lpips, device) if arguments.lpips else None
        checked = evaluate.check(**data)
        if checked.deep and not arguments.bits and len(set(bits.values()) - {None}) > 1:
            listing = ", ".join(f"{path} has {number}" for path, number in bits.items() if number)
            raise UserError(f"models of different significant bits: {listing}; choose with --bits")
        pairs = evaluate.read_pairs(**data)
        protocol = metrics.protocol(
            arguments.protocol,
            scale,
            lpips=distance is not None,
            bits=significant if checked.deep else None,
        )
        with report.Writer(
            arguments.output, data=arguments.data, scale=scale, protocol=protocol, models=learned
        ) as writer:
            rows = evaluate.evaluate(
                upscalers,
                tqdm(pairs, total=checked.pictures, unit="picture", disable=None),
                colour=arguments.protocol,
                border=scale,
                lpips=distance,
                look=writer.add,
            )
            summary = writer.finish(rows)
        for mean in evaluate.averages(rows):
            perceived = "" if mean.lpips is None else f"   LPIPS {mean.lpips:.4f}"
            print(
                f"{mean.upscaler:20} PSNR {mean.psnr:7.3f} dB   SSIM {mean.ssim:.4f}{perceived}   "
                f"({arguments.protocol}, border {scale})"
            )
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
