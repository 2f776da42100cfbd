"""How a run goes on: from which checkpoint, from where in its epoch, with what state."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sr_dist import (
    __version__,
    checkpoint,
    evaluate,
    finite,
    gan,
    machine,
    shards,
    tracking,
    weights,
)
from sr_dist.distributed import Processes
from sr_dist.errors import UserError

# What settings are called that a checkpoint holds under other names; the rest are of the model.
_SETTINGS = {
    ("generator", "scale"): "data.scale",
    ("generator", "channels"): "data.channels",
    ("discriminator", "channels"): "data.channels",
    ("data", "shards"): "data.train",
    ("data", "seed"): "run.seed",
}


_commit = functools.cache(machine.commit)  # what is run, not what is there later


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands: after `step` updates on `images_seen` crops.

    `place`: steps of the present plan that lie behind it, which are as many unless the batch or the
    crops were changed on the way. `unmeasured`: the results of the epoch that `step` ended are to
    be made up for: its evaluation was cut short or failed, or they could not be written.
    """

    step: int = 0
    images_seen: int = 0
    place: int = 0
    unmeasured: bool = False


@dataclasses.dataclass(frozen=True)
class Course:
    """The steps that a run has before it, from `start` to the end of its last epoch."""

    start: Position
    steps_per_epoch: int
    epochs: int  # of the whole run
    batch_size: int  # over all ranks

    @property
    def last_step(self) -> int:
        return self.start.step + self.epochs * self.steps_per_epoch - self.start.place

    @property
    def total_images(self) -> int:
        return self.at(self.last_step).images_seen

    @property
    def steps(self) -> range:
        """Those to come; first the last one once more if its results are to be made up for."""
        return range(self.start.step + (not self.start.unmeasured), self.last_step + 1)

    @property
    def epochs_done(self) -> int:
        """Epochs that have ended, with their results."""
        return self.start.place // self.steps_per_epoch - self.start.unmeasured

    def at(self, step: int) -> Position:
        """Where the run stands after `step`."""
        steps = step - self.start.step
        images_seen = self.start.images_seen + steps * self.batch_size
        return Position(step, images_seen, self.start.place + steps)

    def epoch(self, step: int) -> int:
        """Counted from 1."""
        return (self.at(step).place - 1) // self.steps_per_epoch + 1

    def ends_epoch(self, step: int) -> bool:
        return self.at(step).place % self.steps_per_epoch == 0


@dataclasses.dataclass(frozen=True)
class State:
    """What changes from step to step, on every rank."""

    networks: gan.Networks
    epoch_means: tracking.EpochMeans
    skipped: tracking.Skipped
    nonfinite: finite.Nonfinite


def find_start(
    folder: Path, resume: str, identity: Mapping[str, Any]
) -> checkpoint.Checkpoint | None:
    """The checkpoint that a run goes on from: the newest below `folder`, its own, if there is one.

    `resume`: auto; never, which refuses to; or a checkpoint, or a run's folder: a run without
    checkpoints of its own goes on from there, and a run goes back to one of its own, once: its
    checkpoints say what `resume` they came by.
    `identity`: sections of settings that a run cannot change on its way, as `meta.json` holds them.

    Raises:
        UserError: there is one where `resume` is never, it is of another model or data, or what
            `resume` names is none.
    """
    anew = "none is whole"
    if resume in ("auto", "never"):
        anew += ": the run starts anew, from step 0"
    found = checkpoint.find_newest(folder, otherwise=anew)
    went_there = found is not None and found.meta.get("resume") == resume
    if resume not in ("auto", "never") and not went_there:
        named = checkpoint.find_in(Path(resume), names=None)
        if found is None or named.folder.resolve().parent == folder.resolve():
            found = named
    if found is None:
        return None
    if resume == "never":
        raise UserError(
            f"{folder} holds a run that got to step {found.step}, and run.resume is never. Choose "
            "another run.name, or delete the folder."
        )
    changes = []
    for section, now in identity.items():
        before = found.meta.get(section)
        if before is None or now is None:
            if before != now:
                changes.append(f"it has {'no' if before is None else 'a'} {section}")
            continue
        for key in now:
            name = _SETTINGS.get((section, key), f"model.{section}.{key}")
            if key == "shards" and before.get(key) != now[key]:
                changes.append(f"{name} names other shards than it was trained on")
            elif before.get(key) != now[key]:
                changes.append(f"{name} was {before.get(key)}, is {now[key]}")
    if changes:
        fits = found.meta.get("generator") == identity.get("generator")
        start = f", which may start from its generator: train.start_from={found.folder}" * fits
        raise UserError(
            f"{found.folder} cannot be gone on from: {'; '.join(changes)}. Set that back, or "
            f"choose another run.name for a new run{start}"
        )
    return found


