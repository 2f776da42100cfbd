#!/usr/bin/env python
"""Divide a folder of pictures into training and validation lists."""

import argparse
import logging
import sys
from pathlib import Path

from sr_dist.errors import exit_on_user_error

EXAMPLE = r"""
examples:
  python tools/split_dataset.py --images data/images --val-fraction 0.1
  python tools/split_dataset.py --images data/xrays --group-by '([0-9]+)_[0-9]+\.png$'  # by patient

Writes train.txt and val.txt, with paths relative to them. The bytes of a picture (and --seed)
decide where it goes, and a picture that is listed already stays where it is, so new pictures move
none of the old ones. Delete the lists to divide afresh. With --group-by, pictures of one group
(patient, scene, video) are never on both sides.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--images", required=True, type=Path, metavar="DIR", help="a folder of pictures"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where the lists go (default: the same folder)"
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="about this share of new pictures becomes validation (default 0.1)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="another division (default 0)"
    )
    parser.add_argument(
        "--group-by",
        metavar="REGEX",
        help="pictures in whose paths below DIR this finds the same (its first group, where it has "
        "one) go to the same side",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    with exit_on_user_error():
        from sr_dist import dataset

        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        train, validation = dataset.split(
            arguments.images,
            arguments.val_fraction,
            arguments.seed,
            arguments.output,
            arguments.group_by,
        )
    where = arguments.output or arguments.images
    print(f"{where}: {len(train)} for training, {len(validation)} for validation")


if __name__ == "__main__":
    main()
