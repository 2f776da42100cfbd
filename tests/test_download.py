"""Fetching from a server on this machine that misbehaves as the real ones do."""

from __future__ import annotations

import base64
import hashlib
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest

from sr_dist import download, web
from sr_dist.errors import UserError
from tests.local_server import Reply, Server, data, endless, silent, status

FAST = web.Options(backoff=0.01, timeout=5.0)


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def fetch(address: str, folder: Path, options: web.Options = FAST) -> bytes:
    partial = download.partial_path(folder, address)
    for _ in download.fetch(address, partial, options):
        pass
    return partial.read_bytes()


def fault_of(address: str, folder: Path, options: web.Options = FAST) -> web.Fault:
    with pytest.raises(web.Fault) as raised:
        fetch(address, folder, options)
    return raised.value


def options(**changes: object) -> web.Options:
    return web.Options(**{"backoff": 0.01, "timeout": 5.0, **changes})  # type: ignore[arg-type]


def ranges_asked(server: Server, path: str) -> list[str | None]:
    return [request.headers.get("Range") for request in server.asked(path)]


def test_a_whole_file_takes_one_request_that_says_who_asks(server: Server, tmp_path: Path) -> None:
    body = noise(300_000)
    address = server.serve("/a.png", data(body))
    partial = tmp_path / "a"
    assert sum(download.fetch(address, partial, FAST)) == 300_000
    assert partial.read_bytes() == body
    (request,) = server.requests
    assert request.headers["User-Agent"].startswith("sr_dist/")
    assert request.headers["Accept-Encoding"] == "identity"
    # A run that was killed right after the last piece asks for nothing again.
    assert list(download.fetch(address, partial, FAST)) == []
    assert len(server.requests) == 1 and partial.read_bytes() == body


@pytest.mark.parametrize("validator", ["tag", "date"])
def test_a_cut_file_is_continued(server: Server, tmp_path: Path, validator: str) -> None:
    body = noise(200_000)
    cut, whole = data(body, validator=validator, sent=70_000), data(body, validator=validator)
    address = server.serve("/a", cut, whole)
    assert fetch(address, tmp_path) == body
    first, second = server.requests
    assert "Range" not in first.headers
    assert second.headers["Range"] == "bytes=70000-"
    expected = {"tag": '"', "date": "GMT"}[validator]
    assert second.headers["If-Range"].endswith(expected)


def test_a_later_run_continues_what_an_earlier_one_left(server: Server, tmp_path: Path) -> None:
    body = noise(200_000)
    address = server.serve("/a", data(body, sent=70_000), data(body))
    fault = fault_of(address, tmp_path, options(attempts=1))
    assert "ended after 70000 of 200000 bytes" in fault.reason or "broke off" in fault.reason
    assert fetch(address, tmp_path) == body
    assert ranges_asked(server, "/a") == [None, "bytes=70000-"]


@pytest.mark.parametrize("validator", ["weak", "none"])
def test_without_a_validator_a_file_is_begun_again(
    server: Server, tmp_path: Path, validator: str
) -> None:
    body = noise(200_000)
    cut, whole = data(body, validator=validator, sent=70_000), data(body, validator=validator)
    address = server.serve("/a", cut, whole)
    assert fetch(address, tmp_path) == body
    assert ranges_asked(server, "/a") == [None, None]


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    body = noise(200_000)
    address = server.serve("/a", data(body, sent=70_000), data(body, ranges=False))
    assert fetch(address, tmp_path) == body
    assert ranges_asked(server, "/a") == [None, "bytes=70000-"]


@pytest.mark.parametrize("ignores", [False, True])
@pytest.mark.parametrize("size", [200_000, 250_000, 1000])
def test_a_file_that_changed_is_never_mixed(
    server: Server, tmp_path: Path, size: int, ignores: bool
) -> None:
    old, new = noise(200_000, 1), noise(size, 2)
    address = server.serve(
        "/a", data(old, sent=70_000), data(new, ignores_condition=ignores), data(new)
    )
    assert fetch(address, tmp_path) == new
    # Where the condition is ignored, a part of the new file (or 416) comes and is thrown away.
    assert ranges_asked(server, "/a") == [None, "bytes=70000-", *([None] if ignores else [])]


