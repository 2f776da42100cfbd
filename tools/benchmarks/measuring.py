"""Taking turns, and what is reported of it."""

from __future__ import annotations

import contextlib
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torchvision

from sr_dist import dataset, images, machine

WARM_UP = 2  # turns that are not timed
# A context manager, its module's own, that gives what a turn runs.
Maker = Callable[..., contextlib.AbstractContextManager[Callable[[], object]]]
Timings = dict[str, list[float]]  # seconds of each turn, by contender


def take_turns(
    contenders: Mapping[str, Callable[[], object]],
    repetitions: int,
    synchronize: Callable[[], object] = lambda: None,
) -> Timings:
    """Seconds of each contender's turns, one after the other, A B A B."""
    timings: Timings = {name: [] for name in contenders}
    for turn in range(WARM_UP + repetitions):
        for name, run in contenders.items():
            synchronize()
            began = time.perf_counter()
            run()
            synchronize()
            if turn >= WARM_UP:
                timings[name].append(time.perf_counter() - began)
    return timings


def take_turns_in_processes(
    makers: Mapping[str, tuple[Maker, tuple[object, ...]]],
    repetitions: int,
) -> Timings:
    """`take_turns` of contenders that each live in a process of their own.

    What one sets for its process (memory, threads) the other does not have.
    """
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        turns: dict[str, Callable[[], object]] = {}
        ends = {}
        for name, (make, arguments) in makers.items():
            end, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, make, arguments, torch.get_num_threads()), daemon=True
            )
            process.start()
            theirs.close()  # so that its death is heard
            stack.callback(process.join)
            stack.callback(end.close)
            ends[name] = end
        for name, end in ends.items():
            end.recv()  # it is ready

            def turn(end: Connection = end) -> None:
                end.send(None)
                end.recv()

            turns[name] = turn
        return take_turns(turns, repetitions)


def _serve(
    end: Connection,
    make: Maker,
    arguments: tuple[object, ...],
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    with make(*arguments) as run, contextlib.suppress(EOFError):
        while True:
            end.send(None)
            end.recv()
            run()


def synchronizer(device: torch.device) -> Callable[[], object]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def rates(timings: Sequence[float], amount: float) -> list[float]:
    return [amount / seconds for seconds in timings]


def summary(
    what: str,
    cases: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    unit: str,
    *,
    more_is_better: bool,
) -> dict[str, object]:
    """The contract's fields, from (ours, reference) of each case; of several cases, by their name.

    `ratio`: how many times better ours is than the reference, of the medians.
    """

    def fields(ours: Sequence[float], reference: Sequence[float]) -> dict[str, object]:
        mine, theirs = statistics.median(ours), statistics.median(reference)
        return {
            "ours": _rounded(mine),
            "reference": _rounded(theirs),
            "ratio": round(mine / theirs if more_is_better else theirs / mine, 3),
            "spread": {
                name: [_rounded(min(values)), _rounded(max(values))]
                for name, values in (("ours", ours), ("reference", reference))
            },
            "repetitions": len(ours),
        }

    found = {name: fields(*values) for name, values in cases.items()}
    if list(found) == [what]:
        joined = found[what]
    else:
        names = ("ours", "reference", "ratio", "spread", "repetitions")
        joined = {name: {case: its[name] for case, its in found.items()} for name in names}
    return {"what": what, **joined, "unit": unit}


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def about(device: torch.device) -> dict[str, object]:
    """Where and with what something was measured."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU ({_processor()})",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "commit": machine.commit(),
    }


def _processor() -> str:
    """Its model, where the system tells; else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def photographs(given: Path | None, side: int) -> list[images.Picture]:
    """Colour photographs of side x side pixels: the middles of those in `given`, or samples.

    The samples are scikit-image's; where one is smaller, it is continued by its mirror image.
    """
    if given is not None:
        paths = [path for path, _ in images.list_pictures(given)]
    else:
        paths = dataset.find_sample_photographs()
    return [_squared(images.decode(path, 3), side) for path in paths]


def _squared(picture: images.Picture, side: int) -> images.Picture:
    height, width, _ = picture.shape
    missing = [(0, max(0, side - height)), (0, max(0, side - width)), (0, 0)]
    whole = np.pad(picture, missing, mode="symmetric")
    top, left = (whole.shape[0] - side) // 2, (whole.shape[1] - side) // 2
    return np.ascontiguousarray(whole[top : top + side, left : left + side])
