"""Lists of addresses, Pexels and Kaggle, against a server on this machine and a stub."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sr_dist import images, manifest, sources, web
from sr_dist.errors import UserError
from sr_dist.sources import Picture
from tests import local_server
from tests.helpers import REPOSITORY, refuse, succeed
from tests.local_server import Handler, Reply, Server, data, endless, status

FAST = web.Options(backoff=0.01, timeout=5.0, attempts=3)
TOOL = "tools/make_dataset.py"
# The columns of Unsplash Lite's photos.tsv000, in their order.
UNSPLASH = """photo_id photo_url photo_image_url photo_submitted_at photo_featured photo_width
photo_height photo_aspect_ratio photo_description photographer_username photographer_first_name
photographer_last_name exif_camera_make""".split()


def encoded(seed: int, kind: str = "png", side: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(256, size=(side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def rows(folder: Path, name: str = manifest.NAME) -> list[dict[str, str]]:
    with (folder / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def pictures_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in images.find(folder)}


def listed(folder: Path, *lines: str, name: str = "list.txt") -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# Lists


def test_a_text_file_has_an_address_a_line(tmp_path: Path) -> None:
    path = listed(tmp_path, "\ufeff# mine", "", " http://a.org/1.png?x=1,2;3 ", "#no", "http://b/2")
    assert sources.read_addresses(path) == [
        Picture("http://a.org/1.png?x=1,2;3"),
        Picture("http://b/2"),
    ]
    # What is no address is reported with the failures, not dropped.
    path = listed(tmp_path, "example.org/a.png", "http://b/2")
    assert [p.address for p in sources.read_addresses(path)] == ["example.org/a.png", "http://b/2"]


def test_tables_are_read_by_the_names_of_their_columns(tmp_path: Path) -> None:
    path = listed(
        tmp_path,
        "ImageID,OriginalURL,OriginalLandingURL,License,Author",
        '1,"http://a/1,2.jpg",http://a/page,https://creativecommons.org/by/2.0,"Doe, J."',
        "2,,http://a/page2,,",
        "3,http://a/3.jpg",
        name="open-images.csv",
    )
    licence = "https://creativecommons.org/by/2.0"
    assert sources.read_addresses(path) == [
        Picture("http://a/1,2.jpg", licence, "Doe, J., http://a/page"),
        Picture("line 3", "", "http://a/page2"),
        Picture("http://a/3.jpg"),
    ]
    path = listed(tmp_path, "where;Image URL", "x;http://a/1.jpg")
    assert sources.read_addresses(path) == [Picture("http://a/1.jpg")]
    path = listed(tmp_path, "url", "http://a/1.jpg")
    assert sources.read_addresses(path) == [Picture("http://a/1.jpg")]
    path = listed(tmp_path, "thumb\tbig", "http://a/s.jpg\thttp://a/b.jpg")
    assert sources.read_addresses(path, "big") == [Picture("http://a/b.jpg")]


def unsplash_row(number: int, address: str) -> str:
    values = dict.fromkeys(UNSPLASH, "") | {
        "photo_id": f"id{number}",
        "photo_url": f"https://unsplash.com/photos/id{number}",
        "photo_image_url": address,
        "photo_description": '"say ""hello"""',
        "photographer_username": "jo",
        "photographer_first_name": "Jo",
        "photographer_last_name": "Doe",
    }
    return "\t".join(values.values())


