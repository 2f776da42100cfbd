"""Pictures from the web: lists of addresses, Pexels, Kaggle."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import time
import urllib.parse
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sr_dist import download, images, storage, web
from sr_dist.dataset import Progress
from sr_dist.errors import UserError
from sr_dist.manifest import FAILURES, Manifest, Row, write_failures

MAX_PIXELS = 80_000_000  # of one picture; decoded, they take three bytes each
PEXELS = "https://api.pexels.com/v1"
_PEXELS_PER_PAGE = 80  # the most that it gives
_PARTIAL = ".partial"
_SUFFIX_OF = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "TIFF": ".tif"}
_SUFFIX_OF |= {"BMP": ".bmp"}

# Columns by name, the first that is there: small letters, without _ and blanks.
_ADDRESS = ("photoimageurl", "imageurl", "contenturl", "originalurl", "downloadurl", "url", "link")
_LICENCE = ("licence", "license", "licenceurl", "licenseurl", "rights")
_AUTHOR = ("attribution", "credit", "author", "creator", "photographer", "artist", "owner")
_PAGE = ("photourl", "originallandingurl", "foreignlandingurl", "landingurl", "pageurl", "page")
_UNSPLASH_LICENCE = (
    "Unsplash Dataset terms, https://github.com/unsplash/datasets/blob/master/TERMS.md"
)
_PEXELS_LICENCE = "Pexels licence, https://www.pexels.com/license/"


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture to fetch; an `address` that cannot be fetched is reported with the failures."""

    address: str
    licence: str = ""
    attribution: str = ""


@dataclasses.dataclass(frozen=True)
class Fetched:
    fetched: int
    present: int  # in the output folder already
    duplicates: int
    failures: list[tuple[str, str]]  # (address, reason)


def read_addresses(path: Path, url_column: str | None = None) -> list[Picture]:
    """The pictures that a text file, CSV or TSV lists.

    A text file has an address a line; blank lines and lines that start with # are skipped. A table
    has a header; the columns of addresses, licences and authors are found by their usual names,
    those of Unsplash Lite's photos.tsv000 among them.

    Raises:
        UserError: the file cannot be read, or no column holds addresses.
    """
    if not path.exists() or path.is_dir():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {found}; expected a text file, CSV or TSV of addresses")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(
            f"{path} is not UTF-8 text; expected an address a line, or a CSV or TSV with a header. "
            "Unpack it first if it is an archive."
        ) from None
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise UserError(f"{path} lists no addresses")
    is_list = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", lines[0]) is not None
    if is_list and url_column is not None:
        raise UserError(
            f"--url-column {url_column}: {path} has no header; its first line is {lines[0][:80]!r}"
        )
    if is_list and path.suffix.lower().startswith((".csv", ".tsv")) and re.search(r"[\t,]", text):
        raise UserError(
            f"{path} has no header: its first line is {lines[0][:80]!r}. Expected the names of the "
            "columns, one of them 'url'."
        )
    if is_list or url_column is None and not re.search(r"[\t,;]|url", lines[0].lower()):
        return [Picture(line) for line in lines]
    delimiter = next((mark for mark in "\t;" if mark in lines[0]), ",")
    table = io.StringIO(text[text.index(lines[0]) :], newline="")
    reader = csv.DictReader(table, delimiter=delimiter)
    try:
        pictures = _read_table(path, reader, url_column)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None
    if not pictures:
        raise UserError(f"{path} has a header and nothing below it")
    return pictures


def _read_table(path: Path, reader: csv.DictReader[str], url_column: str | None) -> list[Picture]:
    columns = {re.sub(r"[_\s]", "", name.lower()): name for name in reader.fieldnames or []}

    def column_of(names: Sequence[str]) -> str:
        return next((columns[name] for name in names if name in columns), "")

    if url_column is not None and url_column not in columns.values():
        raise UserError(
            f"{path} has no column {url_column!r}; it has {', '.join(columns.values())}"
        )
    address = url_column or column_of(_ADDRESS)
    if not address:
        raise UserError(
            f"{path} has no column that is known to hold addresses; it has "
            f"{', '.join(columns.values())}. Name the one with --url-column."
        )
    licence, author, page = column_of(_LICENCE), column_of(_AUTHOR), column_of(_PAGE)
    unsplash = "photographerusername" in columns and "photoimageurl" in columns
    pictures = []
    for row in reader:
        values = {name: " ".join((row[name] or "").split()) for name in columns.values()}
        if unsplash:
            kept = [_UNSPLASH_LICENCE, _unsplash_author(values), values.get(page, "")]
        else:
            kept = [values.get(name, "") for name in (licence, author, page)]
        attribution = ", ".join(part for part in kept[1:] if part and part != values[address])
        found = values[address] or f"line {reader.line_num}"
        pictures.append(Picture(found, kept[0], attribution))
    return pictures


