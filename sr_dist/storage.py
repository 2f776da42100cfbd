"""Files by local path or by address: opened anywhere, read through faults, cached if wanted."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import logging
import os
import shutil
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

from sr_dist.errors import UserError

log = logging.getLogger(__name__)

SCHEMES = ("file", "http", "https", "s3", "gs", "hf")
_BLOCK_BYTES = 2 * 2**20  # asked for at once
_LEAST_BYTES = 4 * 2**10  # that an attempt must bring not to count as a failed one
_SLOWEST = 20  # times the timeout: that long a block may take to come
_FIRST_PAUSE = 0.5  # seconds before the second attempt; doubles with each
_LONGEST_PAUSE = 30.0


class Unreadable(OSError):
    """A file that could not be read to where it was wanted; the message says all."""


class OtherBytes(OSError):
    """A file that is not the one that the index tells of; the message says all."""


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


def check_cache(settings: Settings) -> None:
    """Make the cache's folder, if there is to be one.

    Raises:
        UserError: it cannot be made.
    """
    if settings.cache_dir is not None:
        try:
            Path(settings.cache_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"stream.cache_dir: cannot make the folder {settings.cache_dir}: {error.strerror}"
            ) from None


def is_remote(address: str) -> bool:
    return "://" in address and not address.startswith("file://")


def local_path(address: str) -> Path:
    """Of an address that is not remote."""
    return Path(address.removeprefix("file://"))


def open_file(
    address: str, settings: Settings = DEFAULT, *, size: int | None = None, sha256: str = ""
) -> BinaryIO:
    """Open for reading, with seeking. `size` and `sha256`: what the index says of it, if known.

    A remote file is read in blocks. Where a connection breaks, reading goes on at that byte (of gs
    and hf: of that block). With a cache directory the whole file is fetched first, checked, and
    kept; one with other bytes than `sha256` tells of is read from afar instead.

    Raises:
        UserError: the scheme is unknown, its package is missing, or the address tells secrets.
        OSError: it is not there or cannot be read.
    """
    check_address(address)
    if not is_remote(address):
        file = local_path(address).open("rb")
        longer = size is not None and os.fstat(file.fileno()).st_size > size
        return cast(BinaryIO, io.BufferedReader(_Beginning(file, size or 0))) if longer else file
    if settings.cache_dir is not None and size is not None and sha256:
        cached = _Cache(settings).open(address, size, sha256)
        if cached is not None:
            return cached
    return cast(BinaryIO, io.BufferedReader(_Remote(address, settings, size), _BLOCK_BYTES))


def read_bytes(address: str, settings: Settings = DEFAULT) -> bytes:
    """The whole of a file that fits into memory."""
    if not is_remote(address):
        with open_file(address, settings) as file:
            return file.read()
    data: bytes = _attempt(address, settings, lambda fs, path: fs.cat_file(path))
    return data


def size_of(address: str, settings: Settings = DEFAULT) -> int:
    """Bytes of a file.

    Raises:
        OSError: it is not there or cannot be read.
    """
    if not is_remote(address):
        return local_path(address).stat().st_size
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


def sha256_of_file(address: str, settings: Settings = DEFAULT) -> tuple[str, int]:
    """The hash and the number of bytes of a file."""
    digest, size = hashlib.sha256(), 0
    with open_file(address, settings) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size


class _Beginning(io.RawIOBase):
    """The first `size` bytes of a local file, which are all that is read of a remote one too."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.file.tell(), os.SEEK_END: self.size}[whence]
        return self.file.seek(base + offset)

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(min(len(buffer), max(0, self.size - self.file.tell())))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


class _Remote(io.RawIOBase):
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

        def fetch(fs: Any, path: str) -> None:
            before = len(data)
            try:
                _fetch_range(self.address, fs, path, start + before, end, data)
                if start + len(data) < end:
                    raise OSError(f"{len(data)} of {end - start} bytes came")
            except Exception:
                if len(data) - before < _LEAST_BYTES:
                    raise

        try:
            _attempt(self.address, self.settings, fetch, at=lambda: start + len(data))
        except Unreadable as error:
            # No fault of the way, if the file is shorter than the index says.
            try:
                size = size_of(self.address, dataclasses.replace(self.settings, attempts=1))
            except OSError:
                raise error from None
            if size >= end:
                raise
            self.size = _found_shorter[self.address] = size
            return self.readinto(buffer)
        buffer[: len(data)] = data
        self.place = start + len(data)
        return len(data)


_found_shorter: dict[str, int] = {}  # sizes of files that end before the index says


def _fetch_range(address: str, fs: Any, path: str, start: int, end: int, into: bytearray) -> None:
    """Append bytes `start` to `end` of a file to `into`, over http(s) and s3 as they come.

    Raises:
        NoRanges: the server sends something else.
        Exception: whatever the file system raises; what came before is in `into`.
    """
    scheme = address.partition("://")[0]
    if scheme in ("http", "https"):
        fsspec.asyn.sync(fs.loop, _fetch_http, fs, path, start, end, into)
    elif scheme == "s3":
        fsspec.asyn.sync(fs.loop, _fetch_s3, fs, path, start, end, into)
    else:
        data = fs.cat_file(path, start=start, end=end)
        _check_range(None, len(data), start, end)
        into += data


