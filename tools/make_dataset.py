#!/usr/bin/env python
"""Gather pictures into one folder: every one decoded once, exact duplicates dropped."""

import argparse
import os
import signal
from pathlib import Path

from tqdm import tqdm

from sr_dist import archives
from sr_dist.errors import UserError, exit_on_user_error

ARCHIVES = tuple(archives.SETS)
EXAMPLE = """
examples:
  python tools/make_dataset.py --source sample --output data/images
  python tools/make_dataset.py --source folder --input ~/Pictures /mnt/scans --output data/images
  python tools/make_dataset.py --source urls --input photos.tsv000 --add-query 'w=2048' \\
      --count 5000 --output data/unsplash
  python tools/make_dataset.py --source div2k --output data/div2k
  python tools/make_dataset.py --source flickr2k --output data/flickr2k --address URL
  PEXELS_API_KEY=… python tools/make_dataset.py --source pexels --query 'old town' --count 200 \\
      --output data/pexels
  python tools/make_dataset.py --source kaggle --dataset nih-chest-xrays/data --output data/xrays

sources:
  sample    the colour photographs that ship inside scikit-image; no network
  folder    your own jpg, png, webp, tiff and bmp files, nested folders included
  urls      a text file with an address a line (# starts a comment), or a CSV or TSV with a header;
            columns of addresses, licences and authors are found by their usual names. The file
            photos.tsv000 of the Unsplash Lite data set is taken as it is.
  div2k     the 800 + 100 pictures of DIV2K, from its archives (3.8 GB), into DIV2K_train_HR and
            DIV2K_valid_HR
  flickr2k  the 2650 pictures of Flickr2K, from its archive (20 GB). Its server was reported out of
            reach in 2024; --address names a copy elsewhere, zip or tar.
  pexels    photographs of a search, or the curated ones; the key is read from PEXELS_API_KEY
  kaggle    a data set, through the package kagglehub and into its cache, then as folder does

urls, div2k, flickr2k, pexels and kaggle need pip install 'sr_dist[sources]'.

Running again adds what is new or missing; a download goes on where it broke off. manifest.csv in
the output says of each downloaded picture (but for kaggle's): file, address, sha256, bytes, licence
and attribution where they are known; failures.csv lists what could not be had, and why. Exit status
0: there are pictures, and what was left out is listed; 2: there are none, or something that was
given is wrong; 75: stopped, run again to go on.
"""

# Which sources an option is for.
ONLY = {
    "input": ("folder", "urls"),
    "url_column": ("urls",),
    "add_query": ("urls", "pexels"),
    "query": ("pexels",),
    "count": ("urls", "pexels"),
    "address": (*ARCHIVES, "pexels"),
    "dataset": ("kaggle",),
    "workers": ("urls", "pexels"),
    "per_host": ("urls", "pexels"),
    "max_megabytes": ("urls", "pexels"),
    "max_pixels": ("urls", "pexels"),
    "attempts": ("urls", "pexels", *ARCHIVES),
    "timeout": ("urls", "pexels", *ARCHIVES),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sources = ("sample", "folder", "urls", *ARCHIVES, "pexels", "kaggle")
    parser.add_argument("--source", required=True, choices=sources, help="see below")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="where the pictures go"
    )

    def add(name: str, metavar: str, text: str, **options) -> None:  # type: ignore[no-untyped-def]
        of = ", ".join(ONLY[name.replace("-", "_")])
        parser.add_argument(f"--{name}", metavar=metavar, help=f"{of}: {text}", **options)

    add("input", "PATH", "folders and pictures, or lists of addresses", nargs="+", type=Path)
    add("url-column", "NAME", "the column that holds the addresses")
    add("add-query", "TEXT", "added to each address, as w=2048 for a smaller picture of Unsplash")
    add("query", "WORDS", "what to search for; without it, the curated photographs")
    add("count", "N", "at most so many (urls: all; pexels: 80)", type=int)
    add("address", "URL", "fetch from here instead: one for each archive; the API", nargs="+")
    add("dataset", "OWNER/NAME", "as in the address of its page")
    add("workers", "N", "requests at once (8)", type=int)
    add("per-host", "N", "requests at once to one host (4)", type=int)
    add("max-megabytes", "N", "refuse larger files (200)", type=int)
    add("max-pixels", "N", "refuse pictures of more (80000000)", type=int)
    add(
        "attempts", "N", "in a row that bring a file no further, until it is given up (5)", type=int
    )
    add("timeout", "SECONDS", "to wait for an answer, and for its next piece (30)", type=float)
    return parser.parse_args()


def progress(items, what, total):  # type: ignore[no-untyped-def]
    return tqdm(items, desc=what, total=total, disable=None)


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with exit_on_user_error("The same command goes on from here."):
        refuse_stray_options(arguments)
        gather(arguments)