def test_unsplash_lite_as_it_is(tmp_path: Path) -> None:
    address = "https://images.unsplash.com/photo-1"
    path = listed(tmp_path, "\t".join(UNSPLASH), unsplash_row(1, address), name="photos.tsv000")
    (picture,) = sources.read_addresses(path)
    assert picture.address == address
    assert picture.attribution == "Jo Doe (@jo) on Unsplash, https://unsplash.com/photos/id1"
    assert picture.licence.startswith("Unsplash Dataset terms")


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("a.txt", b"# only a comment\n\n", None, "lists no addresses"),
        ("a.txt", b"\x89PNG\r\n\x1a\n\xff\xfe", None, "is not UTF-8 text"),
        ("a.csv", b"name,size\na,1\n", None, "no column that is known.*name, size.*--url-column"),
        ("a.csv", b"name,url\n", None, "a header and nothing below"),
        ("a.csv", b"name,url\na,http://a/b\n", "adress", "no column 'adress'; it has name, url"),
        ("a.csv", b"http://a/b.png,CC0\n", None, "has no header: its first line is 'http://a/b"),
        ("a.txt", b"http://a/b.png\n", "url", "--url-column url: .* has no header"),
        ("a.csv", b'url\n"' + b"x" * 200_000, None, "line .*field larger than field limit"),
        ("a.csv", b"x" * 200_000 + b",url\n", None, "line .*field larger than field limit"),
    ],
)
def test_lists_that_are_refused(
    tmp_path: Path, name: str, content: bytes, column: str | None, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        sources.read_addresses(tmp_path / name, column)
    with pytest.raises(UserError, match="nowhere.csv does not exist"):
        sources.read_addresses(tmp_path / "nowhere.csv")
    with pytest.raises(UserError, match="is a folder; expected a text file, CSV or TSV"):
        sources.read_addresses(tmp_path)


def test_a_query_is_added_to_addresses(tmp_path: Path) -> None:
    given = [Picture("http://a/b"), Picture("http://a/b?c=d#e", "CC0"), Picture("nothing")]
    assert sources.with_query(given, "?w=2048&q=90") == [
        Picture("http://a/b?w=2048&q=90"),
        Picture("http://a/b?c=d&w=2048&q=90#e", "CC0"),
        Picture("nothing"),
    ]
    with pytest.raises(UserError, match="--add-query: expected NAME=VALUE"):
        sources.with_query(given, "2048")


def test_file_names_are_safe_and_different() -> None:
    addresses = [
        "http://a/../../etc/passwd",
        "http://a/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "http://a/..",
        "http://a/.hidden.png",
        "http://a/b.png?size=1",
        "http://a/b.png?size=2",
        "http://a/B.png",
        "http://b/b.png",
        "http://a/",
        "http://a/%E2%82%AC%00%0A.png",
        "http://a/" + "x" * 3000 + ".png",
        "http://a/con:a|b\\c*.png",
        "http://a/-rf.png",
    ]
    names = [sources.file_name(address) for address in addresses]
    assert len({name.lower() for name in names}) == len(addresses)
    for name in names:
        assert len(name) < 80 and name[0].isalnum()
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert names[0].startswith("passwd-") and names[4].startswith("b-")


# Fetching


def test_pictures_are_fetched_checked_and_listed(server: Server, tmp_path: Path) -> None:
    png, jpg = encoded(1), encoded(2, "jpeg")
    large = encoded(3, side=200)
    wanted = [
        Picture(server.serve("/a.png", data(png)), "CC0", "Jo"),
        Picture(server.serve("/noname", data(jpg, "image/jpeg"))),
        Picture(server.serve("/copy.png", data(png))),
        Picture(server.serve("/page", status(200, b"<html>", Content_Type="text/html"))),
        Picture(server.serve("/cut.png", data(png[:-300]))),
        Picture(server.serve("/large.png", data(large))),
        Picture(server.serve("/moving.gif", data(encoded(4, "gif"), "image/gif"))),
        Picture(server.serve("/words.png", data(b"no picture"))),
        Picture("file:///etc/passwd"),
        Picture(server.address("/missing.png")),
        Picture(server.address("/a.png"), "another line of it"),
    ]
    output = tmp_path / "out"
    result = sources.fetch_pictures(wanted, output, FAST, max_pixels=30_000)
    assert (result.fetched, result.present, result.duplicates) == (2, 0, 1)
    reasons = {address.rpartition("/")[2]: reason for address, reason in result.failures}
    assert set(reasons) == {
        *("page", "cut.png", "large.png", "moving.gif", "words.png", "passwd", "missing.png")
    }
    assert "of type text/html" in reasons["page"]
    assert "cannot be decoded" in reasons["cut.png"]
    assert reasons["large.png"] == "is 200x200; at most 30000 pixels are taken"
    assert "of no known format" in reasons["moving.gif"]
    assert "of no known format" in reasons["words.png"]
    assert reasons["passwd"].startswith("file: addresses are refused")
    assert reasons["missing.png"] == "answers with status 404 Not Found"
    failures = rows(output, "failures.csv")
    assert [(row["address"], row["reason"]) for row in failures] == result.failures
    assert (
        [address for address, _ in result.failures]
        == [  # in the order of the list
            picture.address for picture in wanted[3:10]
        ]
    )

    by_address = {row["address"]: row for row in rows(output)}
    assert set(by_address) == {wanted[n].address for n in (0, 1, 2)}
    first, second, copy = (by_address[wanted[n].address] for n in (0, 1, 2))
    assert (first["licence"], first["attribution"]) == ("CC0", "Jo")
    assert copy["file"] == first["file"]  # whichever of the two came first
    assert first["sha256"] == sha256(png) and first["bytes"] == str(len(png))
    assert pictures_in(output) == {first["file"]: png, second["file"]: jpg}
    assert second["file"].startswith("noname-") and second["file"].endswith(".jpg")
    # Each once, those that could not get better too.
    assert len(server.requests) == 9
    assert {path.name for path in output.iterdir()} == {
        *(first["file"], second["file"], "failures.csv", "manifest.csv")
    }


def test_a_decompression_bomb_is_not_decoded(
    server: Server, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    for number, side in enumerate((9_500, 20_000)):  # Pillow warns of the one, refuses the other
        buffer = io.BytesIO()
        Image.new("1", (side, side)).save(buffer, format="png")
        server.serve(f"/{number}.png", data(buffer.getvalue()))
    wanted = [Picture(server.address(f"/{number}.png")) for number in range(2)]
    with pytest.raises(UserError, match="none of 2 pictures could be had"):
        sources.fetch_pictures(wanted, tmp_path / "out", FAST)
    reasons = {row["address"][-5]: row["reason"] for row in rows(tmp_path / "out", "failures.csv")}
    assert reasons["0"] == "is 9500x9500; at most 80000000 pixels are taken"
    assert reasons["1"].startswith("is too large")
    assert not [w for w in recwarn if issubclass(w.category, Image.DecompressionBombWarning)]


def test_running_again_fetches_only_what_is_missing(server: Server, tmp_path: Path) -> None:
    bodies = {f"/{n}.png": encoded(n) for n in range(6)}
    wanted = [Picture(server.serve(path, data(body))) for path, body in bodies.items()]
    server.serve("/4.png", status(404), data(bodies["/4.png"]))
    output = tmp_path / "out"
    first = sources.fetch_pictures(wanted[:5], output, FAST)
    assert (first.fetched, len(first.failures), len(server.requests)) == (4, 1, 5)
    before = rows(output)

    (output / before[0]["file"]).unlink()
    with (output / before[1]["file"]).open("ab") as file:
        file.write(b"more")
    gone = {row["address"] for row in before[:2]}
    again = [Picture(picture.address, "CC0", "Jo") for picture in wanted]
    second = sources.fetch_pictures(again, output, FAST)
    assert (second.fetched, second.present, second.failures) == (4, 2, [])
    asked = {server.address(request.path) for request in server.requests[5:]}
    assert asked == {*gone, wanted[4].address, wanted[5].address} and len(server.requests) == 9
    after = {row["address"]: row for row in rows(output)}
    assert {address: row["sha256"] for address, row in after.items()} == {
        server.address(path): sha256(body) for path, body in bodies.items()
    }
    # A licence that only the later list gives is noted for what was there.
    assert {(row["licence"], row["attribution"]) for row in after.values()} == {("CC0", "Jo")}
    assert not (output / "failures.csv").exists()
    assert sorted(pictures_in(output).values()) == sorted(bodies.values())

    third = sources.fetch_pictures(again, output, FAST)
    assert (third.fetched, third.present) == (0, 6) and len(server.requests) == 9


def test_what_others_put_there_counts_as_a_duplicate(server: Server, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "mine").mkdir(parents=True)
    (output / "mine" / "a.png").write_bytes(encoded(1))
    address = server.serve("/a.png", data(encoded(1)))
    result = sources.fetch_pictures([Picture(address)], output, FAST)
    assert (result.fetched, result.duplicates) == (0, 1)
    (row,) = rows(output)
    assert row["file"] == "mine/a.png" and list(pictures_in(output)) == ["mine/a.png"]


def test_a_broken_download_goes_on_in_the_next_run(server: Server, tmp_path: Path) -> None:
    body, good = encoded(1, side=200), encoded(2)
    address = server.serve("/a.png", data(body, sent=50_000), data(body))
    wanted = [Picture(address), Picture(server.serve("/b.png", data(good)))]
    output = tmp_path / "out"
    once = web.Options(attempts=1, timeout=5.0)
    assert len(sources.fetch_pictures(wanted, output, once).failures) == 1
    assert sources.fetch_pictures(wanted, output, once).fetched == 1
    first, second = server.asked("/a.png")
    assert second.headers["Range"] == "bytes=50000-"
    assert sorted(pictures_in(output).values()) == sorted([body, good])
    assert not (output / ".partial").exists()


def test_nothing_to_be_had(server: Server, tmp_path: Path) -> None:
    output = tmp_path / "out"
    wanted = [Picture(server.address("/a.png")), Picture("ftp://a/b.png")]
    with pytest.raises(
        UserError,
        match="none of 2 pictures could be had; first: http.*/a.png answers with status 404",
    ):
        sources.fetch_pictures(wanted, output, FAST)
    assert len(rows(output, "failures.csv")) == 2 and not (output / manifest.NAME).exists()


# The manifest


def row(name: str, size: int = 3) -> manifest.Row:
    return manifest.Row(name, f"http://a/{name}", "0" * 64, size, "CC0", 'says "a,b"\nand c')


def test_a_killed_run_loses_no_row(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(b"123")
    with manifest.Manifest(tmp_path) as kept:
        kept.add(row("a"))
    # What a run leaves that is killed: no manifest of its own, a last line that is cut off.
    journal = tmp_path / ".manifest.journal"
    values = [json.dumps(vars(row(name))) for name in "bc"]
    journal.write_text(values[0] + "\n" + values[1][:40])
    with manifest.Manifest(tmp_path) as kept:
        assert set(kept.rows) == {"http://a/a", "http://a/b"}
        kept.add(row("c"))
        assert len(journal.read_text().splitlines()) == 3  # the cut line does not swallow it
        with pytest.raises(UserError, match="another run is gathering pictures in"):
            manifest.Manifest(tmp_path).__enter__()
    assert not journal.exists()
    assert [found["file"] for found in rows(tmp_path)] == ["a", "b", "c"]
    assert rows(tmp_path)[0]["attribution"] == 'says "a,b"\nand c'


def test_the_manifest_is_written_however_a_run_ends(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    with pytest.raises(KeyboardInterrupt), manifest.Manifest(tmp_path) as kept:
        kept.add(row("a"))
        raise KeyboardInterrupt
    assert [found["address"] for found in rows(tmp_path)] == ["http://a/a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name,score\na,1\n", "not a manifest of this tool: its columns are name, score"),
        (b"\xff\xfe", "is damaged"),
        (",".join(manifest._COLUMNS).encode() + b"\na,b,c,many,,,\n", "is damaged"),
        (",".join(manifest._COLUMNS).encode() + b"\na,b\n", "is damaged"),
    ],
)
def test_a_manifest_of_another_kind_is_left_alone(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / manifest.NAME).write_bytes(content)
    with pytest.raises(UserError, match=message):
        sources.fetch_pictures([Picture("http://127.0.0.1:1/a")], tmp_path, FAST)
    assert (tmp_path / manifest.NAME).read_bytes() == content
    with pytest.raises(UserError, match=message):  # and the folder is not left locked
        manifest.Manifest(tmp_path).__enter__()


# Pexels


def pexels_photo(server: Server, number: int) -> dict[str, object]:
    original = server.serve(f"/photos/{number}.jpeg", data(encoded(number, "jpeg"), "image/jpeg"))
    return {
        "id": number,
        "width": 24,
        "height": 24,
        "url": f"https://www.pexels.com/photo/{number}/",
        "photographer": f"Jo {number}",
        "photographer_url": f"https://www.pexels.com/@jo{number}",
        "src": {"original": original, "large": "http://127.0.0.1:1/"},
    }


def serve_pexels(server: Server, total: int, quota: int = 100, per_page: int = 80) -> str:
    """The API as it is documented: pages, a key, and what is left of the quota."""
    photos = [pexels_photo(server, number) for number in range(total)]
    left = [quota]

    def page(handler: Handler) -> None:
        if handler.headers.get("Authorization") != "the-key":
            return status(401, b'{"error": "bad key"}')(handler)
        if not left[0]:
            return status(429)(handler)
        left[0] -= 1
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(handler.path).query)
        size, number = int(query["per_page"][0]), int(query["page"][0])
        part = photos[size * (number - 1) : size * number]
        answer = {"page": number, "per_page": size, "photos": part, "total_results": total}
        if size * number < total:
            answer["next_page"] = "https://api.pexels.com/v1/somewhere"
        body = json.dumps(answer).encode()
        headers = {"X_Ratelimit_Remaining": left[0], "X_Ratelimit_Reset": 1590529646}
        status(200, body, Content_Type="application/json", **headers)(handler)

    for number in range(1, 5):
        for what in ("search?query=old+town&", "curated?"):
            server.serve(f"/v1/{what}per_page={per_page}&page={number}", page)
    return server.address("/v1")


def search(server: Server, count: int, key: str = "the-key", **served: int) -> tuple[int, str]:
    api = serve_pexels(server, per_page=min(80, count), **served)
    found, why = sources.search_pexels("old town", count, key, FAST, api)
    assert len({picture.address for picture in found}) == len(found)
    return len(found), why


def test_pexels_pages(server: Server) -> None:
    assert search(server, 100, total=200) == (100, "")
    assert len(server.requests) == 2
    assert search(server, 3, total=200) == (3, "")
    assert len(server.requests) == 3
    assert search(server, 100, total=90) == (90, "")  # there are no more
    assert len(server.requests) == 5
    assert search(server, 80, total=80) == (80, "")
    assert len(server.requests) == 6


def test_pexels_quota(server: Server) -> None:
    used_up = "the key's quota is used up until 2020-05-26 21:47 UTC"
    assert search(server, 200, total=300, quota=2) == (160, used_up)
    assert len(server.requests) == 2  # a third would have been refused
    with pytest.raises(UserError, match="answers with status 429"):
        search(server, 200, total=300, quota=0)


def test_pexels_refuses(server: Server) -> None:
    with pytest.raises(UserError, match="refuses the key in PEXELS_API_KEY") as raised:
        search(server, 5, key="wrong-key", total=10)
    assert "wrong-key" not in str(raised.value)
    for key in ("a secret", "a\nsecret", "sécret"):
        with pytest.raises(UserError, match="a character that no key has") as raised:
            search(server, 5, key=key, total=10)
        assert "cret" not in str(raised.value)
    with pytest.raises(UserError, match="has no photographs for 'old town'"):
        search(server, 5, total=0)
    for body in (b"[]", b'{"photos": [{}]}', b"{", b'{"photos": 1}'):
        server.serve("/b/curated?per_page=5&page=1", status(200, body, Content_Type=web.JSON[0]))
        with pytest.raises(UserError, match="an answer that is not understood"):
            sources.search_pexels("", 5, "the-key", FAST, server.address("/b"))


def test_pexels_keeps_attribution_and_the_key_to_itself(server: Server, tmp_path: Path) -> None:
    api = serve_pexels(server, total=3, per_page=3)
    output = tmp_path / "out"
    options = ("--source", "pexels", "--output", output, "--address", api, "--count", 3)
    done = succeed(TOOL, *map(str, options), PEXELS_API_KEY="the-key")
    assert "3 downloaded, 0 there already, 0 duplicate(s) dropped, 0 left out" in done.stdout
    found = {row["address"]: row for row in rows(output)}
    assert found[server.address("/photos/1.jpeg")]["attribution"] == (
        "Photo by Jo 1 (https://www.pexels.com/@jo1) on Pexels, https://www.pexels.com/photo/1/"
    )
    assert {row["sha256"] for row in found.values()} == {
        sha256(encoded(number, "jpeg")) for number in range(3)
    }
    assert {row["licence"] for row in found.values()} == {
        "Pexels licence, https://www.pexels.com/license/"
    }
    # The key goes to the API alone.
    keys = {request.path[:4]: request.headers.get("Authorization") for request in server.requests}
    assert keys == {"/v1/": "the-key", "/pho": None}
    for path in output.rglob("*"):
        assert not path.is_file() or b"the-key" not in path.read_bytes()
    assert "PEXELS_API_KEY is not set" in refuse(TOOL, *map(str, options), PEXELS_API_KEY="")


# Kaggle: a stub stands for the package, and a server on this machine for the service.

STUB = """
import os, pathlib
def dataset_download(handle):
    pathlib.Path(os.environ["STUB_LOG"]).write_text(handle)
    if "private" in handle:
        raise RuntimeError("403 Client Error.\\n\\nYou don't have permission.")
    return os.environ["STUB_FOLDER"]
"""


def test_kaggle_collects_what_kagglehub_downloaded(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / "images_001" / "images").mkdir(parents=True)
    (cache / "Data_Entry_2017.csv").write_text("Image Index,Finding Labels\n")
    gray = np.random.default_rng(0).integers(256, size=(32, 32), dtype=np.uint8)
    Image.fromarray(gray).save(cache / "images_001" / "images" / "00000001_000.png")
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "kagglehub.py").write_text(STUB)
    environment = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "stub"), str(REPOSITORY)]),
        "STUB_LOG": str(tmp_path / "log"),
        "STUB_FOLDER": str(cache),
    }
    output = tmp_path / "out"
    words = (TOOL, "--source", "kaggle", "--output", str(output), "--dataset")
    done = succeed(*words, "nih-chest-xrays/data", **environment)
    assert (tmp_path / "log").read_text() == "nih-chest-xrays/data"
    assert "1 copied" in done.stdout
    copied = output / "images_001" / "images" / "00000001_000.png"
    assert np.array_equal(images.decode(copied, 1)[..., 0], gray)
    message = refuse(*words, "owner/private", **environment)
    assert "kagglehub cannot download owner/private: 403 Client Error. You don't have" in message
    assert "https://www.kaggle.com/datasets/owner/private" in message


