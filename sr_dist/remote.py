"""Files at addresses: read a range request at a time, through faults."""

from __future__ import annotations

import dataclasses
import errno
import io
import logging
import os
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

from sr_dist.errors import UserError

SCHEMES = ("file", "http", "https", "s3", "gs", "hf")
_BLOCK_BYTES = 2 * 2**20  # asked for at once
_LEAST_BYTES = 4 * 2**10  # that an attempt must bring not to count as a failed one
_SLOWEST = 20  # times the timeout: that long a block may take to come
OF_A_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # this machine's
_FIRST_PAUSE = 0.5  # seconds before the second attempt; doubles with each
_LONGEST_PAUSE = 30.0


class Unreadable(OSError):
    """A file that could not be read to where it was wanted; the message says all."""


class NoRanges(Unreadable):
    """A server that sends the whole file where a part was asked for."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How remote files are read."""

    attempts: int = 6  # in a row, that bring (next to) nothing
    # Seconds to connect, and without a byte, over http(s) and s3; the packages that read gs and hf
    # have their own.
    timeout: float = 30.0
    cache_dir: str | None = None  # remote shards are kept here
    cache_bytes: int = 50 * 10**9  # of shards kept; beside them lies what is being fetched


DEFAULT = Settings()


def is_remote(address: str) -> bool:
    return "://" in address and not address.startswith("file://")


def check_address(address: str) -> None:
    """
    Raises:
        UserError: its scheme is unknown, or it holds secrets: addresses are printed, and recorded
            in the folders of runs.
    """
    scheme = address.partition("://")[0] if "://" in address else "file"
    if scheme not in SCHEMES or address.partition(":")[0] == "pipe":
        raise UserError(
            f"{address}: expected a local path or an address of {', '.join(SCHEMES[1:])}"
        )
    if not is_remote(address):
        return
    try:
        parts = urllib.parse.urlsplit(address)
    except ValueError as error:
        raise UserError(f"expected an address, found one that is none: {error}") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        netloc = parts.netloc.rpartition("@")[2]
        shown = parts._replace(netloc=netloc, query="", fragment="").geturl()
        raise UserError(
            f"{shown}: expected an address without user, password or query, which would be "
            "recorded with every run. Put secrets where the file system looks for them (http: "
            "~/.netrc; s3, gs and hf: their environment variables)."
        )


def open_file(address: str, settings: Settings, size: int | None) -> BinaryIO:
    """Open for reading, with seeking; `size` in bytes, if known."""
    return cast(BinaryIO, io.BufferedReader(_RemoteFile(address, settings, size), _BLOCK_BYTES))


def read_bytes(address: str, settings: Settings) -> bytes:
    """The whole of a file that fits into memory."""
    data: bytes = _attempt(address, settings, lambda fs, path: fs.cat_file(path))
    return data


def fetch_whole(address: str, settings: Settings, target: Path) -> None:
    """Write a file to `target` by one request, for servers that know no others."""
    _attempt(address, settings, lambda fs, path: fs.get_file(path, str(target)), whole=True)


def size_of(address: str, settings: Settings) -> int:
    """Bytes of a file.

    Raises:
        OSError: it is not there or cannot be read.
    """
    return int(_attempt(address, settings, _size))


def _size(fs: Any, path: str) -> int:
    try:
        size = fs.size(path)
    except FileNotFoundError:  # over http that is said of other faults too
        fs.cat_file(path, start=0, end=1)
        raise OSError("the server does not tell its size") from None
    if size is None:
        raise OSError("the server does not tell its size")
    return int(size)


