"""DIV2K and Flickr2K from a server on this machine; archives that are wrong, and evil ones."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import stat
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sr_dist import archives, web
from sr_dist.archives import Archive
from sr_dist.errors import UserError
from tests.helpers import succeed
from tests.local_server import Server, data, status

FAST = web.Options(backoff=0.01, timeout=5.0, attempts=2)
ZIP = "application/zip"


def encoded(seed: int, side: int = 8) -> bytes:
    pixels = np.random.default_rng(seed).integers(256, size=(side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png", compress_level=1)
    return buffer.getvalue()


PICTURES = {f"{number:04}.png": encoded(number) for number in range(1, 5)}
INSIDE = {f"DIV2K_train_HR/{name}": body for name, body in PICTURES.items()}


def packed(members: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("DIV2K_train_HR/", b"")
        for name, body in members.items():
            file.writestr(name, body)
    return buffer.getvalue()


def tarred(members: Mapping[str, bytes], mode: str = "w", **extra: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as file:  # type: ignore[call-overload]
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            file.addfile(info, io.BytesIO(body))
        for info in extra.values():
            file.addfile(info)
    return buffer.getvalue()


def published(body: bytes, address: str, **changes: object) -> Archive:
    """An archive of four pictures, with the sum that it is published under."""
    md5 = hashlib.md5(body, usedforsecurity=False).hexdigest()
    archive = Archive("DIV2K_train_HR", address, md5, len(PICTURES), 1, "research only")
    return dataclasses.replace(archive, **changes)  # type: ignore[arg-type]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.csv"
    }


def test_an_archive_is_fetched_checked_and_unpacked_once(server: Server, tmp_path: Path) -> None:
    body = packed(INSIDE)
    archive = published(body, server.serve("/a.zip", data(body, ZIP)))
    assert archives.fetch(archive, tmp_path, FAST)
    assert files(tmp_path) == INSIDE  # the archive is gone
    found = rows(tmp_path)
    assert [row["file"] for row in found] == sorted(INSIDE)
    assert found[0] == {
        "file": "DIV2K_train_HR/0001.png",
        "address": f"{archive.address}#DIV2K_train_HR/0001.png",
        "sha256": hashlib.sha256(PICTURES["0001.png"]).hexdigest(),
        "bytes": str(len(PICTURES["0001.png"])),
        "licence": "research only",
        "attribution": "",
        "archive_sha256": hashlib.sha256(body).hexdigest(),
    }
    assert not archives.fetch(archive, tmp_path, FAST)
    assert len(server.requests) == 1
    # One that was deleted is had again; the others are left as they are.
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    (tmp_path / "DIV2K_train_HR/0002.png").unlink()
    assert archives.fetch(archive, tmp_path, FAST)
    assert files(tmp_path) == INSIDE and len(server.requests) == 2
    changed = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {"0002.png"}


def test_a_broken_download_goes_on(server: Server, tmp_path: Path) -> None:
    body = packed(INSIDE | {"padding": bytes(3 * 2**20)})
    cut = [data(body, ZIP, sent=count * 2**20) for count in (1, 2)]
    address = server.serve("/a.zip", cut[0], cut[0], cut[1], data(body, ZIP))
    archive = published(body, address, mebibytes=4)
    steps: list[tuple[str, int, int]] = []

    def progress(items, what, total):  # type: ignore[no-untyped-def]
        got = 0
        for item in items:
            got += 1
            yield item
        steps.append((what, total, got))

    options = dataclasses.replace(FAST, attempts=1)
    with pytest.raises(UserError, match="Run again to go on, or name a copy .* with --address"):
        archives.fetch(archive, tmp_path, options, progress=progress)
    assert archives.fetch(archive, tmp_path, FAST, progress=progress)
    assert files(tmp_path) == INSIDE
    asked = [request.headers.get("Range") for request in server.requests]
    assert asked == [None, *[f"bytes={2**20}-"] * 2, f"bytes={2 * 2**20}-"]
    assert steps == [
        ("DIV2K_train_HR (MiB)", 3, 2),
        ("checking DIV2K_train_HR (MiB)", 4, 4),
        ("unpacking DIV2K_train_HR", 4, 4),
    ]


def test_a_stopped_unpacking_goes_on_without_a_download(server: Server, tmp_path: Path) -> None:
    body = packed(INSIDE)
    archive = published(body, server.serve("/a.zip", data(body, ZIP)))

    def stop(items, what, total):  # type: ignore[no-untyped-def]
        for number, item in enumerate(items):
            if what.startswith("unpacking") and number == 2:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        archives.fetch(archive, tmp_path, FAST, progress=stop)
    assert [row["file"][-8:] for row in rows(tmp_path)] == ["0001.png", "0002.png"]
    assert archives.fetch(archive, tmp_path, FAST)
    assert files(tmp_path) == INSIDE and len(rows(tmp_path)) == 4
    assert len(server.requests) == 1


def test_what_is_not_the_published_archive(server: Server, tmp_path: Path) -> None:
    body = packed(INSIDE)
    archive = published(body, server.serve("/a.zip", data(body, ZIP)), md5="0" * 32)
    with pytest.raises(UserError, match=r"its MD5 is [0-9a-f]{32}, expected 0{32}.*--address"):
        archives.fetch(archive, tmp_path, FAST)
    assert files(tmp_path) == {}
    # Named as a copy, it is accepted by what is in it.
    assert archives.fetch(archive, tmp_path, FAST, archive.address)
    assert files(tmp_path) == INSIDE


def as_copy(
    server: Server, folder: Path, body: bytes, media_type: str = ZIP, **changes: object
) -> dict[str, bytes]:
    archive = published(b"", "http://127.0.0.1:1/", **changes)
    address = server.serve("/copy", data(body, media_type))
    archives.fetch(archive, folder, FAST, address)
    return files(folder)


LOW = {f"Set/LR_bicubic/X2/{name}": encoded(9) for name in PICTURES}
COPIES: dict[str, Callable[[], bytes]] = {
    "tar": lambda: tarred(INSIDE),
    "deflated": lambda: packed(INSIDE, zipfile.ZIP_DEFLATED),
    "without folders": lambda: packed(PICTURES),
    "another folder": lambda: packed({f"a/b/{name}": body for name, body in PICTURES.items()}),
    "low beside high": lambda: tarred(LOW | {f"Set/HR/{n}": b for n, b in PICTURES.items()}),
    "low beside others": lambda: packed(LOW | {f"Set/{n}": b for n, b in PICTURES.items()}),
    "litter": lambda: packed(INSIDE | {"__MACOSX/._0001.png": b"x", "read.me": b"x"}),
}


@pytest.mark.parametrize("case", COPIES)
def test_copies_that_are_packed_otherwise(server: Server, tmp_path: Path, case: str) -> None:
    for media_type in (ZIP, "application/x-tar", "binary/octet-stream"):
        folder = tmp_path / media_type.replace("/", "-")
        assert as_copy(server, folder, COPIES[case](), media_type) == INSIDE


def linked(name: str, kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zip_with_mode(mode: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, body in INSIDE.items():
            file.writestr(name, body)
        info = zipfile.ZipInfo("DIV2K_train_HR/0005.png")
        info.create_system, info.external_attr = 3, mode << 16
        file.writestr(info, "/etc/passwd")
    return buffer.getvalue()


def zip_marked_encrypted() -> bytes:
    body = bytearray(packed(INSIDE))
    entry = body.rindex(b"PK\x01\x02")
    body[entry + 8] |= 1
    return bytes(body)


def evil(name: str) -> Callable[[], bytes]:
    return lambda: packed(INSIDE | {name: encoded(5)})


EVIL: dict[str, tuple[Callable[[], bytes], str]] = {
    "up": (evil("../outside.png"), "which would be written elsewhere"),
    "up inside": (evil("DIV2K_train_HR/../../outside.png"), "which would be written elsewhere"),
    "absolute": (evil("/tmp/outside.png"), "which would be written elsewhere"),
    "backslash": (evil("..\\outside.png"), "which would be written elsewhere"),
    "drive": (evil("C:outside.png"), "which would be written elsewhere"),
    "tar up": (lambda: tarred(INSIDE | {"../x.png": b"x"}), "which would be written elsewhere"),
    "tar absolute": (lambda: tarred(INSIDE | {"/x.png": b"x"}), "would be written elsewhere"),
    "symlink": (lambda: tarred(INSIDE, a=linked("a.png", tarfile.SYMTYPE)), "a.png, which is a li"),
    "hard link": (lambda: tarred(INSIDE, a=linked("a.png", tarfile.LNKTYPE)), "which is a link"),
    "device": (lambda: tarred(INSIDE, a=linked("a.png", tarfile.CHRTYPE)), "which is a link or a"),
    "fifo": (lambda: tarred(INSIDE, a=linked("a.png", tarfile.FIFOTYPE)), "a link or a device"),
    "zip link": (lambda: zip_with_mode(stat.S_IFLNK | 0o777), "0005.png, which is a link"),
    "encrypted": (zip_marked_encrypted, "0004.png, which is encrypted"),
}


@pytest.mark.parametrize("case", EVIL)
def test_evil_archives_are_refused_as_a_whole(server: Server, tmp_path: Path, case: str) -> None:
    make, message = EVIL[case]
    output = tmp_path / "a" / "b"
    with pytest.raises(UserError, match=message) as raised:
        as_copy(server, output, make())
    assert "Nothing of it was unpacked" in str(raised.value)
    assert files(tmp_path) == {}
    assert not Path("/tmp/outside.png").exists()


def damaged() -> bytes:
    body = bytearray(packed(INSIDE))
    body[body.index(PICTURES["0002.png"]) + 60] ^= 1
    return bytes(body)


def cut_tar() -> bytes:
    body = tarred(INSIDE)
    return body[: body.index(PICTURES["0004.png"]) + 50]


WRONG: dict[str, tuple[Callable[[], bytes], dict[str, object], str]] = {
    "CRC": (damaged, {}, "is damaged.*Bad CRC-32 for file 'DIV2K_train_HR/0002.png'"),
    "cut zip": (lambda: packed(INSIDE)[:-100], {}, "is damaged, or neither a zip nor"),
    "cut tar": (cut_tar, {}, "is damaged, or .* unexpected end of data"),
    "tar.gz": (lambda: tarred(INSIDE, "w:gz"), {}, "neither a zip nor an uncompressed tar"),
    "text": (lambda: b"not found", {}, "is damaged, or neither"),
    "few": (lambda: packed(INSIDE), {"pictures": 5}, "holds 4 pictures for DIV2K.*; expected 5"),
    "many": (lambda: packed(INSIDE), {"pictures": 3}, "holds 4 pictures .*; expected 3"),
    "twins": (
        lambda: packed({f"{n % 2}/{n // 2}.png": encoded(n) for n in range(4)}),
        {},
        "holds 2 pictures for DIV2K_train_HR; expected 4",
    ),
    "no picture": (
        lambda: packed(INSIDE | {"DIV2K_train_HR/0003.png": b"not a picture"}),
        {},
        "0003.png in http.* of no known format",
    ),
    "bomb": (
        lambda: packed({n: b + bytes(2**20) for n, b in INSIDE.items()}, zipfile.ZIP_DEFLATED),
        {},
        "would unpack to more than 2097152 bytes",
    ),
    "huge": (lambda: bytes(3 * 2**20), {}, "has 3145728 bytes; at most 2097152 are taken"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_archives_are_refused_and_not_kept(server: Server, tmp_path: Path, case: str) -> None:
    make, changes, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        as_copy(server, tmp_path, make(), **changes)
    left = {name for name in files(tmp_path) if not name.startswith("DIV2K_train_HR/")}
    assert left == set()
    # What was unpacked before the fault is whole, and is gone on from.
    for name, body in files(tmp_path).items():
        assert INSIDE[name] == body
    assert as_copy(server, tmp_path, packed(INSIDE)) == INSIDE


def test_faults_of_the_server(server: Server, tmp_path: Path) -> None:
    html = server.serve("/a", status(200, b"<html>", Content_Type="text/html"))
    with pytest.raises(UserError, match="/a is of type text/html; expected application/ or bin"):
        archives.fetch(published(b"", html), tmp_path, FAST)
    missing = published(b"", server.address("/missing"))
    message = "/missing answers with status 404 Not Found. Run again to go on, or name a copy"
    with pytest.raises(UserError, match=message):
        archives.fetch(missing, tmp_path, FAST)
    with pytest.raises(UserError, match="--address: file:///a.zip file: addresses are refused"):
        archives.fetch(missing, tmp_path, FAST, "file:///a.zip")


def test_the_published_sets() -> None:
    sizes = {name: [a.pictures for a in of] for name, of in archives.SETS.items()}
    assert sizes == {"div2k": [800, 100], "flickr2k": [2650]}
    for archive in (*archives.SETS["div2k"], *archives.SETS["flickr2k"]):
        assert web.problem_of(archive.address) == "" and len(archive.md5) == 32


def test_which_copy_is_of_which_archive() -> None:
    div2k, flickr2k = archives.SETS["div2k"], archives.SETS["flickr2k"]
    train, valid = "http://a/DIV2K_train_HR.zip", "http://a/DIV2K_valid_HR.zip?x"
    assert archives.pair(div2k, []) == {}
    assert archives.pair(div2k, ["http://a/1", "http://a/2"]) == {
        "DIV2K_train_HR": "http://a/1",
        "DIV2K_valid_HR": "http://a/2",
    }
    assert archives.pair(div2k, [valid]) == {"DIV2K_valid_HR": valid}
    assert archives.pair(flickr2k, ["http://a/1"]) == {"Flickr2K_HR": "http://a/1"}
    for wrong in (["http://a/1"], [train, valid, train]):
        with pytest.raises(UserError, match="which archive is it of"):
            archives.pair(div2k, wrong)


def test_div2k_by_the_command(server: Server, tmp_path: Path) -> None:
    train = {f"DIV2K_train_HR/{n:04}.png": encoded(n, 2) for n in range(1, 801)}
    valid = {f"DIV2K_valid_HR/{n:04}.png": encoded(n, 2) for n in range(801, 901)}
    addresses = [
        server.serve("/DIV2K_train_HR.zip", data(packed(train), ZIP)),
        server.serve("/DIV2K_valid_HR.zip", status(503), data(packed(valid), ZIP)),
    ]
    output = tmp_path / "out"
    words = ("tools/make_dataset.py", "--source", "div2k", "--output", output, "--address")
    done = succeed(*words, *addresses)
    assert done.stdout == (
        f"{output}/DIV2K_train_HR: 800 pictures unpacked\n"
        f"{output}/DIV2K_valid_HR: 100 pictures unpacked\n"
    )
    assert files(output) == train | valid
    assert len(rows(output)) == 900 and len(server.requests) == 3
    done = succeed(*words, *addresses)
    assert done.stdout.count("there already") == 2 and len(server.requests) == 3


def test_flickr2k_is_whole_or_refused(server: Server, tmp_path: Path) -> None:
    (flickr2k,) = archives.SETS["flickr2k"]
    members = {f"Flickr2K/Flickr2K_HR/{n:06}.png": encoded(n) for n in range(3)}
    low = {f"Flickr2K/Flickr2K_LR_bicubic/X2/{n:06}x2.png": encoded(n) for n in range(3)}
    tar = data(tarred(low | members), "application/x-tar")
    address = server.serve("/Flickr2K.tar", tar)
    with pytest.raises(UserError, match="holds 3 pictures for Flickr2K_HR; expected 2650"):
        archives.fetch(flickr2k, tmp_path, FAST, address)
    assert archives.fetch(dataclasses.replace(flickr2k, pictures=3), tmp_path, FAST, address)
    assert files(tmp_path) == {name.removeprefix("Flickr2K/"): b for name, b in members.items()}
