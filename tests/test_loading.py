"""Loader workers that end, of themselves or by force; what they load is tested in test_stream."""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing import util
from pathlib import Path

import pytest

from sr_dist import loading, stream
from tests.streams import stream_of

LARGE = {"batch": 8, "crop_size": 64, "last": 1000}  # items that fill a pipe


@pytest.mark.parametrize("dies", [0, 1])
@pytest.mark.parametrize("read", [1, 3])
def test_a_worker_killed_while_it_sends_is_told_whatever_the_reader_is_at(
    sharded: Path, dies: int, read: int
) -> None:
    batches = loading.batches(stream_of(sharded, **LARGE), num_workers=2, pin_memory=False)
    with contextlib.closing(batches):
        assert len(list(itertools.islice(batches, read))) == read
        time.sleep(0.3)  # both wait now for somebody to read the rest of an item
        workers = sorted(multiprocessing.active_children(), key=lambda each: each.pid or 0)
        assert len(workers) == 2
        with contextlib.suppress(Exception):  # as logging has it
            os.kill(workers[dies].pid or 0, signal.SIGKILL)
            for _ in range(50):
                time.sleep(0.01)
        begun = time.monotonic()
        with pytest.raises(stream.DataError, match=r"ended with status -9 \(-9: killed"):
            for _ in batches:
                pass
        assert time.monotonic() - begun < 4
        assert sorted(str(each.exitcode) for each in workers) == ["-9", "0"]


def test_workers_end_when_nobody_reads_any_more(sharded: Path) -> None:
    """Also the first, whose line those begun after it know."""
    batches = loading.batches(stream_of(sharded, **LARGE), num_workers=3, pin_memory=False)
    next(batches)
    time.sleep(0.3)
    workers = multiprocessing.active_children()
    begun = time.monotonic()
    batches.close()
    assert time.monotonic() - begun < 4
    assert [each.exitcode for each in workers] == [0, 0, 0]


def test_they_do_so_while_children_that_came_later_live(sharded: Path) -> None:
    first, second = (
        loading.batches(stream_of(sharded, **LARGE), num_workers=2, pin_memory=False)
        for _ in range(2)
    )
    next(first)
    workers = multiprocessing.active_children()
    next(second)
    time.sleep(0.3)
    begun = time.monotonic()
    first.close()
    assert time.monotonic() - begun < 4
    assert [each.exitcode for each in workers] == [0, 0]
    second.close()


def test_nothing_is_left_of_loaders_that_have_ended(sharded: Path) -> None:
    def open_files() -> int:
        return len(list(Path("/dev/fd").iterdir()))

    gc.collect()  # what earlier tests left
    before = open_files(), len(util._finalizer_registry)  # type: ignore[attr-defined]
    for last in (1, 5):
        list(loading.batches(stream_of(sharded, last=last), num_workers=2, pin_memory=False))
    batches = loading.batches(stream_of(sharded, **LARGE), num_workers=2, pin_memory=False)
    next(batches)
    del batches
    assert not multiprocessing.active_children()
    gc.collect()
    assert (open_files(), len(util._finalizer_registry)) == before  # type: ignore[attr-defined]


def test_a_worker_that_does_not_end_is_killed(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stream.CropStream.items

    def stalls(*arguments: int) -> object:
        yield from itertools.islice(real(*arguments), 2)  # type: ignore[arg-type]
        time.sleep(600)

    monkeypatch.setattr(stream.CropStream, "items", stalls)
    batches = loading.batches(stream_of(sharded, last=100), num_workers=2, pin_memory=False)
    next(batches)
    workers = multiprocessing.active_children()
    begun = time.monotonic()
    batches.close()
    assert 4 < time.monotonic() - begun < 9
    assert [each.exitcode for each in workers] == [-9, -9]


def test_an_error_in_a_worker_is_shown_and_ends_it(
    sharded: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: int) -> object:
        raise ZeroDivisionError("an error in the code")
        yield

    monkeypatch.setattr(stream.CropStream, "items", fails)
    batches = loading.batches(stream_of(sharded, last=100), num_workers=2, pin_memory=False)
    with pytest.raises(stream.DataError, match="a loader worker ended with status 1"):
        next(batches)
    assert "ZeroDivisionError: an error in the code" in capfd.readouterr().err


def test_what_cannot_be_sent_ends_the_worker(
    sharded: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def unfit(*arguments: int) -> object:
        yield lambda: None
        time.sleep(5)

    monkeypatch.setattr(stream.CropStream, "items", unfit)
    batches = loading.batches(stream_of(sharded, last=100), num_workers=1, pin_memory=False)
    with pytest.raises(stream.DataError, match="a loader worker ended with status 1"):
        next(batches)
    assert "pickle" in capfd.readouterr().err


@pytest.mark.parametrize("child", [False, True])
def test_a_process_that_leaves_its_batches_unread_ends(sharded: Path, child: bool) -> None:
    """Also a child of multiprocessing's, as a notebook's launcher begins them."""
    script = f"""
import multiprocessing
from pathlib import Path
from sr_dist import loading
from tests.streams import stream_of
kept = []
def read():
    source = stream_of(Path({str(sharded)!r}), last=1000)
    kept.append(loading.batches(source, num_workers=2, pin_memory=False))
    next(kept[0])
if {child}:
    reader = multiprocessing.Process(target=read)
    reader.start()
    reader.join()
else:
    read()
"""
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True)


def test_signals_of_a_group_leave_the_workers_at_work(sharded: Path) -> None:
    """The rank decides, and needs its batches until it has ended."""
    batches = loading.batches(stream_of(sharded, last=30), num_workers=2, pin_memory=False)
    with contextlib.closing(batches):
        next(batches)
        for worker in multiprocessing.active_children():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                os.kill(worker.pid or 0, number)
        assert len(list(batches)) == 29
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
