"""Running the repository's commands as its users do, and looking at what they leave."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
LAUNCHERS = {"accelerate": ACCELERATE[-1], "torchrun": "torch.distributed.run"}
Done = subprocess.CompletedProcess[str]

# Also of all that the tests start: many run side by side.
os.environ["OMP_NUM_THREADS"] = "1"
# Loading these takes a process more than four seconds of a processor, most of what a short training
# takes. A server loads them once, and scripts run in forks of it; it loads nothing of sr_dist.
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    ["torch._dynamo", "torchvision", "accelerate", "torch.utils.tensorboard", "tests.frozen"]
)


@dataclasses.dataclass
class Started:
    """A script that runs in a process of its own; what it says goes to files."""

    words: list[str]
    process: BaseProcess
    folder: tempfile.TemporaryDirectory[str]

    def said(self, stream: str = "stdout") -> str:
        path = Path(self.folder.name, stream)
        return path.read_text() if path.exists() else ""

    def wait_for(self, line: str, timeout: float = 60) -> None:
        """Until it says a line that begins so."""
        deadline = time.monotonic() + timeout
        while True:
            ended = self.process.exitcode is not None  # looked at first: its last words count
            if f"\n{line}" in f"\n{self.said()}":
                return
            assert not ended, f"it ended before: {self.said('stderr')}"
            assert time.monotonic() < deadline, f"in {timeout} s it never said {line!r}"
            time.sleep(0.02)

    def children(self) -> list[int]:
        assert self.process.pid is not None
        return children_of(self.process.pid)

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self, timeout: float = 60) -> Done:
        """How it ended; it is killed where it does not."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise subprocess.TimeoutExpired(self.words, timeout, self.said(), self.said("stderr"))
        return Done(self.words, self.process.exitcode, self.said(), self.said("stderr"))


def start(
    script: str | Path, *words: str | Path | float, cwd: Path | None = None, **environment: str
) -> Started:
    """A script of the repository, in a process that has PyTorch loaded already.

    Or one of `LAUNCHERS`; the ranks that this starts load it themselves.
    """
    given = [LAUNCHERS.get(str(script), str(REPOSITORY / script)), *map(str, words)]
    folder = tempfile.TemporaryDirectory()
    process = _forks.Process(
        target=_become, args=(given, cwd or Path.cwd(), {**os.environ, **environment}, folder.name)
    )
    process.start()
    return Started(given, process, folder)


def _become(words: list[str], cwd: Path, environment: dict[str, str], folder: str) -> None:
    """Run a script in this process as `python` does."""
    multiprocessing.set_start_method(None, force=True)  # the system's own
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate((os.devnull, f"{folder}/stdout", f"{folder}/stderr")):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.argv = words
    try:
        if words[0] not in LAUNCHERS.values():
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
        else:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


def start_ranks(number: int, script: str | Path, *words: str | Path | float) -> list[Started]:
    """The ranks of one run on the CPU, without a launcher above them, as Slurm starts them."""
    common = {"WORLD_SIZE": str(number), "CUDA_VISIBLE_DEVICES": ""}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        start(script, *words, **common, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(number)
    ]


def end_ranks(ranks: Sequence[Started], timeout: float = 120) -> list[Done]:
    """How each of them ended; none lives on."""
    try:
        return [rank.end(timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.process.kill()


def run_ranks(number: int, script: str | Path, *words: str | Path | float) -> Done:
    """How the ranks of one run ended: the worst status, and what all of them said."""
    ended = end_ranks(start_ranks(number, script, *words), timeout=240)
    return Done(
        ended[0].args,
        max((done.returncode for done in ended), key=abs),
        "".join(done.stdout for done in ended),
        "".join(done.stderr for done in ended),
    )


def run(
    *words: str | Path, cwd: Path | None = None, timeout: float = 120, **environment: str
) -> Done:
    """Run a command of the repository (`launch/…`, `tools/…`) with this Python, one thread."""
    given = [str(word) for word in words]
    if given[0].startswith("tools/"):  # loads no PyTorch
        given = [sys.executable, str(REPOSITORY / given[0]), *given[1:]]
    elif given[0].endswith(".py") or given[0] in LAUNCHERS:
        return start(*given, cwd=cwd, **environment).end(timeout)
    return subprocess.run(
        given,
        cwd=cwd,
        timeout=timeout,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
    )


@contextlib.contextmanager
def popen(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """`subprocess.Popen`; where the test fails it is killed, since nothing else may end it."""
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        except BaseException:
            with contextlib.suppress(OSError):  # it is gone
                for child in children_of(process.pid):
                    os.kill(child, signal.SIGKILL)
            process.kill()
            raise


def children_of(process: int) -> list[int]:
    """The processes that its main thread started, in their order."""
    return [int(c) for c in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def all_end(processes: Sequence[subprocess.Popen[str]], timeout: float) -> list[str]:
    """What each of them said on standard error; all must end well, and none lives on."""
    try:
        said = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said


def succeed(*words: str | Path, **options: object) -> Done:
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
