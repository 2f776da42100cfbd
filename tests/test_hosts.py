"""Two machines, and the network between them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY
from tests.hosts import Hosts, two_hosts
from tests.runs import assert_same_run, wait_for_step

pytestmark = pytest.mark.multiprocess


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with two_hosts() as made:
        yield made


def start_both(hosts: Hosts, *words: str | Path) -> list[subprocess.Popen[str]]:
    worker = REPOSITORY / "tests" / "workers" / "slow_steps.py"
    return [hosts.launch(number, worker, *words) for number in range(2)]


def test_a_network_that_fails_loses_nothing(
    hosts: Hosts, recipe: Path, tmp_path: Path, trained_on_two: Path
) -> None:
    """Away for less than the timeout: nobody notices. For more: both say it, and start again."""
    settings = ("checkpoint.every_steps=5", "run.timeout_minutes=0.15")
    first, second = start_both(hosts, recipe, *settings)
    wait_for_step(first, 3)
    hosts.cut()
    time.sleep(3)
    hosts.mend()
    wait_for_step(first, 24)
    hosts.cut()
    time.sleep(12)
    hosts.mend()
    said = [process.communicate(timeout=200)[1] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], said
    assert said[0].count("error (rank 0)") == said[1].count("error (rank 1)") == 1, said
    assert "no sign of life from rank 1 for 9 s; run the same command" in said[0]
    if hosts.kind == "namespaces":  # elsewhere the second is halted, and sees an end to it
        assert "no answer for 9 s from the machine of rank 0" in said[1]
    assert_same_run(trained_on_two, tmp_path / "runs" / "small")
