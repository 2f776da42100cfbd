"""The parts of a run, as its first step or its checkpoint has them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from sr_dist import (
    checkpoint,
    files,
    finite,
    gan,
    loading,
    lpips,
    ranks,
    resuming,
    settings,
    stream,
    tiles,
    tracking,
    weights,
)
from sr_dist.config import Config, to_yaml
from sr_dist.degradation import Degradation
from sr_dist.distributed import Processes
from sr_dist.errors import UserError
from sr_dist.train import checks
from sr_dist.validation import Validation


@dataclasses.dataclass(frozen=True)
class Run:
    """What the parts of a run share."""

    config: Config
    processes: Processes
    saver: checkpoint.Saver
    inputs: checks.Inputs
    objective: gan.Objective
    optimizer: Mapping[str, Any]  # settings, for `gan.apply_settings`
    state: resuming.State
    course: resuming.Course
    measures: bool  # this rank, of the validation pictures
    validation: Validation

    @property
    def folder(self) -> Path:
        return self.saver.folder.parent


def build(config: Config, processes: Processes, saver: checkpoint.Saver) -> Run:
    """Everything, as the first step or the checkpoint has it."""
    inputs = checks.check(config, processes, saver.folder)
    processes.wait_for_main("checked")
    values_of = dataclasses.asdict(config)
    networks = gan.build_networks(
        processes,
        generator=inputs.identity["generator"],
        discriminator=inputs.identity["discriminator"],
        optimizer=values_of["optimizer"],
        half_life=config.train.ema_half_life,
        sync_batchnorm=config.train.sync_batchnorm,
        compiled=config.train.compile,
        recorded=config.train.cuda_graphs,
        factors=_factors(config, processes.mixed_precision),
    )
    objective = gan.build_objective(**values_of["loss"], device=processes.device)
    # fp16 finds its loss scale by trying: it leaves out a step now and then.
    tolerant = config.train.on_nonfinite == "skip" or processes.mixed_precision == "fp16"
    state = resuming.State(
        networks,
        tracking.EpochMeans(processes.device),
        tracking.Skipped(0),
        finite.Nonfinite(processes.device, config.train.nonfinite_in_a_row if tolerant else 1),
    )
    position = resuming.Position()
    if inputs.first_weights is not None:
        for module in (networks.generator, networks.average):
            weights.load(module, inputs.first_weights, str(config.train.start_from))
    if inputs.start is not None:
        position = resuming.position_of(inputs.start, inputs.plan)
        resuming.restore(inputs.start, processes, state)
    step = torch.tensor(float(position.step), dtype=torch.float64, device=processes.device)
    means = processes.means({"step": step, "square": step**2})
    if (means["step"], means["square"]) != (position.step, position.step**2):
        raise UserError(
            f"rank {processes.rank} would go on from step {position.step}, others from elsewhere; "
            f"{saver.folder.parent} must lie on storage that all machines share"
        )
    course = resuming.Course(
        position,
        steps_per_epoch=inputs.plan.steps_per_epoch,
        epochs=config.train.epochs,
        batch_size=config.train.global_batch_size,
    )
    measures = processes.is_main or config.evaluation.ranks == "all"
    validation = _validation(config, processes, inputs, measures)
    return Run(
        config,
        processes,
        saver,
        inputs,
        objective,
        values_of["optimizer"],
        state,
        course,
        measures,
        validation,
    )


def _factors(config: Config, mixed_precision: str) -> ranks.Factors | None:
    """For `gan.build_networks`: None where a step is recorded, compiled or differentiated twice."""
    train, adversarial = config.train, config.loss.adversarial
    if train.cuda_graphs or train.compile or adversarial.r1_weight:
        return None
    of_factor = 4 if mixed_precision == "no" else 2  # bytes of a number on its way
    of_gradient = 4 if train.gradient_compression == "none" else 2
    return ranks.Factors(train.global_batch_size, train.accumulation_steps, of_factor / of_gradient)


def evaluation_tile(config: Config, world_size: int) -> int:
    """LR pixels on a side, of a tile that has no more pixels than the HR crops trained on at once.

    Its features, extracted with its surroundings, take less memory: without gradients a few layers
    are held at once, with them all are. What is enlarged at once (see `upscale.upscale`) does too.
    """
    train, data = config.train, config.data
    at_once = train.global_batch_size // world_size // train.accumulation_steps
    return max(tiles.SMALLEST_SIDE, math.isqrt(at_once * data.crop_size**2))


def _validation(
    config: Config, processes: Processes, inputs: checks.Inputs, measures: bool
) -> Validation:
    data, evaluation = config.data, config.evaluation
    perceived = measures and evaluation.lpips is not None
    numbers = itertools.count()

    def total(values: torch.Tensor) -> torch.Tensor:
        # Shares may take longer than a collective waits.
        processes.wait_for_all(f"measured {next(numbers)}")
        return processes.sum(values.to(processes.device)).cpu()

    validation = Validation(
        data=data.validation,
        scale=data.scale,
        channels=data.channels,
        bits=data.bits,
        reading=inputs.reading,
        colour=evaluation.protocol,
        tile=evaluation.tile or evaluation_tile(config, processes.world_size),
        samples=evaluation.samples,
        lpips=lpips.build(Path(str(evaluation.lpips)), processes.device) if perceived else None,
        interrupted=lambda: processes.watch.wants("stop"),
    )
    if evaluation.ranks == "main":
        return validation
    return dataclasses.replace(
        validation,
        rank=processes.rank,
        ranks=processes.world_size,
        total=total,
    )


@contextlib.contextmanager
def batches(this: Run) -> Iterator[Iterator[stream.Batch]]:
    """This rank's batches, on its device, to the end of the last epoch; the first is read now.

    Its loader workers end with the block, whatever ends it.
    """
    data, inputs, processes = this.config.data, this.inputs, this.processes
    batches = loading.batches(
        stream.CropStream(
            index=inputs.index,
            plan=inputs.plan,
            scale=data.scale,
            channels=data.channels,
            crop_size=data.crop_size,
            bits=data.bits,
            degradation=Degradation(**dataclasses.asdict(data.degradation)),
            rank=processes.rank,
            world_size=processes.world_size,
            first_step=this.course.start.place,
            last_step=this.course.steps_per_epoch * this.course.epochs,
            on_error=this.config.stream.on_error,
            settings=inputs.reading,
            decode=data.decode,
        ),
        num_workers=data.num_workers,
        pin_memory=processes.device.type == "cuda",
    )
    with contextlib.closing(batches):
        on_device = loading.on_device(batches, processes.device, data.scale)
        # Shards that cannot be read end it here. There is none where only an evaluation is to do.
        yield itertools.chain(list(itertools.islice(on_device, 1)), on_device)


@contextlib.contextmanager
def claimed(this: Run) -> Iterator[None]:
    """From here on the run has a folder, in which no other command trains."""
    if not this.processes.is_main:
        yield
        return
    with files.claimed(this.folder):
        if checkpoint.listed(this.saver.folder) != this.inputs.listed:
            raise UserError(f"another command has trained {this.folder} meanwhile; run this again")
        yield


def tracker(this: Run, changes: list[str]) -> tracking.Tracker:
    if not this.processes.is_main:
        return tracking.Silent()
    text, start = to_yaml(this.config), this.course.start
    ours = (this.folder, this.folder / "models", this.folder / "logs")
    for folder in (*ours, *this.folder.glob("samples/*")):
        files.remove_partial(folder)
    files.write_whole(this.folder / "config.yaml", text)
    tracker = tracking.Tracker(
        this.folder,
        first_step=start.step - start.unmeasured,
        first_epoch=this.course.epochs_done,
    )
    if this.inputs.start is None or changes:
        tracker.config(text, settings.flatten(yaml.safe_load(text)), start.step)
    return tracker
