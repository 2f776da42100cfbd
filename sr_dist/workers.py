"""What processes do that compute, whatever their work."""

from __future__ import annotations

import multiprocessing
import os
import threading


def share_processors() -> None:
    """Let threads that wait for each other sleep, where the environment does not say how.

    By themselves they spin for milliseconds, which gains a little. Where others keep the processors
    busy, they spin for a thread that does not run, and training takes several times as long. For
    commands, before they load torch, which reads this once.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def end_with_parent() -> None:
    """Let this process, a child of multiprocessing's, end when its parent does.

    A parent that is killed tells nobody: its child would wait for ever for the next job, or for
    somebody to read its results.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "for children alone"

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
