"""A run from top to bottom: built, gone on with, trained, measured and saved."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from sr_dist import (
    checkpoint,
    distributed,
    evaluate,
    files,
    finite,
    gan,
    generators,
    lpips,
    metrics,
    resuming,
    settings,
    stream,
    tracking,
    weights,
)
from sr_dist.config import Config, to_yaml
from sr_dist.degradation import Degradation
from sr_dist.distributed import Processes
from sr_dist.errors import Stopped, UserError
from sr_dist.train import checks, summary
from sr_dist.validation import Interrupted, Validation


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to."""

    folder: Path
    means: list[evaluate.Mean]  # of the last evaluation: bicubic and the model; empty off rank 0
    skipped: int  # samples that gave way to others, over all ranks and the whole run
    protocol: dict[str, object]


@dataclasses.dataclass(frozen=True)
class _Run:
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


def run(config: Config, dry: bool = False, quiet: bool = False) -> Result | None:
    """Train as configured, from the newest checkpoint of the run if there is one.

    `dry`: check all that can be checked, say what would be done, and return None. `quiet`: without
    a live progress line.

    Raises:
        UserError: the configuration does not fit the data, the machine or the run's checkpoint.
        Stopped: a signal came; a checkpoint has been written.
        LostRank: another rank is gone.
    """
    folder = Path(config.run.output_dir) / config.run.name / "checkpoints"
    with distributed.joined(
        config.train.mixed_precision,
        config.run.seed,
        60 * config.run.timeout_minutes,
        config.train.gradient_compression,
    ) as processes:
        saver = checkpoint.Saver(folder, keep=config.checkpoint.keep, best=config.checkpoint.best)
        with processes.watch.signals(), saver:
            return _run(config, processes, saver, dry, quiet)


def _run(
    config: Config, processes: Processes, saver: checkpoint.Saver, dry: bool, quiet: bool
) -> Result | None:
    """`run`; nothing that it builds may outlive it (see `distributed.joined`)."""
    this = _build(config, processes, saver)
    if not this.course.steps:
        means = _measure_again(this)
    else:
        changes = _say_what_will_be_done(this)
        with _batches(this) as batches:
            if dry:
                summary.say_that_it_was_dry(this.folder)
                return None
            means = _train(this, batches, _tracker(this, changes), quiet)
    protocol = metrics.protocol(config.evaluation.protocol, config.data.scale)
    return Result(
        this.folder, means if processes.is_main else [], this.state.skipped.count, protocol
    )


