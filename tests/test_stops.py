"""Signals, killed processes and launchers: how a run ends, and that nothing is lost."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sr_dist import images
from tests.helpers import (
    ACCELERATE,
    REPOSITORY,
    children_of,
    end_ranks,
    free_port,
    popen,
    refuse,
    run_ranks,
    start,
    start_ranks,
    succeed,
)
from tests.runs import (
    SLOW_STEPS,
    TWO_PROCESSES,
    assert_same_run,
    saved,
    train_on_two,
    wait_for_step,
)


def test_ctrl_c_ends_the_workers_of_make_shards_without_a_word(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)
    (tmp_path / "in").mkdir()
    for number in range(6):
        images.save(noise, tmp_path / "in" / f"{number}.png")
    command = ["tools/make_shards.py", "--images", str(tmp_path / "in"), "--workers", "3"]
    command += ["--output", str(tmp_path / "out")]  # one shard: two workers have nothing to do
    with popen(
        [sys.executable, *command],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        while not list((tmp_path / "out").glob(".shard-*.part")):
            assert running.poll() is None
            time.sleep(0.02)
        os.killpg(running.pid, signal.SIGINT)  # as a terminal sends it, workers included
        _, said = running.communicate(timeout=60)
    assert running.returncode == 75
    assert "stopped. The same command goes on where it was." in said
    assert "Traceback" not in said and "Process" not in said
    assert not list((tmp_path / "out").glob(".shard-*.part"))


_GO_ON = "stopped. The same command goes on "


@pytest.mark.parametrize(
    ("command", "options", "number", "status", "said"),
    [
        ("launch/train.py", "--config a.yaml", signal.SIGINT, 75, _GO_ON + "from the last"),
        ("launch/evaluate.py", "--data . --output out", signal.SIGINT, 130, "stopped."),
        ("launch/upscale.py", "--input . --output out", signal.SIGINT, 130, "stopped."),
        (
            "launch/export.py",
            "--checkpoint a --format onnx --output b",
            signal.SIGTERM,
            143,
            "stopped.",
        ),
        ("tools/make_shards.py", "--images . --output out", signal.SIGINT, 75, _GO_ON + "where"),
        ("tools/make_shards.py", "--images . --output out", signal.SIGTERM, 75, _GO_ON + "where"),
    ],
)
def test_a_signal_while_torch_is_loaded_ends_a_command_at_once(
    tmp_path: Path, command: str, options: str, number: int, status: int, said: str
) -> None:
    """An exception in the midst of it may abort Python, or be lost as it is here."""
    words = [sys.executable, REPOSITORY / command, *options.split()]
    with loading(tmp_path, *words) as running:
        running.send_signal(number)
        _, heard = running.communicate(timeout=20)
    assert running.returncode == status
    assert heard.startswith(f"\n{said}") and heard.count("\n") == 2
    assert not (tmp_path / "out").exists()


@contextlib.contextmanager
def loading(folder: Path, *command: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A command that runs there and loads a torch which takes its time, and loses Ctrl-C."""
    (folder / "torch.py").write_text(
        """
import time

print("loading", flush=True)
while True:
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        pass
"""
    )
    images.save(np.zeros((96, 96, 3), np.uint8), folder / "a.png")
    with popen(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None and running.stdout.readline() == "loading\n"
        yield running


MAKE_SHARDS = (REPOSITORY / "tools/make_shards.py", "--images", ".", "--output", "out")
TRAIN = (REPOSITORY / "launch/train.py", "--config", "a.yaml")


@pytest.mark.parametrize("words", [TRAIN, MAKE_SHARDS], ids=["train", "make_shards"])
def test_ctrl_c_that_ends_also_who_reads_what_a_command_says(
    tmp_path: Path, words: tuple[str | Path, ...]
) -> None:
    """As in `… 2>&1 | tee log`."""
    with loading(tmp_path, sys.executable, *words) as running:
        assert running.stderr is not None
        running.stderr.close()
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=20) == 75


