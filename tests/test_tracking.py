from __future__ import annotations

import errno
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
import types
from pathlib import Path
from typing import Any

import pytest

from sr_dist import checkpoint, config, resuming, shards, tracking, train
from sr_dist.train import loop
from tests.helpers import REPOSITORY, popen, succeed
from tests.runs import full_disk


def test_progress_tells_speed_waiting_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    progress = tracking.Progress(tracking.Work(1000, done=200), visible=True)  # went on at 200
    clock[0] += 10
    progress.advance(80, waited=1.0)
    with caplog.at_level("INFO"):
        speed = progress.report("3/9", {"loss/pixel": 0.12345, "score/hr": 0.5})
    assert 100 < speed.pop("memory/resident") < 10_000
    assert speed == {
        "speed/pictures_per_second": pytest.approx(8),
        "speed/data_wait_share": pytest.approx(0.1),
    }
    (line,) = caplog.messages  # 720 pictures are left, at 8 a second
    assert line == (
        "epoch 3/9  280/1000 pictures  8.0 pictures/s  0:01:30 left  data wait 10.0%  pixel 0.1235"
    )
    with progress.paused(evaluates=True):
        clock[0] += 10
    clock[0] += 5
    progress.advance(40, waited=0.0)
    caplog.clear()
    with caplog.at_level("INFO"):
        speed = progress.report("4/9", {})
    assert speed["speed/pictures_per_second"] == pytest.approx(8)
    assert speed["speed/data_wait_share"] == 0.0
    assert "0:01:25 left" in caplog.text  # 680 pictures, at 40 in 5 seconds


def test_a_disk_that_is_full_for_tensorboard_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tracker = tracking.Tracker(tmp_path, first_step=0, first_epoch=0)
    tracker.flush()
    with full_disk(10):
        tracker.scalars({"loss/pixel": 1.0}, 1)
        with pytest.raises(OSError, match=rf"File too large: '{tmp_path}/tensorboard'"):
            tracker.flush()
    assert "Traceback" not in capfd.readouterr().err


