"""Processes that do work, and what becomes of it when one dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool

import pytest

from sr_dist import pool
from sr_dist.errors import GO_ON

pytestmark = pytest.mark.multiprocess


def double(number: int) -> int:
    return 2 * number


def die_at_three(number: int) -> int:
    if number == 3:
        os._exit(1)
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_work(workers: int) -> None:
    with pool.local_workers(workers) as executor:
        assert list(pool.in_turn(executor, double, range(20))) == list(range(0, 40, 2))


def look_at(job: bytes) -> int:
    time.sleep(0.02)
    return len(job)


@pytest.mark.parametrize("stopped", ["by a death", "by Ctrl-C"])
def test_large_jobs_that_nobody_reads_hold_nothing_up(stopped: str) -> None:
    """More than a pipe holds; Ctrl-C while the bar is drawn, whose frame keeps the work alive."""
    error = KeyboardInterrupt if stopped == "by Ctrl-C" else pool.LostWorker

    def drawn(results: Iterator[int]) -> Iterator[int]:
        for done, result in enumerate(results):
            if done == 3:
                for worker in multiprocessing.active_children():
                    os.kill(worker.pid or 0, signal.SIGINT)
                if stopped == "by Ctrl-C":
                    raise KeyboardInterrupt
            yield result

    began = time.monotonic()
    with pytest.raises(error), pool.local_workers(2) as executor:
        list(drawn(pool.in_turn(executor, look_at, [bytes(300_000)] * 40)))
    assert time.monotonic() - began < 10


def test_the_rest_is_not_begun_after_ctrl_c() -> None:
    begun = []

    def numbers() -> Iterator[int]:
        for number in range(1000):
            begun.append(number)
            yield number
            if number == 4:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), pool.local_workers(2) as executor:
        list(pool.in_turn(executor, double, numbers()))
    assert len(begun) < 10


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None], ids=["ignored", "noted"])
def test_a_signal_that_stops_nothing_costs_no_work(
    handler: signal.Handlers | Callable[..., None],
) -> None:
    def numbers() -> Iterator[int]:
        for number in range(40):
            if number in (4, 5):
                os.kill(os.getpid(), signal.SIGINT)
            yield number

    former = signal.signal(signal.SIGINT, handler)
    try:
        with pool.local_workers(2) as executor:
            assert list(pool.in_turn(executor, double, numbers())) == list(range(0, 80, 2))
    finally:
        signal.signal(signal.SIGINT, former)


def test_a_worker_that_dies_costs_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool's own thread ends it at the same time, which went wrong one time in four."""
    failures: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    for _ in range(40):
        with (
            pytest.raises(pool.LostWorker, match="one of the 2 worker processes died"),
            pool.local_workers(2) as executor,
        ):
            list(pool.in_turn(executor, die_at_three, range(20)))
    assert not failures


def begin_after(number: int) -> None:
    os.kill(os.getpid(), number)
    pool._begin_worker()
    os._exit(0)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, -15), (signal.SIGINT, GO_ON)])
def test_a_new_process_hears_a_signal_once_it_can(
    capfd: pytest.CaptureFixture[str], number: int, status: int
) -> None:
    """By the handlers of the command it would raise KeyboardInterrupt in the midst of its start."""
    former = signal.signal(number, signal.default_int_handler)
    try:
        with pool._uninterrupted():
            process = multiprocessing.get_context("fork").Process(
                target=begin_after, args=(number,)
            )
            process.start()
        process.join(30)
    finally:
        signal.signal(number, former)
    assert process.exitcode == status
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("fails", [False, True])
def test_ctrl_c_is_heard_after_the_start_also_when_that_fails(fails: bool) -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), pool._uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        reached = True
        if fails:
            raise BrokenProcessPool
    assert reached