def _build(config: Config, processes: Processes, saver: checkpoint.Saver) -> _Run:
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
    return _Run(
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
        tile=evaluation.tile,
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


def _measure_again(this: _Run) -> list[evaluate.Mean]:
    """Of a run that has its epochs; leaves its folder as it is."""
    start, means = this.course.start, []
    done = start.place // this.course.steps_per_epoch
    if this.processes.is_main:
        summary.say_that_it_is_done(this.folder, done)
    networks = this.state.networks
    with this.processes.averaged_buffers(networks.weights.values()):
        if this.measures:
            tracker = tracking.Silent()
            means = this.validation.run(networks.evaluated(), tracker, done, start.step)
        this.processes.wait_for_main("evaluated")
    return means


def _say_what_will_be_done(this: _Run) -> list[str]:
    """Returns the settings that a run which goes on has changed."""
    if not this.processes.is_main:
        return []
    networks = this.state.networks
    size = checkpoint.expected_bytes(networks.weights, networks.optimizers)
    return summary.say(
        this.config,
        this.processes,
        this.inputs,
        networks,
        this.course,
        checkpoint_bytes=size,
        free_bytes=checkpoint.check_room(this.folder, size, this.config.checkpoint.keep),
    )


@contextlib.contextmanager
def _batches(this: _Run) -> Iterator[Iterator[stream.Batch]]:
    """This rank's batches, on its device, to the end of the last epoch; the first is read now.

    Its loader workers end with the block, whatever ends it.
    """
    data, inputs, processes = this.config.data, this.inputs, this.processes
    batches = stream.batches(
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
        on_device = stream.on_device(batches, processes.device, data.scale)
        # Shards that cannot be read end it here. There is none where only an evaluation is to do.
        yield itertools.chain(list(itertools.islice(on_device, 1)), on_device)


def _tracker(this: _Run, changes: list[str]) -> tracking.Tracker:
    """From here on the run has a folder."""
    if not this.processes.is_main:
        return tracking.Silent()
    text, start = to_yaml(this.config), this.course.start
    this.folder.mkdir(parents=True, exist_ok=True)
    files.write_whole(this.folder / "config.yaml", text)
    tracker = tracking.Tracker(
        this.folder,
        first_step=start.step - start.unmeasured,
        first_epoch=this.course.epochs_done,
    )
    if this.inputs.start is None or changes:
        tracker.config(text, settings.flatten(yaml.safe_load(text)), start.step)
    return tracker


def _train(
    this: _Run, batches: Iterator[stream.Batch], tracker: tracking.Tracker, quiet: bool
) -> list[evaluate.Mean]:
    """All steps. Returns the last evaluation."""
    config, processes, course, state = this.config, this.processes, this.course, this.state
    progress = tracking.Progress(_work(this), visible=processes.is_main and not quiet)
    saturation = tracking.Saturation(config.loss.adversarial.kind)
    start = this.inputs.start
    logged: Mapping[str, float] = {} if start is None else start.meta.get("logged", {})
    means: list[evaluate.Mean] = []
    this.saver.restart_clock()
    for step in course.steps:
        processes.watch.begin(step)
        ends_epoch = course.ends_epoch(step)
        if step == course.start.step:  # the results of an epoch are to be made up for
            tracker.scalars(logged, step)
            stops, saves = processes.watch.due("stop", step), processes.watch.due("save", step)
        else:
            scalars, rates = _update(this, batches, progress, step)
            logs = ends_epoch or step % config.tracking.log_every_steps == 0
            stops, saves = processes.watch.due("stop", step), processes.watch.due("save", step)
            if config.checkpoint.every_steps is not None:
                saves = saves or step % config.checkpoint.every_steps == 0
            if logs or saves or stops:  # no checkpoint holds what should have stopped the run
                left_out = finite.check_updates(
                    state.nonfinite,
                    processes,
                    this.inputs.index,
                    this.inputs.plan,
                    this.inputs.reading,
                    place_of_step_0=course.at(0).place,
                )
            if logs:
                values = _over_ranks(this, scalars) | {"gradient/left_out": float(left_out)}
                saturation.look(values)
                speed = progress.report(f"{course.epoch(step)}/{course.epochs}", values)
                logged = {**values, **speed, **rates}
                tracker.scalars(logged, step)
            if processes.is_main:
                this.saver.check()
                if not saves and this.saver.is_due(config.checkpoint.every_minutes):
                    processes.watch.ask("save")
        if ends_epoch or saves or stops:
            evaluates = ends_epoch and _evaluates(config, course.epoch(step))
            with progress.paused(evaluates):
                measured, stops = _settle(this, tracker, step, evaluates, stops, logged)
            means = measured or means
            if stops:
                raise Stopped(
                    f"stopped by {processes.watch.signal or 'another rank'} at step {step} of "
                    f"{course.last_step}; the same command goes on from there"
                )
    this.saver.finish()
    progress.close()
    tracker.close()
    return means


def _update(
    this: _Run, batches: Iterator[stream.Batch], progress: tracking.Progress, step: int
) -> tuple[Mapping[str, torch.Tensor], dict[str, float]]:
    """One step of both networks: this rank's scalars, on the device, and the learning rates."""
    train, state, batch_size = this.config.train, this.state, this.course.batch_size
    images_seen = this.course.at(step - 1).images_seen
    asked = time.perf_counter()
    batch = next(batches)
    waited = time.perf_counter() - asked
    rates = gan.apply_settings(
        state.networks, this.optimizer, images_seen, this.course.total_images
    )
    scalars = gan.training_step(
        this.processes,
        state.networks,
        this.objective.at(
            images_seen, warmup_images=train.warmup_images, ramp_images=train.ramp_images
        ),
        batch.lr,
        batch.hr,
        images_seen=images_seen,
        images=batch_size,
        accumulation_steps=train.accumulation_steps,
        keep_statistics=train.on_nonfinite == "skip",
    )
    state.epoch_means.add(scalars)
    state.nonfinite.add(scalars, step)
    state.skipped.add(batch.skipped)
    progress.advance(batch_size, waited)
    return scalars, {f"learning_rate/{name}": rate for name, rate in rates.items()}


def _over_ranks(this: _Run, scalars: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Means of the scalars, and all skipped samples."""
    skipped = torch.tensor(float(this.state.skipped.count), device=this.processes.device)
    values = this.processes.means({**scalars, "data/skipped": skipped})
    values["data/skipped"] *= this.processes.world_size
    return values


def _settle(
    this: _Run,
    tracker: tracking.Tracker,
    step: int,
    evaluates: bool,
    stops: bool,
    logged: Mapping[str, float],
) -> tuple[list[evaluate.Mean], bool]:
    """Evaluate where an epoch ends, and save.

    Returns what has been measured, and whether all ranks are to stop. `stops`: whether this one is.
    """
    processes, course, state = this.processes, this.course, this.state
    networks, ends_epoch = state.networks, course.ends_epoch(step)
    with processes.averaged_buffers(networks.weights.values()) as buffers:
        epoch_sums = processes.sum(state.epoch_means.sums)
        skipped = torch.tensor(state.skipped.count, device=processes.device)
        skipped = processes.sum(skipped)
        finite.check_weights(networks.weights, step)
        # From here on rank 0 alone holds what all ranks have summed, as after a restart.
        state.epoch_means.sums.copy_(epoch_sums * processes.is_main)
        state.skipped.count = int(skipped) * processes.is_main
        # The checkpoint comes after the evaluation, so that a run killed in between repeats
        # both. An evaluation that fails, or whose results find no room, takes no training with
        # it: like one that a stop cuts short it is made up for by the run that goes on, or
        # fails there again.
        measured: list[evaluate.Mean] = []
        unmeasured = ends_epoch
        try:
            if ends_epoch and not (evaluates and stops):
                epoch = course.epoch(step)
                if evaluates and this.measures:
                    measured = this.validation.run(networks.evaluated(), tracker, epoch, step)
                if processes.is_main:
                    _end_epoch(this, tracker, epoch, epoch_sums, measured)
                unmeasured = False
        except Interrupted:
            pass
        finally:
            if ends_epoch and not unmeasured:
                state.epoch_means.sums.zero_()
            if processes.is_main:
                now = dataclasses.replace(course.at(step), unmeasured=unmeasured)
                _save(this, now, buffers, measured, logged)
        stops = stops or unmeasured
        if processes.is_main and stops:  # before any rank ends: launchers end the others then
            this.saver.finish()
            tracker.close()
            distributed.end_attempts(timeout=60 * this.config.run.timeout_minutes)
        return measured, bool(processes.wait_for_main(f"step {step}", "stop" * stops))


def _save(
    this: _Run,
    now: resuming.Position,
    buffers: torch.Tensor,
    measured: list[evaluate.Mean],
    logged: Mapping[str, float],
) -> None:
    """Begin to write a checkpoint."""
    meta = resuming.meta_of(this.inputs.identity, this.processes, this.inputs.plan, now, measured)
    meta |= {"bits": this.config.data.bits, "resume": this.config.run.resume}
    meta["validation"] = this.inputs.measured_on
    if now.unmeasured:  # these points will be purged with those of the evaluation
        meta["logged"] = logged
    saved = resuming.to_save(this.processes, this.state, buffers)
    this.saver.start(checkpoint.snapshot(now.step, this.state.networks.weights, saved, meta))


def _end_epoch(
    this: _Run,
    tracker: tracking.Tracker,
    epoch: int,
    epoch_sums: torch.Tensor,
    means: list[evaluate.Mean],
) -> None:
    """The row of the CSV, and the networks in the published format."""
    tracker.epoch(
        {
            "Epoch": epoch,
            **tracking.epoch_row(epoch_sums),
            "PSNR": means[-1].psnr if means else "",
            "SSIM": means[-1].ssim if means else "",
        }
    )
    data, identity, networks = this.config.data, this.inputs.identity, this.state.networks
    folder, name = this.folder / "models", f"{data.scale}x_epoch{epoch}.pth.tar"
    bits = data.bits if data.channels == 1 else None
    generators.save_published(
        networks.evaluated(), folder / f"netG_{name}", identity["generator"], bits
    )
    if networks.discriminator is not None:
        generators.save_published(
            networks.discriminator, folder / f"netD_{name}", identity["discriminator"]
        )


def _evaluates(config: Config, epoch: int) -> bool:
    return epoch % config.evaluation.every_epochs == 0 or epoch == config.train.epochs


def _work(this: _Run) -> tracking.Work:
    """What is left to do, for the time that it will take."""
    data, train, course = this.config.data, this.config.train, this.course
    cheap, dearer = train.warmup_images, 1.0
    if course.start.images_seen < cheap < course.total_images:
        at_once = course.batch_size // this.processes.world_size // train.accumulation_steps
        shape = (at_once, data.channels, data.crop_size, data.crop_size)
        dearer = gan.relative_cost(
            this.processes, this.state.networks, this.objective, shape=shape, scale=data.scale
        )
    epochs = range(course.epochs_done + 1, course.epochs + 1)
    return tracking.Work(
        total=course.total_images,
        done=course.start.images_seen,
        cheap=cheap,
        dearer=dearer,
        evaluations=sum(_evaluates(this.config, epoch) for epoch in epochs),
    )
