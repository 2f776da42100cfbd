"""Files that appear whole or not at all, and folders that one process writes in."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sr_dist.errors import UserError

log = logging.getLogger(__name__)

_LOCK = ".lock"
_LOOK = 1.0  # seconds, more than a look takes
_LEASE = 120.0  # seconds: NFS keeps the lock of a machine that is gone for 90


@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write, in a folder that is made if need be, which appears when the block ends.

    It is on the disk before it takes its name. The partial file has a name of its own, so several
    processes may write the same file; it is cut, since file systems bound the length of names.

    Raises:
        OSError: with the file's name, also where the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex[:8]}.part")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.filename in (None, str(partial)):
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Remove what `whole` left in `folder` when it was killed, for who alone writes there."""
    for partial in folder.glob(f".*.{'[0-9a-f]' * 8}.part"):
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Let no other process, on any machine that shares it, claim `folder`; it is made if need be.

    The claim ends with the process, whatever ends that, and those that it starts have no part in
    it. It would also end if this process opened the lock's file again and closed it (POSIX).

    Raises:
        UserError: another one has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("a+b") as file:
        try:
            _lock(file, fcntl.LOCK_EX, folder)
        except OSError as error:
            log.warning(
                "%s: locks do not work there (%s); see to it that no two commands write in it",
                folder,
                error.strerror,
            )
        else:
            try:
                file.truncate(0)
                file.write(f"process {os.getpid()}{_here()}".encode())
                file.flush()
            except OSError as error:
                error.filename = str(folder / _LOCK)
                raise
        yield


def check_unclaimed(folder: Path) -> None:
    """Look whether another process has claimed `folder`, and leave it as it is.

    Raises:
        UserError: one has.
    """
    try:
        file = (folder / _LOCK).open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return
    with file, contextlib.suppress(OSError):  # where locks do not work, of which `claimed` tells
        _lock(file, fcntl.LOCK_SH, folder)


def _here() -> str:
    return f" on {socket.gethostname()}"


def _lock(file: BinaryIO, kind: int, folder: Path) -> None:
    """Wait for others that only look, and for a server to notice that another machine is gone.

    Raises:
        UserError: another process has `folder`.
        OSError: there are no locks.
    """
    began, told = time.monotonic(), False
    while True:
        try:
            fcntl.lockf(file, kind | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        file.seek(0)
        who = file.read().decode(errors="replace") or f"another process{_here()}"
        waits = _LEASE if not who.endswith(_here()) else _LOOK
        if time.monotonic() - began > waits:
            raise UserError(
                f"{who} is writing in {folder}; wait for its end, stop it, or choose another name. "
                f"(If that machine is gone for good, delete {folder / _LOCK}.)"
            )
        if waits == _LEASE and not told:
            log.info("%s has %s: waiting up to %d s, in case it is gone", who, folder, _LEASE)
            told = True
        time.sleep(0.05)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file, text as UTF-8; see `whole`."""
    with whole(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