def refuse_stray_options(arguments: argparse.Namespace) -> None:
    for name, of in ONLY.items():
        value = getattr(arguments, name)
        option = f"--{name.replace('_', '-')}"
        if value is not None and arguments.source not in of:
            raise UserError(
                f"{option} is for --source {' or '.join(of)}; --source {arguments.source} "
                "has no use for it"
            )
        if isinstance(value, int) and value < 1:
            raise UserError(f"{option}: expected 1 or more, found {value}")
        if isinstance(value, float) and not 0.1 <= value <= 3600:
            raise UserError(f"{option}: expected 0.1 to 3600 seconds, found {value:g}")


def gather(arguments: argparse.Namespace) -> None:
    if arguments.source in ("folder", "urls") and not arguments.input:
        what = "DIR" if arguments.source == "folder" else "FILE"
        raise UserError(f"--source {arguments.source} needs --input {what}")
    if arguments.source == "kaggle" and not arguments.dataset:
        raise UserError("--source kaggle needs --dataset OWNER/NAME, as nih-chest-xrays/data")
    if arguments.source == "pexels" and not os.environ.get("PEXELS_API_KEY", "").strip():
        raise UserError(
            "PEXELS_API_KEY is not set; get a key at https://www.pexels.com/api/ and export it"
        )
    if arguments.source in ("sample", "folder", "kaggle"):
        collect(arguments)
    elif arguments.source in ("urls", "pexels"):
        download(arguments)
    else:
        unpack(arguments)


def collect(arguments: argparse.Namespace) -> None:
    from sr_dist import dataset

    if arguments.source == "sample":
        pictures = [(path, Path(path.name)) for path in dataset.find_sample_photographs()]
    elif arguments.source == "folder":
        pictures = dataset.find_pictures(arguments.input)
    else:
        from sr_dist import sources

        pictures = dataset.find_pictures([sources.download_from_kaggle(arguments.dataset)])
    result = dataset.collect(pictures, arguments.output, progress)
    for path, reason in result.rejects:
        print(f"left out: {path} {reason}")
    if arguments.source == "folder":
        for line in dataset.passed_over(arguments.input, arguments.output):
            print(line)
    print(
        f"{arguments.output}: {result.copied} copied, {result.present} there already, "
        f"{result.duplicates} duplicate(s) dropped, {len(result.rejects)} left out"
    )


def download(arguments: argparse.Namespace) -> None:
    from sr_dist import manifest, sources

    options = web_options(arguments)
    note = ""
    if arguments.source == "urls":
        pictures = [
            picture
            for path in arguments.input
            for picture in sources.read_addresses(path, arguments.url_column)
        ][: arguments.count]
    else:
        key = os.environ["PEXELS_API_KEY"].strip()
        api = one_address(arguments.address) or sources.PEXELS
        count = arguments.count or 80
        pictures, why = sources.search_pexels(arguments.query or "", count, key, options, api)
        if len(pictures) < count:
            note = f"Pexels gave {len(pictures)} of {count} photographs{why and ': ' + why}"
    if arguments.add_query:
        pictures = sources.with_query(pictures, arguments.add_query)
    limit = arguments.max_pixels or sources.MAX_PIXELS
    result = sources.fetch_pictures(pictures, arguments.output, options, limit, progress)
    for address, reason in result.failures[:20]:
        print(f"left out: {address} {reason}")
    if len(result.failures) > 20:
        more = len(result.failures) - 20
        print(f"and {more} more; all are in {arguments.output / manifest.FAILURES}")
    if note:
        print(note)
    print(
        f"{arguments.output}: {result.fetched} downloaded, {result.present} there already, "
        f"{result.duplicates} duplicate(s) dropped, {len(result.failures)} left out"
    )


def unpack(arguments: argparse.Namespace) -> None:
    chosen = archives.SETS[arguments.source]
    copies = archives.pair(chosen, arguments.address or [])
    for archive in chosen:
        copy = copies.get(archive.folder)
        options = web_options(arguments)
        fresh = archives.fetch(archive, arguments.output, options, copy, progress)
        done = "unpacked" if fresh else "there already"
        print(f"{arguments.output / archive.folder}: {archive.pictures} pictures {done}")


def one_address(given: list[str] | None) -> str:
    if given and len(given) > 1:
        raise UserError(f"--address: --source pexels takes one, found {len(given)}")
    return given[0] if given else ""


def web_options(arguments: argparse.Namespace):  # type: ignore[no-untyped-def]
    from sr_dist import web

    names = ("workers", "per_host", "attempts", "timeout")
    given = {name: getattr(arguments, name) for name in names}
    if arguments.max_megabytes:
        given["max_bytes"] = arguments.max_megabytes * 10**6
    return web.Options(**{name: value for name, value in given.items() if value is not None})


if __name__ == "__main__":
    main()
