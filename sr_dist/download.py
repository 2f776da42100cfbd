"""Fetch files: politely, with retries, going on where a connection broke.

A file arrives in a partial file with a note of what it is part of. The next attempt, in this run or
a later one, asks for the rest on the condition that the file is still the same; where the server
cannot say so, it starts again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import heapq
import json
import math
import queue
import random
import re
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sr_dist import web
from sr_dist.web import Fault, Options

_LONGEST_BACKOFF = 60.0  # seconds
_PROGRESS = 2**20  # bytes by which an attempt has to get further not to count as failed
_LOST = 3  # addresses of a host in a row without an answer: the rest is not tried


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of an address: `checked`, of the whole `partial` file, or the reason why not."""

    address: str
    partial: Path
    checked: Any = None
    reason: str = ""


def partial_path(folder: Path, address: str) -> Path:
    """Where an address arrives: the same for every run."""
    return folder / f"{hashlib.sha256(address.encode()).hexdigest()[:24]}.part"


def forget(partial: Path) -> None:
    """Remove a partial file and its note."""
    partial.unlink(missing_ok=True)
    _note_path(partial).unlink(missing_ok=True)


def fetch(address: str, partial: Path, options: Options) -> Iterator[int]:
    """Fetch one file into `partial`, with retries; yields the size of each piece as it arrives.

    Raises:
        Fault: it cannot be had; after a passing fault the partial file stays.
        UserError: urllib3 is not installed.
    """
    client = web.Client(options)
    task = _Task(address, "")
    while True:
        try:
            yield from _attempt(client, address, partial, options)
            return
        except Fault as fault:
            _wait_or_raise(task, fault, partial, options)


def read(
    address: str, headers: Mapping[str, str], options: Options
) -> tuple[bytes, Mapping[str, str]]:
    """The body and the headers of one answer, with retries.

    No redirect is followed: `headers` may hold a key that is for this host alone.

    Raises:
        Fault: there is no answer, or one with an error.
        UserError: urllib3 is not installed.
    """
    client = web.Client(options)
    task = _Task(address, "")
    while True:
        try:
            with client.ask(address, headers, redirects=0) as response:
                body = b""
                for piece in web.pieces(response, options):
                    body += piece
                    if len(body) > options.max_bytes:
                        raise Fault(f"sends more than {options.max_bytes} bytes")
                _check_length(len(body), _length(response.headers))
                return body, response.headers
        except Fault as fault:
            _wait_or_raise(task, fault, None, options)


def _wait_or_raise(task: _Task, fault: Fault, partial: Path | None, options: Options) -> None:
    delay = task.delay_after(fault, partial, options)
    if delay is None:
        raise fault
    time.sleep(delay)


