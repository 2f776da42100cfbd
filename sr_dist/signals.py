"""Signals that stop a run, heard by a thread: the main one may be in a call that hears none."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from sr_dist.errors import GO_ON, say_stopped

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def launcher_keeps_store() -> bool:
    """Whether torchrun or accelerate launch started this rank, and keeps the store of all ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


@contextmanager
def left_at_once(again: str = "") -> Iterator[None]:
    """While nothing has begun that could be lost, `STOPPING` end this process.

    Also where it waits for others in a call that hears none, and while it loads torch, which an
    exception of a signal's handler would abort, print pages of, or swallow. `again`: what running
    the command again does; the exit status is then `GO_ON`, otherwise 128 and the signal's number.
    """

    def leave(numbers: socket.socket) -> None:
        while received := numbers.recv(1):
            number = received[0]
            if number in STOPPING:
                try:
                    # A launcher sends SIGTERM when another rank has ended, and has said why.
                    if number != signal.SIGTERM or not launcher_keeps_store():
                        say_stopped(again)
                finally:  # also where Ctrl-C has ended who reads that
                    os._exit(GO_ON if again else 128 + number)

    with heard_by(leave, lambda number, frame: None):
        yield


@contextmanager
def heard_by(
    hear: Callable[[socket.socket], None], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """`hear` reads a byte for each signal, in a thread; `handler` is for the main one, when it can.

    Signals but `STOPPING` are heard too; what is ignored stays so, as SIGINT in a script's `… &`.
    """
    theirs, ours = socket.socketpair()
    ours.setblocking(False)  # as set_wakeup_fd wants it
    before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {
        each: signal.signal(each, handler)
        for each in STOPPING
        if signal.getsignal(each) != signal.SIG_IGN
    }
    wakeup = signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
    listening = threading.Thread(target=hear, args=(theirs,), daemon=True, name="signals")
    listening.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for each, former in before.items():
            signal.signal(each, former)
        ours.shutdown(socket.SHUT_WR)  # which ends the thread, whoever else holds it
        listening.join()
        ours.close()
        theirs.close()