def part(body: bytes, first: int, last: int, whole: bytes) -> Reply:
    """An answer with a part, right or not, of the file whose validator is that of `whole`."""
    span = f"bytes {first}-{last - 1}/{len(whole)}"
    tag = f'"{hashlib.sha256(whole).hexdigest()[:12]}"'
    headers = {"Content_Type": "image/png", "Content_Range": span, "ETag": tag}
    return status(206, body[first:last], **headers)


def test_a_part_may_be_shorter_than_what_was_asked_for(server: Server, tmp_path: Path) -> None:
    body = noise(200_000)
    short = part(body, 70_000, 100_000, body)
    address = server.serve("/a", data(body, sent=70_000), short, data(body))
    assert fetch(address, tmp_path) == body
    assert ranges_asked(server, "/a") == [None, "bytes=70000-", "bytes=100000-"]


@pytest.mark.parametrize("first", [0, 69_999, 70_001])
def test_another_part_than_the_one_asked_for(server: Server, tmp_path: Path, first: int) -> None:
    body = noise(200_000)
    wrong = part(body, first, first + 130_000, body)
    address = server.serve("/a", data(body, sent=70_000), wrong, data(body))
    assert fetch(address, tmp_path) == body
    assert ranges_asked(server, "/a") == [None, "bytes=70000-", None]


def test_a_part_that_nobody_asked_for(server: Server, tmp_path: Path) -> None:
    body = noise(1000)
    address = server.serve("/a", part(body, 0, 500, body), data(body))
    assert fetch(address, tmp_path) == body
    assert ranges_asked(server, "/a") == [None, None]


def test_a_damaged_note_begins_again(server: Server, tmp_path: Path) -> None:
    body = noise(5000)
    address = server.serve("/a", data(body))
    partial = download.partial_path(tmp_path, address)
    partial.write_bytes(b"something else")
    assert fetch(address, tmp_path) == body
    partial.write_bytes(body[:100])
    partial.with_suffix(".json").write_text('{"address": ')
    assert fetch(address, tmp_path) == body
    assert ranges_asked(server, "/a") == [None, None]


def test_two_503_then_good(server: Server, tmp_path: Path) -> None:
    address = server.serve("/a", status(503), status(503), data(b"picture"))
    assert fetch(address, tmp_path, options(backoff=0.1)) == b"picture"
    times = [request.time for request in server.requests]
    assert len(times) == 3
    # 0.1 s and 0.2 s, each times 0.5 to 1.5.
    assert 0.05 <= times[1] - times[0] < 1 and 0.1 <= times[2] - times[1] < 1


def test_429_is_left_alone_as_long_as_it_asks(server: Server, tmp_path: Path) -> None:
    address = server.serve("/a", status(429, Retry_After=1), data(b"picture"))
    assert fetch(address, tmp_path) == b"picture"
    first, second = server.requests
    assert 1.0 <= second.time - first.time < 2.0


def test_retry_after_as_a_date(server: Server, tmp_path: Path) -> None:
    date = formatdate(time.time() + 100, usegmt=True)
    address = server.serve("/a", status(503, Retry_After=date))
    fault = fault_of(address, tmp_path, options(attempts=1))
    assert fault.wait is not None and 95 < fault.wait <= 101
    # What cannot be understood is as if it were not there.
    address = server.serve("/b", status(503, Retry_After="soon"), data(b"picture"))
    assert fetch(address, tmp_path) == b"picture"


def test_a_wait_that_is_too_long_is_not_sat_out(server: Server, tmp_path: Path) -> None:
    address = server.serve("/a", status(429, Retry_After=3600))
    reason = fault_of(address, tmp_path).reason
    assert reason == (
        "answers with status 429 Too Many Requests and asks to wait 3600 s; run again after that"
    )
    assert len(server.requests) == 1


