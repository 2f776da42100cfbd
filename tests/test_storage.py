"""Shards from real servers: HTTP with every fault, S3, and the cache on the disk."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import fsspec.implementations.http
import fsspec.implementations.memory
import numpy as np
import pytest
from fsspec.registry import _registry

from sr_dist import remote, shard_reader, shards, storage, stream
from sr_dist.errors import UserError
from tests import local_server
from tests.helpers import free_port, start_ranks, succeed
from tests.local_server import Reply, Server, data, silent, status
from tests.runs import full_disk
from tests.streams import assert_equal, read, read_batches

pytest.importorskip("aiohttp", reason="aiohttp is not installed")

QUICK = storage.Settings(attempts=4, timeout=0.5)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.01)


def serve(server: Server, folder: Path) -> str:
    """All files of a folder, and the address of the folder."""
    for path in folder.iterdir():
        server.serve(f"/s/{path.name}", data(path.read_bytes()))
    return server.address("/s")


def test_training_reads_over_http_what_lies_on_the_disk(server: Server, sharded: Path) -> None:
    address = serve(server, sharded)
    assert shards.read_index(address).fingerprint == shards.read_index(str(sharded)).fingerprint
    local = read(sharded, last=12)
    assert_equal(local, read(address, last=12, settings=QUICK))
    assert_equal(local, read(f"{address}/index.json", last=12, num_workers=2, settings=QUICK))
    some = f"{address}/shard-{{000001..000002}}.tar"
    assert_equal(read(f"{sharded}/shard-{{000001..000002}}.tar"), read(some, settings=QUICK))


def test_reading_starts_at_a_mark_and_not_at_the_beginning(server: Server, sharded: Path) -> None:
    address = serve(server, sharded)
    whole = shards.read_index(address)
    read(address, first=9, last=10, batch=1, settings=QUICK)
    asked = [r.headers["Range"] for r in server.requests if r.path.endswith(".tar")]
    marks = {f"bytes={mark}-" for shard in whole.shards for mark in shard.marks[1:]}
    assert any(asked[0].startswith(mark) for mark in marks)
    assert len(asked) <= 4, "the shards of the lane's first window"


FAULTS: dict[str, list[Reply]] = {
    "503": [status(503), status(503)],
    "500 with a page": [status(500, b"<html>oops</html>")],
    "a stall": [silent(0.8)],
    "429": [status(429, b"", Retry_After=1)],
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda name: name.replace(" ", "-"))
def test_faults_that_pass(server: Server, fault: str) -> None:
    body = os.urandom(60_000)
    address = server.serve("/a.tar", *FAULTS[fault], data(body))
    with storage.open_file(address, QUICK, size=len(body)) as file:
        assert file.read() == body
    assert len(server.asked("/a.tar")) == len(FAULTS[fault]) + 1


@pytest.fixture
def own_s3(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses of s3 lead to the server."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.address(""))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@pytest.mark.parametrize("scheme", ["http", "s3"])
@pytest.mark.usefixtures("own_s3")
def test_a_cut_connection_goes_on_at_the_byte_where_it_broke(server: Server, scheme: str) -> None:
    body = os.urandom(100_000)
    replies = [data(body, sent=45_000), status(503), data(body, sent=45_001), data(body)]
    address = server.serve("/b/a.tar", *replies)
    address = "s3://b/a.tar" if scheme == "s3" else address
    with storage.open_file(address, QUICK, size=len(body)) as file:
        assert b"".join(iter(lambda: file.read(7_000), b"")) == body
    asked = [request.headers["Range"] for request in server.asked("/b/a.tar")]
    assert asked == [f"bytes={start}-99999" for start in (0, 45_000, 45_000, 45_001)]


def brief(body: bytes, sent: int) -> Reply:
    """Every connection is cut after so many bytes."""

    def reply(handler: local_server.Handler) -> None:
        begin, _, final = handler.headers["Range"].removeprefix("bytes=").partition("-")
        first, end = int(begin), int(final) + 1
        span = f"bytes {first}-{final}/{len(body)}"
        handler.start(206, {"Content-Length": end - first, "Content-Range": span})
        handler.wfile.write(body[first : min(end, first + sent)])
        handler.close_connection = True

    return reply


def test_connections_that_never_last_bring_the_file_all_the_same(server: Server) -> None:
    """Of a block of two million bytes none would ever come at once."""
    body = os.urandom(3_000_000)
    address = server.serve("/a.tar", brief(body, 100_000))
    with storage.open_file(address, storage.Settings(attempts=1), size=len(body)) as file:
        assert file.read() == body
    assert len(server.asked("/a.tar")) < 1.2 * len(body) / 100_000


def test_a_cache_that_cannot_be_is_no_damage(server: Server, sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", Path("/proc/nowhere")):
        cached = storage.Settings(cache_dir=str(folder))
        index = shards.read_index(served(server, sharded))
        with pytest.raises(UserError, match=f"stream.cache_dir: cannot make the folder {folder}"):
            shard_reader.check_files(index, cached)
        for workers in (0, 1):
            with pytest.raises(UserError, match="stream.cache_dir: cannot make the folder"):
                read(index.root, settings=cached, on_error="skip", num_workers=workers)


def test_faults_of_the_cache_are_told_as_such(
    server: Server, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = shards.read_index(served(server, sharded))
    nowhere = storage.Settings(cache_dir="/proc/self")  # is there; no file can be made in it
    message = (
        "stream.cache_dir: cannot keep shards in /proc/self: .* Make it writable, name another"
    )
    with pytest.raises(UserError, match=message):
        shard_reader.check_files(index, nowhere)
    with pytest.raises(UserError, match=message):
        read(index.root, settings=nowhere, on_error="skip")
    cached = storage.Settings(cache_dir=str(tmp_path / "cache"))
    message = "stream.cache_dir: cannot keep shards in .*/cache: File too large. Make room, lower"
    for ranges in (True, False):
        for path in sharded.glob("*.tar"):
            server.serve(f"/s/{path.name}", data(path.read_bytes(), ranges=ranges))
        with full_disk(), pytest.raises(UserError, match=message):
            read(index.root, settings=cached, on_error="skip")
    asked = len(server.requests)
    with full_disk(), pytest.raises(OSError, match="File too large"):
        remote.fetch_whole(index.address(0), QUICK, tmp_path / "whole")
    assert len(server.requests) == asked + 1, "another attempt would find it as full"
    room = shutil.disk_usage(tmp_path)._replace(free=sum(s.bytes for s in index.shards))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: room)
        with pytest.raises(UserError, match="/cache has .* GB free, and the shards would take"):
            shard_reader.check_files(index, cached)
        least = dataclasses.replace(cached, cache_bytes=max(s.bytes for s in index.shards))
        assert shard_reader.check_files(index, least) == []


def test_a_full_cache_need_not_be_written_to(
    server: Server, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = served(server, sharded)
    cached = storage.Settings(cache_dir=str(tmp_path / "cache"))
    expected = read(address, last=22, crops=1, settings=cached)

    def none(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(storage.tempfile, "TemporaryFile", none)
    monkeypatch.setattr(storage._Cache, "_locked", none)
    monkeypatch.setattr(os, "utime", none)
    asked = len(server.requests)
    assert shard_reader.check_files(shards.read_index(address), cached) == []
    assert_equal(read(address, last=22, crops=1, settings=cached), expected)
    assert {request.path for request in server.requests[asked:]} == {"/s/index.json"}
    next((tmp_path / "cache").glob("*.tar")).unlink()
    with pytest.raises(UserError, match="cannot keep shards in .*: Read-only file system"):
        shard_reader.check_files(shards.read_index(address), cached)


def test_a_server_that_trickles_is_left(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_SLOWEST", 2)

    def trickle(handler: local_server.Handler) -> None:
        handler.start(206, {"Content-Length": 9999, "Content-Range": "bytes 0-9998/9999"})
        for _ in range(100):
            handler.wfile.write(b"x")
            time.sleep(0.1)

    address = server.serve("/a.tar", trickle)
    began = time.monotonic()
    with pytest.raises(OSError, match=r"cannot be read at byte \d+ after 2 attempts"):
        storage.open_file(address, storage.Settings(attempts=2, timeout=0.5), size=9999).read()
    assert time.monotonic() - began < 8


def test_a_wrong_length_is_a_fault(server: Server) -> None:
    body = os.urandom(1000)

    def short(handler: local_server.Handler) -> None:
        handler.start(206, {"Content-Length": 600, "Content-Range": "bytes 0-599/1000"})
        handler.wfile.write(body[:600])

    address = server.serve("/a.tar", short, data(body))
    with storage.open_file(address, QUICK, size=1000) as file:
        assert file.read() == body
    server.serve("/b.tar", short)
    server.sizes["/b.tar"] = 1000
    with pytest.raises(OSError, match=r"b.tar cannot be read at byte 600 after 4 attempts: "):
        storage.open_file(server.address("/b.tar"), QUICK, size=1000).read()


def test_a_head_that_tells_half_the_size_makes_no_damage(server: Server, sharded: Path) -> None:
    """A fault that passes stays one, though HEAD says that the bytes are not there."""
    address = served(server, sharded)
    for path in sharded.glob("*.tar"):
        server.sizes[f"/s/{path.name}"] = path.stat().st_size // 2
        server.serve(f"/s/{path.name}", *[status(503)] * 3, data(path.read_bytes()))
    reading = storage.Settings(attempts=3, timeout=2)
    for _ in range(3):  # each shard in its turn
        with pytest.raises(
            stream.DataError, match=r"cannot be read at byte \d+ after 3 attempts: 503"
        ):
            read(address, last=22, crops=1, on_error="skip", settings=reading)
    found = read_batches(address, last=22, crops=1, on_error="skip", settings=reading)
    assert not any(batch.skipped for batch in found)
    assert_equal([batch[:2] for batch in found], read(sharded, last=22, crops=1))
    assert shard_reader.check_files(shards.read_index(address), reading) == []


@pytest.mark.parametrize("says", ["416", "416 with the size", "Content-Range", "nothing"])
def test_what_a_get_says_of_the_end_is_believed(server: Server, says: str) -> None:
    body = os.urandom(1000)

    def short(handler: local_server.Handler) -> None:
        start = int(handler.headers["Range"].removeprefix("bytes=").partition("-")[0])
        total = "*" if says in ("416", "nothing") else len(body)
        if start < len(body):
            span = f"bytes {start}-{len(body) - 1}/{total}"
            handler.start(206, {"Content-Length": len(body) - start, "Content-Range": span})
            handler.wfile.write(body[start:])
        elif says == "416 with the size":
            handler.start(416, {"Content-Length": 0, "Content-Range": f"bytes */{total}"})
        else:
            handler.start(416 if says == "416" else 500, {"Content-Length": 0})

    address = server.serve("/a.tar", short)
    server.sizes["/a.tar"] = len(body)
    attempts = 1 if says == "Content-Range" else 2
    file = remote.open_file(address, storage.Settings(attempts=attempts), 2000)
    if says == "nothing":
        with pytest.raises(OSError, match="cannot be read at byte 1000 after 2 attempts"):
            file.read()
    else:
        assert file.read() == body


def test_all_remote_shards_are_asked_for_before_a_run(
    server: Server, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = served(server, sharded)
    index = shards.read_index(address)
    assert shard_reader.check_files(index, QUICK) == []
    server.serve("/s/shard-000001.tar", data((sharded / "shard-000001.tar").read_bytes()[:-9000]))
    server.sizes["/s/shard-000001.tar"] -= 9000
    (problem,) = shard_reader.check_files(index, QUICK)
    assert f"shard-000001.tar has {index.shards[1].bytes - 9000} bytes, the index says" in problem
    server.serve("/s/shard-000002.tar", status(404))
    del server.sizes["/s/shard-000002.tar"]
    message = "shard-000002.tar is not there, .* Such shards are never skipped"
    with pytest.raises(UserError, match=message):
        shard_reader.check_files(index, QUICK)
    monkeypatch.setattr(shard_reader, "_MOST_ASKED", 1)
    assert shard_reader.check_files(index, QUICK) == []


def test_a_whole_file_where_its_end_was_asked_for_is_a_fault(server: Server) -> None:
    body = os.urandom(2 * 2**20)
    address = server.serve("/a.tar", data(body, ranges=False))
    server.sizes["/a.tar"] = 4 * 2**20
    with (
        storage.open_file(address, QUICK, size=4 * 2**20) as file,
        pytest.raises(OSError, match="byte 2097152 after 4 attempts: .* sent 2097152 others"),
    ):
        file.read()


def test_small_files_need_no_ranges_also_where_connections_break(server: Server) -> None:
    body = os.urandom(300_000)
    replies = [data(body, ranges=False, sent=200_000), data(body, ranges=False)]
    address = server.serve("/a.tar", *replies)
    with storage.open_file(address, QUICK, size=len(body)) as file:
        assert file.read() == body


def test_compressed_answers_are_named(server: Server) -> None:
    address = server.serve("/a.tar", data(os.urandom(100), Content_Encoding="gzip"))
    with pytest.raises(OSError, match="the server compresses what it sends"):
        storage.open_file(address, QUICK, size=100).read()


def test_headers_of_fsspecs_configuration_are_sent(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fsspec.config.conf, "http", {"headers": {"X-Token": "abc"}})
    fsspec.implementations.http.HTTPFileSystem.clear_instance_cache()
    body = os.urandom(1000)
    address = server.serve("/a.tar", data(body))
    assert storage.open_file(address, QUICK, size=1000).read() == body
    assert {request.headers["X-Token"] for request in server.asked("/a.tar")} == {"abc"}


def test_a_fault_that_stays_names_address_byte_and_attempts(server: Server, sharded: Path) -> None:
    address = serve(server, sharded)
    for number in range(3):
        server.serve(f"/s/shard-{number:06d}.tar", status(503))
    message = (
        r"shard http://\S+/s/shard-00000\d.tar cannot be read: http://\S+ cannot be read at byte "
    )
    with pytest.raises(stream.DataError, match=message + r"\d+ after 4 attempts: 503"):
        read(address, settings=QUICK)
    with pytest.raises(UserError, match="no shards at .*: .*/t/index.json does not exist"):
        shards.read_index(server.address("/t"), QUICK)


def test_servers_without_ranges_need_the_cache(
    server: Server, sharded: Path, tmp_path: Path
) -> None:
    for path in sharded.iterdir():
        server.serve(f"/s/{path.name}", data(path.read_bytes(), ranges=False))
    address = server.address("/s")
    with pytest.raises(stream.DataError, match="does not answer range requests. Set stream.cache"):
        read(address, settings=QUICK)
    for path in sharded.glob("*.tar"):  # slow ones too
        server.serve(f"/s/{path.name}", data(path.read_bytes(), ranges=False, delay=0.8))
    cached = storage.Settings(attempts=1, timeout=2, cache_dir=str(tmp_path))
    assert_equal(read(sharded), read(address, settings=cached))


def test_the_cache_makes_the_second_epoch_local(
    server: Server, sharded: Path, tmp_path: Path
) -> None:
    address = serve(server, sharded)
    cached = storage.Settings(attempts=2, timeout=2, cache_dir=str(tmp_path / "cache"))
    local = read(sharded, last=30, crops=1)
    assert_equal(local, read(address, last=30, crops=1, settings=cached))
    asked = len(server.requests)
    assert_equal(local, read(address, last=30, crops=1, settings=cached))
    again = [request.path for request in server.requests[asked:]]
    assert again == ["/s/index.json"]
    kept = sorted((tmp_path / "cache").glob("*.tar"))
    hashes = {hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}
    assert hashes == {shard.sha256 for shard in shards.read_index(str(sharded)).shards}
    assert not list((tmp_path / "cache").glob("*.part"))


def served(server: Server, folder: Path) -> str:
    """Like `serve`, with sizes."""
    for path in folder.iterdir():
        server.sizes[f"/s/{path.name}"] = path.stat().st_size
    return serve(server, folder)


@pytest.mark.parametrize("kind", ["shorter", "altered"])
@pytest.mark.parametrize("cached", [False, True], ids=["direct", "cached"])
def test_damage_is_the_same_from_afar(
    server: Server, sharded: Path, tmp_path: Path, kind: str, cached: bool
) -> None:
    """What is skipped of a damaged shard does not depend on where it lies, nor on the cache."""
    folder = Path(shutil.copytree(sharded, tmp_path / "local"))
    victim = folder / "shard-000001.tar"
    if kind == "shorter":
        victim.write_bytes(victim.read_bytes()[:-60_000])
    else:
        altered = bytearray(victim.read_bytes())
        altered[70_000:70_600] = bytes(600)
        victim.write_bytes(altered)
    address = served(server, folder)
    reading = storage.Settings(
        attempts=2, timeout=5, cache_dir=str(tmp_path / "cache") if cached else None
    )
    options = {"last": 22, "crops": 1, "on_error": "skip"}
    local, far = read_batches(folder, **options), read_batches(address, settings=reading, **options)
    assert_equal([batch[:2] for batch in local], [batch[:2] for batch in far])
    skipped = [[len(batch.skipped) for batch in batches] for batches in (local, far)]
    assert skipped[0] == skipped[1] and sum(skipped[0]) > 0
    if cached:
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 2, "the damaged one is not kept"
    with pytest.raises(stream.DataError, match="shard-000001.tar"):
        read(address, last=22, crops=1, settings=reading)


def test_what_a_killed_process_left_in_the_cache_is_removed(
    server: Server, sharded: Path, tmp_path: Path
) -> None:
    address = serve(server, sharded)
    cached = storage.Settings(cache_dir=str(tmp_path))
    (tmp_path / ("0" * 32 + ".part")).write_bytes(b"half")
    held = tmp_path / ("1" * 32 + ".part")
    held.write_bytes(b"of a process that lives")
    with (tmp_path / ("1" * 32 + ".lock")).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        read(address, settings=cached)
    assert list(tmp_path.glob("*.part")) == [held]


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://me:hush@h/s", "http://h/s"),
        ("https://h/s?token=hush", "https://h/s"),
        ("s3://key:hush@bucket/s", "s3://bucket/s"),
        ("s3://bucket/s?sig=hush", "s3://bucket/s"),
        ("http://h/s#hush", "http://h/s"),
        ("http://me:hush@h/s/a.tar", "http://h/s"),
        ("http://me:hush@h/s/a-{0..1.tar", "http://h/s"),
    ],
)
def test_secrets_in_addresses_are_refused_and_not_printed(address: str, shown: str) -> None:
    for read_it in (shards.read_index, storage.open_file, storage.read_bytes, storage.size_of):
        with pytest.raises(UserError, match="expected an address without user") as refused:
            read_it(address)
        assert shown in str(refused.value) and "hush" not in str(refused.value)


def test_the_cache_keeps_to_its_size(server: Server, sharded: Path, tmp_path: Path) -> None:
    address = serve(server, sharded)
    index = shards.read_index(address)
    sizes = [shard.bytes for shard in index.shards]
    folder = tmp_path / "cache"
    cached = storage.Settings(cache_dir=str(folder), cache_bytes=sizes[0] + sizes[1])

    def use(number: int) -> None:
        shard = index.shards[number]
        file = storage.open_file(
            index.address(number), cached, size=shard.bytes, sha256=shard.sha256
        )
        assert len(file.read()) == shard.bytes
        time.sleep(0.02)

    for number in (0, 1, 0, 2):
        use(number)
        total = sum(path.stat().st_size for path in folder.glob("*.tar"))
        assert total <= cached.cache_bytes
    asked = len(server.requests)
    use(0)
    assert len(server.requests) == asked, "the least recently used one has gone"
    use(1)
    assert len(server.requests) > asked
    small = storage.Settings(cache_dir=str(folder), cache_bytes=sizes[0] - 1)
    message = f"cache_bytes is {sizes[0] - 1}, but .* has [0-9]+ bytes; allow more"
    with pytest.raises(UserError, match=f"cache_bytes is {sizes[0] - 1}, but .* has {sizes[0]}"):
        storage.open_file(index.address(0), small, size=sizes[0], sha256=index.shards[0].sha256)
    with pytest.raises(UserError, match=message):  # before a run begins
        shard_reader.check_files(index, small)


def test_a_cache_needs_room_for_what_is_read_beside_it(
    server: Server, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has made room stays on the disk while it is open."""
    index = shards.read_index(serve(server, sharded))
    sizes = sorted(shard.bytes for shard in index.shards)
    largest = sizes[-1]
    for open_at_once, most, needed in (
        (0, largest, 2 * largest),
        (1, largest, 3 * largest),
        (1, 2 * largest, 3 * largest),  # whose shards stay while they are read
    ):
        cached = storage.Settings(cache_dir=str(tmp_path / "cache"), cache_bytes=most)
        for short in (0, 1):
            usage = shutil._ntuple_diskusage(10**12, 0, needed - short)  # type: ignore[attr-defined]
            monkeypatch.setattr(storage.shutil, "disk_usage", lambda _, usage=usage: usage)
            if not short:
                assert shard_reader.check_files(index, cached, open_at_once) == []
                continue
            with pytest.raises(UserError, match=r"has .* GB free, and the shards would take"):
                shard_reader.check_files(index, cached, open_at_once)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_what_rots_in_the_cache_is_no_damage_of_the_shard(
    server: Server, sharded: Path, tmp_path: Path, on_error: str
) -> None:
    address = serve(server, sharded)
    cached = storage.Settings(cache_dir=str(tmp_path / "cache"))
    expected = read(address, last=22, crops=1, settings=cached)
    kept = sorted((tmp_path / "cache").glob("*.tar"))
    content = bytearray(kept[0].read_bytes())
    content[len(content) // 2] ^= 1
    kept[0].write_bytes(content)
    with pytest.raises(UserError, match="the copy of .* has not the bytes any more .* removed"):
        read(address, last=22, crops=1, settings=cached, on_error=on_error)
    assert not kept[0].exists()
    assert_equal(read(address, last=22, crops=1, settings=cached, on_error=on_error), expected)


def _use_all(address: str, folder: str, order: list[int], most: int = 10**9) -> int:
    index = shards.read_index(address)
    cached = storage.Settings(cache_dir=folder, cache_bytes=most)
    total = 0
    for number in order:
        shard = index.shards[number]
        with storage.open_file(
            index.address(number), cached, size=shard.bytes, sha256=shard.sha256
        ) as file:
            content = file.read()
            assert hashlib.sha256(content).hexdigest() == shard.sha256
            total += len(content)
    return total


@pytest.mark.multiprocess
def test_several_processes_fill_the_cache_together(
    server: Server, sharded: Path, tmp_path: Path
) -> None:
    address = serve(server, sharded)
    for path in sharded.glob("*.tar"):
        server.serve(f"/s/{path.name}", data(path.read_bytes(), delay=0.1))
    orders = [[0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 2, 1]]
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        results = [pool.apply_async(_use_all, (address, str(tmp_path), order)) for order in orders]
        totals = {result.get(timeout=60) for result in results}
    assert totals == {sum(path.stat().st_size for path in sharded.glob("*.tar"))}
    for path in sharded.glob("*.tar"):
        asked = [r for r in server.asked(f"/s/{path.name}")]
        assert len(asked) == 1, "one process fetches for all"


@pytest.mark.multiprocess
def test_several_processes_share_a_cache_that_holds_one_shard(
    server: Server, sharded: Path, tmp_path: Path
) -> None:
    """What one of them has just found there may be gone, to make room for another's."""
    address, index = serve(server, sharded), shards.read_index(str(sharded))
    most = max(shard.bytes for shard in index.shards)
    orders = [[0, 1, 2] * 8, [2, 1, 0] * 8, [1, 0, 2] * 8, [0, 2, 1] * 8]
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        folder = str(tmp_path)
        results = [pool.apply_async(_use_all, (address, folder, its, most)) for its in orders]
        totals = {result.get(timeout=120) for result in results}
    assert totals == {8 * sum(shard.bytes for shard in index.shards)}
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= most


def test_a_cache_tells_shards_apart_by_address_size_and_bytes(
    server: Server, tmp_path: Path
) -> None:
    cached = storage.Settings(cache_dir=str(tmp_path))
    for place, body in (("/a/x.tar", b"a" * 9), ("/b/x.tar", b"b" * 9), ("/a/x.tar", b"c" * 9)):
        address = server.serve(place, data(body))
        known = {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()}
        with storage.open_file(address, cached, **known) as file:  # type: ignore[arg-type]
            assert file.read() == body
    assert len(list(tmp_path.glob("*.tar"))) == 3


def test_pauses_between_attempts_double_up_to_a_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of the pauses of these tests
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for attempt in range(1, 10):
        remote.pause(attempt)
    assert slept == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_every_failed_attempt_is_followed_by_a_pause(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[int] = []
    monkeypatch.setattr(remote, "pause", pauses.append)
    address = server.serve("/a.tar", status(503), status(503), data(b"x" * 10))
    with storage.open_file(address, QUICK, size=10) as file:
        assert file.read() == b"x" * 10
    assert pauses == [1, 2]


def test_an_index_of_which_a_server_sends_a_part_is_asked_for_again(
    server: Server, sharded: Path
) -> None:
    body = (sharded / "index.json").read_bytes()
    address = server.serve("/s/index.json", data(body[:99]), data(body[:-3]), data(body))
    index = shards.read_index(address, QUICK)
    assert index.fingerprint == shards.read_index(str(sharded)).fingerprint
    address = server.serve("/t/index.json", data(body[:99]))
    with pytest.raises(UserError, match=r"t/index.json is not valid JSON \("):
        shards.read_index(address, QUICK)
    assert len(server.asked("/t/index.json")) >= QUICK.attempts


class _Store(fsspec.implementations.memory.MemoryFileSystem):
    """A store of which, as of gs and hf, only the bytes of an answer are seen."""

    protocol = "gs"
    says_end, sends_whole, faults = "no bytes", False, 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.partition("://")[2]

    def cat_file(self, path: str, start: int = 0, end: int = 0, **_: object) -> bytes:
        if _Store.faults:
            _Store.faults -= 1
            raise OSError("503")
        if self.sends_whole:
            return bytes(super().cat_file(path))
        if start >= self.size(path) and self.says_end == "an error":
            raise RuntimeError("the range cannot be satisfied")
        return bytes(super().cat_file(path, start=start, end=end))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Store]]:
    monkeypatch.setitem(_registry, "gs", _Store)
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 400)
    yield _Store
    _Store().store.clear()


