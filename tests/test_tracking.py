from __future__ import annotations

import time

import pytest

from sr_dist import tracking


def test_progress_tells_speed_waiting_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    progress = tracking.Progress(total=1000, done=200, visible=True)  # went on at 200
    progress.advance(80, waited=1.0)
    clock[0] += 10
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
    # Evaluating is no training, but takes its time until the end.
    with progress.paused():
        clock[0] += 10
    progress.advance(40, waited=0.0)
    clock[0] += 5
    caplog.clear()
    with caplog.at_level("INFO"):
        speed = progress.report("4/9", {})
    assert speed["speed/pictures_per_second"] == pytest.approx(8)
    assert speed["speed/data_wait_share"] == 0.0
    assert "0:02:22 left" in caplog.text  # 680 pictures, at 120 in 25 seconds
