from __future__ import annotations

import threading
import time

import pytest

from sr_dist import watch


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
        held.threads[1].join(5)
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
