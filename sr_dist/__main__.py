"""`python -m sr_dist`: the version, and what this machine can do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator

import torch

from sr_dist import __version__, generators, machine


def devices() -> Iterator[str]:
    yield f"CPU, {os.cpu_count()} processors, {torch.get_num_threads()} threads for computing"
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        memory = properties.total_memory / 2**30
        yield f"GPU {number}, {properties.name}, {memory:.0f} GiB"


def precisions() -> Iterator[str]:
    on_gpu = torch.cuda.is_available()
    fast = machine.has_bf16(torch.device("cuda" if on_gpu else "cpu"))
    yield "no (fp32)"
    yield "bf16" if fast else "bf16 (emulated here, slower than fp32)"
    if on_gpu:
        yield "fp16"


def extras() -> Iterator[tuple[str, list[str]]]:
    """Each extra, and what of it is not there."""
    distribution = importlib.metadata.distribution("sr_dist")
    for extra in distribution.metadata.get_all("Provides-Extra") or []:
        missing = []
        for line in distribution.requires or []:
            requirement, _, condition = line.partition(";")
            if not re.search(rf"extra == ['\"]{re.escape(extra)}['\"]", condition):
                continue
            name = re.match(r"[\w.-]+", requirement)
            if name is None or name[0].replace("-", "_") == "sr_dist":
                continue
            try:
                importlib.metadata.version(name[0])
            except importlib.metadata.PackageNotFoundError:
                missing.append(f"{name[0]} is missing")
        yield extra, missing


def main() -> None:
    lines = [
        f"sr_dist {__version__}",
        f"Python {platform.python_version()}, torch {torch.__version__}",
        "devices:",
        *(f"  {device}" for device in devices()),
        f"train.mixed_precision: {', '.join(precisions())}",
        "extras, for what not everybody needs (pip install 'sr_dist[NAME]'):",
        *(f"  {name:8} {', '.join(missing) or 'installed'}" for name, missing in extras()),
        f"models: {', '.join(generators.shipped()) or 'none'}",
    ]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
