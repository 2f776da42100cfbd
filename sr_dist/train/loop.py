"""A run from top to bottom: built, gone on with, trained, measured and saved."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from sr_dist import (
    checkpoint,
    distributed,
    evaluate,
    finite,
    gan,
    generators,
    metrics,
    resuming,
    stream,
    tracking,
)
from sr_dist.config import Config
from sr_dist.distributed import Processes
from sr_dist.errors import Stopped, UserError
from sr_dist.train import building, summary
from sr_dist.train.building import Run
from sr_dist.validation import Interrupted


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to."""

    folder: Path
    means: list[evaluate.Mean]  # of the last evaluation: bicubic and the model; empty off rank 0
    skipped: int  # samples that gave way to others, over all ranks and the whole run
    protocol: dict[str, object]


def run(
    config: Config,
    dry: bool = False,
    quiet: bool = False,
    launcher: int | None = None,
    met: Callable[[], object] = lambda: None,
) -> Result | None:
    """Train as configured, from the newest checkpoint of the run if there is one.

    `dry`: check all that can be checked, say what would be done, and return None. `quiet`: without
    a live progress line. `launcher`: the process that started this one, if it hands no signal on;
    its end is taken for one. `met`: called once all processes have met, before signals ask for
    stops.

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
        met()
        saver = checkpoint.Saver(folder, keep=config.checkpoint.keep, best=config.checkpoint.best)
        with processes.watch.signals(launcher), saver:
            try:
                return _run(config, processes, saver, dry, quiet)
            except torch.OutOfMemoryError as error:
                traceback.clear_frames(error.__traceback__)  # they hold the wrapped modules
                raise UserError(
                    f"the GPU's memory does not do: {str(error).splitlines()[0]} Lower "
                    "train.global_batch_size, data.crop_size or evaluation.tile, or raise "
                    "train.accumulation_steps"
                ) from None


def _run(
    config: Config, processes: Processes, saver: checkpoint.Saver, dry: bool, quiet: bool
) -> Result | None:
    """`run`; nothing that it builds may outlive it (see `distributed.joined`)."""
    this = building.build(config, processes, saver)
    if not this.course.steps:
        assert this.inputs.start is not None, "a new run has steps"
        if processes.is_main:
            summary.say_that_it_is_done(this.inputs.start.run, this.course.epochs_done)
        if dry:
            return None
        means = _measure_again(this)
    else:
        changes = _say_what_will_be_done(this)
        with building.batches(this) as batches:
            if dry:
                begun = (this.folder / "config.yaml").exists()
                summary.say_that_it_was_dry(this.folder, begun)
                return None
            with building.claimed(this):
                means = _train(this, batches, building.tracker(this, changes), quiet)
    protocol = metrics.protocol(config.evaluation.protocol, config.data.scale)
    return Result(
        this.folder, means if processes.is_main else [], this.state.skipped.count, protocol
    )


def _measure_again(this: Run) -> list[evaluate.Mean]:
    """Of a run that has its epochs; leaves its folder as it is."""
    start, means = this.course.start, []
    networks = this.state.networks
    with this.processes.averaged_buffers(networks.weights.values()):
        if this.measures:
            tracker = tracking.Silent()
            means = this.validation.run(
                networks.evaluated(), tracker, this.course.epochs_done, start.step
            )
        this.processes.wait_for_main("evaluated")
    return means


def _say_what_will_be_done(this: Run) -> list[str]:
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


def _train(
    this: Run, batches: Iterator[stream.Batch], tracker: tracking.Tracker, quiet: bool
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
    this: Run, batches: Iterator[stream.Batch], progress: tracking.Progress, step: int
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


def _over_ranks(this: Run, scalars: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Means of the scalars, and all skipped samples."""
    skipped = torch.tensor(float(this.state.skipped.count), device=this.processes.device)
    values = this.processes.means({**scalars, "data/skipped": skipped})
    values["data/skipped"] *= this.processes.world_size
    return values


def _settle(
    this: Run,
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
        # fails there again. (Where TensorBoard has no room for a few numbers, none is left for
        # a checkpoint either.)
        measured: list[evaluate.Mean] = []
        unmeasured, interrupted = ends_epoch, False
        try:
            if ends_epoch and not (evaluates and stops):
                epoch = course.epoch(step)
                if evaluates and this.measures:
                    measured = this.validation.run(networks.evaluated(), tracker, epoch, step)
                if processes.is_main:
                    _end_epoch(this, tracker, epoch, epoch_sums, measured)
                unmeasured = False
        except Interrupted:
            interrupted = True
        finally:
            if ends_epoch and not unmeasured:
                state.epoch_means.sums.zero_()
            if processes.is_main:
                tracker.flush()  # no checkpoint is ahead of what TensorBoard has
                now = dataclasses.replace(course.at(step), unmeasured=unmeasured)
                _save(this, now, buffers, measured, logged)
        stops = stops or unmeasured
        if processes.is_main and stops:  # before any rank ends: launchers end the others then
            this.saver.finish()
            tracker.close()
            if interrupted:  # it may have been the launcher, because a rank is gone
                processes.watch.confirm("stop")
            distributed.end_attempts(timeout=60 * this.config.run.timeout_minutes)
        return measured, bool(processes.wait_for_main(f"step {step}", "stop" * stops))


def _save(
    this: Run,
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
    this: Run,
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


def _work(this: Run) -> tracking.Work:
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
    checked, loss, evaluation = this.inputs.validation, this.config.loss, 0.0
    if checked is not None:
        # Forwards and metrics, against forwards and backwards of one network or of three.
        alone = course.start.images_seen < cheap or not (
            loss.content.weight or loss.adversarial.weight
        )
        crops = checked.pixels / data.crop_size**2 * (0.5 if alone else 0.2)
        others_wait = this.config.evaluation.ranks == "main"
        evaluation = crops * (this.processes.world_size if others_wait else 1)
    return tracking.Work(
        total=course.total_images,
        done=course.start.images_seen,
        cheap=cheap,
        dearer=dearer,
        evaluations=sum(_evaluates(this.config, epoch) for epoch in epochs),
        evaluation=evaluation,
    )
