"""Signs of life and agreement between ranks, in a thread of its own: no step waits for it.

Each rank tells a store, which the launcher keeps (without one rank 0), that it lives and which step
it is at. Rank 0 watches the others, and they it.

What all ranks must do at the end of the same step (stop, save) is asked for by any of them. That
step is found without a word about how far the loops are apart, since a GPU's loop runs ahead of the
GPU, and so of the other loops, by as many steps as fit into its queue:

1. The thread of each rank hears of the request, and tells the step at whose end its loop will look
   next: the one begun, or the one after that if its end is over.
2. From then on the loop does not go beyond that end before it knows the step that was agreed on.
3. Rank 0's thread gathers what all have told, and names the latest: the step agreed on.

So all do it at the end of the same step: none had got beyond the end that it told of (2), which was
not later than the latest (3), and each goes on to that one. And all get there: 1 and 3 are done by
threads that never wait for a loop, a step, or a device, so that a loop waits for two or three
periods at most; and up to the step agreed on, no step needs anything from a loop that waits, for
one that waits at the end of a step has already sent, or queued on its device, its part of that step
and all before it. A loop waits for this once a request, and a step without a request waits for
nothing. No step is begun for the agreement that the loop furthest ahead had not begun already.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Protocol

from sr_dist import signals
from sr_dist.errors import Stopped

log = logging.getLogger(__name__)

_PERIOD = 0.25  # seconds between two looks at the store
_SILENT = 3.0  # seconds without a sign of life that tell of a rank, once something is wrong
_WAITING = 6.0  # the same of one that only waits, and tells of its life all the time
# Seconds in which a second signal is an echo of the first: where one is sent to a launcher and its
# ranks together, they get it once more from the launcher, which hands it on at once (torchrun and
# accelerate launch; measured: within 0.01 s at five busy processes a core). Others sent SIGTERM.
_ECHO = 0.5
_HALT = 1.0  # seconds more than a period that tell of a process that was suspended
_GONE = 1  # exit status


class Store(Protocol):
    """What is used of `torch.distributed.Store`."""

    def set(self, key: str, value: str) -> object: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


class Watch:
    """One rank's part. `store` is None where there is one rank: it agrees with itself at once.

    `timeout`: seconds without a sign of life after which a rank counts as lost; the others then end
    with a message that names it. `launcher_keeps_store`: which otherwise goes with rank 0.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Store | None,
        timeout: float,
        launcher_keeps_store: bool = False,
    ) -> None:
        self.rank, self.world_size, self.store, self.timeout = rank, world_size, store, timeout
        self.launcher_keeps_store = launcher_keeps_store
        self.patience = timeout  # with other ranks
        self.step = 0  # the one that this rank has begun, kept by the loop
        self.asked: set[str] = set()
        self.wanted: set[str] = set()  # what some rank asked for, with its round
        self.looked: dict[str, int] = {}  # what → the last step at whose end the loop looked
        self.held: dict[str, int] = {}  # what → the end that it waits at, once that was told
        self.agreed: dict[str, int] = {}  # what → step at whose end
        self.rounds: dict[str, int] = {}  # how often something was agreed on and done
        self.signal: str = ""  # the name of the one that came first
        self.signalled = 0.0  # when
        self.beats = 0
        self.heard: dict[int, tuple[str, float]] = {}  # rank → last sign, when it changed
        self.lock = threading.Lock()  # of what two threads change
        self.leaving = False  # from now on the store may be gone
        self.closing = threading.Event()
        self.halted = 0.0  # seconds that this process was suspended, which is nobody's silence
        self.resumed = 0.0  # when the last of them were over
        self.answered = self._now()  # when the store did so last
        self.trouble: float | None = None  # when rank 0 heard that something went wrong
        self.told_quiet = False  # whether it has named those that are gone
        self.threads = [
            threading.Thread(target=target, daemon=True, name="watch")
            for target in (self._live, self._guard)
        ]

    def __enter__(self) -> Watch:
        if self.store is not None:
            self.answered = self._now()
            for thread in self.threads:
                thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self.store is None:
            return
        well = kind is None or issubclass(kind, Stopped)
        try:
            with suppress(RuntimeError):  # the store is gone: nobody is to be waited for or told
                if self.rank == 0 and well and not self.launcher_keeps_store:
                    for rank in range(1, self.world_size):  # without a store they cannot end well
                        self.wait_for(f"left {rank}")
                self.leaving = True
                if self.rank:
                    self.tell(f"left {self.rank}", "well" if well else "by an error")
        finally:
            self.leaving = True
            self.closing.set()
        for thread in self.threads:
            thread.join(10)

    @contextmanager
    def signals(self, launcher: int | None = None) -> Iterator[None]:
        """Let the first SIGTERM, SIGINT or SIGUSR1 ask for a stop, and a second one stop at once.

        A thread hears them, also while the loop waits for the other ranks. `launcher`: the parent
        of this process, if it hands no signal on; its end counts as SIGTERM, if none came before.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def begin(number: int, frame: FrameType | None) -> None:
            if not self.step:  # nothing has begun that could be lost
                raise KeyboardInterrupt

        over = threading.Event()
        outliving = threading.Thread(target=self._outlive, args=(launcher, over), daemon=True)
        with signals.heard_by(self._hear, begin):
            if launcher is not None:
                outliving.start()
            try:
                yield
            finally:
                over.set()
                if launcher is not None:
                    outliving.join()

    def _hear(self, numbers: socket.socket) -> None:
        """What the system writes there: a byte for each signal."""
        while received := numbers.recv(1):
            number = received[0]
            if number not in signals.STOPPING:
                continue
            now, name = time.monotonic(), signal.Signals(number).name
            if self.signal:
                if now - self.signalled > _ECHO:
                    os._exit(128 + number)
            else:
                self.signal, self.signalled = name, now
                if self.step:
                    self.ask("stop")

    def _outlive(self, launcher: int, over: threading.Event) -> None:
        """Tell this process of its launcher's end; what ended it may have told both."""
        while not over.wait(_PERIOD):
            if os.getppid() != launcher:
                if not self.signal:
                    os.kill(os.getpid(), signal.SIGTERM)
                return

    def begin(self, step: int) -> None:
        """The loop begins `step`."""
        self.step = step
        if self.signal:  # whose exception met code that swallows those, as Python's around a fork
            self.ask("stop")

    def ask(self, what: str) -> None:
        """Ask that all ranks do something (a word, as `stop`) at the end of the same step."""
        self.asked.add(what)

    def wants(self, what: str) -> bool:
        """Whether a rank has asked for it, and it has not been done: for work that can be left."""
        return what in self.asked or self._key(what) in self.wanted

    def due(self, what: str, step: int) -> bool:
        """Whether all ranks do it at the end of this `step`; to be asked at the end of each."""
        if self.store is None:
            found = what in self.asked
            self.asked.discard(what)
            return found
        with self.lock:
            self.looked[what] = step
            if what not in self.held:
                return False
        while what not in self.agreed:  # the thread ends the process if a rank is lost
            time.sleep(0.01)
        at = self.agreed[what]
        assert step <= at, f"rank {self.rank} is at step {step}; {what} was due at {at}"
        if step < at:
            return False
        with self.lock:
            self.asked.discard(what)
            self.rounds[what] = self.rounds.get(what, 0) + 1
            del self.held[what], self.agreed[what]
        return True

    def confirm(self, what: str) -> None:
        """For rank 0, for which the others wait: return when all have heard that it is asked for.

        One that is gone never does. This process then ends, and names it, before a launcher that
        has sent SIGTERM loses its patience (torchrun and accelerate launch after 30 s).
        """
        self.patience = min(self.timeout, _WAITING)
        while self.store is not None and what not in self.agreed:
            time.sleep(0.01)
        self.patience = self.timeout

    def _key(self, what: str) -> str:
        return f"{what}/{self.rounds.get(what, 0)}"

    def wait_for(self, key: str) -> str:
        """What another rank has told under `key`. A wait may take any time, while all live."""
        if self.store is None:
            return ""
        while not self.store.check([f"told/{key}"]):
            time.sleep(0.02)
        return self.store.get(f"told/{key}").decode()

    def tell(self, key: str, what: str = "") -> None:
        if self.store is not None:
            self.store.set(f"told/{key}", what)

    def missing(self) -> list[int]:
        """After something went wrong between ranks: those that give no sign of life any more.

        The same for all ranks, however late they come to know that something did.
        """
        assert self.store is not None
        try:
            self.store.set("trouble", "1")
            time.sleep(_SILENT)
            if self.rank and self._quiet():
                return [0]
            until = time.monotonic() + 2 * _SILENT
            while time.monotonic() < until and not self.store.check(["quiet"]):
                time.sleep(0.05)
            found = self.store.get("quiet").decode() if self.store.check(["quiet"]) else ""
            if self.rank == 0:
                time.sleep(_SILENT)  # in which the others read it: the store may go with this rank
            return [int(rank) for rank in found.split()]
        except RuntimeError:  # the store went with the process that kept it
            return [0]

    def _tell_quiet(self) -> None:
        """Rank 0 names those that are gone, if any, when another finds that something went wrong.

        Its loop may not find that out before all the others have left: it may wait for them, and
        not for the one that is gone.
        """
        assert self.store is not None
        if self.told_quiet or not self.store.check(["trouble"]):
            return
        if self.trouble is None:
            self.trouble = self._now()
        # Whose end is the trouble has been silent since. Once for all: those to whom something
        # else happened end too, and are then as silent.
        age, quiet = self._now() - self.trouble, self._quiet()
        if age >= 1.5 * _SILENT or (quiet and age >= _SILENT):
            self.store.set("quiet", " ".join(map(str, quiet)))
            self.told_quiet = True

    def _quiet(self) -> list[int]:
        self._listen()
        now = self._now()
        return [r for r, (_, when) in sorted(self.heard.items()) if now - when >= _SILENT - _PERIOD]

    def _now(self) -> float:
        """Seconds, by a clock that stands while this process is suspended."""
        return time.monotonic() - self.halted

    def _wait_a_period(self) -> bool:
        """Whether the watch is closing."""
        due = time.monotonic() + _PERIOD
        closing = self.closing.wait(_PERIOD)
        with self.lock:  # both threads wake after the same suspension, which counts once
            now = time.monotonic()
            longer = now - max(due, self.resumed)
            if longer > _HALT:
                self.halted, self.resumed = self.halted + longer, now
        return closing

    def _live(self) -> None:
        assert self.store is not None
        while not self._wait_a_period():
            try:
                self.beats += 1
                self.store.set(f"alive/{self.rank}", f"{self.beats} {self.step}")
                self._agree()
                self._listen()
                if self.rank == 0:
                    self._tell_quiet()
                self.answered = self._now()
                lost = self._lost()
            except RuntimeError:  # the store is gone, and with it who keeps it
                if not self.leaving:
                    keeper = "rank 0"
                    if self.launcher_keeps_store:
                        keeper = "the launcher that keeps the ranks together"
                    self._end(f"{keeper} is gone")
                return
            if lost:
                self._end(lost)

    def _guard(self) -> None:
        """A store that the network has cut off neither answers nor raises: who asks it waits."""
        while not self._wait_a_period():
            if self._now() - self.answered > self.timeout:
                self._end(
                    f"no answer for {self.timeout:.0f} s from the machine of rank 0, where the "
                    "ranks are kept together"
                )

    def _agree(self) -> None:
        """What the module says, a part of it at a time; nothing here waits for a loop."""
        assert self.store is not None
        for what in ("stop", "save"):
            with self.lock:
                key, asked = self._key(what), what in self.asked
            if asked:
                self.store.set(f"asked/{key}", "1")
            if not self.store.check([f"asked/{key}"]):
                continue
            self.wanted.add(key)
            with self.lock:
                if key != self._key(what):  # done meanwhile
                    continue
                tells = what not in self.held
                if tells:
                    self.held[what] = max(self.step, self.looked.get(what, -1) + 1)
                agreed = what in self.agreed
            if tells:
                self.store.set(f"held/{key}/{self.rank}", str(self.held[what]))
            if agreed:
                continue
            if self.rank == 0:
                everyone = [f"held/{key}/{rank}" for rank in range(self.world_size)]
                if self.store.check(everyone):
                    latest = max(int(self.store.get(each)) for each in everyone)
                    self.store.set(f"agreed/{key}", str(latest))
            if self.store.check([f"agreed/{key}"]):
                self.agreed[what] = int(self.store.get(f"agreed/{key}"))

    def _listen(self) -> None:
        """Rank 0 listens to all others, and they to it."""
        assert self.store is not None
        now = self._now()
        for rank in range(1, self.world_size) if self.rank == 0 else [0]:
            key = f"alive/{rank}"
            sign = self.store.get(key).decode() if self.store.check([key]) else ""
            if rank not in self.heard or self.heard[rank][0] != sign:
                self.heard[rank] = (sign, now)

    def _left_well(self, rank: int) -> bool:
        """Whether it has done its part; who left by an error may be waited for in vain."""
        assert self.store is not None
        key = f"told/left {rank}"
        return self.store.check([key]) and self.store.get(key) == b"well"

    def _lost(self) -> str:
        """Why this rank cannot go on without another one, if so. Rank 0 tells the others."""
        assert self.store is not None
        now = self._now()
        lost = [
            rank
            for rank, (_, when) in sorted(self.heard.items())
            if now - when > self.patience and not self._left_well(rank)
        ]
        if not lost:
            told = self.rank != 0 and self.store.check(["lost"])
            return self.store.get("lost").decode() if told else ""
        names = ", ".join(map(str, lost))
        why = f"no sign of life from rank {names} for {self.patience:.0f} s"
        if self.rank == 0:
            self.store.set("lost", why)
            time.sleep(4 * _PERIOD)  # in which they read it: the store may go with this rank
        return why

    def _end(self, why: str) -> None:
        """The loop may wait for a collective that never ends: nothing else gets it out."""
        log.error(
            "error (rank %d): %s; run the same command to go on from the last checkpoint",
            self.rank,
            why,
        )
        logging.shutdown()
        os._exit(_GONE)
