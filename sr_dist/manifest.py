"""What was fetched from where: `manifest.csv` in a folder of pictures, and `failures.csv`.

`manifest.csv` is replaced as a whole when a run ends, however it ends. Until then each new row is
in a journal beside it, so that a killed run loses nothing: the next one reads both.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from sr_dist import files
from sr_dist.errors import UserError

NAME = "manifest.csv"
FAILURES = "failures.csv"
_JOURNAL = ".manifest.journal"


@dataclasses.dataclass(frozen=True)
class Row:
    """One address and the file its picture is in; duplicates share a file."""

    file: str  # relative to the folder, with /
    address: str
    sha256: str  # of the file
    bytes: int
    licence: str = ""
    attribution: str = ""
    archive_sha256: str = ""  # of the archive the picture came in


_COLUMNS = [field.name for field in dataclasses.fields(Row)]


def write_failures(folder: Path, failures: Sequence[tuple[str, str]]) -> None:
    """Write (address, reason) pairs as `failures.csv`; without any, there is no such file."""
    if failures:
        _write(folder / FAILURES, ["address", "reason"], failures)
    else:
        (folder / FAILURES).unlink(missing_ok=True)


def _write(path: Path, header: list[str], rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    files.write_whole(path, text.getvalue())


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if reader.fieldnames != _COLUMNS:
                raise UserError(
                    f"{path} is not a manifest of this tool: its columns are "
                    f"{', '.join(reader.fieldnames or ['none'])}, expected {', '.join(_COLUMNS)}. "
                    "Move it away, or choose another output folder."
                )
            return [_row(row) for row in reader]
    except (UnicodeDecodeError, csv.Error, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({error}); move it away and run again") from None


def _row(values: dict[str, Any]) -> Row:
    values["bytes"] = int(values["bytes"])
    return Row(**values)


def _read_journal(path: Path) -> list[Row]:
    rows: list[Row] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(_row(json.loads(line)))
            except (ValueError, TypeError):
                continue  # the run was killed while it wrote this line
    return rows


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Refuse a second run in the folder: two would write into each other's partial files."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(place)
        raise UserError(
            f"another run is gathering pictures in {folder}; wait for it, or choose another folder"
        ) from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(place)


class Manifest:
    """The rows of a folder, by address; a context manager, open in one process at a time.

    Rows whose file is gone, or is of another size, are left out: their pictures are to be fetched
    again.

    Raises:
        UserError: on entering, where the manifest there is another tool's or damaged, or another
            process has it open.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[str, Row] = {}
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Manifest:
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            opened.enter_context(_locked(self.folder))
            listed = _read(self.folder / NAME) + _read_journal(self.folder / _JOURNAL)
            self.rows = {row.address: row for row in listed if self._is_there(row)}
            journal = (self.folder / _JOURNAL).open("a", encoding="utf-8")
            self._journal = opened.enter_context(journal)
            self._journal.write("\n")  # ends a line that a killed run left unfinished
            self._open = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._open:
            rows = sorted(self.rows.values(), key=lambda row: (row.file, row.address))
            if rows:
                _write(self.folder / NAME, _COLUMNS, [dataclasses.astuple(row) for row in rows])
            else:
                (self.folder / NAME).unlink(missing_ok=True)
            (self.folder / _JOURNAL).unlink(missing_ok=True)

    def add(self, row: Row) -> None:
        """Note a picture whose file is in its place."""
        self.rows[row.address] = row
        self._journal.write(json.dumps(dataclasses.asdict(row)) + "\n")
        self._journal.flush()

    def _is_there(self, row: Row) -> bool:
        path = self.folder / row.file
        return path.is_file() and path.stat().st_size == row.bytes
