from __future__ import annotations

import sys
import threading
import time

import pytest

from sr_dist import watch
from tests.helpers import run


class Silent:
    """A store that does not answer, and says nothing of it."""

    def set(self, key: str, value: str) -> object:
        threading.Event().wait()
        return None

    def get(self, key: str) -> bytes:
        return b""

    def check(self, keys: list[str]) -> bool:
        return False


def test_a_store_that_does_not_answer_ends_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(watch.Watch, "_end", lambda self, why: said.append(why))
    with watch.Watch(1, 2, Silent(), timeout=0.6) as held:
        held.threads.pop(0)  # which waits for ever
        deadline = time.monotonic() + 5
        while not said:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert "no answer for 1 s from the machine of rank 0" in said[0]


def test_the_time_of_a_suspended_process_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    held = watch.Watch(1, 2, Silent(), timeout=5)

    def wait(seconds: float) -> bool:
        clock[0] += seconds + lost
        return False

    monkeypatch.setattr(held.closing, "wait", wait)
    lost = 0.3  # a busy machine
    before = held._now()
    assert held._wait_a_period() is False
    assert held._now() - before == pytest.approx(0.55)
    lost = 3600.0
    before = held._now()
    held._wait_a_period()
    assert held._now() - before == pytest.approx(0.25)


SIGNALLED = """
import os, signal, sys, threading, time
from sr_dist import watch
held = watch.Watch(0, 1, None, timeout=5)
with held.signals():
    held.begin(int(sys.argv[1]))
    for name in sys.argv[2:]:
        if name[0].isdigit():
            time.sleep(float(name))
        else:
            os.kill(os.getpid(), signal.Signals[name])
    # The main thread waits where no Python runs, as in a collective.
    lock = threading.Lock()
    lock.acquire()
    threading.Timer(1.5, lock.release).start()
    lock.acquire()
    print(held.signal, held.wants("stop"))
"""


@pytest.mark.parametrize(
    ("step", "signals", "status", "said"),
    [
        (3, ["SIGTERM"], 0, "SIGTERM True"),
        (3, ["SIGUSR1", "SIGTERM"], 0, "SIGUSR1 True"),
        (3, ["SIGTERM", "SIGTERM"], 0, "SIGTERM True"),
        (3, ["SIGTERM", "0.7", "SIGTERM"], 128 + 15, ""),
        (3, ["SIGUSR1", "5.2", "SIGTERM"], 128 + 15, ""),
        (0, ["SIGINT"], -2, ""),
    ],
    ids=["one", "an echo", "sent twice", "the same again", "another later", "nothing begun"],
)
def test_a_second_signal_stops_at_once(
    step: int, signals: list[str], status: int, said: str
) -> None:
    done = run(sys.executable, "-c", SIGNALLED, str(step), *signals, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (status, said), done.stderr
    assert ("KeyboardInterrupt" in done.stderr) == (not step)


class Kept:
    """A store in memory."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> object:
        self.values[key] = value.encode()
        return None

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


@pytest.mark.parametrize("asking", [0, 1, 2])
def test_all_ranks_agree_on_a_step_however_long_steps_take(asking: int) -> None:
    """A first step of a second, then many in the time of a look at the store: saved twice."""
    ranks, store = 3, Kept()
    gradients = threading.Barrier(ranks)  # no rank ends a step before all have come so far
    done: list[list[int]] = [[] for _ in range(ranks)]
    failures: list[BaseException] = []

    def train(rank: int) -> None:
        try:
            with watch.Watch(rank, ranks, store, timeout=20) as held:
                for step in range(1, 20_000):
                    held.begin(step)
                    time.sleep(1.0 if step == 1 else 0.0005 * (rank == 1))
                    gradients.wait(20)
                    if rank == asking and step in (40, *(first + 30 for first in done[rank])):
                        held.ask("save")
                    if held.due("save", step):
                        done[rank].append(step)
                    if len(done[rank]) == 2:
                        break
        except BaseException as error:
            failures.append(error)
            gradients.abort()

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert done[0] == done[1] == done[2] and len(done[0]) == 2
    assert 40 < done[0][0] and done[0][0] + 30 < done[0][1]
