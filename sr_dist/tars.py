"""Tar files read member by member and sample by sample, trusting nothing that they say.

Of our own, since the readers at hand end silently where a file was cut at a header, read members of
any size into memory, and do not say where in the file a member begins.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

PICTURE_MEMBERS = ("webp", "png", "jpg", "jpeg")
_MOST_PICTURE_BYTES = 512 * 2**20
_MOST_JSON_BYTES = 2**20
_BLOCK = 512
_MOST_EXTENSION = 2**20  # bytes of a long name or of extended headers
_MOST_BYTES = 2**40  # of a member, so that places in the file are numbers that it can be asked for
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_PAX, _PAX_GLOBAL = tarfile.XHDTYPE, tarfile.XGLTYPE


class DamagedTar(ValueError):
    """Bytes that are no whole or no honest tar; the message is the reason, without its name."""


@dataclasses.dataclass(frozen=True)
class Member:
    """A regular file of a tar, which can be read until the next one is asked for."""

    name: str
    offset: int  # of its first header, bytes: reading can start there
    size: int
    file: BinaryIO

    def expect(self, most: int) -> None:
        """
        Raises:
            DamagedTar: it has more than `most` bytes.
        """
        if self.size > most:
            raise DamagedTar(f"{self.name} has {self.size} bytes; at most {most} are expected")

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            DamagedTar: the file ends before.
        """
        return _exactly(self.file, self.size, self.name)


