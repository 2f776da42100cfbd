"""The short form of soak.py: one fault of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import soak


@pytest.mark.multiprocess
def test_faults_of_every_kind_lose_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    soak.soak(tmp_path, seed=1, faults=5, say=said.append)
    assert len(said) == 6 and said[-1] == "5 faults, 72 steps: all as in the unbroken run"
    for kind in ("kill all", "kill one", "stop", "full disk", "/"):  # the last names a file
        assert any(kind in line for line in said), kind
