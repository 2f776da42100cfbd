from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import pytest

from sr_dist import watch
from tests.helpers import run


class Silent:
    """A store that does not answer a sign of life, and says nothing of it."""

    def set(self, key: str, value: str) -> object:
        if key.startswith("alive"):
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

    def wait_in_both(seconds: float) -> bool:
        monkeypatch.setattr(held.closing, "wait", wait)
        held._wait_a_period()  # the other thread's, suspended with this one
        return False

    monkeypatch.setattr(held.closing, "wait", wait_in_both)
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
        (3, ["SIGUSR1", "0.7", "SIGTERM"], 128 + 15, ""),
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


def test_a_signal_whose_exception_was_swallowed_stops_after_the_first_step() -> None:
    held = watch.Watch(0, 1, None, timeout=5)
    with held.signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt:
            pass
        deadline = time.monotonic() + 5
        while not held.signal:  # which a thread hears
            assert time.monotonic() < deadline
        held.begin(1)
        assert held.due("stop", 1) and held.signal == "SIGTERM"


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


class Queues:
    """The ranks' devices: a rank begins a step when all have begun the one `ahead` before it.

    With 0 it ends none before all have come so far, as on the CPU; with more its loop runs ahead,
    as a GPU's does.
    """

    def __init__(self, ranks: int, ahead: int) -> None:
        self.begun, self.ahead, self.broken = [0] * ranks, ahead, False
        self.changed = threading.Condition()

    def pass_through(self, rank: int, step: int) -> None:
        with self.changed:
            self.begun[rank] = step
            self.changed.notify_all()
            there = self.changed.wait_for(
                lambda: min(self.begun) >= step - self.ahead or self.broken, 20
            )
        assert there and not self.broken

    def leave(self, rank: int, well: bool) -> None:
        with self.changed:
            self.begun[rank], self.broken = 10**9, self.broken or not well
            self.changed.notify_all()


