"""What a step computes between its updates, as CUDA graphs: recorded once, then played back.

A step is some two thousand small operations, and naming one to the GPU takes the CPU longer than
the GPU needs for it. A graph of them is started by one call. It repeats what it recorded, on the
same memory; whatever differs from step to step must lie in tensors that stay where they are (see
`Recorder.hold`), or outside.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor, nn

from sr_dist.errors import UserError

# Turns as usual before one is recorded: libraries choose their kernels in the first, and take
# memory of their own.
_WARM_UP = 2


@dataclasses.dataclass(frozen=True)
class Gradients:
    """What a section of a step leaves: gradients of a network, ready for its update."""

    network: str
    scalars: dict[str, Tensor]  # detached, on the device
    of: list[tuple[nn.Parameter, Tensor]]

    @classmethod
    def found(cls, network: str, module: nn.Module, scalars: dict[str, Tensor]) -> Gradients:
        """Those that `module`, called `network`, has now."""
        of = [(p, p.grad) for p in module.parameters() if p.grad is not None]
        return cls(network, scalars, of)


class Recorder:
    """Records sections of steps on `device`, a CUDA device, and plays them back."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # One for all: sections use each other's results, and are played in the order recorded.
        self._pool = torch.cuda.graph_pool_handle()
        self._turns: collections.Counter[Hashable] = collections.Counter()
        self._recorded: dict[Hashable, list[tuple[torch.cuda.CUDAGraph, Gradients]]] = {}
        self._held: dict[Hashable, Tensor] = {}

    def hold(self, name: str, value: Tensor) -> Tensor:
        """`value`, on the device and where it was put under this name before."""
        key = (name, value.shape, value.stride(), value.dtype)
        if key not in self._held:
            self._held[key] = torch.empty_like(value, device=self._stream.device)
        return self._held[key].copy_(value, non_blocking=True)

    def play(
        self, key: Hashable, number: int, begin: Callable[[], Iterator[Gradients]]
    ) -> Iterator[Gradients]:
        """The `number` sections that `begin` computes, the first times; later their recordings.

        `key`: of all on which the operations depend that is not in tensors. What is given is
        overwritten in the next turn.

        Raises:
            UserError: a section does what no graph can.
        """
        if key in self._recorded:
            for graph, found in self._recorded[key]:
                graph.replay()
                for parameter, gradient in found.of:
                    parameter.grad = gradient
                yield found
            return
        sections = begin()
        self._turns[key] += 1
        if self._turns[key] <= _WARM_UP:
            for _ in range(number):
                with self._beside():
                    found = next(sections)
                yield found
            return
        recorded = []
        for _ in range(number):
            graph = torch.cuda.CUDAGraph()
            with self._recording(graph):
                found = next(sections)
            recorded.append((graph, found))
            graph.replay()
            yield found
        self._recorded[key] = recorded

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream of the recordings, which autograd remembers, after and before the other."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    @contextlib.contextmanager
    def _recording(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        first: BaseException | None = None
        try:
            # Of this thread alone: others copy batches, or watch over collectives.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                try:
                    yield
                except BaseException as error:
                    first = error
                    raise
        except RuntimeError as error:
            first = first or error  # behind which the end of the recording fails, too
            if not isinstance(first, RuntimeError) or isinstance(first, torch.OutOfMemoryError):
                raise first from None
            raise UserError(
                "train.cuda_graphs: a step of this run cannot be recorded "
                f"({str(first).splitlines()[0]}); use train.cuda_graphs=false"
            ) from error
