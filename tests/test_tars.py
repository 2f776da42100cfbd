"""The tar reader against the standard library's, against cut files and against hostile ones."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sr_dist import tars

Files = list[tuple[str, bytes]]


def made(files: Files, **options: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:  # type: ignore[call-overload]
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def read(data: bytes) -> Files:
    return [(member.name, member.read()) for member in tars.read_members(io.BytesIO(data))]


names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=150)
names = names.filter(lambda name: name not in (".", "..") and name == name.strip())


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=6),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_reads_what_the_standard_library_writes(files: Files, form: int) -> None:
    data = made(files, format=form, encoding="utf-8")
    assert read(data) == files
    # Every member can be read from its offset alone.
    members = list(tars.read_members(io.BytesIO(data)))
    for number, member in enumerate(members):
        file = io.BytesIO(data)
        file.seek(member.offset)
        assert next(tars.read_members(file)).read() == files[number][1]


def test_folders_are_passed_over() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        folder = tarfile.TarInfo("deep")
        folder.type, folder.size = tarfile.DIRTYPE, 700  # a size that means nothing
        tar.addfile(folder)
        info = tarfile.TarInfo("deep/a.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert read(buffer.getvalue()) == [("deep/a.png", b"abc")]


def test_a_cut_anywhere_is_found() -> None:
    """At every byte: in a header, in a payload, between members, before the end mark."""
    data = made([("a.png", b"x" * 700), ("b.png", b"y" * 10)])
    end = 512 + 1024 + 512 + 512
    for length in [*range(0, end, 37), 511, 512, 513, 1212, 1536, 2048, 2058, end - 1, end]:
        with pytest.raises(tars.DamagedTar, match="cut off"):
            read(data[:length])
    assert len(read(data[: end + 512])) == 2, "one block of zeros is an end"


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (tarfile.SYMTYPE, "a.png", "a.png is a link; shards hold files alone"),
        (tarfile.LNKTYPE, "a.png", "a.png is a link"),
        (tarfile.CHRTYPE, "a.png", "a.png is no regular file"),
        (tarfile.FIFOTYPE, "a.png", "a.png is no regular file"),
        (tarfile.REGTYPE, "/etc/passwd.png", "leads out of the shard"),
        (tarfile.REGTYPE, "a/../../b.png", "leads out of the shard"),
    ],
)
def test_hostile_members_are_refused(kind: bytes, name: str, message: str) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    data = info.tobuf() + bytes(1024)
    with pytest.raises(tars.DamagedTar, match=message):
        read(data)


def test_sizes_that_are_only_told_are_not_believed() -> None:
    info = tarfile.TarInfo("a.json")
    info.size = 2**40
    huge = info.tobuf() + b"{}" + bytes(1022)
    with pytest.raises(tars.DamagedTar, match="a.json has 1099511627776 bytes; at most"):
        list(tars.read_samples(io.BytesIO(huge)))
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 2**40
    with pytest.raises(tars.DamagedTar, match="bytes of extensions"):
        read(info.tobuf() + bytes(1024))


def test_flipped_bits_of_a_header_are_found() -> None:
    data = made([("a.png", b"abc")])
    for place in (0, 124, 156, 500):
        changed = bytearray(data)
        changed[place] ^= 1
        with pytest.raises(tars.DamagedTar, match="no tar header at byte 0"):
            read(bytes(changed))


def test_samples_are_neighbours_of_one_key() -> None:
    crc = json.dumps({"crc32": zlib.crc32(b"two")}).encode()
    data = made(
        [
            ("__meta__", b"no sample"),
            ("x/1.jpg", b"one"),
            ("x/1.txt", b"words"),
            ("x/2.seg.webp", b"two"),
            ("x/2.json", crc),
            ("x/3.json", b"[1"),
            ("x/4.PNG", b"four"),
            ("x/4.json", b"no json"),
            ("x/5.webp", b"five"),
            ("x/5.json", crc),
            (".hidden.png", b"no key"),
        ]
    )
    found = list(tars.read_samples(io.BytesIO(data)))
    assert [(s.key, s.ending, s.picture) for s in found] == [
        ("x/1", "jpg", b"one"),
        ("x/2", "seg.webp", b"two"),
        ("x/4", "PNG", b"four"),
        ("x/5", "webp", b"five"),
    ]
    assert found[1].about == {"crc32": zlib.crc32(b"two")}
    assert [bool(s.problem) for s in found] == [False, False, False, True]
    passed = list(tars.read_samples(io.BytesIO(data), passed_over=2))
    assert [s.picture for s in passed] == [b"", b"", b"four", b"five"]
    assert [s.offset for s in passed] == [s.offset for s in found]


def test_reading_ends_where_a_member_begins() -> None:
    data = made([("1.png", b"one"), ("1.txt", b""), ("2.png", b"two"), ("3.png", b"three")])
    offsets = [member.offset for member in tars.read_members(io.BytesIO(data))]

    def keys(end: int, start: int = 0) -> list[str]:
        file = io.BytesIO(data)
        file.seek(start)
        return [sample.key for sample in tars.read_samples(file, end=end)]

    assert keys(offsets[2]) == ["1"] and keys(offsets[3], offsets[2]) == ["2"]
    assert keys(offsets[2], offsets[2]) == []
    with pytest.raises(tars.DamagedTar, match=f"no member begins at byte {offsets[2] - 1}"):
        keys(offsets[2] - 1)
    with pytest.raises(tars.DamagedTar, match="it ends at byte 3584, before byte 9999"):
        keys(9999)


def test_several_pictures_of_a_sample_are_no_picture() -> None:
    data = made([("1.hr.png", b"a"), ("1.lr.png", b"b"), ("2.jpg", b"c"), ("2.webp", b"d")])
    problems = [sample.problem for sample in tars.read_samples(io.BytesIO(data))]
    assert problems[0] == (
        "has several pictures (hr.png, lr.png), and nothing says which one to take"
    )
    assert problems[1].startswith("has several pictures (jpg, webp)")


def test_what_is_too_large_is_so_for_all() -> None:
    """Also for who passes it over, so that what is lost does not depend on who reads."""
    info = tarfile.TarInfo("1.png")
    info.size = 2**30
    for passed_over in (0, 5):
        with pytest.raises(tars.DamagedTar, match="1.png has 1073741824 bytes; at most 536870912"):
            list(tars.read_samples(io.BytesIO(info.tobuf()), passed_over=passed_over))


def test_a_packed_tar_is_told_to_be_one() -> None:
    with pytest.raises(tars.DamagedTar, match="it is packed with gzip: unpack it"):
        read(gzip.compress(made([("1.png", os.urandom(2000))])))


def test_a_member_twice_is_refused() -> None:
    data = made([("1.png", b"a"), ("1.png", b"b")])
    with pytest.raises(tars.DamagedTar, match="sample 1 has two members png"):
        list(tars.read_samples(io.BytesIO(data)))


@settings(max_examples=150)
@given(st.data())
def test_changed_bytes_are_refused_or_read_and_nothing_else(data: st.DataObject) -> None:
    files = [("1.png", b"p" * 600), ("1.json", b'{"crc32": 1}'), ("é" * 80 + ".png", b"q")]
    whole = bytearray(made(files, encoding="utf-8"))
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    del whole[data.draw(st.integers(1, len(whole))) :]
    try:
        list(tars.read_samples(io.BytesIO(bytes(whole))))
    except tars.DamagedTar:
        pass


def checked(header: bytes) -> bytes:
    """The header with the checksum that fits."""
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


sizes = st.one_of(
    st.binary(min_size=12, max_size=12),
    st.integers(0, 2**88 - 1).map(lambda size: b"\x80" + size.to_bytes(11, "big")),
    st.integers(-(2**80), -1).map(lambda size: b"\xff" + (256**11 + size).to_bytes(11, "big")),
    st.integers(0, 5000).map(lambda size: b"%011o\0" % size),
)
extensions = st.one_of(
    st.binary(max_size=600),
    st.sampled_from([b"0", b"7", b"-1", b"9" * 25, b"9" * 6000, b"x"]).map(
        lambda size: pax(b"size", size)
    ),
    st.binary(max_size=200).map(lambda name: pax(b"path", name)),
)


def pax(key: bytes, value: bytes) -> bytes:
    """A line of an extended header, which begins with its own length."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest)
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return b"%d" % length + rest


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"0", b"\0", b"x", b"g", b"L", b"K", b"5", b"2", b"S", b"7"]),
            sizes,
            extensions,
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 3),
)
def test_headers_that_lie_are_refused_or_read_and_nothing_else(
    headers: list[tuple[bytes, bytes, bytes]], end: int
) -> None:
    data = b""
    for number, (kind, size, content) in enumerate(headers):
        name = tarfile.TarInfo(f"{number // 2}.{('png', 'json')[number % 2]}").tobuf()
        if kind in b"xg":
            size = b"%011o\0" % len(content)
        data += checked(name[:124] + size + name[136:156] + kind + name[157:])
        data += content + bytes(-len(content) % 512)
    for place in (None, end * 512):
        try:
            list(tars.read_samples(io.BytesIO(data + bytes(1024)), end=place))
        except tars.DamagedTar:
            pass


@pytest.mark.slow
@settings(max_examples=200_000)
@given(st.binary(max_size=4096), st.data())
def test_any_bytes_at_length(noise: bytes, data: st.DataObject) -> None:
    """Minutes long: noise, and noise with headers whose checksums are right."""
    info = tarfile.TarInfo(data.draw(st.sampled_from(["1.png", "1.json", "a/b.c.webp", "x"])))
    info.type = data.draw(st.sampled_from([b"0", b"x", b"g", b"L", b"K", b"5", b"2", b"S", b"7"]))
    info.size = data.draw(st.integers(0, 10**10))
    for tar in (noise, info.tobuf() + noise, noise[:512] + info.tobuf() + noise):
        try:
            list(tars.read_samples(io.BytesIO(tar)))
        except tars.DamagedTar:
            pass