class _RemoteFile(io.RawIOBase):
    """A remote file, a range request at a time."""

    def __init__(self, address: str, settings: Settings, size: int | None) -> None:
        self.address, self.settings = address, settings
        if size is None:
            size = size_of(address, settings)
        self.size, self.place = _found_shorter.get(address, size), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.size}[whence]
        self.place = base + offset
        return self.place

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self.read(_BLOCK_BYTES) or b"", b""))

    def readinto(self, buffer: Any) -> int:
        start = self.place
        end = min(start + len(buffer), start + _BLOCK_BYTES, self.size)
        if start >= end:
            return 0
        data = bytearray()
        told: int | None = None  # of the file's size, by the last answer

        def fetch(fs: Any, path: str) -> None:
            nonlocal told
            before, told = len(data), None
            try:
                told = _fetch_range(self.address, fs, path, start + before, end, data)
                if start + len(data) < end:
                    raise OSError(f"{len(data)} of {end - start} bytes came")
            except Exception:
                if len(data) - before < _LEAST_BYTES:
                    raise

        try:
            _attempt(self.address, self.settings, fetch, at=lambda: start + len(data))
        except Unreadable:
            # No fault of the way, if the file is shorter than the index says. A HEAD request is
            # not believed: what tells a wrong size may be all that is wrong.
            if told is None or told > start + len(data):
                raise
            self.size = _found_shorter[self.address] = told
            return self.readinto(buffer)
        buffer[: len(data)] = data
        self.place = start + len(data)
        return len(data)


_found_shorter: dict[str, int] = {}  # sizes of files that end before the index says


def _fetch_range(
    address: str, fs: Any, path: str, start: int, end: int, into: bytearray
) -> int | None:
    """Append bytes `start` to `end` of a file to `into`, over http(s) and s3 as they come.

    Fewer come where the file ends before. Returns its size, if the answer tells it; where it says
    no more than that no byte is at `start`, that is returned.

    Raises:
        NoRanges: the server sends something else.
        Exception: whatever the file system raises; what came before is in `into`.
    """
    scheme = address.partition("://")[0]
    if scheme in ("http", "https"):
        told: int | None = fsspec.asyn.sync(fs.loop, _fetch_http, fs, path, start, end, into)
        return told
    if scheme == "s3":
        told = fsspec.asyn.sync(fs.loop, _fetch_s3, fs, path, start, end, into)
        return told
    # Whose answers are not seen; the size is what the store has in its books.
    try:
        data = fs.cat_file(path, start=start, end=end)
    except Exception:  # gs has one of many kinds for a range behind the end
        size = _size(fs, path)
        if size > start:
            raise
        return size
    if len(data) > end - start:
        _check_range(None, len(data), start, end)
    into += data
    return None if len(data) == end - start else _size(fs, path)


async def _fetch_http(fs: Any, path: str, start: int, end: int, into: bytearray) -> int | None:
    session = await fs.set_session()
    configured = dict(fs.kwargs)  # in fsspec's own configuration: headers, authentication
    headers = {**configured.pop("headers", {}), "Range": f"bytes={start}-{end - 1}"}
    headers["Accept-Encoding"] = "identity"
    async with session.get(fs.encode_url(path), headers=headers, **configured) as answer:
        if answer.status == 404:
            raise FileNotFoundError(path)
        part = answer.headers.get("Content-Range")
        if answer.status == 416:
            return _total(part, start)
        answer.raise_for_status()
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise OSError("the server compresses what it sends, though it was asked not to")
        part = part if answer.status == 206 else None
        _check_range(part, answer.content_length, start, end)
        if part is None:  # the whole file, which cannot be gone on with where it breaks
            into += await answer.read()
            return None
        missing = end - start
        async for piece in answer.content.iter_any():
            into += piece[:missing]
            missing -= len(piece)
            if missing <= 0:  # a body without a length may go on
                break
        return _total(part, None)


async def _fetch_s3(fs: Any, path: str, start: int, end: int, into: bytearray) -> int | None:
    bucket, key, _ = fs.split_path(path)
    wanted = f"bytes={start}-{end - 1}"
    try:
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=wanted)
    except OSError as error:
        said = getattr(error.__cause__, "response", None) or {}
        if said.get("Error", {}).get("Code") in ("InvalidRange", "416"):
            return start
        raise
    async with answer["Body"] as body:
        part = answer.get("ContentRange")
        _check_range(part, answer["ContentLength"], start, end)
        while piece := await body.read(2**16):
            into += piece
    return _total(part, None)