def test_kagglehub_itself_against_a_server_that_answers_as_kaggle_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kagglehub = pytest.importorskip("kagglehub")
    if not kagglehub.__version__.startswith("1.0."):
        pytest.skip(f"kagglehub {kagglehub.__version__} may ask other questions")
    try:
        kaggle = local_server.start(7777)  # where its setting TEST looks for the service
    except OSError:
        pytest.skip("port 7777 is taken")
    try:
        monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "TEST")
        monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "no-credentials"))
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as packed:
            packed.writestr("images_001/images/0.png", encoded(1))
            packed.writestr("Data_Entry_2017.csv", "Image Index")
        version = status(200, b'{"currentVersionNumber": 3}', Content_Type="application/json")
        service = "/api/v1/datasets.DatasetApiService"
        kaggle.serve(f"{service}/GetDataset", version, version, status(403, b"{}"))
        kaggle.serve(f"{service}/DownloadDataset", data(buffer.getvalue(), "application/zip"))
        for _ in range(2):
            folder = sources.download_from_kaggle("nih-chest-xrays/data")
            assert pictures_in(folder) == {"images_001/images/0.png": encoded(1)}
        assert len(kaggle.asked(f"{service}/DownloadDataset")) == 1  # it is in the cache
        with pytest.raises(UserError, match="owner/private: 403 Client Error.*may ask you"):
            sources.download_from_kaggle("owner/private")
    finally:
        kaggle.shutdown()
        kaggle.server_close()