async def _fetch_http(fs: Any, path: str, start: int, end: int, into: bytearray) -> None:
    session = await fs.set_session()
    configured = dict(fs.kwargs)  # in fsspec's own configuration: headers, authentication
    headers = {**configured.pop("headers", {}), "Range": f"bytes={start}-{end - 1}"}
    headers["Accept-Encoding"] = "identity"
    async with session.get(fs.encode_url(path), headers=headers, **configured) as answer:
        if answer.status == 404:
            raise FileNotFoundError(path)
        answer.raise_for_status()
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise OSError("the server compresses what it sends, though it was asked not to")
        part = answer.headers.get("Content-Range") if answer.status == 206 else None
        _check_range(part, answer.content_length, start, end)
        if part is None:  # the whole file, which cannot be gone on with where it breaks
            into += await answer.read()
            return
        missing = end - start
        async for piece in answer.content.iter_any():
            into += piece[:missing]
            missing -= len(piece)
            if missing <= 0:  # a body without a length may go on
                return


async def _fetch_s3(fs: Any, path: str, start: int, end: int, into: bytearray) -> None:
    bucket, key, _ = fs.split_path(path)
    part = f"bytes={start}-{end - 1}"
    answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=part)
    async with answer["Body"] as body:
        _check_range(answer.get("ContentRange"), answer["ContentLength"], start, end)
        while piece := await body.read(2**16):
            into += piece


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
            if attempt == settings.attempts:
                reason = str(error) or type(error).__name__
                raise Unreadable(
                    f"{address} cannot be read at byte {at()} after {attempt} "
                    f"attempt{'s' if attempt > 1 else ''}: {reason}"
                ) from None
        time.sleep(min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE))
    raise AssertionError("the last attempt returns or raises")


def _options(address: str, settings: Settings, whole: bool) -> dict[str, Any]:
    scheme = address.partition("://")[0]
    if scheme in ("http", "https"):
        try:
            import aiohttp
        except ImportError:
            raise UserError(
                f"cannot open {address}: aiohttp is not installed: pip install 'sr_dist[remote]'"
            ) from None
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


class _Cache:
    """Remote shards on the local disk, shared by the processes of a machine.

    A shard is fetched by one process, checked and then moved into place; files that were not used
    for longest make room. Who has one open keeps it, since removing leaves its bytes to them. Lock
    files, which are empty, stay.
    """

    def __init__(self, settings: Settings) -> None:
        assert settings.cache_dir is not None
        self.settings = settings
        self.folder = Path(settings.cache_dir)

    def open(self, address: str, size: int, sha256: str) -> BinaryIO | None:
        """The shard, or None where the one at `address` is not that of the index."""
        if size > self.settings.cache_bytes:
            raise UserError(
                f"stream.cache_bytes is {self.settings.cache_bytes}, but {address} has {size} bytes"
            )
        key = hashlib.sha256(f"{address}\0{size}\0{sha256}".encode()).hexdigest()[:32]
        check_cache(self.settings)
        path = self.folder / f"{key}.tar"
        while key not in _not_kept:
            with contextlib.suppress(FileNotFoundError):
                file = path.open("rb")
                if os.fstat(file.fileno()).st_size == size:
                    with contextlib.suppress(PermissionError):  # somebody else's cache serves too
                        os.utime(path)  # when it was last used
                    return file
                file.close()
            with self._locked(f"{key}.lock"):
                if not (path.exists() and path.stat().st_size == size):
                    try:
                        self._fetch(address, path, size, sha256)
                    except OtherBytes as error:
                        log.warning("%s, and so is not kept in %s", error, self.folder)
                        _not_kept.add(key)
        return None

    def _fetch(self, address: str, path: Path, size: int, sha256: str) -> None:
        partial = path.with_suffix(".part")
        try:
            self._copy(address, partial, size)
            digest, found = sha256_of_file(str(partial))
            if (digest, found) != (sha256, size):
                raise OtherBytes(
                    f"{address} has {found} bytes with sha256 {digest[:12]}…, the index says "
                    f"{size} and {sha256[:12]}…"
                )
            with self._locked("room.lock"):
                self._make_room(size)
                os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _copy(self, address: str, partial: Path, size: int) -> None:
        remote = _Remote(address, self.settings, size)
        try:
            with partial.open("wb") as file, io.BufferedReader(remote, _BLOCK_BYTES) as source:
                shutil.copyfileobj(source, file, _BLOCK_BYTES)
        except NoRanges:
            _attempt(
                address,
                self.settings,
                lambda fs, path: fs.get_file(path, str(partial)),
                whole=True,
            )
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # before it takes a name that is believed

    def _make_room(self, size: int) -> None:
        for partial in self.folder.glob("*.part"):
            lock = self._locked(f"{partial.stem}.lock", wait=False)
            with contextlib.suppress(BlockingIOError), lock:
                partial.unlink(missing_ok=True)  # of a process that was killed
        kept = [(path.stat(), path) for path in self.folder.glob("*.tar")]
        total = sum(status.st_size for status, _ in kept)
        for status, path in sorted(kept, key=lambda item: item[0].st_mtime):
            if total + size > self.settings.cache_bytes:
                path.unlink()
                total -= status.st_size

    @contextlib.contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[None]:
        """
        Raises:
            BlockingIOError: another has it, and not `wait`.
        """
        with (self.folder / name).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield


_not_kept: set[str] = set()  # keys of shards with other bytes than the index says