def _unsplash_author(values: dict[str, str]) -> str:
    names = [values.get(f"photographer_{part}_name", "") for part in ("first", "last")]
    name = " ".join(part for part in names if part)
    return f"{name} (@{values['photographer_username']}) on Unsplash".strip()


def with_query(pictures: Sequence[Picture], query: str) -> list[Picture]:
    """The pictures with `query` (`w=2048&q=90`) added to their addresses, as resizing servers want.

    Raises:
        UserError: it is not of the form NAME=VALUE&NAME=VALUE.
    """
    query = query.lstrip("?&")
    if not re.fullmatch(r"[^\s=&#]+=[^\s=&#]*(&[^\s=&#]+=[^\s=&#]*)*", query):
        raise UserError(f"--add-query: expected NAME=VALUE&NAME=VALUE, found {query!r}")
    changed = []
    for picture in pictures:
        address, mark, fragment = picture.address.partition("#")
        if not web.problem_of(picture.address):
            address += ("&" if "?" in address else "?") + query
        changed.append(dataclasses.replace(picture, address=address + mark + fragment))
    return changed


def search_pexels(
    query: str, count: int, key: str, options: web.Options, api: str = PEXELS
) -> tuple[list[Picture], str]:
    """Up to `count` photographs of a search, or of the curated ones for an empty `query`.

    Returns them, and why they are fewer where the key's quota is the reason.

    Raises:
        UserError: the key is refused, or the service gives no usable answer.
    """
    if not re.fullmatch(r"[!-~]+", key):  # the error of a library would show it
        raise UserError("PEXELS_API_KEY holds a character that no key has; copy it again")
    options = dataclasses.replace(options, media_types=web.JSON)
    found: dict[str, Picture] = {}
    per_page = min(_PEXELS_PER_PAGE, count)
    page = 1
    while len(found) < count:
        parameters = {"query": query} if query else {}
        parameters |= {"per_page": str(per_page), "page": str(page)}
        what = "search" if query else "curated"
        address = f"{api.rstrip('/')}/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            body, headers = download.read(address, {"Authorization": key}, options)
            photos, more = _parse_pexels(body)
        except web.Fault as fault:
            if fault.status in (401, 403):
                raise UserError(f"{address} refuses the key in PEXELS_API_KEY; check it") from None
            if fault.status == 429 and found:
                return list(found.values())[:count], "the key's quota is used up"
            raise UserError(f"{address} {fault.reason}") from None
        for photo in photos:
            found.setdefault(photo.address, photo)
        if not more:
            break
        if headers.get("X-Ratelimit-Remaining") == "0" and len(found) < count:
            return list(found.values()), f"the key's quota is used up{_until(headers)}"
        page += 1
    if not found:
        raise UserError(f"Pexels has no photographs for {query!r}; try other words in --query")
    return list(found.values())[:count], ""


