"""Everything that concerns several processes; the only importer of accelerate."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import logging
import os
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from sr_dist import machine, ranks, signals
from sr_dist.errors import LostRank, Stopped, UserError
from sr_dist.watch import Watch

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of this run, seen from one of them. Made by `joined`."""

    accelerator: Accelerator
    rank: int
    world_size: int
    device: torch.device
    mixed_precision: str  # no, bf16 or fp16
    watch: Watch
    reductions: ranks.Reductions  # of gradients that are on their way

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        reduces: bool = True,
        ignored: Sequence[str] = (),
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The module in DistributedDataParallel and autocast; the optimiser behind the scaler.

        `reduces`: without it the module has autocast alone, and its gradients are for `average`.
        `ignored`: parameters that DistributedDataParallel leaves alone, since their gradients
        become those of all ranks elsewhere.
        """
        # Its own method for this sets just this.
        module._ddp_params_and_buffers_to_ignore = list(ignored)  # type: ignore[assignment]
        if not reduces:
            autocast = self.accelerator.prepare_model(module, evaluation_mode=True)
            return autocast, self.accelerator.prepare_optimizer(optimizer)
        with warnings.catch_warnings():
            # torch 2.14 renames the option; older releases lack the new name.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            wrapped, optimizer = self.accelerator.prepare(module, optimizer)
        if self.world_size > 1:
            # A function of its own: torch knows no annotations that are text.
            wrapped.register_comm_hook(None, lambda _, bucket: self.reductions.begin_bucket(bucket))
        return wrapped, optimizer

    def rehearse(self, wrapped: nn.Module, example: Tensor) -> None:
        """Reduce gradients once, of no consequence, before the first step of `wrapped`.

        DistributedDataParallel sums gradients in one order in its first step, and in that in which
        they came there from then on; with three addends or more the sums differ in their last bits.
        A run that goes on would begin with another order than one that never stopped.
        """
        if self.world_size == 1:
            return
        wrapped.eval()  # BatchNorm's and spectral norm's buffers stay
        with torch.compiler.set_stance("force_eager"):  # of other shapes than the steps' are
            wrapped(example.to(self.device)).float().mean().backward()
        self.reductions.finish()
        wrapped.train()
        for parameter in wrapped.parameters():
            parameter.grad = None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return self.accelerator.autocast()  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """A loss that is not finite gives gradients that are not, on all ranks once reduced."""
        self.accelerator.backward(loss * torch.where(torch.isfinite(loss), 1.0, torch.nan))

    def reduced(self, module: nn.Module, now: bool) -> contextlib.AbstractContextManager[Any]:
        """For the forward and backward of one part of a batch: gradients are reduced if `now`.

        That is then begun; `step` waits for it.
        """
        if now or self.world_size == 1:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(module)  # type: ignore[no-any-return]

    @torch.no_grad()
    def average(self, gradients: Sequence[Tensor]) -> None:
        """Make them their means over ranks, by one message, as DistributedDataParallel does."""
        if self.world_size == 1:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self.reductions.begin(flat)
        self.reductions.finish()
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        shaped = [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
        torch._foreach_copy_(list(gradients), shaped)

    def step(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Update what the optimiser trains, unless its gradient, of all ranks, is not finite.

        The gradient is first cut to the `clip_norm` of the optimiser's group, if it has one; its
        length before that is returned. Nothing waits for the device: the fused optimiser looks at
        the length there. Reduced gradients are the same on all ranks, and so is what they decide.
        Accelerate's own clipping would undo the loss scale of every optimiser at once.
        """
        (group,) = optimizer.param_groups
        scaler, bare = self.accelerator.scaler, optimizer.optimizer  # type: ignore[attr-defined]
        self.reductions.finish()
        if scaler:
            scaler.unscale_(bare)
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        length = nn.utils.get_total_norm(gradients)
        if group.get("clip_norm") is not None:
            nn.utils.clip_grads_with_norm_(group["params"], group["clip_norm"], length)
        if scaler:  # which leaves such a step out itself, and lowers its scale
            optimizer.step()
            return length
        bare.found_inf, bare.grad_scale = (~torch.isfinite(length)).to(torch.float32), None
        try:
            optimizer.step()
        finally:
            del bare.found_inf, bare.grad_scale
        return length

    def scaler_state(self) -> dict[str, Any]:
        """The state of the gradient scaler; empty without fp16."""
        return dict(self.accelerator.scaler.state_dict()) if self.accelerator.scaler else {}

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        if self.accelerator.scaler and state:
            self.accelerator.scaler.load_state_dict(state)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, the same on all of them."""
        total = values.clone()
        if self.world_size > 1:
            torch.distributed.all_reduce(total)
        return total

    def means(self, scalars: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean over ranks of each scalar, as numbers: waits for the device."""
        joined = self.sum(torch.stack(list(scalars.values())).double()) / self.world_size
        return dict(zip(scalars, joined.tolist(), strict=True))

    @contextlib.contextmanager
    def averaged_buffers(self, modules: Collection[nn.Module]) -> Iterator[Tensor]:
        """Inside, all ranks' modules hold the mean of their floating-point buffers.

        Those are BatchNorm's statistics. Afterwards each has its own again, so that a look at the
        modules, or a checkpoint, changes nothing of the training. Yields the own buffers of all
        ranks, (world size, numbers).
        """
        own = _flat_buffers(modules)
        everyone = own.new_zeros(self.world_size, own.numel())
        everyone[self.rank] = own
        everyone = self.sum(everyone)
        _set_buffers(modules, everyone.sum(0) / self.world_size)
        try:
            yield everyone
        finally:
            _set_buffers(modules, own)

    def set_buffers(self, modules: Collection[nn.Module], everyone: Tensor) -> None:
        """Give the modules back what `averaged_buffers` yielded, if there were as many ranks."""
        if len(everyone) == self.world_size:
            _set_buffers(modules, everyone[self.rank])

    def wait_for_main(self, what: str, said: str = "") -> str:
        """Return when rank 0 is here with the same `what`, however long that takes.

        `said`: what rank 0 has to say, which is returned on all ranks.
        """
        if not self.is_main:
            return self.watch.wait_for(what)
        self.watch.tell(what, said)
        return said

    def wait_for_all(self, what: str) -> None:
        """Return when all ranks are here with the same `what`, however long that takes."""
        self.watch.tell(f"{what} {self.rank}")
        for rank in range(self.world_size):
            self.watch.wait_for(f"{what} {rank}")