@pytest.mark.parametrize("ahead", [0, 5])
@pytest.mark.parametrize("asking", [0, 1, 2])
def test_all_ranks_agree_on_a_step_however_long_steps_take_and_however_far_one_is_ahead(
    asking: int, ahead: int
) -> None:
    """A first step of a second, then many in the time of a look at the store: saved twice.

    Each rank is the slowest in its turn, so that each is ahead at times.
    """
    ranks, store = 3, Kept()
    queues = Queues(ranks, ahead)
    done: list[list[int]] = [[] for _ in range(ranks)]
    failures: list[BaseException] = []
    finished = threading.Barrier(ranks)  # a rank leaves when all are done, as a run does

    def train(rank: int) -> None:
        try:
            with watch.Watch(rank, ranks, store, timeout=20) as held:
                for step in range(1, 20_000):
                    held.begin(step)
                    time.sleep(1.0 if step == 1 else 0.0005 * (step // 25 % ranks == rank))
                    queues.pass_through(rank, step)
                    if rank == asking and step in (40, *(first + 30 for first in done[rank])):
                        held.ask("save")
                    if held.due("save", step):
                        done[rank].append(step)
                    if len(done[rank]) == 2:
                        break
                queues.leave(rank, well=True)
                finished.wait(20)
        except BaseException as error:
            failures.append(error)
            queues.leave(rank, well=False)
            finished.abort()

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert done[0] == done[1] == done[2] and len(done[0]) == 2
    assert 40 <= done[0][0] and done[0][0] + 30 <= done[0][1]


def test_a_request_while_all_are_past_the_end_of_a_step_is_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in an evaluation, which comes after the look; and no step more than that is begun."""
    monkeypatch.setattr(watch, "_PERIOD", 0.01)
    store = Kept()
    with watch.Watch(0, 2, store, timeout=20) as one, watch.Watch(1, 2, store, timeout=20) as other:
        for step in (18, 19):
            one.begin(step)
            assert not one.due("stop", step)
        other.begin(18)
        other.ask("stop")
        deadline = time.monotonic() + 20
        while "stop" not in one.agreed or "stop" not in other.agreed:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not other.due("stop", 18) and not other.due("stop", 19)
        assert one.due("stop", 20) and other.due("stop", 20)


def test_a_store_that_goes_is_said_to_be_gone_with_who_kept_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Gone(Kept):
        def set(self, key: str, value: str) -> object:
            raise RuntimeError("Connection reset by peer")

    said: list[str] = []
    monkeypatch.setattr(watch.Watch, "_end", lambda self, why: said.append(why))
    with watch.Watch(1, 2, Gone(), 5) as held:
        held.threads[0].join(10)
    with watch.Watch(1, 2, Gone(), 5, launcher_keeps_store=True) as held:
        held.threads[0].join(10)
    assert said == ["rank 0 is gone", "the launcher that keeps the ranks together is gone"]


def test_rank_0_which_keeps_the_store_leaves_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where others take longer to end than a rank may be silent; after an error at once."""
    monkeypatch.setattr(watch, "_PERIOD", 0.05)
    said: list[str] = []
    monkeypatch.setattr(watch.Watch, "_end", lambda self, why: said.append(why))
    store, left = Kept(), []

    def leave(rank: int, after: float) -> None:
        with watch.Watch(rank, 3, store, timeout=0.4):
            time.sleep(after)
        left.append(rank)

    threads = [
        threading.Thread(target=leave, args=(rank, after))
        for rank, after in ((0, 0.1), (1, 0.2), (2, 1.2))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert left in ([1, 2, 0], [1, 0, 2]) and said == []
    assert store.get("told/left 1") == store.get("told/left 2") == b"well"
    with pytest.raises(ValueError), watch.Watch(0, 2, Kept(), timeout=60):
        raise ValueError
    with watch.Watch(0, 2, Kept(), timeout=60, launcher_keeps_store=True):
        pass


def test_a_rank_that_left_by_an_error_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_PERIOD", 0.05)
    said: list[str] = []
    monkeypatch.setattr(watch.Watch, "_end", lambda self, why: said.append(why))
    store = Kept()
    with pytest.raises(ValueError), watch.Watch(0, 2, store, timeout=0.4):
        with pytest.raises(KeyError), watch.Watch(1, 2, store, timeout=5):
            time.sleep(0.2)
            raise KeyError
        deadline = time.monotonic() + 10
        while not said and time.monotonic() < deadline:
            time.sleep(0.02)
        raise ValueError
    assert said and said[0] == "no sign of life from rank 1 for 0 s"


def test_a_silent_rank_is_named_by_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that do not listen to it know it from rank 0, before that and its store end."""
    monkeypatch.setattr(watch, "_PERIOD", 0.05)
    store, said = Kept(), {}
    over = threading.Event()

    def end(self: watch.Watch, why: str) -> None:
        said.setdefault(self.rank, why)
        self.closing.set()

    monkeypatch.setattr(watch.Watch, "_end", end)

    def live(rank: int) -> None:
        with pytest.raises(ValueError), watch.Watch(rank, 3, store, timeout=0.5) as held:
            if rank == 2:
                time.sleep(0.3)
                held.closing.set()  # it says nothing any more
            over.wait(20)
            raise ValueError

    threads = [threading.Thread(target=live, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while len(said) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    over.set()
    for thread in threads:
        thread.join(20)
    assert said == dict.fromkeys((0, 1), "no sign of life from rank 2 for 0 s")


def all_together(live: Callable[[int], None], ranks: int) -> None:
    """`live` of each rank, in a thread of its own, to the end."""
    threads = [threading.Thread(target=live, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)


def test_one_that_ended_by_an_error_of_its_own_is_not_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever has an error of its own later on, when that one is silent, tells of its own."""
    monkeypatch.setattr(watch, "_PERIOD", 0.05)
    monkeypatch.setattr(watch, "_SILENT", 0.6)
    store, found = Kept(), {}

    def live(rank: int) -> None:
        with watch.Watch(rank, 2, store, timeout=60, launcher_keeps_store=True) as held:
            time.sleep(0.3)
            if rank == 0:
                left.wait(20)
                time.sleep(0.2)
            found[rank] = held.missing()
        left.set()

    left = threading.Event()
    all_together(live, 2)
    assert found == {0: [], 1: []}


def test_a_rank_that_is_gone_is_named_by_whoever_finds_out_first_and_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 0 may wait for one that lives, and know of nothing until that has left too."""
    monkeypatch.setattr(watch, "_PERIOD", 0.05)
    monkeypatch.setattr(watch, "_SILENT", 1.5)
    store, found = Kept(), {}
    gone, left = threading.Event(), threading.Event()

    def live(rank: int) -> None:
        with watch.Watch(rank, 3, store, timeout=60, launcher_keeps_store=True) as held:
            time.sleep(0.3)
            if rank == 2:
                held.closing.set()  # it says nothing any more
                gone.set()
            elif rank == 1:
                gone.wait(20)
                found[rank] = held.missing()
            else:
                left.wait(20)
                time.sleep(2)  # so that rank 1 is silent as well
                found[rank] = held.missing()
        if rank == 1:
            left.set()

    all_together(live, 3)
    assert found == {0: [2], 1: [2]}