def test_kaggle_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    for handle in ("data", "a/b/c", "../x/y", "https://www.kaggle.com/a/b"):
        with pytest.raises(UserError, match="--dataset: expected OWNER/NAME"):
            sources.download_from_kaggle(handle)
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    with pytest.raises(UserError, match=r"pip install 'sr_dist\[sources\]'"):
        sources.download_from_kaggle("a/b")


# The command


def test_urls_from_unsplash_lite(server: Server, tmp_path: Path) -> None:
    bodies = [encoded(number, "jpeg") for number in range(4)]
    for number, body in enumerate(bodies):
        server.serve(f"/photo-{number}?w=64", data(body, "image/jpeg"))
    lines = [unsplash_row(n, server.address(f"/photo-{n}")) for n in range(4)]
    path = listed(tmp_path, "\t".join(UNSPLASH), *lines, name="photos.tsv000")
    output = tmp_path / "out"
    words = (TOOL, "--source", "urls", "--input", path, "--output", output, "--add-query", "w=64")
    done = succeed(*words, "--count", "3", "--workers", "2")
    assert done.stdout == (
        f"{output}: 3 downloaded, 0 there already, 0 duplicate(s) dropped, 0 left out\n"
    )
    done = succeed(*words)
    assert "1 downloaded, 3 there already" in done.stdout
    assert sorted(pictures_in(output).values()) == sorted(bodies)
    assert {row["attribution"][-3:] for row in rows(output)} == {"id0", "id1", "id2", "id3"}
    assert len(server.requests) == 4


