"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


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


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file, text as UTF-8; see `whole`."""
    with whole(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