@pytest.mark.parametrize("words", [TRAIN, MAKE_SHARDS], ids=["train", "make_shards"])
def test_a_signal_that_is_ignored_from_the_start_stays_so(
    tmp_path: Path, words: tuple[str | Path, ...]
) -> None:
    ignoring = ("bash", "-c", "trap '' INT; exec \"$@\"", "bash")
    with loading(tmp_path, *ignoring, sys.executable, *words) as running:
        running.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert running.poll() is None
        running.send_signal(signal.SIGTERM)
        _, heard = running.communicate(timeout=20)
    assert running.returncode == 75 and heard.startswith("\nstopped.")


def test_one_command_trains_a_run_and_ctrl_c_ends_it_in_one_line(
    recipe: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(REPOSITORY / "launch" / "train.py"), "--config", str(recipe)]
    overrides = ["train.epochs=500", "tracking.log_every_steps=1"]
    with popen(
        [*command, *overrides],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        assert running.stderr is not None
        for line in running.stderr:  # until its second epoch: one checkpoint is there
            if line.startswith("epoch 2/"):
                break
        for words in ((), ("--dry-run",)):
            said = refuse("launch/train.py", "--config", recipe, *overrides, *words)
            process = f"error: process {running.pid} on {socket.gethostname()}"
            assert f"{process} is writing in {tmp_path}/runs/small; " in said
        os.killpg(running.pid, signal.SIGINT)  # as a terminal sends it, workers included
        _, said = running.communicate(timeout=60)
    assert running.returncode == 75
    assert "Traceback" not in said
    assert re.search(
        r"stopped by SIGINT at step \d+ of 9000; the same command goes on from there", said
    )
    step = saved(tmp_path / "runs/small")[1]["step"]
    assert isinstance(step, int)
    again = succeed("launch/train.py", "--config", recipe, f"train.epochs={step // 18 + 1}")
    assert "going on from" in again.stderr


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the worker in /proc")
def test_a_loader_worker_that_is_killed_ends_the_run(recipe: Path) -> None:
    """As by a system that runs out of memory; its fellows, which ignore SIGTERM, end too."""
    command = [sys.executable, str(REPOSITORY / "launch" / "train.py"), "--config", str(recipe)]
    with popen(
        [*command, "train.epochs=50", "data.num_workers=2"],
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        try:
            assert running.stderr is not None
            assert any(line.startswith("epoch 1/") for line in running.stderr)
            children = children_of(running.pid)
            workers = [
                c for c in children if b"train.py" in Path(f"/proc/{c}/cmdline").read_bytes()
            ]
            assert len(workers) == 2
            os.kill(workers[0], signal.SIGKILL)
            _, said = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 2 and "Traceback" not in said
    assert "a loader worker ended with status -9 (-9: killed" in said
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_killed_process_takes_its_loader_workers_along(recipe: Path) -> None:
    """Also those that wait for somebody to read their batches, which no pipe holds in whole."""
    large = ("data.crop_size=64", "train.global_batch_size=16", "data.num_workers=2")
    started = start(SLOW_STEPS, recipe, "train.epochs=50", *large)
    started.wait_for("step 3\n")
    assert started.process.pid is not None
    workers = children_of(started.process.pid)
    assert len(workers) == 2
    started.signal(signal.SIGKILL)
    assert started.end().returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "they live on"
        time.sleep(0.05)


@pytest.mark.multiprocess
def test_a_signal_to_any_rank_stops_all_after_a_checkpoint(
    recipe: Path, tmp_path: Path, trained_on_two: Path
) -> None:
    """Stopped twice, by signals to one and the other rank: the run of one unbroken."""
    for number, rank, caught in (
        (signal.SIGUSR1, 1, 5),
        (signal.SIGTERM, 0, 25),
    ):
        ranks = start_ranks(2, SLOW_STEPS, recipe)
        ranks[rank].wait_for(f"step {caught}\n")
        ranks[rank].signal(number)
        ended = end_ranks(ranks)
        said = [done.stderr for done in ended]
        assert [done.returncode for done in ended] == [75, 75], said
        step = saved(tmp_path / "runs/small")[1]["step"]
        assert f"at step {step} of 36; the same command goes on from there" in said[0]
        assert caught <= step < 36 and "Traceback" not in said[0] + said[1]  # type: ignore
    train_on_two(recipe)
    assert_same_run(trained_on_two, tmp_path / "runs/small")


@pytest.mark.multiprocess
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_named_by_the_others(recipe: Path, killed: int) -> None:
    settings = ("train.global_batch_size=6", "train.epochs=50", "run.timeout_minutes=0.3")
    ranks = start_ranks(3, SLOW_STEPS, recipe, *settings)
    ranks[killed].wait_for("step 3\n")
    ranks[killed].signal(signal.SIGKILL)
    for rank, process in enumerate(ranks):
        done = process.end()
        if rank != killed:
            assert done.returncode == 1
            assert f"rank {killed} is gone; run the same command" in done.stderr
            assert "Traceback" not in done.stderr


@pytest.mark.multiprocess
def test_a_killed_rank_is_started_again_by_the_launcher_and_nothing_is_lost(
    recipe: Path, tmp_path: Path, trained_on_two: Path
) -> None:
    """Under --max_restarts, one rank killed and later the other: the run of one unbroken."""
    options = ("--config_file", TWO_PROCESSES, "--max_restarts", 2, "--monitor_interval", 0.5)
    settings = ("checkpoint.every_steps=5",)
    running = start("accelerate", "launch", *options, SLOW_STEPS, recipe, *settings)
    for step, victim in ((8, -1), (23, 0)):
        running.wait_for(f"step {step}\n")
        ranks = running.children()
        assert len(ranks) == 2
        os.kill(ranks[victim], signal.SIGKILL)
    done = running.end(timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 1\n") == 2, "each of them began once, later at a checkpoint"
    assert_same_run(trained_on_two, tmp_path / "runs/small")


def standalone(*, processes: int, restarts: int) -> tuple[str, ...]:
    """The options of torchrun for one machine, and that it looks at its ranks often."""
    own = ("--standalone", "--monitor_interval=0.2", f"--max_restarts={restarts}")
    return (*own, f"--nproc_per_node={processes}")


@pytest.mark.multiprocess
def test_a_rank_killed_while_another_measures_is_started_again(
    recipe: Path, tmp_path: Path, trained_on_two: Path
) -> None:
    """The launcher then stops the one that measures, by the signal that people stop runs by."""
    worker = REPOSITORY / "tests" / "workers" / "slow_evaluation.py"
    running = start("torchrun", *standalone(processes=2, restarts=1), worker, 3, recipe)
    running.wait_for("measures\n")
    (killed,) = (
        child
        for child in running.children()
        if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes()
    )
    os.kill(killed, signal.SIGKILL)
    done = running.end(timeout=120)
    assert done.returncode == 0, done.stderr
    assert "stopped before the launcher started it again" not in done.stderr, done.stderr
    assert "error (rank 0): no sign of life from rank 1 for 6 s" in done.stderr, done.stderr
    assert_same_run(trained_on_two, tmp_path / "runs/small")


@pytest.mark.multiprocess
def test_a_mistake_is_said_once_before_ranks_are_joined() -> None:
    """Also where the launcher ends rank 0 before it comes to it, since the other has ended."""
    worker = REPOSITORY / "tests/workers/one_mistake.py"
    launched = start("torchrun", *standalone(processes=2, restarts=0), worker, "early").end(
        timeout=60
    )
    assert launched.stderr.count("error (rank 1): everywhere alike") == 1
    assert launched.stderr.count("everywhere alike") == 1
    assert "stopped" not in launched.stderr, "of rank 0, by the launcher"
    alone = run_ranks(2, worker, "early")
    assert alone.stderr == "error: everywhere alike\n"


@pytest.mark.multiprocess
def test_a_process_that_waits_for_others_can_be_stopped(recipe: Path) -> None:
    """In the call that waits for them it hears no signal; as nothing has begun, it ends at once."""
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        environment = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        waiting = start("launch/train.py", "--config", recipe, **environment)
        with contextlib.closing(meet(int(environment["MASTER_PORT"]))):
            waiting.signal(number)
            done = waiting.end(timeout=20)
        assert done.returncode == 75
        assert (
            done.stderr
            == "\nstopped. The same command goes on from the last checkpoint, if there is one.\n"
        )


def meet(port: int) -> socket.socket:
    """A connection to who listens there, once somebody does."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.multiprocess
def test_processes_that_do_not_come_are_told_of(recipe: Path) -> None:
    environment = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}  # NCCL would be waited for for longer
    words = ("--config", recipe, "run.timeout_minutes=0.05")
    done = start("launch/train.py", *words, **environment).end()
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "error: the 2 processes could not meet: " in done.stderr


@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_to_the_launcher_stops_its_ranks_after_a_checkpoint(
    recipe: Path, tmp_path: Path, processes: int
) -> None:
    """The launcher of several hands it on; that of one ends without a word."""
    launcher = {1: TWO_PROCESSES.with_name("cpu.yaml"), 2: TWO_PROCESSES}[processes]
    command = [*ACCELERATE, "launch", "--config_file", str(launcher)]
    command += [str(SLOW_STEPS), str(recipe), "train.epochs=50"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with popen(command, **pipes) as running:
        wait_for_step(running, 3)
        running.terminate()
        steps, said = running.communicate(timeout=120)
    step = saved(tmp_path / "runs/small")[1]["step"]
    assert f"at step {step} of 900; the same command goes on from there" in said
    assert running.returncode != 0


@pytest.mark.multiprocess
def test_a_stop_is_one_for_the_launcher_that_starts_ranks_again(
    recipe: Path, tmp_path: Path
) -> None:
    """Of its two further attempts none trains; the next start goes on."""
    words = (SLOW_STEPS, recipe, "train.epochs=50")
    running = start("torchrun", *standalone(processes=2, restarts=2), *words)
    running.wait_for("step 3\n")
    os.kill(running.children()[1], signal.SIGUSR1)
    done = running.end(timeout=120)
    assert done.returncode == 1 and "exitcode  : 75" in done.stderr, done.stderr
    assert done.stderr.count("stopped before the launcher started it again") == 2, done.stderr
    step = saved(tmp_path / "runs/small")[1]["step"]
    assert f"step {step}\n" in done.stdout
    assert f"step {step + 1}\n" not in done.stdout  # type: ignore[operator]
    (again,) = start_ranks(1, SLOW_STEPS, recipe, "train.epochs=50")
    again.wait_for(f"step {step + 1}\n")  # type: ignore[operator]
    again.signal(signal.SIGTERM)
    assert again.end().returncode == 75


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_stop_before_the_first_step_is_one_too(recipe: Path, number: signal.Signals) -> None:
    """But for SIGTERM, by which launchers also end the ranks that they will start again."""
    running = start("torchrun", *standalone(processes=1, restarts=1), SLOW_STEPS, recipe)
    running.wait_for("building\n")
    os.kill(running.children()[0], number)
    done = running.end(timeout=120)
    told = done.stderr.count("stopped before the launcher started it again")
    if number == signal.SIGTERM:
        assert told == 0 and "step 36\n" in done.stdout and done.returncode == 0
    else:
        assert told == 1 and "step" not in done.stdout, done.stderr


def has_loaded_torch(process: int) -> bool:
    """A script, and not the launcher's own image before the script's takes its place."""
    place = Path(f"/proc/{process}")
    try:
        return (
            b"accelerate" not in (place / "cmdline").read_bytes()
            and "libtorch" in (place / "maps").read_text()
        )
    except OSError:  # it has ended: a launcher asks other programs too before it starts the script
        return False


@pytest.mark.multiprocess
def test_a_launcher_that_ends_while_its_process_loads_takes_it_along(
    recipe: Path, tmp_path: Path
) -> None:
    command = [*ACCELERATE, "launch", "--config_file", str(TWO_PROCESSES.with_name("cpu.yaml"))]
    command += [str(REPOSITORY / "launch/train.py"), "--config", str(recipe), "train.epochs=50"]
    with popen(command, stderr=subprocess.PIPE, text=True) as running:
        deadline = time.monotonic() + 60
        while not (its := children_of(running.pid)) or not has_loaded_torch(its[0]):
            assert time.monotonic() < deadline and running.poll() is None
            time.sleep(0.01)
        running.terminate()
        said = running.communicate(timeout=60)[1]  # which both of them hold open
    assert "Traceback" not in said
    assert not list((tmp_path / "runs/small").glob("checkpoints/step-*"))
