from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]


def run(
    *words: str | Path, cwd: Path | None = None, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of the repository (`launch/…`, `tools/…`) with this Python, one thread."""
    given = [str(word) for word in words]
    if given[0].endswith(".py"):
        given = [sys.executable, str(REPOSITORY / given[0]), *given[1:]]
    elif given[0] == "accelerate":
        # The launcher is told where to find its script, since the tests run elsewhere.
        given = [*ACCELERATE, *given[1:]]
    return subprocess.run(
        given,
        cwd=cwd,
        timeout=timeout,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
    )


def all_end(processes: Sequence[subprocess.Popen[str]], timeout: float) -> list[str]:
    """What each of them said on standard error; all must end well, and none lives on."""
    try:
        said = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said


def succeed(*words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    done = run(*words, **options)  # type: ignore[arg-type]
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done


def refuse(*words: str | Path, **options: object) -> str:
    """The message of a command that must end as the user's mistake: status 2, no traceback."""
    done = run(*words, **options)  # type: ignore[arg-type]
    assert done.returncode == 2, f"{words}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stderr


def contents(folder: Path) -> dict[str, str]:
    """The sha256 of each file. Not the bytes: of them pytest would print the difference."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