def _buffers(modules: Collection[nn.Module]) -> list[Tensor]:
    return [b for module in modules for b in module.buffers() if b.is_floating_point()]


def _flat_buffers(modules: Collection[nn.Module]) -> Tensor:
    device = next(next(iter(modules)).parameters()).device
    flat = [buffer.flatten() for buffer in _buffers(modules)]
    return torch.cat(flat) if flat else torch.zeros(0, device=device)


@torch.no_grad()
def _set_buffers(modules: Collection[nn.Module], values: Tensor) -> None:
    buffers = _buffers(modules)
    parts = torch.split(values, [buffer.numel() for buffer in buffers])
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.copy_(part.view_as(buffer))


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """For mistakes that all processes meet alike before they are joined: one of them says it.

    The first to meet it, where the launcher keeps a store: as soon as one has ended, it ends the
    others. Otherwise the first process of each machine.
    """
    try:
        yield
    except UserError as error:
        if signals.launcher_keeps_store():
            error.silent = not _is_first_to_say(str(error), lambda: _launchers_store(timeout=10))
        else:
            error.silent = os.environ.get("LOCAL_RANK", "0") != "0"
        raise


def _is_first_to_say(message: str, find_store: Callable[[], Any]) -> bool:
    """Whether no other rank has met the same mistake yet."""
    digest = hashlib.sha256(message.encode(errors="replace")).hexdigest()
    try:
        return bool(find_store().add(f"sr_dist/said/{_attempt()}/{digest}", 1) == 1)
    except RuntimeError:  # the process that keeps the store is gone: nobody else is left to speak
        return True