def fetch_all(
    addresses: Sequence[str], folder: Path, options: Options, check: Callable[[Path], Any]
) -> Generator[Outcome, None, None]:
    """Fetch different addresses into partial files in `folder`, several at once; yields each's end.

    `check` gets each whole file, in the thread that fetched it; it returns what becomes
    `Outcome.checked`, or raises a `Fault`. The caller moves the file away. Closing the iterator
    ends the requests; what has arrived stays for the next run.

    Raises:
        UserError: urllib3 is not installed.
    """
    client = web.Client(options)
    folder.mkdir(parents=True, exist_ok=True)
    schedule = Schedule(addresses, options)
    outcomes: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
    threads = [
        threading.Thread(
            target=_work, args=(schedule, client, folder, options, check, outcomes), daemon=True
        )
        for _ in range(min(options.workers, len(addresses)))
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in addresses:
            outcome = outcomes.get()
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome
    finally:
        schedule.stop()
        # One that waits for an answer may do so until its time-out; it then does nothing but end.
        deadline = time.monotonic() + 2
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def _work(
    schedule: Schedule,
    client: web.Client,
    folder: Path,
    options: Options,
    check: Callable[[Path], Any],
    outcomes: queue.SimpleQueue[Outcome | BaseException],
) -> None:
    try:
        while (task := schedule.take()) is not None:
            partial = partial_path(folder, task.address)
            if reason := schedule.closed(task):
                schedule.finish(task, None)
                outcomes.put(Outcome(task.address, partial, reason=reason))
                continue
            try:
                with contextlib.closing(_attempt(client, task.address, partial, options)) as sizes:
                    for _ in sizes:
                        if schedule.stopped:
                            return
                outcome = Outcome(task.address, partial, check(partial))
                schedule.finish(task, None)
            except Fault as fault:
                delay = task.delay_after(fault, partial, options)
                if delay is not None:
                    schedule.again(task, delay, fault.busy)
                    continue
                outcome = Outcome(task.address, partial, reason=fault.reason)
                schedule.finish(task, fault)
            outcomes.put(outcome)
    except BaseException as error:  # for the caller's thread to raise
        outcomes.put(error)


def _attempt(
    client: web.Client, address: str, partial: Path, options: Options
) -> Generator[int, None, None]:
    """One request for what is missing of a file; yields the size of each piece.

    Raises:
        Fault: the file is not whole; what has arrived stays if the rest can be asked for.
    """
    start, validator, total = _read_note(partial, address)
    if total is not None and start == total:
        return  # a run was stopped after the last piece
    headers = {"Range": f"bytes={start}-", "If-Range": validator} if start else {}
    with client.ask(address, headers) as response:
        if response.status == 200:
            start, validator = 0, _validator(response.headers)
            total = _length(response.headers)
        elif not _continues(response, start, validator, total):
            forget(partial)
            raise Fault("changed while it was fetched", passing=True)
        if total is not None and total > options.max_bytes:
            raise Fault(f"has {total} bytes; at most {options.max_bytes} are taken")
        _write_note(partial, address, validator, total)
        size = start
        with partial.open("ab" if start else "wb") as file:
            for piece in web.pieces(response, options):
                size += len(piece)
                if size > options.max_bytes:
                    raise Fault(f"sends more than {options.max_bytes} bytes")
                file.write(piece)
                yield len(piece)
    _check_length(size, total)
    if size == 0:
        raise Fault("is empty")


def _continues(response: Any, start: int, validator: str, total: int | None) -> bool:
    """Whether an answer of status 206 is the rest of the very file that was begun.

    Some servers do not know If-Range and send the rest of whatever is there now.
    """
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if response.status != 206 or span is None or int(span[1]) != start or not start:
        return False
    same_size = total is None or span[2] in ("*", str(total))
    return same_size and _validator(response.headers) in ("", validator)


def _check_length(size: int, total: int | None) -> None:
    if total is not None and size != total:
        raise Fault(f"ended after {size} of {total} bytes", passing=True)


def _length(headers: Mapping[str, str]) -> int | None:
    found = headers.get("Content-Length", "")
    return int(found) if found.isdecimal() else None


def _validator(headers: Mapping[str, str]) -> str:
    """What a server can compare a version of a file by; a weak tag says too little for that."""
    tag = headers.get("ETag", "")
    found = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")
    return found if re.fullmatch(r"[ -~]*", found) else ""  # it is to be sent back


def _note_path(partial: Path) -> Path:
    return partial.with_suffix(".json")


def _write_note(partial: Path, address: str, validator: str, total: int | None) -> None:
    note = {"address": address, "validator": validator, "total": total}
    _note_path(partial).write_text(json.dumps(note), encoding="utf-8")


def _read_note(partial: Path, address: str) -> tuple[int, str, int | None]:
    """(bytes that are there, validator, bytes of the whole); what has no note is not there."""
    try:
        note = json.loads(_note_path(partial).read_text(encoding="utf-8"))
        size = partial.stat().st_size
        validator, total = str(note["validator"]), note["total"]
        usable = note["address"] == address and validator and (total is None or size <= total)
    except (OSError, ValueError, TypeError, KeyError):
        usable = False
    return (size, validator, total) if usable else (0, "", None)


@dataclasses.dataclass
class _Task:
    address: str
    host: str
    failures: int = 0  # in a row that brought it no further
    furthest: int = 0  # bytes

    def delay_after(self, fault: Fault, partial: Path | None, options: Options) -> float | None:
        """Seconds until the next attempt; None: give up. Removes a partial file that is no use."""
        if not fault.passing:
            if partial is not None:
                forget(partial)
            return None
        size = partial.stat().st_size if partial is not None and partial.exists() else 0
        if size >= self.furthest + _PROGRESS:
            self.furthest, self.failures = size, 0
        self.failures += 1
        if fault.wait is not None and fault.wait > options.longest_wait:
            fault.reason += f" and asks to wait {fault.wait:.0f} s; run again after that"
            return None
        if self.failures >= options.attempts:
            fault.reason += f" ({self.failures} attempts)" if self.failures > 1 else ""
            return None
        if fault.wait is not None:
            return fault.wait + random.uniform(0, options.backoff)
        delay = min(_LONGEST_BACKOFF, options.backoff * 2.0 ** (self.failures - 1))
        return delay * random.uniform(0.5, 1.5)


class _Host:
    def __init__(self) -> None:
        self.waiting: deque[_Task] = deque()
        self.later: list[tuple[float, int, _Task]] = []  # a heap of (when, tie-break, task)
        self.active = 0
        self.not_before = 0.0
        self.closed = ""  # why nothing more is asked of it
        self.lost = 0  # addresses in a row without an answer


class Schedule:
    """Which address next: hosts take turns, and each has a limit and may ask to be left alone."""

    def __init__(self, addresses: Sequence[str], options: Options) -> None:
        self.stopped = False
        self._options = options
        self._changed = threading.Condition()
        self._unfinished = len(addresses)
        self._tie_break = 0
        self._hosts: dict[str, _Host] = {}
        for address in addresses:
            name = urllib.parse.urlsplit(address).netloc.lower()
            self._hosts.setdefault(name, _Host()).waiting.append(_Task(address, name))
        self._turns = deque(self._hosts)  # the hosts with something left to ask

    def take(self) -> _Task | None:
        """The next task; waits until there is one. None: all are done, or `stop` was called."""
        with self._changed:
            while self._unfinished and not self.stopped:
                task, wait = self._next(time.monotonic())
                if task is not None:
                    return task
                self._changed.wait(None if math.isinf(wait) else wait)
            return None

    def _next(self, now: float) -> tuple[_Task | None, float]:
        """A task that is due, or the seconds until one may be."""
        wait = math.inf
        for _ in range(len(self._turns)):
            name = self._turns[0]
            self._turns.rotate(-1)
            host = self._hosts[name]
            if host.active >= self._options.per_host:
                continue
            due = 0.0 if host.waiting else host.later[0][0]
            due = 0.0 if host.closed else max(due, host.not_before)
            if due > now:
                wait = min(wait, due - now)
                continue
            # What was tried before comes first: something of it may have arrived.
            again = host.later and (host.later[0][0] <= now or not host.waiting)
            task = heapq.heappop(host.later)[2] if again else host.waiting.popleft()
            host.active += 1
            if not host.waiting and not host.later:
                self._turns.pop()  # it was turned to the end
            return task, 0.0
        return None, wait

    def closed(self, task: _Task) -> str:
        """Why nothing more is asked of a task's host, or nothing."""
        return self._hosts[task.host].closed

    def again(self, task: _Task, delay: float, busy: bool) -> None:
        """Put a task back for `delay` seconds; `busy`: nothing is asked of its host so long."""
        with self._changed:
            host = self._hosts[task.host]
            when = time.monotonic() + delay
            if not host.waiting and not host.later:
                self._turns.append(task.host)
            self._tie_break += 1
            heapq.heappush(host.later, (when, self._tie_break, task))
            host.not_before = max(host.not_before, when if busy else 0.0)
            host.active -= 1
            self._changed.notify_all()

    def finish(self, task: _Task, fault: Fault | None) -> None:
        """A task is done with; some faults say that its host is not worth asking again."""
        with self._changed:
            host = self._hosts[task.host]
            host.lost = host.lost + 1 if fault is not None and fault.unreachable else 0
            if host.lost >= _LOST:
                host.closed = f"not tried: {_LOST} others of {task.host} got no answer"
            elif fault is not None and (fault.wait or 0) > self._options.longest_wait:
                host.closed = f"not tried: {task.host} asks to wait {fault.wait:.0f} s"
            host.active -= 1
            self._unfinished -= 1
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self.stopped = True
            self._changed.notify_all()