def test_attempts_are_bounded(server: Server, tmp_path: Path) -> None:
    address = server.serve("/a", status(500))
    reason = fault_of(address, tmp_path, options(attempts=3)).reason
    assert reason == "answers with status 500 Internal Server Error (3 attempts)"
    assert len(server.requests) == 3


def test_a_wrong_content_length_is_a_fault(server: Server, tmp_path: Path) -> None:
    body = noise(1000)
    address = server.serve("/a", data(body, ranges=False, sent=400))
    reason = fault_of(address, tmp_path, options(attempts=3)).reason
    assert reason.endswith("(3 attempts)") and len(server.requests) == 3


def test_progress_does_not_count_as_a_failure(server: Server, tmp_path: Path) -> None:
    body = noise(4 * 2**20)
    step = 2**20 + 100_000
    cuts = [data(body, sent=count * step) for count in (1, 2, 3)]
    address = server.serve("/a", *cuts, data(body))
    assert fetch(address, tmp_path, options(attempts=2)) == body
    assert ranges_asked(server, "/a") == [None, *(f"bytes={n * step}-" for n in (1, 2, 3))]
    # Without ranges each attempt begins at the start, and gets no further than the one before.
    address = server.serve("/b", data(body, ranges=False, sent=step))
    fault_of(address, tmp_path, options(attempts=2))
    assert len(server.asked("/b")) == 2


LASTING = {
    "not found": (status(404), "answers with status 404 Not Found"),
    "forbidden": (status(403), "answers with status 403 Forbidden"),
    "nothing": (status(204), "answers with status 204 No Content"),
    "page": (status(200, b"<html>", Content_Type="text/html; charset=utf-8"), "of type text/html"),
    "empty": (data(b""), "is empty"),
    "robots": (data(b"x", X_Robots_Tag="noai, noimageai"), "asks not to be used for training"),
    "packed": (data(b"x", Content_Encoding="gzip"), "is sent compressed (gzip)"),
    "large": (data(bytes(70_000)), "has 70000 bytes; at most 50000 are taken"),
    "endless": (endless(), "sends more than 50000 bytes"),
}


@pytest.mark.parametrize("case", LASTING)
def test_what_would_not_get_better_is_asked_for_once(
    server: Server, tmp_path: Path, case: str
) -> None:
    reply, reason = LASTING[case]
    fault = fault_of(server.serve("/a", reply), tmp_path, options(max_bytes=50_000))
    assert reason in fault.reason
    assert len(server.requests) == 1
    assert not list(tmp_path.iterdir())


def test_other_media_types_that_pictures_come_as(server: Server, tmp_path: Path) -> None:
    for media_type in ("application/octet-stream", "IMAGE/JPEG", "image/png; x=y"):
        address = server.serve(f"/{media_type[:3]}", data(b"picture", media_type))
        assert fetch(address, tmp_path) == b"picture"


def test_silence_ends_at_the_time_out_and_is_tried_again(server: Server, tmp_path: Path) -> None:
    address = server.serve("/a", silent(2), data(b"picture"))
    began = time.monotonic()
    assert fetch(address, tmp_path, options(timeout=0.2)) == b"picture"
    assert time.monotonic() - began < 1.5
    fault = fault_of(server.serve("/b", silent(1)), tmp_path, options(timeout=0.2, attempts=1))
    assert fault.reason == "gave no answer for 0.2 s" and fault.unreachable


def test_stalling_and_dripping_bodies(server: Server, tmp_path: Path) -> None:
    stalls = server.serve("/stalls", endless(pause=1.0, piece=b"x"))
    reason = fault_of(stalls, tmp_path, options(timeout=0.2, attempts=1)).reason
    assert reason == "sent nothing for 0.2 s"
    # Something arrives often enough for the time-out, and yet it would take for ever.
    drips = server.serve("/drips", endless(pause=0.02, piece=b"x"))
    reason = fault_of(drips, tmp_path, options(timeout=0.3, attempts=1)).reason
    assert reason == "sends less than 1000 bytes/s"


