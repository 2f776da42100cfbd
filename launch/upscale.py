#!/usr/bin/env python
"""Enlarge pictures with a trained model."""

import argparse
import logging
import sys
from pathlib import Path

from sr_dist import signals, tiles, workers
from sr_dist.errors import UserError, exit_on_user_error

EXAMPLE = """
examples:
  python launch/upscale.py --input photo.jpg holiday/ --output out/
  python launch/upscale.py --checkpoint runs/quickstart --input photo.jpg --output out/

Each picture becomes NAME.png in the output folder (NAME.jpg.png and NAME.webp.png where two would
be one); folders keep their structure. Gray stays gray, and alpha stays; results have 8 bits a
channel, and replace those of before. What lies in an output folder inside an input one is not
enlarged again. A picture that cannot be used is reported at the end (exit status 2); the others are
done all the same.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE_OR_RUN",
        help="a run's folder, a checkpoint's, a .pth.tar file, an exported model, owner/name on "
        "Hugging Face, or a model of the package (default: its x4 model)",
    )
    parser.add_argument(
        "--input", required=True, nargs="+", type=Path, metavar="PATH", help="pictures and folders"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="a folder for the results"
    )
    parser.add_argument(
        "--tile",
        type=int,
        default=tiles.SIDE,
        metavar="N",
        help="side of the tiles that bound the memory, pixels of the input (default %(default)s; "
        f"{tiles.SMALLEST_SIDE} at least)",
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="what computes: bf16 is faster where the processor has it, and rounds more; auto "
        "(default) tries both on the first picture where it has, which takes some seconds, and "
        "takes bf16 if that is faster and within 45 dB of fp32",
    )
    parser.add_argument(
        "--bits",
        type=int,
        metavar="N",
        help="significant bits of 16-bit gray pictures (default: those that the run was trained "
        "with, or 16)",
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

            from sr_dist import dataset, generators, images, upscale

        if arguments.bits is not None and not 9 <= arguments.bits <= 16:
            raise UserError(f"--bits: expected 9 to 16, found {arguments.bits}")
        tiles.check(arguments.tile)
        if arguments.output.suffix.lower() in images.SUFFIXES and not arguments.output.is_dir():
            raise UserError(
                f"--output: expected a folder, found {arguments.output}; results are called as "
                "their pictures are, NAME.png"
            )
        pictures = dataset.find_pictures(arguments.input, apart_from=arguments.output)
        targets = dataset.png_targets([relative for _, relative in pictures])
        written = {(arguments.output / target).resolve() for target in targets}
        for path, _ in pictures:
            if path.resolve() in written:
                raise UserError(f"{path} would be overwritten by a result; choose another --output")
        checkpoint = arguments.checkpoint or Path(generators.DEFAULT)
        generator, description = generators.load(checkpoint)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        generator = upscale.prepare(generator, device)
        bits = arguments.bits or generators.bits_of(checkpoint) or 16
        rejects, replaced, engine = [], 0, arguments.engine
        for (path, _), target in zip(
            tqdm(pictures, unit="picture", disable=None), targets, strict=True
        ):
            try:
                if engine == "auto":
                    engine, why = upscale.fastest(
                        generator,
                        images.decode_with_alpha(path, bits)[0],
                        scale=description["scale"],
                        channels=description["channels"],
                    )
                    logging.info("--engine auto takes %s", why)
                result = upscale.upscale_any(
                    generator,
                    path,
                    scale=description["scale"],
                    channels=description["channels"],
                    tile=arguments.tile,
                    bits=bits,
                    engine=engine,
                )
            except images.PictureError as error:
                rejects.append(f"{path} {error}")
                continue
            replaced += (arguments.output / target).exists()
            images.save(result, arguments.output / target, images.colour_profile(path))
        for line in dataset.passed_over(arguments.input, arguments.output):
            print(line)
        again = f", of which {replaced} replaced what was there" if replaced else ""
        print(f"{len(pictures) - len(rejects)} picture(s) in {arguments.output}{again}")
        if rejects:
            raise UserError(
                f"{len(rejects)} picture(s) could not be used:\n  " + "\n  ".join(rejects)
            )


if __name__ == "__main__":
    main()
