"""What every worker process does, whatever its work."""

from __future__ import annotations

import multiprocessing
import os
import threading


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