def test_redirects_are_followed_to_http_alone(server: Server, tmp_path: Path) -> None:
    server.serve("/b", status(302, Location="c?x=1"))
    server.serve("/c?x=1", data(b"picture"))
    address = server.serve("/a", status(301, Location=server.address("/b")))
    assert fetch(address, tmp_path) == b"picture"
    assert [request.path for request in server.requests] == ["/a", "/b", "/c?x=1"]

    for target in ("file:///etc/passwd", "ftp://example.org/a.png", "data:image/png;base64,AAAA"):
        reason = fault_of(server.serve("/d", status(302, Location=target)), tmp_path).reason
        assert reason.startswith(f"leads to '{target}': ") and "addresses are refused" in reason
    address = server.serve("/e", status(302, Location="/e"))
    assert "more than 10 redirects" in fault_of(address, tmp_path).reason
    assert len(server.asked("/e")) == 11


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("http://example.org/a.png", ""),
        ("HTTPS://example.org:8443/a.png?b=c", ""),
        ("file:///etc/passwd", "file: addresses are refused; expected http:// or https://"),
        ("ftp://example.org/a.png", "ftp: addresses are refused; expected http:// or https://"),
        ("example.org/a.png", "is no address; expected http:// or https://"),
        ("", "is no address; expected http:// or https://"),
        ("http:///a.png", "names no host"),
        ("http://[::1/a.png", "is no address (Invalid IPv6 URL)"),
    ],
)
def test_addresses(address: str, problem: str) -> None:
    assert web.problem_of(address) == problem


def test_a_body_is_read_with_the_headers_given_and_no_redirect(server: Server) -> None:
    json = options(media_types=web.JSON)
    good = status(200, b"{}", Content_Type="application/json", X_Left=7)
    address = server.serve("/a", status(503), good)
    body, headers = download.read(address, {"Authorization": "key"}, json)
    assert (body, headers["X-Left"]) == (b"{}", "7")
    assert [r.headers["Authorization"] for r in server.requests] == ["key", "key"]
    address = server.serve("/b", status(302, Location=server.address("/a", "localhost")))
    with pytest.raises(web.Fault, match="not followed"):
        download.read(address, {"Authorization": "key"}, json)
    assert len(server.asked("/a")) == 2


def outcomes(
    addresses: list[str], folder: Path, options: web.Options = FAST
) -> dict[str, bytes | str]:
    """What each address gave, or the reason why it gave nothing."""
    found = download.fetch_all(addresses, folder, options, lambda path: path.read_bytes())
    return {outcome.address: outcome.reason or outcome.checked for outcome in found}


def test_many_at_once_and_few_to_one_host(server: Server, tmp_path: Path) -> None:
    bodies = {f"/{n}": noise(20_000, n) for n in range(20)}
    addresses = [server.serve(path, data(body, delay=0.02)) for path, body in bodies.items()]
    found = outcomes(addresses, tmp_path, options(workers=6, per_host=2))
    assert found == {server.address(path): body for path, body in bodies.items()}
    assert len(server.requests) == 20 and server.most_active == 2
    assert server.connections <= 2  # kept


def test_hosts_take_turns(server: Server, tmp_path: Path) -> None:
    for n in range(4):
        server.serve(f"/{n}", data(b"picture"))
    addresses = [
        server.address(f"/{n}", host) for host in ("127.0.0.1", "localhost") for n in "0123"
    ]
    outcomes(addresses, tmp_path, options(workers=1))
    asked = [request.headers["Host"].partition(":")[0] for request in server.requests]
    assert asked == ["127.0.0.1", "localhost"] * 4


