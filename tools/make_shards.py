#!/usr/bin/env python
"""Write pictures as tar shards for streaming, index shards made by others, or verify shards."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path

from tqdm import tqdm

from sr_dist import signals
from sr_dist.errors import UserError, exit_on_user_error

AGAIN = "The same command goes on where it was."
_LISTED = 20  # of what cannot be used

EXAMPLE = """
examples:
  python tools/make_shards.py --images data/images/train.txt --output data/shards
  python tools/make_shards.py index laion/00000.tar laion/00001.tar
  python tools/make_shards.py verify data/shards
  python tools/make_shards.py --images /nfs/images --output /nfs/shards --dask tcp://host:8786

index reads the headers of pictures, verify decodes all of them.

Output: WebDataset tars (shard-000000.tar, …) with a picture and a .json for each sample, index.json
with count, bytes and sha256 of each tar, and rejects.jsonl where pictures could not be used. The
same pictures and options give the same bytes with any number of workers. A stopped run goes on with
the same command.
"""


def parse_arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="make_shards.py --images DIR|LIST --output DIR [options]\n"
        "       make_shards.py index TAR|DIR…\n"
        "       make_shards.py verify DIR|INDEX…",
    )
    if words[:1] and words[0] in ("index", "verify"):
        parser.add_argument("command", choices=("index", "verify"))
        parser.add_argument("shards", nargs="+", metavar="SHARDS")
        parser.add_argument(
            "--min-size",
            type=int,
            default=1,
            metavar="N",
            help="pictures with a shorter side cannot be used, as by larger crops (default 1)",
        )
        return parser.parse_args(words)
    if words[:1] and not words[0].startswith("-"):
        parser.error(f"unknown command {words[0]!r}; expected index, verify, or --images DIR|LIST")
    parser.add_argument(
        "--images", required=True, type=Path, metavar="DIR|LIST", help="a folder, or a path a line"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="a new folder for the shards"
    )
    parser.add_argument(
        "--tile",
        type=int,
        metavar="N",
        help="cut pictures into tiles of at least N pixels a side (default 256); 0: whole pictures",
    )
    parser.add_argument(
        "--reduce",
        type=int,
        nargs="+",
        default=[1],
        metavar="N",
        help="write each picture at 1/N of its size, for each N given: 1 2 adds copies of half the "
        "size, which are sharper and show more of a picture in a crop (default 1)",
    )
    parser.add_argument(
        "--encode",
        choices=("webp", "png", "jpeg", "keep"),
        default="webp",
        help="webp: lossless (default); jpeg: quality 95; keep: the original bytes, whole",
    )
    parser.add_argument(
        "--samples-per-shard", type=int, default=1000, metavar="N", help="about (default 1000)"
    )
    parser.add_argument(
        "--channels", type=int, choices=(1, 3), default=3, help="3: RGB (default), 1: gray"
    )
    parser.add_argument(
        "--min-size",
        type=int,
        default=96,
        metavar="N",
        help="reject pictures with a shorter side (default 96)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the pictures")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: one for each processor)",
    )
    parser.add_argument(
        "--dask",
        metavar="ADDRESS",
        help="a Dask scheduler, tcp://host:8786, whose workers do the work instead",
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first rejected picture")
    return parser.parse_args(words)


def progress(items, what, total):  # type: ignore[no-untyped-def]
    return tqdm(items, desc=what, total=total, disable=None)


def main() -> None:
    words = sys.argv[1:]
    arguments = parse_arguments(words)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with exit_on_user_error(AGAIN):
        if getattr(arguments, "command", "") == "index":
            index(arguments.shards, arguments.min_size)
        elif getattr(arguments, "command", "") == "verify":
            verify(arguments.shards, arguments.min_size)
        else:
            write(arguments)


def write(arguments: argparse.Namespace) -> None:
    from sr_dist import images, pool, shard_writer

    if arguments.encode == "keep" and arguments.tile:
        raise UserError("--encode keep stores whole pictures; leave --tile out")
    if arguments.encode == "keep" and arguments.reduce != [1]:
        raise UserError("--encode keep stores pictures as they are; leave --reduce out")
    if len(set(arguments.reduce)) < len(arguments.reduce):
        raise UserError(f"--reduce: each number once, found {arguments.reduce}")
    tile = arguments.tile if arguments.tile is not None else 256
    for name, value, least in (
        ("--tile", tile, 0),
        ("--samples-per-shard", arguments.samples_per_shard, 1),
        ("--min-size", arguments.min_size, 1),
        ("--reduce", min(arguments.reduce), 1),
        ("--workers", arguments.workers, 1),
        ("--seed", arguments.seed, 0),
    ):
        if value < least:
            raise UserError(f"{name}: expected {least} or more, found {value}")
    options = shard_writer.Options(
        tile=0 if arguments.encode == "keep" else tile,
        reductions=tuple(sorted(arguments.reduce)),
        encode=arguments.encode,
        samples_per_shard=arguments.samples_per_shard,
        channels=arguments.channels,
        min_size=arguments.min_size,
        seed=arguments.seed,
    )
    pictures = images.list_pictures(arguments.images)
    output = arguments.output
    if arguments.dask:  # its workers may have another working folder
        pictures = [(path.resolve(), name) for path, name in pictures]
        output = output.resolve()
    shard_writer.check_output(pictures, output)
    with signals.left_at_once(AGAIN):
        import webdataset  # noqa: F401 (here, since it loads torch, which `write` needs)
    try:
        with (
            dask_workers(arguments.dask)
            if arguments.dask
            else pool.local_workers(arguments.workers) as executor
        ):
            result = shard_writer.write(
                pictures,
                output,
                options,
                executor=executor,
                strict=arguments.strict,
                progress=progress,
            )
    except pool.LostWorker as error:
        shard_writer.remove_partial(output)
        raise UserError(
            f"{error}; run the same command to go on, with fewer --workers or a smaller "
            "--samples-per-shard"
        ) from None
    except KeyboardInterrupt:
        if not arguments.dask:  # whose workers may still be writing
            shard_writer.remove_partial(output)
        raise
    done = "complete already: " if result.already_complete else ""
    print(f"{arguments.output}: {done}{result.samples} samples in {result.shards} shard(s)")
    if result.rejects:
        print(f"{len(result.rejects)} picture(s) rejected (rejects.jsonl):")
        print_some(result.rejects)


@contextlib.contextmanager
def dask_workers(address: str) -> Iterator[Executor]:
    """The workers of a Dask cluster, which must see the same folders under the same names."""
    try:
        import distributed
    except ImportError:
        raise UserError("--dask needs distributed: pip install 'sr_dist[cluster]'") from None
    try:
        client = distributed.Client(address, timeout="10s")
    except (OSError, TimeoutError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--dask: no scheduler answers at {address}: {reason}") from None
    with client:
        if not client.scheduler_info()["workers"]:
            raise UserError(f"--dask: the scheduler at {address} has no workers; start some first")
        try:
            yield client.get_executor(pure=False)
        except distributed.scheduler.KilledWorker as error:
            raise UserError(
                f"--dask: workers died again and again over the same shard ({error}); run the same "
                "command to go on, with a smaller --samples-per-shard or workers with more memory"
            ) from None


def index(given: list[str], min_size: int) -> None:
    from sr_dist import indexing, shards

    if min_size < 1:
        raise UserError(f"--min-size: expected 1 or more, found {min_size}")
    tars: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            tars += sorted(path.glob("*.tar"))
        elif path.is_file():
            tars.append(path)
        else:
            raise UserError(f"{path} does not exist; expected a tar or a folder of tars")
    if not tars:
        raise UserError(f"no tars in {', '.join(given)}")
    target, unusable = indexing.index(tars, progress, min_size=min_size)
    samples = shards.read_index(str(target)).samples
    print(f"{target}: {samples} samples in {len(tars)} shard(s)")
    if unusable:
        print(f"{len(unusable)} sample(s) cannot be used; train with stream.on_error=skip:")
        print_some(unusable)


def print_some(lines: Sequence[str]) -> None:
    print("\n".join(f"  {line}" for line in lines[:_LISTED]))
    if len(lines) > _LISTED:
        print(f"  … and {len(lines) - _LISTED} more")


def verify(given: list[str], min_size: int) -> None:
    from sr_dist import indexing, shards

    problems = [
        problem for address in given for problem in indexing.verify(address, progress, min_size)
    ]
    if problems:
        raise UserError(f"{len(problems)} problem(s):\n  " + "\n  ".join(problems))
    for address in given:
        found = shards.read_index(address)
        print(f"{address}: {found.samples} samples in {len(found.shards)} shard(s), all whole")


if __name__ == "__main__":
    main()