@pytest.mark.parametrize("says_end", ["no bytes", "an error"])
def test_stores_of_which_only_the_bytes_are_seen(
    store: type[_Store], monkeypatch: pytest.MonkeyPatch, says_end: str
) -> None:
    body = os.urandom(1000)
    store().pipe_file("/bucket/a.tar", body)
    monkeypatch.setattr(store, "says_end", says_end)
    monkeypatch.setattr(store, "faults", 3)
    with storage.open_file("gs://bucket/a.tar", QUICK, size=1000) as file:
        assert file.read() == body and store.faults == 0
    for told in (1100, 2000):  # the last block lacks bytes, or there are none
        monkeypatch.setattr(remote, "_found_shorter", {})
        with storage.open_file("gs://bucket/a.tar", QUICK, size=told) as file:
            assert file.read() == body
    monkeypatch.setattr(store, "faults", 4)
    message = "gs://bucket/a.tar cannot be read at byte 0 after 4 attempts: 503"
    with pytest.raises(OSError, match=message):
        storage.open_file("gs://bucket/a.tar", QUICK, size=1000).read()
    monkeypatch.setattr(store, "sends_whole", True)
    with pytest.raises(remote.NoRanges, match="asked for 400 bytes, the server sent 1000"):
        storage.open_file("gs://bucket/a.tar", QUICK, size=1000).read()


