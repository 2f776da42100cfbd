from __future__ import annotations

import json

import pytest

from tests.helpers import refuse, succeed


def test_step_prints_one_json_object_last() -> None:
    done = succeed(
        *("tools/benchmark.py", "step", "--batch-size", 2, "--crop-size", 32),
        *("--repetitions", 3),
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["what"] == "step" and result["unit"] == "images/s"
    assert result["ratio"] == pytest.approx(result["ours"] / result["reference"], rel=1e-3)
    for name in ("ours", "reference"):
        least, most = result["spread"][name]
        assert 0 < least <= result[name] <= most
    assert result["config"]["batch_size"] == 2 and result["versions"]["torch"]


def test_memory_is_flat() -> None:
    done = succeed("tools/benchmark.py", "memory", "--samples", 4000)
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["samples"], result["what"]) == (4000, "memory") and result["epochs"] >= 10
    assert result["reference"] > 50 and result["ratio"] < 1.05


def test_impossible_sizes_are_refused() -> None:
    command = ("tools/benchmark.py", "step")
    assert "--repetitions: expected 1 or more" in refuse(*command, "--repetitions", 0)
    assert "--crop-size: expected a multiple of 4" in refuse(*command, "--crop-size", 50)