def test_urls_lists_what_is_left_out(server: Server, tmp_path: Path) -> None:
    good = server.serve("/a.png", data(encoded(1)))
    large = server.serve("/b.png", endless(piece=bytes(100_000)))
    wide = server.serve("/c.png", data(encoded(1, side=40)))
    missing = [server.address(f"/{n}.png") for n in range(23)]
    output = tmp_path / "out"
    path = listed(tmp_path, large, wide, *missing, good)
    done = succeed(
        *(TOOL, "--source", "urls", "--input", path, "--output", output),
        *("--max-megabytes", "1", "--max-pixels", "1000", "--attempts", "1"),
    )
    lines = done.stdout.splitlines()
    assert lines[0] == f"left out: {large} sends more than 1000000 bytes"
    assert lines[1] == f"left out: {wide} is 40x40; at most 1000 pixels are taken"
    assert lines[19] == f"left out: {missing[17]} answers with status 404 Not Found"
    assert lines[20:] == [
        f"and 5 more; all are in {output / 'failures.csv'}",
        f"{output}: 1 downloaded, 0 there already, 0 duplicate(s) dropped, 25 left out",
    ]
    assert len(rows(output, "failures.csv")) == 25


def test_a_stopped_download_goes_on(server: Server, tmp_path: Path) -> None:
    bodies = [encoded(number) for number in range(12)]
    hang = threading.Event()

    def held(reply: Reply) -> Reply:
        def wait(handler: Handler) -> None:
            hang.wait(20)
            reply(handler)

        return wait

    for number, body in enumerate(bodies):
        reply = data(body)
        server.serve(f"/{number}.png", reply if number < 6 else held(reply))
    path = listed(tmp_path, *(server.address(f"/{n}.png") for n in range(12)))
    output = tmp_path / "out"
    words = [sys.executable, str(REPOSITORY / TOOL), "--source", "urls"]
    words += ["--input", str(path), "--output", str(output), "--workers", "2"]
    running = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    journal = output / ".manifest.journal"
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_text().count("sha256") < 12:  # twice a line
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, message = running.communicate(timeout=90)
    assert running.returncode == 75, message
    assert "stopped. The same command goes on from here." in message
    assert "Traceback" not in message
    assert len(rows(output)) == 6 and not journal.exists()
    hang.set()
    asked = len(server.requests)
    done = succeed(TOOL, *words[2:])
    assert "6 downloaded, 6 there already" in done.stdout
    assert len(server.requests) - asked == 6
    assert sorted(pictures_in(output).values()) == sorted(bodies)


def test_make_dataset_refuses_what_does_not_belong(tmp_path: Path) -> None:
    output = tmp_path / "out"
    path = listed(tmp_path, "http://127.0.0.1:1/a.png")
    urls = (TOOL, "--output", output, "--source", "urls")
    assert "--source urls needs --input FILE" in refuse(*urls)
    message = refuse(*urls, "--input", path, "--query", "cats")
    assert "--query is for --source pexels; --source urls has no use for it" in message
    message = refuse(TOOL, "--output", output, "--source", "sample", "--input", path)
    assert "--input is for --source folder or urls" in message
    assert "--workers: expected 1 or more, found 0" in refuse(
        *urls, "--input", path, "--workers", "0"
    )
    assert "--timeout: expected 0.1 to 3600 seconds, found nan" in refuse(
        *urls, "--input", path, "--timeout", "nan"
    )
    assert "needs --dataset OWNER/NAME" in refuse(TOOL, "--output", output, "--source", "kaggle")
    assert not output.exists()
