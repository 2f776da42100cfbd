"""The batches of one rank: made by its loader workers, brought onto its device."""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import queue
import signal
import socket
import threading
import time
import traceback
from collections.abc import Generator, Iterator, Sequence
from multiprocessing import util
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sr_dist import signals, stream, tensors
from sr_dist.workers import end_with_parent

_AHEAD = 4  # items that a worker has ready besides those on its line


class _Packed(NamedTuple):
    """A `Batch` on its way from a loader worker: plain arrays, which go by its line.

    Tensors would go through shared memory, which costs more for crops than copying them does, and
    is short in many containers.
    """

    lr: npt.NDArray[np.uint8]  # (B, H, W, C)
    hr: npt.NDArray[np.uint8]
    skipped: tuple[str, ...]

    @classmethod
    def of(cls, batch: stream.Batch) -> _Packed:
        lr, hr = (each.permute(0, 2, 3, 1).contiguous().numpy() for each in batch[:2])
        return cls(lr, hr, batch.skipped)

    def unpacked(self) -> stream.Batch:
        lr, hr = (torch.from_numpy(each).permute(0, 3, 1, 2) for each in self[:2])
        return stream.Batch(lr, hr, self.skipped)


def batches(
    source: stream.CropStream, num_workers: int, pin_memory: bool
) -> Generator[stream.Batch | stream.Encoded, None, None]:
    """This rank's batches: one from the rows that each of its loader workers makes.

    Raises:
        DataError: a shard is damaged, or a worker was killed.
    """
    per_rank = source.plan.global_batch_size // source.world_size
    with _rows(source, min(num_workers, per_rank)) as rows:
        for _ in range(source.first_step, source.last_step):
            batch = _joined([_checked(next(each)) for each in rows])
            if pin_memory and isinstance(batch, stream.Batch):  # which the joining would undo
                batch = batch._replace(lr=batch.lr.pin_memory(), hr=batch.hr.pin_memory())
            yield batch


@contextlib.contextmanager
def _rows(
    source: stream.CropStream, num_workers: int
) -> Generator[list[Iterator[stream.Item | _Packed]], None, None]:
    """What each loader worker makes, in their order; without any, what this process makes."""
    if not num_workers:
        with contextlib.closing(source.items()) as items:
            yield [items]
        return
    # A line to each. Through one that they share, as those of torch's DataLoader do, a worker that
    # is killed can leave a part of an item, for the rest of which the reader waits for ever.
    workers: list[BaseProcess] = []
    lines: list[Connection] = []
    # At the exit of this process too, before multiprocessing waits there for all workers.
    end = util.Finalize(None, functools.partial(_end, workers, lines), exitpriority=10)
    try:
        # Workers that are forked have it so until they ignore them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOPPING)
        try:
            for worker in range(num_workers):
                line, far_end = multiprocessing.Pipe()
                lines.append(line)
                arguments = (source, worker, num_workers, far_end)
                process = multiprocessing.Process(target=_work, args=arguments)
                process.start()
                workers.append(process)
                far_end.close()  # the worker alone has it now, and the line ends with it
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield [_received(*each) for each in zip(workers, lines, strict=True)]
    finally:
        end()


def _end(workers: list[BaseProcess], lines: list[Connection]) -> None:
    """A worker ends when it finds that nobody reads; before that it makes the item it is at.

    Later children of this process have its lines open as well: closing them would tell nothing.
    """
    for line in lines:
        with socket.socket(fileno=os.dup(line.fileno())) as same, contextlib.suppress(OSError):
            same.shutdown(socket.SHUT_RDWR)  # of a worker that has ended some systems mind it
        line.close()
    deadline = time.monotonic() + 5
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        if worker.is_alive():
            worker.kill()
            worker.join()


def _received(worker: BaseProcess, line: Connection) -> Iterator[stream.Item | _Packed]:
    while True:
        try:
            item = line.recv()
        except (EOFError, OSError):  # an OSError in the middle of an item
            worker.join(timeout=5)
            raise stream.DataError(
                f"a loader worker ended with status {worker.exitcode} (-9: killed, as by a system "
                "that runs out of memory; fewer data.num_workers need less). Run the same command "
                "to go on from the last checkpoint."
            ) from None
        yield item


def _work(
    source: stream.CropStream,
    worker: int,
    num_workers: int,
    far_end: Connection,
) -> None:
    """The loader worker: makes items until there are no more, or nobody reads them."""
    # What stops a run is sent to all its processes, but the rank decides, and needs its batches.
    for number in signals.STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.STOPPING)
    end_with_parent()
    torch.set_num_threads(1)
    made: queue.Queue[stream.Item | _Packed | None] = queue.Queue(_AHEAD)
    unread = threading.Event()

    def send() -> None:
        try:
            while (item := made.get()) is not None:
                far_end.send(item)
        except (BrokenPipeError, ConnectionResetError):
            unread.set()
            while made.get() is not None:
                pass
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    sender = threading.Thread(target=send, daemon=True)  # not waited for where making items fails
    sender.start()
    with contextlib.closing(source.items(worker, num_workers)) as items:
        for item in items:
            if unread.is_set():
                break
            made.put(_Packed.of(item) if isinstance(item, stream.Batch) else item)
    made.put(None)
    sender.join()


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


def _checked(item: stream.Item | _Packed) -> stream.Batch | stream.Encoded:
    if isinstance(item, stream.DataError):
        raise item
    return item.unpacked() if isinstance(item, _Packed) else item
