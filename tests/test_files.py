from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sr_dist import files
from sr_dist.errors import UserError
from tests.helpers import REPOSITORY, popen
from tests.runs import full_disk

CLAIMS = """
import os, sys, time
from pathlib import Path
from sr_dist import files
with files.claimed(Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(600)
"""


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    files.write_whole(path, "größer")
    assert path.read_bytes() == "größer".encode()
    with full_disk(1000), pytest.raises(OSError, match="File too large: .*a.txt"):
        files.write_whole(path, bytes(2000))
    assert path.read_text(encoding="utf-8") == "größer"
    assert [each.name for each in path.parent.iterdir()] == ["a.txt"]
    longest = tmp_path / ("x" * 255)
    files.write_whole(longest, b"1")
    with pytest.raises(OSError, match="source"), files.whole(longest):
        raise OSError(5, "Input/output error", "source")
    assert longest.read_bytes() == b"1"


def test_a_folder_is_claimed_by_one_process_for_as_long_as_that_lives(tmp_path: Path) -> None:
    """And no longer, though what it has started does."""
    folder = tmp_path / "run"
    files.check_unclaimed(folder)
    assert not folder.exists()
    command = [sys.executable, "-c", CLAIMS, str(folder)]
    with popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as running:
        assert running.stdout is not None
        child = int(running.stdout.readline())
        try:
            with pytest.raises(
                UserError, match=rf"process {running.pid} on .* is writing in .*run;"
            ):
                files.check_unclaimed(folder)
            with pytest.raises(UserError, match="is writing in"), files.claimed(folder):
                pass
            running.kill()
            running.wait()
            os.kill(child, 0)  # lives
            with files.claimed(folder):
                assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        finally:
            os.kill(child, signal.SIGKILL)


def test_who_only_looks_is_waited_for_and_a_machine_that_may_be_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with files.claimed(tmp_path):
        pass
    code = """
import fcntl, sys, time
with open(sys.argv[1], "r+b") as file:
    fcntl.lockf(file, int(sys.argv[2]))
    print("locked", flush=True)
    time.sleep(float(sys.argv[3]))
"""
    monkeypatch.setattr(files, "_LOOK", 30)
    words = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    looks = [*words, str(fcntl.LOCK_SH), "0.5"]
    with popen(looks, stdout=subprocess.PIPE, text=True) as looking:
        assert looking.stdout is not None and looking.stdout.readline() == "locked\n"
        with files.claimed(tmp_path):
            assert looking.wait(10) == 0
    (tmp_path / ".lock").write_text("process 5 on elsewhere")
    monkeypatch.setattr(files, "_LOOK", 0)
    monkeypatch.setattr(files, "_LEASE", 30)
    holds = [*words, str(fcntl.LOCK_EX), "1"]
    with popen(holds, stdout=subprocess.PIPE, text=True) as holding:
        assert holding.stdout is not None and holding.stdout.readline() == "locked\n"
        with caplog.at_level("INFO"):
            files.check_unclaimed(tmp_path)
        assert holding.wait(10) == 0
    assert f"process 5 on elsewhere has {tmp_path}: waiting up to 30 s" in caplog.text


def test_where_locks_do_not_work_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with files.claimed(tmp_path):
        pass
    assert "locks do not work there (No locks available)" in caplog.text
    files.check_unclaimed(tmp_path)
