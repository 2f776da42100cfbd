"""The batches of one rank: made by its loader workers, brought onto its device."""

from __future__ import annotations

import atexit
import functools
import itertools
import multiprocessing
import signal
from collections.abc import Generator, Iterator, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sr_dist import stream, tensors
from sr_dist.workers import end_with_parent


def batches(
    source: stream.CropStream, num_workers: int, pin_memory: bool
) -> Generator[stream.Batch | stream.Encoded, None, None]:
    """This rank's batches: one from the rows that each of its loader workers makes.

    Raises:
        DataError: a shard is damaged, or a worker was killed.
    """
    per_rank = source.plan.global_batch_size // source.world_size
    num_workers = min(num_workers, per_rank)
    loader = DataLoader(
        source,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_begin_worker,
        collate_fn=_as_it_is,  # which by default makes tensors of arrays
    )
    others = set(multiprocessing.active_children())
    parts = iter(loader)
    workers = set(multiprocessing.active_children()) - others
    at_exit = functools.partial(_kill, workers)
    atexit.register(at_exit)
    try:
        for _ in range(source.first_step, source.last_step):
            # Workers take turns, so consecutive items are the parts of one batch.
            rows = [_checked(_next(parts, workers)) for _ in range(max(1, num_workers))]
            batch = _joined(rows)
            if pin_memory and isinstance(batch, stream.Batch):  # which the joining would undo
                batch = batch._replace(lr=batch.lr.pin_memory(), hr=batch.hr.pin_memory())
            yield batch
    finally:
        # Left to a traceback, the workers would be ended by the garbage collector, which closes
        # their queues first and then waits 5 s for each.
        del parts
        # An error's traceback may hold on to them. At the end of the interpreter, multiprocessing
        # would wait for ever for them to follow a SIGTERM, which they ignore.
        if not any(worker.is_alive() for worker in workers):
            atexit.unregister(at_exit)


def _next(parts: Iterator[stream.Item], workers: set[BaseProcess]) -> stream.Item:
    try:
        return next(parts)
    except (RuntimeError, ConnectionError, EOFError):  # where it met the end of the process
        dead = connection.wait([worker.sentinel for worker in workers], timeout=5)
        codes = {worker.exitcode for worker in workers if worker.sentinel in dead}
        if not codes:
            raise
        raise stream.DataError(
            f"a loader worker ended with status {codes.pop()} (-9: killed, as by a system that "
            "runs out of memory; fewer data.num_workers need less). Run the same command to go on "
            "from the last checkpoint."
        ) from None


def _kill(workers: set[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


def _joined(rows: list[stream.Batch | stream.Encoded]) -> stream.Batch | stream.Encoded:
    skipped = tuple(itertools.chain.from_iterable(row.skipped for row in rows))
    if isinstance(rows[0], stream.Encoded):
        encoded = [row.crops for row in rows if isinstance(row, stream.Encoded)]
        return stream.Encoded(tuple(itertools.chain.from_iterable(encoded)), skipped)
    if len(rows) == 1:
        return rows[0]
    decoded = [row for row in rows if isinstance(row, stream.Batch)]
    lr, hr = (torch.cat([getattr(row, name) for row in decoded]) for name in ("lr", "hr"))
    return stream.Batch(lr, hr, skipped)


def decoded(batch: stream.Encoded, device: torch.device, scale: int) -> stream.Batch:
    """The crops of JPEGs, decoded on `device`: by nvJPEG on a GPU.

    Raises:
        DataError: one of them is damaged behind its header.
    """
    from torchvision import io  # at need: slow to import

    def decode(crops: Sequence[stream.EncodedCrop]) -> list[Tensor]:
        data = [torch.frombuffer(bytearray(crop.data), dtype=torch.uint8) for crop in crops]
        found: list[Tensor] = io.decode_jpeg(data, mode=io.ImageReadMode.RGB, device=device)
        return found

    try:
        pictures = decode(batch.crops)
    except RuntimeError:
        for crop in batch.crops:  # to name the one
            try:
                decode([crop])
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise stream.DataError(f"{crop.where} cannot be decoded: {reason}") from None
        raise
    cut = [
        tensors.crop(picture, each.crop)
        for each, picture in zip(batch.crops, pictures, strict=True)
    ]
    hr = torch.stack(cut).contiguous(memory_format=torch.channels_last)
    return stream.Batch(tensors.downscale(hr, scale), hr, batch.skipped)


def on_device(
    batches: Iterator[stream.Batch | stream.Encoded], device: torch.device, scale: int
) -> Iterator[stream.Batch]:
    """The batches on `device`; on a GPU each is copied while the one before it is trained on.

    What `batches` gives should be pinned, or the copies wait. `scale`: of what is decoded there.
    """
    if device.type != "cuda":
        for each in batches:
            yield decoded(each, device, scale) if isinstance(each, stream.Encoded) else each
        return
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    copied: stream.Batch | None = None
    for batch in itertools.chain(batches, [None]):
        ready, copied = copied, None
        if ready is not None:
            now = torch.cuda.current_stream(device)
            now.wait_stream(side)
            for tensor in (ready.lr, ready.hr):  # made on the one, and freed on the other
                tensor.record_stream(now)
        if batch is not None:
            with torch.cuda.stream(side):
                if isinstance(batch, stream.Encoded):
                    copied = decoded(batch, device, scale)
                else:
                    lr, hr = (x.to(device, non_blocking=True) for x in (batch.lr, batch.hr))
                    copied = batch._replace(lr=lr, hr=hr)
        if ready is not None:
            yield ready


def _checked(item: stream.Item) -> stream.Batch | stream.Encoded:
    if isinstance(item, stream.DataError):
        raise item
    return item.unpacked() if isinstance(item, stream.Packed) else item


def _as_it_is(item: Any) -> Any:
    return item


def _begin_worker(worker: int) -> None:
    torch.set_num_threads(1)
    end_with_parent()
    # What stops a run is sent to all its processes, but the rank decides, and needs its batches.
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)
