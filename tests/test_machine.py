from __future__ import annotations

import os
import platform
import re
import subprocess
import sys

import pytest
import torch

from sr_dist import machine
from tests.helpers import REPOSITORY, succeed

# 200 MB are freed, in blocks of some MB: how much of it the process still holds.
FREED = """
import sys, torch
from sr_dist import machine
way, size = sys.argv[1], int(sys.argv[2])
kept = way == "as it comes" or machine.keep_freed_memory(large_too=way == "all kept")
before = machine.megabytes_in_use()["resident"]
blocks = [torch.ones(size * 250_000) for _ in range(200 // size)]
held = machine.megabytes_in_use()["resident"] - before
del blocks
print(kept, held, machine.megabytes_in_use()["resident"] - before)
"""


@pytest.mark.parametrize(
    ("processor", "bf16", "amx", "has"),
    [
        *(("x86_64", False, False, False), ("x86_64", True, False, True)),
        *(("AMD64", False, True, True), ("aarch64", False, False, True)),
    ],
)
def test_avx_512_alone_is_not_bf16(
    processor: str, bf16: bool, amx: bool, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN says it computes in bf16 on those too, and takes twice as long as in fp32."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(platform, "machine", lambda: processor)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert machine.has_bf16(torch.device("cpu")) == has


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is Linux's")
@pytest.mark.parametrize(
    ("way", "megabytes", "stays"),
    [
        *(("all kept", 200, True), ("all kept", 25, True)),
        *(("small kept", 40, False), ("small kept", 25, True)),
        *(("as it comes", 200, False), ("as it comes", 25, False)),
    ],
)
def test_freed_memory_is_kept(way: str, megabytes: int, stays: bool) -> None:
    kept, held, left = succeed(sys.executable, "-c", FREED, way, megabytes).stdout.split()
    assert kept == "True" and float(held) > 190
    assert float(left) > 190 if stays else float(left) < 10


def test_the_commit_is_that_of_the_checkout() -> None:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("this is no checkout")
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    found = machine.commit()
    assert found is not None and re.sub("-dirty$", "", found).endswith(head[:7])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libgomp is Linux's")
def test_commands_leave_the_processors_to_others_while_they_wait() -> None:
    """As libgomp itself says, which has read it before any computing."""
    training = ("launch/train.py", "--config", "configs/quickstart.yaml", "run.processes=2")
    enlarging = ("launch/upscale.py", "--input", "nowhere.png", "--output", "nowhere")
    for words, told, spins in (
        (training, {}, 0),
        (enlarging, {"GOMP_SPINCOUNT": "300000"}, 300000),
    ):
        environment = {**os.environ, "OMP_DISPLAY_ENV": "verbose"}
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
            environment.pop(name, None)
        done = subprocess.run(
            [sys.executable, *words],
            env=environment | told, capture_output=True, text=True, timeout=60, cwd=REPOSITORY,
        )  # fmt: skip
        assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
