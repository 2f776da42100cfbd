#!/usr/bin/env python
"""Gather pictures into one folder: every one decoded once, exact duplicates dropped."""

import argparse
from pathlib import Path

from tqdm import tqdm

from sr_dist.errors import UserError, exit_on_user_error

EXAMPLE = """
examples:
  python tools/make_dataset.py --source sample --output data/images
  python tools/make_dataset.py --source folder --input ~/Pictures /mnt/scans --output data/images

Sources: sample, the colour photographs that ship inside scikit-image (no network); folder, your own
jpg, png, webp, tiff and bmp files, nested folders included. Running again adds what is new.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", required=True, choices=("sample", "folder"))
    parser.add_argument(
        "--input", nargs="+", default=[], type=Path, metavar="DIR", help="for --source folder"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    with exit_on_user_error("The same command adds what is missing."):
        from sr_dist import dataset

        if arguments.source == "sample":
            if arguments.input:
                raise UserError("--input is for --source folder; the sample needs none")
            sample = dataset.find_sample_photographs()
            pictures = [(path, Path(path.name)) for path in sample]
        else:
            if not arguments.input:
                raise UserError("--source folder needs --input DIR")
            pictures = dataset.find_pictures(arguments.input)
        result = dataset.collect(
            pictures,
            arguments.output,
            lambda items, what, total: tqdm(items, desc=what, total=total, disable=None),
        )
    for path, reason in result.rejects:
        print(f"left out: {path} {reason}")
    print(
        f"{arguments.output}: {result.copied} copied, {result.present} there already, "
        f"{result.duplicates} duplicates dropped, {len(result.rejects)} left out"
    )


if __name__ == "__main__":
    main()
