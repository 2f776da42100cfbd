"""Processes that do work, and what becomes of it when one dies."""

from __future__ import annotations

import os
import threading

import pytest

from sr_dist import pool
from sr_dist.errors import UserError

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


def test_a_worker_that_dies_costs_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool's own thread ends it at the same time, which went wrong one time in four."""
    failures: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    for _ in range(40):
        with (
            pytest.raises(UserError, match="one of the 2 worker processes died"),
            pool.local_workers(2) as executor,
        ):
            list(pool.in_turn(executor, die_at_three, range(20)))
    assert not failures
