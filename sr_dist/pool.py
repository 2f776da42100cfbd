"""Work done by processes: a pool of them on this machine, or any executor.

They end with what began them, and Ctrl-C ends all without a word of theirs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from sr_dist import workers
from sr_dist.errors import GO_ON, UserError

Given = TypeVar("Given")
Result = TypeVar("Result")

_STOPPING = (signal.SIGINT, signal.SIGTERM)


class LostWorker(UserError):
    """A worker process of this machine died."""


def in_turn(
    executor: Executor | None, function: Callable[[Given], Result], items: Iterable[Given]
) -> Iterator[Result]:
    """`map(function, items)` by the executor; nothing runs any more once it has ended.

    One that is not read to its end leaves a pool of local processes shut down.
    """
    if executor is None:
        yield from map(function, items)
        return
    futures = []
    try:
        rest = iter(items)
        with _uninterrupted() as stopped:  # while a pool starts its processes
            for item in rest:
                futures.append(executor.submit(function, item))
                if stopped():
                    break
        # A signal that came has raised by now, or its handler lets the work go on.
        futures += [executor.submit(function, item) for item in rest]
        for future in futures:
            yield future.result()
    except BaseException:
        if isinstance(executor, ProcessPoolExecutor):
            # It cancels them itself. Where others do and a process dies, its thread fails over
            # them (Python 3.11), and whoever waits for the rest waits for ever.
            _shut_down(executor)
        else:
            for future in futures:
                future.cancel()
            wait(futures)
        raise


def _shut_down(pool: ProcessPoolExecutor) -> None:
    """Wait until what is begun has ended; nothing more is begun."""
    if sys.version_info >= (3, 11, 5):
        pool.shutdown(cancel_futures=True)
        return
    # Until then a pool waits for ever to hand on a large job that no process is left to read
    # (https://github.com/python/cpython/issues/94777).
    inner: Any = pool
    thread, queue = inner._executor_manager_thread, inner._call_queue
    pool.shutdown(wait=False, cancel_futures=True)
    if thread is None:  # nothing was given to it
        return
    thread.join(1.0)
    if thread.is_alive():
        queue._reader.close()
        thread.join()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM are heard when the block ends; by processes begun in it, once they can.

    Yields what tells whether one has come, so that the block can end.

    They have the handlers of this one until `_begin_worker`. An exception of these would end a new
    process with a traceback, or be lost in a callback of its fork, and with it the signal by which
    the pool ends it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    handlers = {
        number: handler for number in _STOPPING if callable(handler := signal.getsignal(number))
    }
    heard: list[int] = []
    # Blocked for the new processes. They may reach this one by other threads all the same.
    for number in handlers:
        signal.signal(number, lambda number, _: heard.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield lambda: bool(heard) or not signal.sigpending().isdisjoint(handlers)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if heard:  # also where the block failed, as it does when the new processes heard it first
            os.kill(os.getpid(), heard[0])


def _begin_worker() -> None:
    # Ctrl-C reaches all processes of a terminal; the owner says what there is to say. An exception
    # here would say it too, and come up in the midst of the pool's own code, locks in hand.
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: os._exit(GO_ON))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which the pool ends them by; its owner hears it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)  # see _uninterrupted
    workers.end_with_parent()


@contextlib.contextmanager
def local_workers(number: int) -> Iterator[Executor | None]:
    """An executor of so many processes on this machine; None for one, which is this process.

    What is not begun when the block ends is left.

    Raises:
        LostWorker: a process died.
    """
    if number == 1:
        yield None
        return
    executor = ProcessPoolExecutor(number, initializer=_begin_worker)
    try:
        yield executor
    except BrokenProcessPool:
        raise LostWorker(
            f"one of the {number} worker processes died, as they do where memory runs out"
        ) from None
    finally:
        _shut_down(executor)