def launched_world_size() -> int:
    """The number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many of them are on this machine; all, where the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", launched_world_size()))


def lacks_processes(world_size: int) -> bool:
    """Whether `accelerate launch` was told to start several processes, and started this one alone.

    Its launcher of one process gives an address to meet at if several were asked for, and no rank.
    """
    return world_size == 1 and launched_alone() and "MASTER_ADDR" in os.environ


def launched_alone() -> bool:
    """Whether this is the only process of `accelerate launch`, which then hands no signals on."""
    told = os.environ.keys()
    its = {"ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"}  # people set the first, too
    return its <= told and not told & {"RANK", "WORLD_SIZE"}


def _attempt() -> int:
    """How often the launcher has started all ranks again (`--max_restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _launchers_store(timeout: float) -> Any:
    """The store that the launcher keeps for all attempts, and that ends with it."""
    return torch.distributed.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=datetime.timedelta(seconds=timeout),
    )


def end_attempts(timeout: float) -> None:
    """Let the attempts that the launcher will make after this one end as well: `joined` sees to it.

    To it a rank that stops has failed, whatever its status. For one rank to call.
    """
    if signals.launcher_keeps_store():
        _launchers_store(timeout).set("sr_dist/stopped", str(_attempt()))


def _was_stopped(timeout: float) -> bool:
    """Whether an earlier attempt of the same launcher called `end_attempts`."""
    if not signals.launcher_keeps_store():
        return False
    store, key = _launchers_store(timeout), "sr_dist/stopped"
    told = int(store.get(key)) if store.check([key]) else -1
    if told == _attempt():  # the launcher stopped all ranks itself, to start more of them
        store.set(key, "-1")
    return 0 <= told < _attempt()


def told_cpu() -> bool:
    """Whether the launcher was told to compute on the CPU, whatever GPUs there are.

    Accelerate hands `use_cpu` on where it starts one process alone; its launcher of several can
    only hide the GPUs (`gpu_ids`), which CUDA does at the first number that is none of theirs.
    """
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip()
    return bool(parse_flag_from_env("ACCELERATE_USE_CPU")) or seen == "" or seen.startswith("-")


def _join_again(backend: str, timeout: float) -> None:
    """After a restart by the launcher (`--max_restarts`), join the group under keys of its own.

    The launcher keeps one store for all attempts, and torch 2.14 leaves in it where the ranks of
    the first one listened; those of the second would knock there.
    """
    if not _attempt() or not signals.launcher_keeps_store():
        return
    torch.distributed.init_process_group(
        backend,
        store=distributed_c10d.PrefixStore(f"attempt {_attempt()}", _launchers_store(timeout)),
        rank=int(os.environ["RANK"]),
        world_size=launched_world_size(),
        timeout=datetime.timedelta(seconds=timeout),
    )


def _accelerator(on_cpu: bool, mixed_precision: str | None, timeout: float) -> Accelerator:
    """Made where all processes meet."""
    # NCCL's own watch would end the process before ours has named the rank that is gone.
    patience = timeout if on_cpu else timeout + 60
    _join_again("gloo" if on_cpu else "nccl", patience)
    return Accelerator(
        cpu=on_cpu,
        mixed_precision=mixed_precision,
        kwargs_handlers=[
            # BatchNorm's buffers are averaged before they are used, not sent at every forward.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=patience)),
        ],
    )


@contextlib.contextmanager
def joined(
    mixed_precision: str | None, seed: int, timeout: float = 600.0, compression: str = "none"
) -> Iterator[Processes]:
    """Join the processes that `accelerate launch` (or torchrun) started, or be the only one.

    `mixed_precision`: no, bf16, fp16, or None for what accelerate launch was told. Build what holds
    wrapped modules in a function called inside, so that they are gone when the group is closed: an
    interpreter that ends while gloo's threads still work is aborted. `timeout`: seconds that a rank
    may give no sign of life, or keep the others waiting in a step. `compression`: of the gradients
    that ranks send each other; bf16, or none.

    Raises:
        UserError: fp16 without a GPU; accelerate would compute in fp32 and not say so.
        Stopped: an earlier attempt of the same launcher was.
        LostRank: the others do not answer any more.
    """
    on_cpu = told_cpu() or not torch.cuda.is_available()
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    with said_once():
        if on_cpu and (mixed_precision or told) == "fp16":
            why = "the launcher was told to use the CPU" if told_cpu() else "none is here"
            raise UserError(f"mixed precision fp16 needs a GPU, and {why}; use bf16 or no")
    try:
        if _was_stopped(timeout):
            raise Stopped("stopped before the launcher started it again; the same command goes on")
        accelerator = _accelerator(on_cpu, mixed_precision, timeout)
    except torch.distributed.DistError as error:
        raise LostRank(
            f"the {launched_world_size()} processes could not meet: {str(error).splitlines()[0]}"
        ) from None
    if on_cpu and launched_world_size() > 1 and not told_cpu() and accelerator.is_main_process:
        log.warning("no GPU can be used here: all processes compute on the CPU")
    if on_cpu:
        machine.keep_freed_memory()
    else:
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    # All ranks build the same weights; nothing in a step draws from this generator.
    torch.manual_seed(seed)
    several = accelerator.num_processes > 1
    watch = Watch(
        accelerator.process_index,
        accelerator.num_processes,
        distributed_c10d._get_default_store() if several else None,
        timeout,
        signals.launcher_keeps_store(),
    )
    processes = Processes(
        accelerator=accelerator,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
        mixed_precision=str(accelerator.mixed_precision),
        watch=watch,
        reductions=ranks.Reductions(accelerator.num_processes, compression),
    )
    try:
        with watch:
            try:
                yield processes
            except RuntimeError as error:
                if not several or isinstance(error, torch.OutOfMemoryError):
                    raise
                missing = watch.missing()
                if not missing:
                    raise
                traceback.clear_frames(error.__traceback__)
                names = ", ".join(map(str, missing))
                gone = f"rank {names} is" if len(missing) == 1 else f"ranks {names} are"
                raise LostRank(
                    f"{gone} gone; run the same command to go on from the last checkpoint"
                ) from None
    except BaseException as error:
        if isinstance(error, UserError) and processes.world_size > 1:
            store = distributed_c10d._get_default_store
            error.silent = not _is_first_to_say(str(error), store)
        # A stop before the first step; by SIGTERM launchers end ranks also to start all again.
        if isinstance(error, KeyboardInterrupt) and watch.signal in ("SIGINT", "SIGUSR1"):
            with contextlib.suppress(RuntimeError):  # a launcher that is gone starts none again
                end_attempts(min(timeout, 10))
        traceback.clear_frames(error.__traceback__)  # they hold the wrapped modules
        raise
    finally:
        accelerator.free_memory()
        accelerator.end_training()
        # The next ones of this interpreter may compute in another precision.
        AcceleratorState._reset_state(reset_partial_state=True)
