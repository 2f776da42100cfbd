"""DIV2K and Flickr2K: fetch their archives, check them, and unpack the pictures safely."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import shutil
import stat
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from PIL import Image

from sr_dist import download, images, sources, web
from sr_dist.dataset import Progress
from sr_dist.errors import UserError
from sr_dist.manifest import Manifest, Row

_PARTIAL = ".partial"
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Archive:
    """A published archive: what it is named after, where it lies and what is in it."""

    folder: str  # of its high-resolution pictures, in the archive and in the output
    address: str
    md5: str  # of the file at `address`
    pictures: int
    mebibytes: int  # about; for the progress line
    licence: str

    @property
    def max_bytes(self) -> int:
        """Neither the archive nor what is unpacked may be larger."""
        return 2 * self.mebibytes * _MIB


# The addresses are those that the authors give: http://data.vision.ee.ethz.ch/cvl/DIV2K/ and, for
# Flickr2K, the EDSR project (https://github.com/limbee/NTIRE2017, README and issue 25, where it was
# reported out of reach in 2024). By the MD5 sums several public projects verify these files.
_DIV2K = "http://data.vision.ee.ethz.ch/cvl/DIV2K"
_DIV2K_LICENCE = f"academic research only; the owners keep their copyright ({_DIV2K}/)"
SETS = {
    "div2k": (
        Archive(
            folder="DIV2K_train_HR",
            address=f"{_DIV2K}/DIV2K_train_HR.zip",
            md5="bdc2d9338d4e574fe81bf7d158758658",
            pictures=800,
            mebibytes=3367,
            licence=_DIV2K_LICENCE,
        ),
        Archive(
            folder="DIV2K_valid_HR",
            address=f"{_DIV2K}/DIV2K_valid_HR.zip",
            md5="9fcdda83005c5e5997799b69f955ff88",
            pictures=100,
            mebibytes=428,
            licence=_DIV2K_LICENCE,
        ),
    ),
    "flickr2k": (
        Archive(
            folder="Flickr2K_HR",
            address="https://cv.snu.ac.kr/research/EDSR/Flickr2K.tar",
            md5="5d3f39443d5e9489bff8963f8f26cb03",
            pictures=2650,
            mebibytes=20000,
            licence="none stated with the archive; the pictures are from Flickr",
        ),
    ),
}


def pair(archives: Sequence[Archive], addresses: Sequence[str]) -> dict[str, str]:
    """Folder → address of the copy to take instead of what is published.

    As many addresses as archives are in their order; fewer name the archive that they are of.

    Raises:
        UserError: it cannot be told which archive an address is of.
    """
    folders = [archive.folder for archive in archives]
    if len(addresses) == len(folders):
        return dict(zip(folders, addresses, strict=True))
    paired: dict[str, str] = {}
    for address in addresses:
        named = [folder for folder in folders if folder in address]
        if len(named) != 1 or named[0] in paired:
            raise UserError(
                f"--address {address}: which archive is it of? Give one address for each of "
                f"{', '.join(folders)}, in this order, or addresses that hold these names."
            )
        paired[named[0]] = address
    return paired


@dataclasses.dataclass(frozen=True)
class Member:
    """A file in an archive."""

    name: str
    size: int  # bytes, as the archive states
    open: Callable[[], IO[bytes]]


def fetch(
    archive: Archive,
    output: Path,
    options: web.Options,
    address: str | None = None,
    progress: Progress = lambda items, what, total: items,
) -> bool:
    """Fetch an archive and unpack its pictures into `output/FOLDER`; False if they are there.

    `address`: of a copy elsewhere, zip or tar, which is accepted by its contents alone: the number
    of pictures, each whole. The archive is deleted in the end; its sha256 is in `manifest.csv`.
    Running again goes on where it stopped.

    Raises:
        UserError: it cannot be had, is not what was published, or is not safe to unpack.
    """
    options = dataclasses.replace(options, media_types=web.ARCHIVES, max_bytes=archive.max_bytes)
    source = address or archive.address
    if problem := web.problem_of(source):
        raise UserError(f"--address: {source} {problem}")
    with Manifest(output) as manifest:
        have = {row.file for row in manifest.rows.values()}
        if sum(name.startswith(f"{archive.folder}/") for name in have) == archive.pictures:
            return False
        partial = download.partial_path(output / _PARTIAL, source)
        whole = partial.with_suffix(".whole")
        if not whole.exists():
            _download(archive, source, partial, options, progress)
            os.replace(partial, whole)
            download.forget(partial)
        try:
            sha256 = _check_sum(archive, source, whole, address is None, progress)
            _unpack(archive, source, whole, sha256, manifest, progress)
        except UserError:
            whole.unlink()  # the next run is to fetch it afresh
            raise
        whole.unlink()
        with contextlib.suppress(OSError):  # the partial files of other archives
            whole.parent.rmdir()
    return True


def _download(
    archive: Archive, source: str, partial: Path, options: web.Options, progress: Progress
) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    there = partial.stat().st_size if partial.exists() else 0
    try:
        steps = _by_mebibyte(download.fetch(source, partial, options))
        expected = max(1, archive.mebibytes - there // _MIB)
        for _ in progress(steps, f"{archive.folder} (MiB)", expected):
            pass
    except web.Fault as fault:
        raise UserError(
            f"{source} {fault.reason}. Run again to go on, or name a copy of the archive elsewhere "
            f"with --address: a zip or tar with the {archive.pictures} pictures."
        ) from None


def _by_mebibyte(sizes: Iterator[int]) -> Iterator[int]:
    """Something for each mebibyte that has arrived."""
    received = 0
    for size in sizes:
        received += size
        while received >= _MIB:
            received -= _MIB
            yield _MIB


def _check_sum(archive: Archive, source: str, path: Path, strict: bool, progress: Progress) -> str:
    """The sha256 of an archive; `strict`: if its MD5 is the known one."""
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with path.open("rb") as file:
        blocks = iter(functools.partial(file.read, _MIB), b"")
        total = -(-path.stat().st_size // _MIB)
        for block in progress(blocks, f"checking {archive.folder} (MiB)", total):
            md5.update(block)
            sha256.update(block)
    if strict and md5.hexdigest() != archive.md5:
        raise UserError(
            f"{source} is not the archive that was published: its MD5 is {md5.hexdigest()}, "
            f"expected {archive.md5}. It is deleted; run again to fetch it afresh, or accept what "
            f"lies there by its contents alone: --address {source}"
        )
    return sha256.hexdigest()


def _unpack(
    archive: Archive,
    source: str,
    path: Path,
    sha256: str,
    manifest: Manifest,
    progress: Progress,
) -> None:
    """Write the pictures of an archive, each decoded once, and their rows of the manifest."""
    folder = manifest.folder / archive.folder
    have = {row.file for row in manifest.rows.values()}
    with _opened(path, source) as members, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        chosen = _choose(archive, source, members)
        folder.mkdir(exist_ok=True)
        for member in progress(chosen, f"unpacking {archive.folder}", len(chosen)):
            name = PurePosixPath(member.name).name
            if f"{archive.folder}/{name}" in have:
                continue
            partial = folder / f".{name}.part"
            try:
                with member.open() as packed, partial.open("wb") as file:
                    shutil.copyfileobj(packed, file, _MIB)
                _, digest, size = sources.inspect(partial, sources.MAX_PIXELS)
                os.replace(partial, folder / name)
            except images.PictureError as error:
                raise UserError(
                    f"{member.name} in {source} {error}. The archive is deleted; run again to "
                    "fetch it afresh."
                ) from None
            finally:
                partial.unlink(missing_ok=True)
            manifest.add(
                Row(
                    file=f"{archive.folder}/{name}",
                    address=f"{source}#{member.name}",
                    sha256=digest,
                    bytes=size,
                    licence=archive.licence,
                    archive_sha256=sha256,
                )
            )


def _choose(archive: Archive, source: str, members: Sequence[Member]) -> list[Member]:
    """The high-resolution pictures.

    A copy may be packed in a folder of another name, or in none, and with low-resolution pictures.
    """
    found = []
    for member in members:
        path = PurePosixPath(member.name)
        if path.suffix.lower() in images.SUFFIXES and not path.name.startswith("."):
            found.append((path, member))
    within = [m for p, m in found if p.parent.name in (archive.folder, "HR")]
    chosen = within or [
        m for p, m in found if not re.search(r"(^|[/_])LR([/_]|$)", p.parent.as_posix())
    ]
    names = {PurePosixPath(member.name).name for member in chosen}
    if len(chosen) != archive.pictures or len(names) != len(chosen):
        raise UserError(
            f"{source} holds {len(names)} pictures for {archive.folder}; expected "
            f"{archive.pictures}. The archive is deleted; name one that is complete with --address."
        )
    if sum(member.size for member in chosen) > archive.max_bytes:
        raise UserError(
            f"{source} would unpack to more than {archive.max_bytes} bytes, which its pictures "
            "cannot have. The archive is deleted."
        )
    return chosen


@contextlib.contextmanager
def _opened(path: Path, source: str) -> Iterator[list[Member]]:
    """The files in a zip or tar, none of which has a name or kind that unpacking could be hurt by.

    Raises:
        UserError: it is neither, is damaged, or holds something unsafe.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as packed:
                yield _members_of_zip(packed, source)
        else:
            # Not the compressed kinds: what they unpack to is known only afterwards.
            with tarfile.open(path, "r:") as tar:
                yield _members_of_tar(tar, source)
    # zipfile raises NotImplementedError for a compression that it does not know.
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError) as e:
        raise UserError(
            f"{source} is damaged, or neither a zip nor an uncompressed tar: {e}. It is deleted; "
            "run again to fetch it afresh, or name another with --address."
        ) from None