def _total(part: str | None, otherwise: int | None) -> int | None:
    """The size of the whole file by a Content-Range, `bytes 0-9/100` or `bytes */100`."""
    total = (part or "").rpartition("/")[2]
    return int(total) if total.isdecimal() else otherwise


def _check_range(part: str | None, length: int | None, start: int, end: int) -> None:
    """Whether an answer is what was asked for, by its Content-Range and its length.

    Raises:
        NoRanges: it is the whole file.
        OSError: it is something else.
    """
    asked = end - start
    if part is not None:
        if not part.startswith(f"bytes {start}-") or (length or asked) > asked:
            raise OSError(f"asked for bytes {start} to {end - 1}, the server sent {part}")
    elif length is None or length > asked:
        sent = "the whole file" if length is None else f"{length}"
        raise NoRanges(
            f"asked for {asked} bytes, the server sent {sent}: it does not answer range requests. "
            "Set stream.cache_dir, which fetches shards whole, or use another server"
        )
    elif length < asked or start:
        raise OSError(f"asked for bytes {start} to {end - 1}, the server sent {length} others")


def _attempt(
    address: str,
    settings: Settings,
    fetch: Callable[[Any, str], Any],
    *,
    at: Callable[[], int] = int,
    whole: bool = False,
) -> Any:
    """What `fetch(file system, path)` returns, tried again after a fault that may pass.

    `at`: the byte that an error names. `whole`: it is a whole file and may take as long as it
    needs, if only bytes come.
    """
    check_address(address)
    for attempt in range(1, settings.attempts + 1):
        try:
            fs, path = fsspec.core.url_to_fs(address, **_options(address, settings, whole))
            if isinstance(getattr(fs, "retries", None), int):
                fs.retries = 1  # s3fs's own attempts would multiply these
        except (ImportError, ValueError) as error:  # a missing package, a malformed address
            raise UserError(f"cannot open {address}: {error}") from None
        try:
            return fetch(fs, path)
        except NoRanges as error:
            raise NoRanges(f"{address}: {error}") from None
        except (FileNotFoundError, PermissionError, UserError):
            raise
        except ImportError as error:
            raise UserError(f"cannot open {address}: {error}") from None
        except Exception as error:  # each file system raises its own
            if isinstance(error, OSError) and error.errno in OF_A_FULL_DISK:
                raise
            if attempt == settings.attempts:
                reason = str(error) or type(error).__name__
                raise Unreadable(
                    f"{address} cannot be read at byte {at()} after {attempt} "
                    f"attempt{'s' if attempt > 1 else ''}: {reason}"
                ) from None
        pause(attempt)
    raise AssertionError("the last attempt returns or raises")


def pause(attempt: int) -> None:
    """Before the attempt that follows a failed one, counted from 1."""
    time.sleep(min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE))


def _options(address: str, settings: Settings, whole: bool) -> dict[str, Any]:
    scheme = address.partition("://")[0]
    if scheme in ("http", "https"):
        try:
            import aiohttp
        except ImportError:
            raise ImportError("aiohttp is not installed: pip install 'sr_dist[remote]'") from None
        timeout = aiohttp.ClientTimeout(
            total=None if whole else _SLOWEST * settings.timeout,
            sock_connect=settings.timeout,
            sock_read=settings.timeout,
        )
        # From the environment come the proxy and ~/.netrc.
        return {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    if scheme == "s3":
        logging.getLogger("botocore").setLevel(logging.WARNING)  # it tells where it looks for keys
        timeouts = {"connect_timeout": settings.timeout, "read_timeout": settings.timeout}
        return {"config_kwargs": {**timeouts, "retries": {"total_max_attempts": 1}}}
    return {}
