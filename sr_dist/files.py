"""Files that appear whole or not at all, and folders that one process writes in."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sr_dist.errors import UserError

log = logging.getLogger(__name__)

_LOCK = ".lock"


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

    The claim ends with the process, whatever ends that. Those that it starts have no part in it.

    Raises:
        UserError: another one has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("a+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(_in_use(folder)) from None
            log.warning(
                "%s: locks do not work there (%s); see to it that no two commands write in it",
                folder,
                error.strerror,
            )
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            file.flush()
        yield


def check_unclaimed(folder: Path) -> None:
    """Look whether another process has claimed `folder`, and leave it as it is.

    Raises:
        UserError: one has.
    """
    try:
        file = (folder / _LOCK).open("rb")
    except FileNotFoundError:
        return
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:  # of others `claimed` tells
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(_in_use(folder)) from None


def _in_use(folder: Path) -> str:
    who = (folder / _LOCK).read_text(errors="replace") or "another process"
    return (
        f"{who} is writing in {folder}; wait for its end, stop it, or choose another name. (If "
        f"that machine is gone for good, delete {folder / _LOCK}.)"
    )


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file, text as UTF-8; see `whole`."""
    with whole(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