def _members_of_tar(tar: tarfile.TarFile, source: str) -> list[Member]:
    members = []
    for info in tar:
        _refuse_unsafe(info.name, source)
        if not (info.isfile() or info.isdir()):
            raise _unsafe(f"{info.name}, which is a link or a device", source)
        if info.isfile():
            members.append(Member(info.name, info.size, functools.partial(_extract, tar, info)))
    return members


def _extract(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(info)
    assert file is not None, "a regular file"
    return file


def _members_of_zip(packed: zipfile.ZipFile, source: str) -> list[Member]:
    members = []
    for info in packed.infolist():
        _refuse_unsafe(info.orig_filename, source)
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _unsafe(f"{info.filename}, which is a link or a device", source)
        if info.flag_bits & 1:
            raise _unsafe(f"{info.filename}, which is encrypted", source)
        if not info.is_dir():
            # zipfile compares the CRC when the last byte is read, and reads no more than stated.
            opener = functools.partial(packed.open, info)
            members.append(Member(info.filename, info.file_size, opener))
    return members


def _refuse_unsafe(name: str, source: str) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in name or "\0" in name:
        raise _unsafe(f"{name!r}, which would be written elsewhere", source)


def _unsafe(what: str, source: str) -> UserError:
    return UserError(
        f"{source} holds {what}; the published archive has nothing of the kind. Nothing of it was "
        "unpacked, and it is deleted; name a sound one with --address."
    )