def test_no_checkpoint_is_ahead_of_tensorboard(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its points up to a checkpoint would otherwise be missing for good."""
    real, calls = tracking.Tracker.flush, []

    def flush(self: tracking.Tracker) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self)

    monkeypatch.setattr(tracking.Tracker, "flush", flush)
    with pytest.raises(OSError, match="No space left"):
        train.run(config.load(recipe, ["checkpoint.every_steps=3", "data.num_workers=0"]))
    found = checkpoint.find_newest(tmp_path / "runs" / "small" / "checkpoints")
    assert found is not None and found.step == 3


def test_a_terminal_shows_a_live_line_and_quiet_means_quiet(recipe: Path) -> None:
    ours, theirs = pty.openpty()
    size = struct.pack("HHHH", 40, 200, 0, 0)  # rows and columns
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
    command = [sys.executable, str(REPOSITORY / "launch" / "train.py"), "--config", str(recipe)]
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "xterm-256color"}
    with popen(
        [*command, "train.epochs=1"], stdout=subprocess.PIPE, stderr=theirs, env=environment
    ) as running:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux says so that the other end is closed
                break
            if not part:
                break
            shown += part
        assert running.stdout is not None
        table = running.stdout.read().decode()
        assert running.wait(60) == 0
    os.close(ours)
    lines = re.findall(r"epoch 1/1: +\d+%\|.*?\| (\d+)/144(.*?)\r", shown.decode())
    assert lines[-1][0] == "144" and len(lines) > 3, "one line, again and again"
    said = r", 0:00:00 left, [\d.]+ pictures/s, data wait [\d.]+%, loss 0\.\d+ *"
    assert re.fullmatch(said, lines[-1][1])
    assert not re.search(rb"\x1b\[[\d;]*m", shown), "no colours"
    result = r"PSNR dB +SSIM\n  bicubic +\d\d\.\d+ +0\.\d+\n  SR +\d\d\.\d+ +0\.\d+\n"
    assert re.search(result, table)
    random = ("train.epochs=2", "loss.content.weight=0.006")
    quiet = succeed("launch/train.py", "--config", recipe, "--quiet", *random)
    assert re.search(result, quiet.stdout)
    said = quiet.stderr.splitlines()
    assert said == ["the content loss compares features of RANDOM weights: for tests only"], said


def test_an_evaluation_that_is_made_up_for_counts(recipe: Path) -> None:
    """Work after a start at the end of an epoch whose results are still to come, and at one not."""
    settings = config.load(recipe, ["train.epochs=5", "train.warmup_images=0"])
    plan = shards.make_plan(
        shards.read_index(settings.data.train),
        seed=0,
        global_batch_size=8,
        crops_per_image=1,
        crop_size=settings.data.crop_size,
    )
    for unmeasured, left in ((True, 4), (False, 3)):
        ended = 2 * plan.steps_per_epoch
        position = resuming.Position(ended, 8 * ended, ended, unmeasured)
        course = resuming.Course(position, plan.steps_per_epoch, epochs=5, batch_size=8)
        inputs = types.SimpleNamespace(validation=None)
        this: Any = types.SimpleNamespace(config=settings, course=course, inputs=inputs)
        assert loop._work(this).evaluations == left


@pytest.mark.parametrize("off", [0.5, 1.0, 2.0])
def test_the_time_left_foresees_the_first_evaluation(
    monkeypatch: pytest.MonkeyPatch, off: float
) -> None:
    """After each quarter of the training, a tenth of the time; guessed within a factor of two."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    work = tracking.Work(3600, evaluations=4, evaluation=off * 100)
    progress, whole = tracking.Progress(work, visible=False), 400
    for step in range(360):
        progress.advance(10, waited=0.0)
        clock[0] += 1
        left = progress.left()
        if clock[0] >= whole / 10:
            assert left == pytest.approx(whole - clock[0], rel=0.2, abs=0.5)
        if step % 90 == 89:
            with progress.paused(evaluates=True):
                clock[0] += 10


def test_a_first_step_that_takes_long_is_no_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where networks are compiled in it."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    progress = tracking.Progress(tracking.Work(1000), visible=False)
    with progress.paused(evaluates=True):  # that a stopped run is made up for
        clock[0] += 600
    for seconds in (120, *[1] * 9):
        clock[0] += seconds
        progress.advance(10, waited=0.0)
    assert progress.left() == pytest.approx(90)


def test_the_time_left_forgets_a_slow_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the steps at a third of the pace."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    progress = tracking.Progress(tracking.Work(10_000), visible=False)
    for step in range(1, 1001):
        clock[0] += 3 if step <= 100 else 1
        progress.advance(10, waited=0.0)
        if step >= 330:
            assert progress.left() == pytest.approx(1000 - step, rel=0.2)


def test_the_time_left_knows_of_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every hundred steps; how long they take says nothing of the steps in between."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    progress = tracking.Progress(tracking.Work(10_000), visible=False)
    for step in range(1, 1001):
        clock[0] += 1
        progress.advance(10, waited=0.0)
        if step % 100 == 0:
            with progress.paused(evaluates=False):
                clock[0] += 30
            assert progress.left() == pytest.approx(1300 - 1.3 * step)
        elif step > 100:
            assert progress.left() == pytest.approx(1300 - clock[0], rel=0.2, abs=34)


def test_one_early_checkpoint_is_not_taken_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    progress = tracking.Progress(tracking.Work(100_000), visible=False)
    clock[0] += 1
    progress.advance(10, waited=0.0)
    with progress.paused(evaluates=False):
        clock[0] += 30
    assert progress.left() == pytest.approx(9999 + 9999 * 30 / 1000)


def test_the_pace_is_a_mean_in_which_later_pictures_weigh_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    progress = tracking.Progress(tracking.Work(1000, done=200), visible=True)
    with progress.paused(evaluates=True):  # that a stopped run is made up for
        clock[0] += 600
    with caplog.at_level("INFO"):
        for pictures, seconds in ((10, 100), (10, 1), (30, 6)):
            clock[0] += seconds
            progress.advance(pictures, waited=0.0)
    assert caplog.messages == ["the first step took 100.0 s"]
    # 0.1 and 0.2 seconds a picture, 10 pictures with 10 before them and 30 with 20 before them.
    pace = (10 * 10 * 0.1 + 30 * 20 * 0.2) / (10 * 10 + 30 * 20)
    assert progress.left() == pytest.approx(pace * 750)


def test_the_time_left_is_right_from_the_first_tenth_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a warm-up goes before slower training, and with evaluations."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    # 2000 at 20 a second, 2000 at 8; ten evaluations of 12 seconds.
    work = tracking.Work(4000, cheap=2000, dearer=2.5, evaluations=10)
    progress = tracking.Progress(work, visible=False)
    whole = 2000 / 20 + 2000 / 8 + 10 * 12
    said = []
    for step in range(400):
        progress.advance(10, waited=0.0)
        clock[0] += 10 / (20 if step < 200 else 8)
        if step % 40 == 39:
            with progress.paused(evaluates=True):
                clock[0] += 12
        said.append((clock[0], progress.left()))
    assert clock[0] == pytest.approx(whole)
    later = [(at, left) for at, left in said if at >= whole / 10]
    assert len(later) > 300
    for at, left in later:
        assert left == pytest.approx(whole - at, rel=0.2, abs=0.5)
