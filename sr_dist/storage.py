"""Files by local path or by address: opened anywhere, read through faults, cached if wanted."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

from sr_dist.errors import UserError

SCHEMES = ("file", "http", "https", "s3", "gs", "hf")
_BLOCK_BYTES = 2 * 2**20  # asked for at once
_FIRST_PAUSE = 0.5  # seconds before the second attempt; doubles with each
_LONGEST_PAUSE = 30.0


class Unreadable(OSError):
    """A file that could not be read to where it was wanted; the message says all."""


class NoRanges(Unreadable):
    """A server that sends the whole file where a part was asked for."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How remote files are read."""

    attempts: int = 6  # to get a block, in a row
    timeout: float = 30.0  # seconds to connect, and without a byte
    cache_dir: str | None = None  # remote shards are kept here
    cache_bytes: int = 50 * 10**9  # of shards kept; beside them lies what is being fetched


DEFAULT = Settings()


def is_remote(address: str) -> bool:
    return "://" in address and not address.startswith("file://")


def open_file(
    address: str, settings: Settings = DEFAULT, *, size: int | None = None, sha256: str = ""
) -> BinaryIO:
    """Open for reading, with seeking. `size` and `sha256`: what the index says of it, if known.

    A remote file is read in blocks; where a connection breaks, reading goes on at the byte it had
    got to. With a cache directory the whole file is fetched first, checked, and kept.

    Raises:
        UserError: the scheme is unknown, or its package is missing.
        OSError: it is not there or cannot be read.
    """
    scheme = address.partition("://")[0] if "://" in address else "file"
    if scheme not in SCHEMES or address.partition(":")[0] == "pipe":
        raise UserError(
            f"{address}: expected a local path or an address of {', '.join(SCHEMES[1:])}"
        )
    if not is_remote(address):
        return Path(address.removeprefix("file://")).open("rb")
    if settings.cache_dir is not None and size is not None and sha256:
        return _Cache(settings).open(address, size, sha256)
    return cast(BinaryIO, io.BufferedReader(_Remote(address, settings, size), _BLOCK_BYTES))


def read_bytes(address: str, settings: Settings = DEFAULT) -> bytes:
    """The whole of a file that fits into memory."""
    if not is_remote(address):
        with open_file(address, settings) as file:
            return file.read()
    data: bytes = _attempt(address, settings, 0, lambda fs, path: fs.cat_file(path))
    return data


def size_of(address: str, settings: Settings = DEFAULT) -> int:
    """Bytes of a file.

    Raises:
        OSError: it is not there or cannot be read.
    """
    if not is_remote(address):
        return Path(address.removeprefix("file://")).stat().st_size
    return int(_attempt(address, settings, 0, lambda fs, path: fs.size(path)))


def sha256_of_file(address: str, settings: Settings = DEFAULT) -> tuple[str, int]:
    """The hash and the number of bytes of a file."""
    digest, size = hashlib.sha256(), 0
    with open_file(address, settings) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size


class _Remote(io.RawIOBase):
    """A remote file, a range request at a time."""

    def __init__(self, address: str, settings: Settings, size: int | None) -> None:
        self.address, self.settings = address, settings
        if size is None:
            size = size_of(address, settings)
        self.size, self.place = size, 0

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
        wanted = min(len(buffer), max(0, self.size - self.place))
        if not wanted:
            return 0
        start, end = self.place, self.place + wanted

        def fetch(fs: Any, path: str) -> bytes:
            data: bytes = fs.cat_file(path, start=start, end=end)
            if len(data) > wanted:
                raise NoRanges(
                    f"{self.address}: asked for {wanted} bytes, the server sent {len(data)}: it "
                    "does not answer range requests. Set stream.cache_dir, which fetches shards "
                    "whole, or use another server"
                )
            if len(data) < wanted:
                raise OSError(f"{len(data)} of {wanted} bytes came")
            return data

        data = _attempt(self.address, self.settings, start, fetch)
        buffer[:wanted] = data
        self.place = end
        return wanted


def _attempt(address: str, settings: Settings, at: int, fetch: Any) -> Any:
    """What `fetch(file system, path)` returns, tried again after a fault that may pass."""
    for attempt in range(1, settings.attempts + 1):
        try:
            fs, path = fsspec.core.url_to_fs(address, **_options(address, settings))
            return fetch(fs, path)
        except (FileNotFoundError, PermissionError, NoRanges, UserError):
            raise
        except (ImportError, ValueError) as error:  # a missing package, a malformed address
            raise UserError(f"cannot open {address}: {error}") from None
        except Exception as error:  # each file system raises its own
            if attempt == settings.attempts:
                reason = str(error) or type(error).__name__
                raise Unreadable(
                    f"{address} cannot be read at byte {at} after {attempt} attempts: {reason}"
                ) from None
        time.sleep(min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE))
    raise AssertionError("the last attempt returns or raises")


def _options(address: str, settings: Settings) -> dict[str, Any]:
    scheme = address.partition("://")[0]
    if scheme in ("http", "https"):
        try:
            import aiohttp
        except ImportError:
            raise UserError(
                f"cannot open {address}: aiohttp is not installed: pip install 'sr_dist[remote]'"
            ) from None
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=settings.timeout, sock_read=settings.timeout
        )
        return {"client_kwargs": {"timeout": timeout}}
    if scheme == "s3":
        timeouts = {"connect_timeout": settings.timeout, "read_timeout": settings.timeout}
        return {"config_kwargs": timeouts}
    return {}


class _Cache:
    """Remote shards on the local disk, shared by the processes of a machine.

    A shard is fetched by one process, checked and then moved into place; files that were not used
    for longest make room. Who has one open keeps it, since removing leaves its bytes to them.
    """

    def __init__(self, settings: Settings) -> None:
        assert settings.cache_dir is not None
        self.settings = settings
        self.folder = Path(settings.cache_dir)

    def open(self, address: str, size: int, sha256: str) -> BinaryIO:
        if size > self.settings.cache_bytes:
            raise UserError(
                f"stream.cache_bytes is {self.settings.cache_bytes}, but {address} has {size} bytes"
            )
        key = hashlib.sha256(f"{address}\0{size}\0{sha256}".encode()).hexdigest()[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{key}.tar"
        while True:
            with contextlib.suppress(FileNotFoundError):
                file = path.open("rb")
                if os.fstat(file.fileno()).st_size == size:
                    os.utime(path)  # when it was last used
                    return file
                file.close()
            with self._locked(f"{key}.lock"):
                if not (path.exists() and path.stat().st_size == size):
                    self._fetch(address, path, size, sha256)

    def _fetch(self, address: str, path: Path, size: int, sha256: str) -> None:
        partial = path.with_suffix(".part")
        try:
            self._copy(address, partial, size)
            digest, found = sha256_of_file(str(partial))
            if (digest, found) != (sha256, size):
                raise Unreadable(
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
            with partial.open("wb") as file, io.BufferedReader(remote, 4 * _BLOCK_BYTES) as source:
                while block := source.read(4 * _BLOCK_BYTES):
                    file.write(block)
        except NoRanges:
            _attempt(address, self.settings, 0, lambda fs, path: fs.get_file(path, str(partial)))

    def _make_room(self, size: int) -> None:
        kept = [(path.stat(), path) for path in self.folder.glob("*.tar")]
        total = sum(status.st_size for status, _ in kept)
        for status, path in sorted(kept, key=lambda item: item[0].st_mtime):
            if total + size > self.settings.cache_bytes:
                path.unlink()
                total -= status.st_size

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self.folder / name).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
