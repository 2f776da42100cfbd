"""Files by local path or by address: opened anywhere, read through faults, cached if wanted."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from sr_dist import remote
from sr_dist.errors import UserError
from sr_dist.remote import DEFAULT, Settings, check_address, is_remote

__all__ = [
    "DEFAULT",
    "OtherBytes",
    "Settings",
    "check_address",
    "check_cache",
    "check_cached",
    "is_cached",
    "is_remote",
    "local_path",
    "open_file",
    "read_bytes",
    "sha256_of_file",
    "size_of",
]

log = logging.getLogger(__name__)

_ROOM = "Make room, lower stream.cache_bytes, or name another folder."


class OtherBytes(OSError):
    """A file that is not the one that the index tells of; the message says all."""


def check_cache(
    settings: Settings, files: Sequence[tuple[str, int, str]] = (), open_at_once: int = 0
) -> None:
    """Make the cache's folder, if there is to be one, and see whether it can hold `files`.

    Each of them is an address with the bytes and the sha256 that the index tells. `open_at_once`:
    how many this machine reads at a time; what has made room stays on the disk while it is read.
    Where all are in the cache already, nothing is written and the folder may be read-only.

    Raises:
        UserError: it cannot be made or written to, or there is no room.
    """
    if settings.cache_dir is None:
        return
    folder, most = Path(settings.cache_dir), settings.cache_bytes
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"stream.cache_dir: cannot make the folder {folder}: {error.strerror}"
        ) from None
    for address, size, _ in files:
        _check_fits(settings, address, size)
    missing = [size for address, size, sha in files if not is_cached(settings, address, size, sha)]
    if not missing:
        return
    with _told_of_cache(settings), tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
    kept = sum(_size_of(path) or 0 for path in folder.glob("*.tar"))
    # Those opened last are kept: where twice as many fit, none makes room while it is read.
    beside = max(0, min(open_at_once * max(missing), 2 * open_at_once * max(missing) - most))
    needed = min(sum(missing), max(0, most - kept) + beside) + max(missing)  # one being fetched
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"stream.cache_dir: {folder} has {free / 1e9:.1f} GB free, and the shards would take "
            f"{needed / 1e9:.1f} GB more. {_ROOM}"
        )


def is_cached(settings: Settings, address: str, size: int, sha256: str) -> bool:
    """Whether a shard is in the cache."""
    if settings.cache_dir is None:
        return False
    return _size_of(_place(settings, address, size, sha256)) == size


def check_cached(settings: Settings, address: str, size: int, sha256: str) -> None:
    """Whether a shard of which a sample cannot be used is in the cache as it was fetched.

    Raises:
        UserError: it is not, and so has been removed: the damage is this disk's.
    """
    if settings.cache_dir is None or not is_remote(address):
        return
    path = _place(settings, address, size, sha256)
    if path in _sound:
        return
    try:
        digest, _ = sha256_of_file(str(path))
    except FileNotFoundError:  # read from afar, or gone
        return
    except OSError:  # a disk that cannot read it any more
        digest = ""
    if digest == sha256:
        _sound.add(path)
        return
    path.unlink(missing_ok=True)
    raise UserError(
        f"stream.cache_dir: the copy of {address} in {settings.cache_dir} has not the bytes any "
        "more that were fetched, and has been removed. Run the same command to fetch it again; a "
        "disk that does this more than once is about to fail."
    )


def _size_of(path: Path) -> int | None:
    """Bytes of a file of the cache; None where it is not there (any more: others make room)."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _place(settings: Settings, address: str, size: int, sha256: str) -> Path:
    """Where a shard lies in the cache."""
    assert settings.cache_dir is not None
    key = hashlib.sha256(f"{address}\0{size}\0{sha256}".encode()).hexdigest()[:32]
    return Path(settings.cache_dir) / f"{key}.tar"


def _check_fits(settings: Settings, address: str, size: int) -> None:
    if size > settings.cache_bytes:
        raise UserError(
            f"stream.cache_bytes is {settings.cache_bytes}, but {address} has {size} bytes; allow "
            "more, or leave stream.cache_dir out"
        )


@contextlib.contextmanager
def _told_of_cache(settings: Settings) -> Iterator[None]:
    """Raise what is wrong with the cache's folder as that, and not as a fault of a shard."""
    try:
        yield
    except OSError as error:
        # Of a file afar, which has no name on the disk.
        afar = isinstance(error, FileNotFoundError | PermissionError) and error.filename is None
        if afar or isinstance(error, remote.Unreadable):
            raise
        advice = _ROOM
        if error.errno not in remote.OF_A_FULL_DISK:
            advice = "Make it writable, name another folder, or leave stream.cache_dir out."
        raise UserError(
            f"stream.cache_dir: cannot keep shards in {settings.cache_dir}: "
            f"{error.strerror or error}. {advice}"
        ) from None


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
        with _told_of_cache(settings):
            cached = _Cache(settings).open(address, size, sha256)
        if cached is not None:
            return cached
    return remote.open_file(address, settings, size)


def read_bytes(address: str, settings: Settings = DEFAULT) -> bytes:
    """The whole of a file that fits into memory."""
    if not is_remote(address):
        with open_file(address, settings) as file:
            return file.read()
    return remote.read_bytes(address, settings)


def size_of(address: str, settings: Settings = DEFAULT) -> int:
    """Bytes of a file.

    Raises:
        OSError: it is not there or cannot be read.
    """
    if not is_remote(address):
        return local_path(address).stat().st_size
    return remote.size_of(address, settings)


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
        _check_fits(self.settings, address, size)
        check_cache(self.settings)
        path = _place(self.settings, address, size, sha256)
        key = path.stem
        while key not in _not_kept:
            with contextlib.suppress(FileNotFoundError):
                file = path.open("rb")
                if os.fstat(file.fileno()).st_size == size:
                    with contextlib.suppress(OSError):  # somebody else's cache serves too
                        os.utime(path)  # when it was last used
                    return file
                file.close()
            with self._locked(f"{key}.lock"):
                if _size_of(path) != size:
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
        try:
            with (
                partial.open("wb") as file,
                remote.open_file(address, self.settings, size) as source,
            ):
                shutil.copyfileobj(source, file)
        except remote.NoRanges:
            remote.fetch_whole(address, self.settings, partial)
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


_sound: set[Path] = set()  # shards in the cache that were looked at again
_not_kept: set[str] = set()  # keys of shards with other bytes than the index says