def read_members(file: BinaryIO, end: int | None = None) -> Iterator[Member]:
    """The regular files of a tar, from where `file` stands (a member's offset) to its end mark.

    What is not read of them is passed over by seeking. `end`: the offset of a member, at which to
    stop.

    Raises:
        DamagedTar: it is cut off, a header is damaged, no member begins at `end`, or it holds what
            has no place in a data set: a link, a device, a name that leads elsewhere.
    """
    at = file.tell()
    offset, long_name, long_size = at, "", None
    while True:
        if end is not None and offset >= end:
            if offset > end:
                raise DamagedTar(f"no member begins at byte {end}, where the index has one")
            return
        header = file.read(_BLOCK)
        if len(header) < _BLOCK:
            what = f"inside the header at byte {at}" if header else f"at byte {at}, before its end"
            raise DamagedTar(f"it is cut off {what}")
        if not any(header):
            if end is not None:
                raise DamagedTar(f"it ends at byte {at}, before byte {end}")
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            packed = " (it is packed with gzip: unpack it)" if header[:2] == b"\x1f\x8b" else ""
            raise DamagedTar(f"there is no tar header at byte {at} ({error}){packed}") from None
        at += _BLOCK
        size = info.size if long_size is None else long_size
        if not 0 <= size <= _MOST_BYTES:
            raise DamagedTar(f"the header at byte {at - _BLOCK} tells a size of {size:.3g} bytes")
        padded = -(-size // _BLOCK) * _BLOCK
        if info.type in (_PAX, _PAX_GLOBAL, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            if size > _MOST_EXTENSION:
                raise DamagedTar(f"the header at byte {at - _BLOCK} has {size} bytes of extensions")
            data = _exactly(file, size, f"the extended header at byte {at - _BLOCK}")
            at += padded
            file.seek(at)
            if info.type == _PAX:
                long_name, long_size = _extended(data, long_name)
            elif info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            continue
        name = long_name or info.name
        _check_name(name, info)
        if info.type in _REGULAR:
            yield Member(name, offset, size, file)
            at += padded  # a folder has no bytes, whatever size its header tells
        file.seek(at)
        offset, long_name, long_size = at, "", None


@dataclasses.dataclass(frozen=True)
class Sample:
    """Neighbouring members that share a name up to its first dot, one of them a picture."""

    key: str
    offset: int  # of its first member in the tar
    ending: str  # of the picture; empty where there is none
    picture: bytes  # empty where it was passed over
    about: dict[str, Any]  # what its .json says
    problem: str = ""  # why it cannot be trusted


def read_samples(
    file: BinaryIO, *, passed_over: int = 0, end: int | None = None, ours: bool = False
) -> Iterator[Sample]:
    """The samples of a tar that hold a picture, from where `file` stands to `end`.

    The pictures of the first `passed_over` of them are not read. Where a sample's .json holds the
    CRC-32 of its picture, the two are compared. `ours`: `shard_writer` wrote the tar, so that each
    has one, and to have lost it is damage.

    Raises:
        DamagedTar: as `read_members`; a sample has a member twice, or one too large.
    """
    count = 0
    named = (member for member in read_members(file, end) if all(_split(member.name)))
    for key, members in itertools.groupby(named, lambda member: _split(member.name)[0]):
        sample = _sample(key, members, count >= passed_over, ours)
        if sample.ending:
            yield sample
            count += 1


def _check_name(name: str, info: tarfile.TarInfo) -> None:
    if info.type != tarfile.DIRTYPE and info.type not in _REGULAR:
        kind = {tarfile.SYMTYPE: "a link", tarfile.LNKTYPE: "a link"}.get(
            info.type, "no regular file"
        )
        raise DamagedTar(f"{name} is {kind}; shards hold files alone")
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise DamagedTar(f"the name {name!r} leads out of the shard")


def _exactly(file: BinaryIO, size: int, what: str) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise DamagedTar(f"it is cut off inside {what}, {size - len(data)} bytes short")
    return data


def _extended(data: bytes, name: str) -> tuple[str, int | None]:
    """`path` and `size` of a pax header: lines of `LENGTH KEY=VALUE`."""
    size, at = None, 0
    while at < len(data):
        length, separator, _ = data[at : at + 20].partition(b" ")
        if not separator or not length.isdigit() or not 0 < int(length) <= len(data) - at:
            raise DamagedTar("an extended header is no list of keys and values")
        line = data[at + len(length) + 1 : at + int(length)].rstrip(b"\n")
        key, _, value = line.partition(b"=")
        if key == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            if not value.isdigit() or len(value) > 20:
                raise DamagedTar("an extended header tells a size that is no number")
            size = int(value)
        at += int(length)
    return name, size


def _split(name: str) -> tuple[str, str]:
    """The key, which is folder and name up to its first dot, and the ending; both may be empty."""
    folder, slash, last = name.rpartition("/")
    base, _, ending = last.partition(".")
    return (folder + slash + base if base else ""), ending


def _sample(key: str, members: Iterator[Member], wanted: bool, ours: bool) -> Sample:
    offset, about, endings = -1, {}, set[str]()
    pictures: list[tuple[str, bytes]] = []  # ending and bytes
    for member in members:
        offset = member.offset if offset < 0 else offset
        ending = _split(member.name)[1]
        if ending in endings:
            raise DamagedTar(f"sample {key} has two members {ending}")
        endings.add(ending)
        kind = ending.rpartition(".")[2].lower()
        if kind in PICTURE_MEMBERS:
            # Checked also where it is passed over: damage is the same whoever reads.
            member.expect(_MOST_PICTURE_BYTES)
            pictures.append((ending, member.read() if wanted else b""))
        elif kind == "json":
            member.expect(_MOST_JSON_BYTES)
            about = _about(member.read())
    ending, picture = pictures[0] if pictures else ("", b"")
    problem = ""
    if len(pictures) > 1:
        several = ", ".join(ending for ending, _ in pictures)
        problem = f"has several pictures ({several}), and nothing says which one to take"
    elif ours and "crc32" not in about:
        problem = "has no .json that tells the CRC-32 of its picture, as it was written with"
    elif wanted and ending and "crc32" in about and zlib.crc32(picture) != about["crc32"]:
        problem = "does not have the bytes that its .json tells of"
    return Sample(key, offset, ending, picture, about, problem)


def _about(text: bytes) -> dict[str, Any]:
    """A sample's .json; empty where it is none: it is damaged, or of others and may be anything."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