def test_a_busy_host_is_left_alone_while_others_are_asked(server: Server, tmp_path: Path) -> None:
    server.serve("/0", status(429, Retry_After=1), data(b"picture"))
    for n in range(1, 6):
        server.serve(f"/{n}", data(b"picture", delay=0.02))
    busy = [server.address(f"/{n}") for n in range(6)]
    other = [server.address(f"/{n}", "localhost") for n in range(1, 6)]
    found = outcomes(busy + other, tmp_path, options(workers=4, per_host=1))
    assert set(found.values()) == {b"picture"} and len(found) == 11
    times: dict[str, list[float]] = {"127.0.0.1": [], "localhost": []}
    for request in server.requests:
        times[request.headers["Host"].partition(":")[0]].append(request.time)
    first, second = times["127.0.0.1"][:2]
    assert second - first >= 1.0
    assert max(times["localhost"]) < second and len(times["localhost"]) == 5


def test_a_host_that_is_not_there_is_given_up(server: Server, tmp_path: Path) -> None:
    dead = [f"http://127.0.0.1:1/{n}" for n in range(30)]
    good = server.serve("/a", data(b"picture"))
    found = outcomes([*dead, good], tmp_path, options(workers=2, per_host=1, attempts=2))
    assert found.pop(good) == b"picture"
    reasons = list(found.values())
    assert sum("cannot be reached" in str(reason) for reason in reasons) == 3
    assert reasons.count("not tried: 3 others of 127.0.0.1:1 got no answer") == 27
    assert str(reasons[0]).endswith("Connection refused) (2 attempts)")


def test_a_host_that_asks_for_too_long_a_wait_is_asked_once(server: Server, tmp_path: Path) -> None:
    addresses = [server.serve(f"/{n}", status(429, Retry_After=3600)) for n in range(10)]
    found = outcomes(addresses, tmp_path, options(workers=1))
    assert len(server.requests) == 1
    assert sum("not tried: 127.0.0.1" in str(reason) for reason in found.values()) == 9


def test_one_failure_does_not_end_the_others(server: Server, tmp_path: Path) -> None:
    addresses = [server.serve(f"/{n}", data(b"picture")) for n in range(5)]
    server.serve("/2", status(404))
    found = outcomes(addresses, tmp_path)
    assert [found[address] for address in addresses] == [
        *[b"picture"] * 2,
        "answers with status 404 Not Found",
        *[b"picture"] * 2,
    ]


def test_closing_ends_the_requests(server: Server, tmp_path: Path) -> None:
    addresses = [server.serve(f"/{n}", data(noise(1000, n), delay=0.05)) for n in range(40)]
    found = download.fetch_all(addresses, tmp_path, options(workers=2), lambda path: None)
    next(found)
    before = threading.active_count()
    found.close()
    asked = len(server.requests)
    assert threading.active_count() <= before
    time.sleep(0.2)
    assert len(server.requests) == asked <= 6


def test_an_error_of_the_check_is_raised(server: Server, tmp_path: Path) -> None:
    address = server.serve("/a", data(b"picture"))
    with pytest.raises(ZeroDivisionError):
        list(download.fetch_all([address], tmp_path, FAST, lambda path: 1 / 0))


def test_the_proxy_of_the_environment_is_used(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "http://pictures.invalid/a.png"
    server.replies[address] = [data(b"picture")]
    monkeypatch.setenv("http_proxy", f"http://me:pa%20ss@127.0.0.1:{server.server_address[1]}")
    assert fetch(address, tmp_path) == b"picture"
    credentials = base64.b64encode(b"me:pa ss").decode()
    assert server.requests[0].headers["Proxy-Authorization"] == f"Basic {credentials}"
    monkeypatch.setenv("no_proxy", "pictures.invalid")
    fault = fault_of("http://pictures.invalid/b.png", tmp_path, options(attempts=1))
    assert "cannot be reached" in fault.reason and len(server.requests) == 1


def test_without_urllib3_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "urllib3", None)
    with pytest.raises(UserError, match=r"pip install 'sr_dist\[sources\]'"):
        fetch("http://127.0.0.1:1/", tmp_path)
