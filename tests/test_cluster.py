"""Shards made by a Dask cluster: a real scheduler and two workers on loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sr_dist import images, indexing, shards
from tests.helpers import REPOSITORY, children_of, contents, free_port, popen, refuse, succeed

pytest.importorskip("distributed", reason="distributed (Dask) is not installed")
pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[int]]]:
    """The scheduler's address and the process ids of its two workers."""
    folder = tmp_path_factory.mktemp("cluster")
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    options |= {"cwd": folder, "env": {**os.environ, "PYTHONPATH": str(REPOSITORY)}}
    dask = [sys.executable, "-m", "dask"]
    local = ["--host", "127.0.0.1", "--no-dashboard"]
    running = [subprocess.Popen([*dask, "scheduler", *local, "--port", str(port)], **options)]
    for _ in range(2):
        worker = [*dask, "worker", address, *local, "--nthreads", "1", "--no-nanny"]
        running.append(subprocess.Popen(worker, **options))
    import distributed

    deadline = time.monotonic() + 90
    while True:
        assert time.monotonic() < deadline and all(p.poll() is None for p in running)
        try:
            with distributed.Client(address, timeout="5s") as client:
                client.wait_for_workers(2, timeout=60)
                break
        except OSError:
            time.sleep(0.2)
    yield address, [process.pid for process in running[1:]]
    for process in running:
        process.kill()
        process.wait(20)


def many_pictures(photographs: Path, folder: Path) -> tuple[str | int | Path, ...]:
    """The options of `make_shards` that make 24 shards of 24 pictures."""
    folder.mkdir()
    coffee = images.decode(photographs / "coffee.png", 3)
    for number in range(24):
        images.save(coffee[number:, :].copy(), folder / f"{number:02}.png")
    return ("--tile", 64, "--samples-per-shard", 1, "--images", folder)


def make_and_kill(
    output: Path,
    options: Iterable[object],
    victim: Callable[[int], int],
    number: signal.Signals = signal.SIGKILL,
) -> tuple[int, str]:
    """Signal to a process, found from that of `make_shards`, once three shards are there.

    Returns its status and what it said.
    """
    command = [sys.executable, str(REPOSITORY / "tools" / "make_shards.py"), *map(str, options)]
    with popen(
        [*command, "--output", str(output)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as making:
        deadline = time.monotonic() + 60
        while len(list(output.glob("*.tar"))) < 3:
            assert time.monotonic() < deadline and making.poll() is None
            time.sleep(0.005)
        os.kill(victim(making.pid), number)
        _, said = making.communicate(timeout=120)
    return making.returncode, said


def test_a_cluster_writes_the_same_bytes_also_when_a_worker_dies(
    cluster: tuple[str, list[int]], photographs: Path, tmp_path: Path
) -> None:
    address, workers = cluster
    options = ("--tile", 64, "--samples-per-shard", 1, "--images", photographs)
    succeed("tools/make_shards.py", *options, "--output", tmp_path / "local", "--workers", 1)
    done = succeed(
        *("tools/make_shards.py", *options, "--output", "far", "--dask", address),
        cwd=tmp_path,
    )
    assert "3 shard(s)" in done.stdout
    assert contents(tmp_path / "far") == contents(tmp_path / "local")

    options = many_pictures(photographs, tmp_path / "many")
    status, said = make_and_kill(
        tmp_path / "killed", (*options, "--dask", address), lambda making: workers[0]
    )
    assert status == 0, said
    assert len(shards.read_index(str(tmp_path / "killed")).shards) == 24
    succeed("tools/make_shards.py", *options, "--output", tmp_path / "alone", "--workers", 2)
    assert contents(tmp_path / "killed") == contents(tmp_path / "alone")


def test_a_scheduler_that_does_not_answer(photographs: Path, tmp_path: Path) -> None:
    message = refuse(
        *("tools/make_shards.py", "--images", photographs, "--output", tmp_path / "out"),
        *("--dask", f"tcp://127.0.0.1:{free_port()}"),
    )
    assert "--dask: no scheduler answers at tcp://127.0.0.1" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("killed", ["a worker", "the command", "the command, by SIGTERM"])
def test_what_was_finished_before_a_kill_is_kept(
    photographs: Path, tmp_path: Path, killed: str
) -> None:
    """Killed as a machine without memory kills; what the command started ends with it."""
    options = (*many_pictures(photographs, tmp_path / "many"), "--workers", 2)

    def victim(making: int) -> int:
        (tmp_path / "out" / ".shard-000023.tar.0123abcd.part").touch()  # as if it wrote that
        return children_of(making)[-1] if killed == "a worker" else making

    status, said = make_and_kill(
        tmp_path / "out",
        options,
        victim,
        signal.SIGTERM if "SIGTERM" in killed else signal.SIGKILL,
    )
    if "SIGTERM" in killed:
        assert status == 75 and "stopped. The same command goes on where it was." in said
    elif killed == "the command":
        assert status == -signal.SIGKILL
    else:
        assert status == 2 and "one of the 2 worker processes died" in said
        assert not list((tmp_path / "out").rglob("*.part"))
    assert "Traceback" not in said
    recorded = [path.stem for path in (tmp_path / "out" / ".progress").glob("shard-*.json")]
    finished = [tmp_path / "out" / f"{name}.tar" for name in recorded]
    kept = {path.name: path.stat().st_mtime_ns for path in finished}
    assert 2 <= len(kept) < 24
    succeed("tools/make_shards.py", *options, "--output", tmp_path / "out")
    assert indexing.verify(str(tmp_path / "out")) == []
    assert not list((tmp_path / "out").glob("*.part"))
    for name, written in kept.items():
        assert (tmp_path / "out" / name).stat().st_mtime_ns == written, "not written again"