def position_of(start: checkpoint.Checkpoint, plan: shards.Plan) -> Position:
    """The checkpoint's, or under changed batches or crops the same share of its epoch."""
    then = start.meta["position"]
    share = then["step_in_epoch"] / then["steps_per_epoch"]
    # Of an epoch that has not ended, one step is left at least: its results come with it.
    done = min(round(share * plan.steps_per_epoch), plan.steps_per_epoch - 1)
    place = then["epochs"] * plan.steps_per_epoch + done
    unmeasured = then.get("unmeasured", False) and place % plan.steps_per_epoch == 0
    return Position(start.step, start.meta["images_seen"], place, unmeasured)


def restore(start: checkpoint.Checkpoint, processes: Processes, state: State) -> None:
    """Put the networks, the optimisers and the counts where the checkpoint has them.

    Raises:
        UserError: its weights do not fit.
    """
    networks, held = state.networks, start.networks()
    for name, module in networks.weights.items():
        # An average that the run did not keep before starts from the generator.
        source = name if name in held else "generator"
        weights.load(module, start.weights(source), str(start.folder))
    saved = start.training()
    if networks.weights.keys() == held:
        processes.set_buffers(networks.weights.values(), saved["buffers"].to(processes.device))
    for name, optimizer in networks.optimizers.items():
        optimizer.load_state_dict(saved["optimizers"][name])
    processes.load_scaler_state(saved["scaler"])
    state.nonfinite.restore(saved.get("nonfinite", state.nonfinite.counts))
    if processes.is_main:
        state.epoch_means.sums.copy_(saved["epoch_sums"])
        state.skipped.count = saved["skipped"]


def to_save(processes: Processes, state: State, buffers: torch.Tensor) -> dict[str, Any]:
    """What a run needs beside its weights to go on."""
    return {
        "optimizers": {name: o.state_dict() for name, o in state.networks.optimizers.items()},
        "scaler": processes.scaler_state(),
        "epoch_sums": state.epoch_means.sums.cpu(),
        "skipped": state.skipped.count,
        "nonfinite": state.nonfinite.counts.cpu(),
        "buffers": buffers.cpu(),
    }


def meta_of(
    identity: Mapping[str, Any],
    processes: Processes,
    plan: shards.Plan,
    position: Position,
    means: list[evaluate.Mean],
) -> dict[str, Any]:
    """What a checkpoint says of itself; `means`: of the evaluation at its step, if any."""
    epochs, step_in_epoch = divmod(position.place, plan.steps_per_epoch)
    metrics_of = {}
    if means:
        metrics_of = {"psnr": means[-1].psnr, "ssim": means[-1].ssim, "lpips": means[-1].lpips}
    return {
        **identity,
        "epoch": epochs if step_in_epoch == 0 else epochs + 1,
        "images_seen": position.images_seen,
        "position": {
            "epochs": epochs,
            "step_in_epoch": step_in_epoch,
            "steps_per_epoch": plan.steps_per_epoch,
            "unmeasured": position.unmeasured,
        },
        "metrics": metrics_of,
        "world_size": processes.world_size,
        "mixed_precision": processes.mixed_precision,
        "versions": {
            "sr_dist": __version__,
            "torch": torch.__version__,
            "commit": _commit(),
        },
    }