def _parse_pexels(body: bytes) -> tuple[list[Picture], bool]:
    """The photographs of a page, and whether another page follows."""
    try:
        answer = json.loads(body)
        photos = [
            Picture(
                str(photo["src"]["original"]),
                _PEXELS_LICENCE,
                f"Photo by {photo['photographer']} ({photo['photographer_url']}) on Pexels, "
                f"{photo['url']}",
            )
            for photo in answer["photos"]
        ]
        return photos, bool(photos and answer.get("next_page"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise web.Fault(f"gives an answer that is not understood: {error!r}") from None


def _until(headers: Any) -> str:
    reset = headers.get("X-Ratelimit-Reset", "")
    if not reset.isdecimal():
        return ""
    return time.strftime(" until %Y-%m-%d %H:%M UTC", time.gmtime(int(reset)))


def download_from_kaggle(handle: str) -> Path:
    """The folder where `kagglehub` keeps a data set (`OWNER/NAME`), downloaded if need be.

    Raises:
        UserError: kagglehub is not installed, or cannot get the set.
    """
    if not re.fullmatch(r"[\w-]+/[\w-]+(/versions/\d+)?", handle):
        raise UserError(
            f"--dataset: expected OWNER/NAME (nih-chest-xrays/data) or OWNER/NAME/versions/N, "
            f"found {handle!r}"
        )
    try:
        import kagglehub
    except ImportError:
        raise UserError(
            "--source kaggle needs the package kagglehub, which is not installed: "
            "pip install 'sr_dist[sources]'"
        ) from None
    try:
        return Path(kagglehub.dataset_download(handle))
    except Exception as error:  # kagglehub raises its own, those of requests, and others
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"kagglehub cannot download {handle}: {text} Its page, https://www.kaggle.com/datasets/"
            f"{handle}, may ask you to agree to terms; private sets need KAGGLE_USERNAME and "
            "KAGGLE_KEY."
        ) from None


def fetch_pictures(
    pictures: Sequence[Picture],
    output: Path,
    options: web.Options,
    max_pixels: int = MAX_PIXELS,
    progress: Progress = lambda items, what, total: items,
) -> Fetched:
    """Fetch pictures into `output`, each decoded once, exact duplicates (same bytes) dropped.

    Every address that was had is in `manifest.csv`, duplicates with the file that was there first;
    the others are in `failures.csv` with the reason. Running again fetches only what is missing.

    Raises:
        UserError: none of the pictures could be had.
    """

    def check(path: Path) -> tuple[str, str, int]:
        try:
            return inspect(path, max_pixels)
        except images.PictureError as error:
            raise web.Fault(str(error)) from None

    wanted: dict[str, Picture] = {}
    for picture in pictures:
        wanted.setdefault(picture.address, picture)
    reasons = {address: web.problem_of(address) for address in wanted}
    fetched = duplicates = 0
    with warnings.catch_warnings(), Manifest(output) as manifest:
        # Pillow would warn of what `inspect` refuses.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        asked = [address for address, reason in reasons.items() if not reason]
        missing = [address for address in asked if address not in manifest.rows]
        _describe(manifest, wanted)
        files = _files_by_hash(manifest, output)
        arriving = download.fetch_all(missing, output / _PARTIAL, options, check)
        try:
            for outcome in progress(arriving, "downloading", len(missing)):
                reasons[outcome.address] = outcome.reason
                if outcome.reason:
                    continue
                suffix, digest, size = outcome.checked
                if digest in files:
                    duplicates += 1
                else:
                    fetched += 1
                    files[digest] = file_name(outcome.address) + suffix
                    os.replace(outcome.partial, output / files[digest])
                picture = wanted[outcome.address]
                noted = (picture.licence, picture.attribution)
                manifest.add(Row(files[digest], outcome.address, digest, size, *noted))
                download.forget(outcome.partial)
        finally:
            arriving.close()
            failures = [(address, reason) for address, reason in reasons.items() if reason]
            write_failures(output, failures)
        if not any((output / _PARTIAL).iterdir()):
            (output / _PARTIAL).rmdir()
    if len(failures) == len(wanted):
        address, reason = failures[0]
        raise UserError(
            f"none of {len(wanted)} pictures could be had; first: {address} {reason}. "
            f"All are in {output / FAILURES}."
        )
    return Fetched(fetched, len(asked) - len(missing), duplicates, failures)


def file_name(address: str) -> str:
    """A name without ending for what an address gives: its own last part, and part of its hash.

    Letters, digits, dots and dashes alone, never hidden, and different for different addresses.
    """
    parts = urllib.parse.urlsplit(address)
    last = urllib.parse.unquote(parts.path).rstrip("/").rpartition("/")[2]
    stem = os.path.splitext(last)[0] or parts.hostname or "picture"
    safe = re.sub(r"[^A-Za-z0-9.-]+", "_", stem).strip("._-")[:60]
    return f"{safe or 'picture'}-{hashlib.sha256(address.encode()).hexdigest()[:12]}"


def inspect(path: Path, max_pixels: int) -> tuple[str, str, int]:
    """(file ending, sha256, bytes) of a picture, which is decoded to see whether it is whole.

    Raises:
        PictureError: it cannot be used, or has more than `max_pixels`.
    """
    # Pillow's readers raise whatever damaged bytes provoke, and no picture is to end a long run.
    try:
        with Image.open(path, formats=images.FORMATS) as image:
            (width, height), kind = image.size, image.format or ""
    except Image.DecompressionBombError as error:
        raise images.PictureError(f"is too large: {error}") from None
    except Exception:
        width, height, kind = 0, 0, ""  # decoding says why
    if width * height > max_pixels:
        raise images.PictureError(f"is {width}x{height}; at most {max_pixels} pixels are taken")
    try:
        images.decode(path, 3)
    except images.PictureError:
        raise
    except Exception as error:
        raise images.PictureError(f"cannot be decoded: {error!r}") from None
    if kind not in _SUFFIX_OF:
        raise images.PictureError(f"is of format {kind}; expected {', '.join(_SUFFIX_OF)}")
    return _SUFFIX_OF[kind], *storage.sha256_of_file(str(path))


def _describe(manifest: Manifest, wanted: Mapping[str, Picture]) -> None:
    """Note licences and attributions that an earlier list did not give."""
    for address, picture in wanted.items():
        if address in manifest.rows:
            row = manifest.rows[address]
            manifest.rows[address] = dataclasses.replace(
                row,
                licence=picture.licence or row.licence,
                attribution=picture.attribution or row.attribution,
            )


def _files_by_hash(manifest: Manifest, output: Path) -> dict[str, str]:
    """sha256 → name of the pictures in a folder, whoever put them there."""
    files = {row.sha256: row.file for row in manifest.rows.values()}
    known = set(files.values())
    for path in images.find(output):
        name = path.relative_to(output).as_posix()
        if name not in known:
            files.setdefault(storage.sha256_of_file(str(path))[0], name)
    return files