@pytest.mark.parametrize(
    "address", ["pipe:cat x", "nosuch://x/index.json", "ftp://x/y", "memory://x", "github://a:b@c"]
)
def test_other_schemes_are_refused(address: str) -> None:
    with pytest.raises(UserError):
        shards.read_index(address)
    with pytest.raises(UserError, match="pipe|expected a local path or an address of http, https"):
        storage.open_file(address)


@pytest.fixture(scope="module")
def bucket(sharded: Path) -> Iterator[str]:
    """A real S3 server (moto's) that holds the shards."""
    pytest.importorskip("moto.server", reason="moto is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    port = free_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    running = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        import s3fs

        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline and running.poll() is None
                time.sleep(0.1)
        s3 = s3fs.S3FileSystem(skip_instance_cache=True)
        s3.mkdir("pictures")
        for path in sharded.iterdir():
            s3.put_file(str(path), f"pictures/deep/{path.name}")
        yield "s3://pictures/deep"
    finally:
        running.terminate()
        running.wait(20)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def test_shards_in_s3(bucket: str, sharded: Path, tmp_path: Path) -> None:
    local = read(sharded, last=12)
    assert_equal(local, read(bucket, last=12))
    assert_equal(local, read(f"{bucket}/index.json", last=12, num_workers=2))
    cached = storage.Settings(cache_dir=str(tmp_path / "cache"))
    assert_equal(local, read(bucket, last=12, settings=cached))
    with pytest.raises(UserError, match="no shards at s3://pictures/none"):
        shards.read_index("s3://pictures/none")


def test_damage_in_s3_is_that_on_the_disk(bucket: str, sharded: Path, tmp_path: Path) -> None:
    import s3fs

    folder = Path(shutil.copytree(sharded, tmp_path / "local"))
    victim = folder / "shard-000001.tar"
    victim.write_bytes(victim.read_bytes()[:-60_000])
    for path in folder.iterdir():
        s3fs.S3FileSystem(skip_instance_cache=True).put_file(str(path), f"pictures/cut/{path.name}")
    options = {"last": 22, "crops": 1, "on_error": "skip"}
    far = read("s3://pictures/cut", settings=storage.Settings(attempts=2), **options)
    assert_equal(read(folder, **options), far)


@pytest.mark.usefixtures("own_s3")
def test_attempts_are_ours_alone(server: Server) -> None:
    """Those of s3fs and of botocore would multiply them."""
    server.serve("/none/a.tar", status(503))
    with pytest.raises(OSError, match="after 3 attempts"):
        storage.open_file(
            "s3://none/a.tar", storage.Settings(attempts=3, timeout=2), size=100
        ).read()
    assert len(server.asked("/none/a.tar")) == 3


def flaky(body: bytes, seed: int, share: float = 0.2) -> Reply:
    """Every now and then a 503, a silence, a cut connection, or a wrong length."""
    random, lock = np.random.default_rng(seed), threading.Lock()
    cut = data(body, sent=len(body) // 2)

    def reply(handler: local_server.Handler) -> None:
        with lock:
            draw = random.random() / share
        if draw < 0.3:
            status(503)(handler)
        elif draw < 0.4:
            silent(1.5)(handler)
        elif draw < 0.7:
            cut(handler)
        elif draw < 1:
            handler.start(206, {"Content-Length": 10})
            handler.wfile.write(bytes(10))
        else:
            data(body)(handler)

    return reply


@pytest.mark.multiprocess
def test_a_run_from_a_faulty_server_killed_and_resumed_sees_the_samples_of_an_unbroken_one(
    server: Server, sharded: Path, photographs: Path, tmp_path: Path
) -> None:
    """Two ranks over HTTP, killed at a step; one rank goes on; against a local run's rows."""
    for number, path in enumerate(sorted(sharded.iterdir())):
        server.serve(f"/s/{path.name}", flaky(path.read_bytes(), number))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
run: {{name: far, output_dir: {tmp_path}/runs}}
data: {{train: "{server.address("/s")}", validation: {photographs}/chelsea.png, crop_size: 48,
  crops_per_image: 1, num_workers: 1}}
stream: {{timeout: 1, attempts: 20}}
model: {{generator: {{num_channels: 4, num_blocks: 1}}}}
loss: {{content: {{weight: 0}}, adversarial: {{weight: 0}}}}
train: {{epochs: 2, global_batch_size: 8}}
checkpoint: {{every_steps: 5}}
"""
    )
    worker, seen = "tests/workers/record_rows.py", tmp_path / "seen"
    seen.mkdir()
    running = start_ranks(2, worker, recipe, seen / "first", 0.2)
    deadline = time.monotonic() + 120
    checkpoint = tmp_path / "runs" / "far" / "checkpoints" / "step-00000005"
    records = [seen / f"first-{rank}" for rank in range(2)]
    while not checkpoint.exists() or any(len(r.read_text().splitlines()) < 9 for r in records):
        assert time.monotonic() < deadline and running[0].process.exitcode is None
        time.sleep(0.05)
    for rank in running:
        rank.signal(signal.SIGKILL)
    assert [rank.end().returncode for rank in running] == [-signal.SIGKILL] * 2
    done = succeed(worker, recipe, seen / "second", "0", timeout=180)
    assert "going on from" in done.stderr

    def rows(name: str) -> dict[int, list[str]]:
        lines = (seen / name).read_text().splitlines() if (seen / name).exists() else []
        return {step: hashes for step, hashes in map(json.loads, lines)}

    expected = {}
    for step, (_, hr) in enumerate(read(sharded, last=36, crops=1, batch=8, seed=0), start=1):
        expected[step] = [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in hr]
    ranks, second = [rows(f"first-{rank}") for rank in range(2)], rows("second-0")
    killed = min(max(its) for its in ranks)
    assert killed >= 9 and min(second) <= killed + 1 and max(second) == 36
    for step in range(1, 37):
        if step in second:
            assert second[step] == expected[step]
        else:
            assert ranks[0][step] + ranks[1][step] == expected[step]
