"""A training run from configuration to results, on this process's share of the work."""

from __future__ import annotations

import dataclasses
import itertools
import logging
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
    models,
    resuming,
    settings,
    shard_reader,
    shards,
    storage,
    stream,
    tracking,
    weights,
)
from sr_dist.config import Config, to_yaml
from sr_dist.degradation import Degradation
from sr_dist.distributed import Processes
from sr_dist.errors import Stopped, UserError
from sr_dist.validation import Interrupted, Validation

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to."""

    folder: Path
    means: list[evaluate.Mean]  # of the last evaluation: bicubic and the model; empty off rank 0
    skipped: int  # samples that gave way to others, over all ranks and the whole run
    protocol: dict[str, object]


def run(config: Config, dry: bool = False, quiet: bool = False) -> Result | None:
    """Train as configured, from the newest checkpoint of the run if there is one.

    `dry`: check all that can be checked, say what would be done, and return None. `quiet`: without
    a live progress line.

    Raises:
        UserError: the configuration does not fit the data, the machine or the run's checkpoint.
        Stopped: a signal came; a checkpoint has been written.
        LostRank: another rank is gone.
    """
    timeout = 60 * config.run.timeout_minutes
    with distributed.joined(
        config.train.mixed_precision,
        config.run.seed,
        timeout,
        config.train.gradient_compression,
    ) as processes:
        folder = Path(config.run.output_dir) / config.run.name / "checkpoints"
        saver = checkpoint.Saver(folder, keep=config.checkpoint.keep, best=config.checkpoint.best)
        with processes.watch.signals(), saver:
            return _run(config, processes, saver, dry, quiet)


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What a run reads, found to be as it should."""

    reading: storage.Settings
    index: shards.Index
    plan: shards.Plan
    pictures: int  # of validation; known to rank 0
    measured_on: str  # rank 0: their fingerprint, and the protocol
    identity: dict[str, Any]
    start: checkpoint.Checkpoint | None  # what the run goes on from
    first_weights: dict[str, torch.Tensor] | None  # what a new one starts from


def _check(config: Config, processes: Processes, folder: Path) -> _Inputs:
    """Look at everything that can be wrong before anything is built or written."""
    data, batch_size = config.data, config.train.global_batch_size
    if config.run.processes not in (None, processes.world_size):
        raise UserError(
            f"run.processes is {config.run.processes}, but the launcher started "
            f"{processes.world_size}; see launch/accelerate/ for configurations that start several"
        )
    if config.run.processes is None and distributed.lacks_processes(processes.world_size):
        raise UserError(
            "accelerate launch was told of several processes and started one, as it does with "
            "--cpu; see launch/accelerate/ for configurations that start several, or set "
            "run.processes=1 for one"
        )
    parts = processes.world_size * config.train.accumulation_steps
    if batch_size % parts:
        raise UserError(
            f"train.global_batch_size {batch_size} does not divide among {processes.world_size} "
            f"processes in {config.train.accumulation_steps} part(s) each; choose a multiple of "
            f"{parts}"
        )
    if config.loss.adversarial.r1_weight and processes.mixed_precision == "fp16":
        raise UserError("loss.adversarial.r1_weight loses its gradient in fp16; use bf16 or no")
    if data.decode == "nvjpeg" and processes.device.type != "cuda":
        raise UserError("data.decode=nvjpeg needs a GPU, and none is here; use data.decode=cpu")
    reading = storage.Settings(
        attempts=config.stream.attempts,
        timeout=config.stream.timeout,
        cache_dir=config.stream.cache_dir,
        cache_bytes=config.stream.cache_bytes,
    )
    index = shards.read_index(data.train, reading)
    if index.channels < data.channels:
        raise UserError(f"{data.train} holds gray pictures, but data.channels is {data.channels}")
    if config.stream.on_error == "stop":
        shards.check_size(index, data.crop_size)
    plan = shards.make_plan(
        index,
        seed=config.run.seed,
        global_batch_size=batch_size,
        crops_per_image=data.crops_per_image,
        crop_size=data.crop_size,
    )
    pictures, measured_on = 0, ""
    if processes.is_main:
        problems = shard_reader.check_files(index, reading)
        if problems and config.stream.on_error == "stop":
            more = f" ({len(problems)} shards are not as indexed)" if len(problems) > 1 else ""
            raise UserError(
                f"shard {problems[0]}{more}; write the shards again, or train on what can be read "
                "of damaged ones with stream.on_error=skip"
            )
        for problem in problems:
            log.warning("shard %s", problem)
        if data.channels == 3 and evaluate.is_gray(data.validation, reading):
            raise UserError(
                f"{data.validation} holds gray pictures alone, but data.channels is 3; validate on "
                "colour pictures, or train with data.channels 1"
            )
        checked = evaluate.check(
            data.validation,
            scale=data.scale,
            channels=data.channels,
            bits=data.bits,
            least=lpips.LEAST if config.evaluation.lpips is not None else 0,
            reading=reading,
        )
        pictures = checked.pictures
        measured_on = f"{config.evaluation.protocol} {checked.fingerprint}"
    identity = _identity(config, index, plan)
    start = resuming.find_start(folder / "checkpoints", config.run.resume, identity)
    first_weights = None
    if start is None and config.train.start_from is not None:
        first_weights = generators.load_state(Path(config.train.start_from), identity["generator"])
    return _Inputs(reading, index, plan, pictures, measured_on, identity, start, first_weights)


def _run(
    config: Config, processes: Processes, saver: checkpoint.Saver, dry: bool, quiet: bool
) -> Result | None:
    batch_size, folder = config.train.global_batch_size, saver.folder.parent
    inputs = _check(config, processes, folder)
    processes.wait_for_main("checked")
    plan, start = inputs.plan, inputs.start
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

    # Where the run stands.
    position = resuming.Position() if start is None else resuming.position_of(start, plan)
    first_step, steps_per_epoch = position.step, plan.steps_per_epoch
    total_steps = first_step + steps_per_epoch * config.train.epochs - position.place
    total_images = position.images_seen + (total_steps - first_step) * batch_size
    epoch_means = tracking.EpochMeans(processes.device)
    skipped = tracking.Skipped(0)
    skips = config.train.on_nonfinite == "skip"
    # fp16 finds its loss scale by trying: it leaves out a step now and then.
    tolerant = skips or processes.mixed_precision == "fp16"
    limit = config.train.nonfinite_in_a_row if tolerant else 1
    nonfinite = finite.Nonfinite(processes.device, limit)
    if inputs.first_weights is not None:
        for module in (networks.generator, networks.average):
            weights.load(module, inputs.first_weights, str(config.train.start_from))
    if start is not None:
        resuming.restore(start, processes, networks, epoch_means, skipped, nonfinite)
    step_of_ranks = processes.means({"first": torch.tensor(first_step, device=processes.device)})
    if step_of_ranks["first"] != first_step:
        raise UserError(
            f"rank {processes.rank} would go on from step {first_step}, others from elsewhere; "
            f"{folder} must lie on storage that all machines share"
        )
    means: list[evaluate.Mean] = []
    protocol = metrics.protocol(config.evaluation.protocol, config.data.scale)
    measures = processes.is_main or config.evaluation.ranks == "all"
    validation = _validation(config, processes, inputs.reading, measures)
    if first_step > total_steps or (first_step == total_steps and not position.unmeasured):
        done = position.place // steps_per_epoch
        if processes.is_main:
            log.info("%s has its %d epochs; raise train.epochs to train it further", folder, done)
        if measures:  # what is there, and leave the folder as it is
            means = validation.run(networks.evaluated(), tracking.Silent(), done, first_step)
        processes.wait_for_main("evaluated")
        return Result(folder, means if processes.is_main else [], skipped.count, protocol)
    changes: list[str] = []
    if processes.is_main:
        size = checkpoint.expected_bytes(networks.weights, networks.optimizers)
        free = checkpoint.check_room(folder, size, config.checkpoint.keep)
        _say_what_will_be_done(config, processes, inputs, networks, (size, free), total_images)
        if start is not None:
            log.info("going on from %s, step %d of %d", start.folder, first_step, total_steps)
            # Its own, or that of the run which run.resume names.
            changes = _changes(start.folder.resolve().parents[1] / "config.yaml", config)
            ranks = start.meta.get("world_size", processes.world_size)
            if ranks != processes.world_size:
                changes.append(f"the number of processes was {ranks}, is {processes.world_size}")
            for change in changes:
                log.info("changed since: %s", change)
    batches = _batches(config, processes, inputs, position.place)
    # Shards that cannot be read end it here. There is none where only an evaluation is left to do.
    batches = itertools.chain(list(itertools.islice(batches, 1)), batches)
    if dry:
        return None
    tracker: tracking.Tracker = tracking.Silent()
    if processes.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_whole(folder / "config.yaml", to_yaml(config))
        tracker = tracking.Tracker(
            folder,
            first_step=first_step - position.unmeasured,
            first_epoch=position.place // steps_per_epoch - position.unmeasured,
        )
        if start is None or changes:
            text = to_yaml(config)
            tracker.config(text, settings.flatten(yaml.safe_load(text)), first_step)
    work = _work(config, processes, networks, objective, position, plan, total_images)
    progress = tracking.Progress(work, visible=processes.is_main and not quiet)

    saturation = tracking.Saturation(config.loss.adversarial.kind)
    every_minutes, saved_at = config.checkpoint.every_minutes, time.monotonic()
    every_seconds = None if every_minutes is None else 60 * every_minutes

    logged: dict[str, float] = {} if start is None else start.meta.get("logged", {})

    for step in range(first_step if position.unmeasured else first_step + 1, total_steps + 1):
        processes.watch.begin(step)
        place = position.place + step - first_step
        epoch, ends_epoch = (place - 1) // steps_per_epoch + 1, place % steps_per_epoch == 0
        if step == first_step:  # the results of an epoch are to be made up for
            tracker.scalars(logged, step)
            stops, saves = processes.watch.due("stop", step), processes.watch.due("save", step)
        else:
            images_seen = position.images_seen + (step - 1 - first_step) * batch_size
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            rates = gan.apply_settings(networks, values_of["optimizer"], images_seen, total_images)
            scalars = gan.training_step(
                processes,
                networks,
                objective.at(
                    images_seen,
                    warmup_images=config.train.warmup_images,
                    ramp_images=config.train.ramp_images,
                ),
                batch.lr,
                batch.hr,
                images_seen=images_seen,
                images=batch_size,
                accumulation_steps=config.train.accumulation_steps,
                keep_statistics=skips,
            )
            epoch_means.add(scalars)
            nonfinite.add(scalars, step)
            skipped.add(batch.skipped)
            progress.advance(batch_size, waited)

            logs = ends_epoch or step % config.tracking.log_every_steps == 0
            stops = processes.watch.due("stop", step)
            saves = processes.watch.due("save", step)
            if config.checkpoint.every_steps is not None:
                saves = saves or step % config.checkpoint.every_steps == 0
            if logs or saves or stops:  # no checkpoint holds what should have stopped the run
                left_out = finite.check_updates(
                    nonfinite,
                    processes,
                    inputs.index,
                    plan,
                    inputs.reading,
                    place_of_step_0=position.place - first_step,
                )
            if logs:
                mine = torch.tensor(float(skipped.count), device=processes.device)
                values = processes.means({**scalars, "data/skipped": mine})
                values |= {
                    "data/skipped": values["data/skipped"] * processes.world_size,
                    "gradient/left_out": left_out,
                }
                saturation.look(values)
                speed = progress.report(f"{epoch}/{config.train.epochs}", values)
                learning_rates = {f"learning_rate/{name}": rate for name, rate in rates.items()}
                logged = {**values, **speed, **learning_rates}
                tracker.scalars(logged, step)
            if processes.is_main:
                saver.check()
                late = every_seconds is not None and time.monotonic() - saved_at >= every_seconds
                if late and not saves:
                    processes.watch.ask("save")

        if not (ends_epoch or saves or stops):
            continue

        evaluates = ends_epoch and _evaluates(config, epoch)
        with (
            progress.paused(evaluates),
            processes.averaged_buffers(networks.weights.values()) as buffers,
        ):
            epoch_sums = processes.sum(epoch_means.sums)
            all_skipped = processes.sum(torch.tensor(skipped.count, device=processes.device))
            finite.check_weights(networks.weights, step)
            # From here on rank 0 alone holds what all ranks have summed, as after a restart.
            epoch_means.sums.copy_(epoch_sums * processes.is_main)
            skipped.count = int(all_skipped) * processes.is_main
            # The checkpoint comes after the evaluation, so that a run killed in between repeats
            # both. An evaluation that fails, or whose results find no room, takes no training with
            # it: like one that a stop cuts short it is made up for by the run that goes on, or
            # fails there again.
            measured: list[evaluate.Mean] = []
            unmeasured = ends_epoch
            try:
                if ends_epoch and not (evaluates and stops):
                    if evaluates and measures:
                        measured = validation.run(networks.evaluated(), tracker, epoch, step)
                        means = measured
                    if processes.is_main:
                        row = (epoch, epoch_sums, measured)
                        _end_epoch(folder, config, networks, inputs.identity, tracker, *row)
                    unmeasured = False
            except Interrupted:
                pass
            finally:
                if ends_epoch and not unmeasured:
                    epoch_means.sums.zero_()
                if processes.is_main:
                    state = resuming.state_of(
                        processes, networks, epoch_means, skipped, nonfinite, buffers
                    )
                    now = resuming.Position(
                        step,
                        position.images_seen + (step - first_step) * batch_size,
                        place,
                        unmeasured,
                    )
                    meta = resuming.meta_of(inputs.identity, processes, plan, now, measured)
                    meta |= {"bits": config.data.bits, "resume": config.run.resume}
                    meta["validation"] = inputs.measured_on
                    if unmeasured:  # these points will be purged with those of the evaluation
                        meta["logged"] = logged
                    saver.start(checkpoint.snapshot(step, networks.weights, state, meta))
                    saved_at = time.monotonic()
            stops = stops or unmeasured
            if processes.is_main and stops:  # before any rank ends: launchers end the others then
                saver.finish()
                tracker.close()
                distributed.end_attempts(timeout=60 * config.run.timeout_minutes)
            stops = bool(processes.wait_for_main(f"step {step}", "stop" * stops))
        if stops:
            raise Stopped(
                f"stopped by {processes.watch.signal or 'another rank'} at step {step} of "
                f"{total_steps}; the same command goes on from there"
            )

    saver.finish()
    progress.close()
    tracker.close()
    return Result(folder, means if processes.is_main else [], skipped.count, protocol)


def _evaluates(config: Config, epoch: int) -> bool:
    return epoch % config.evaluation.every_epochs == 0 or epoch == config.train.epochs


def _work(
    config: Config,
    processes: Processes,
    networks: gan.Networks,
    objective: gan.Objective,
    position: resuming.Position,
    plan: shards.Plan,
    total_images: int,
) -> tracking.Work:
    """What is left to do, for the time that it will take."""
    data, train = config.data, config.train
    cheap, dearer = train.warmup_images, 1.0
    if position.images_seen < cheap < total_images:
        at_once = train.global_batch_size // processes.world_size // train.accumulation_steps
        shape = (at_once, data.channels, data.crop_size, data.crop_size)
        dearer = gan.relative_cost(processes, networks, objective, shape=shape, scale=data.scale)
    done = position.place // plan.steps_per_epoch - position.unmeasured
    epochs = range(done + 1, train.epochs + 1)
    return tracking.Work(
        total=total_images,
        done=position.images_seen,
        cheap=cheap,
        dearer=dearer,
        evaluations=sum(_evaluates(config, epoch) for epoch in epochs),
    )


def _validation(
    config: Config, processes: Processes, reading: storage.Settings, measures: bool
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
        reading=reading,
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


def _batches(
    config: Config, processes: Processes, inputs: _Inputs, first_step: int
) -> Iterator[stream.Batch]:
    """This rank's batches, on its device, from a step of the plan to the end of the last epoch."""
    data = config.data
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
            first_step=first_step,
            last_step=inputs.plan.steps_per_epoch * config.train.epochs,
            on_error=config.stream.on_error,
            settings=inputs.reading,
            decode=data.decode,
        ),
        num_workers=data.num_workers,
        pin_memory=processes.device.type == "cuda",
    )
    return stream.on_device(batches, processes.device, data.scale)


def _say_what_will_be_done(
    config: Config,
    processes: Processes,
    inputs: _Inputs,
    networks: gan.Networks,
    checkpoint_and_free: tuple[int, int],
    total_images: int,
) -> None:
    """`checkpoint_and_free`: bytes of a checkpoint, and free on the disk."""
    index, plan = inputs.index, inputs.plan
    log.info(
        "%s on %s, precision %s; %s parameters in the generator, %s in the discriminator; "
        "checkpoints of about %.0f MB, %.0f GB free",
        "1 process" if processes.world_size == 1 else f"{processes.world_size} processes",
        processes.device.type,
        processes.mixed_precision,
        f"{models.count_parameters(networks.generator):,}",
        f"{models.count_parameters(networks.discriminator):,}" if networks.discriminator else 0,
        checkpoint_and_free[0] / 1e6,
        checkpoint_and_free[1] / 1e9,
    )
    left_out = plan.left_out_per_epoch
    log.info(
        "training on %d samples in %d shard(s)%s, "
        "%d crop(s) of each: %d steps of %d crops an epoch; validation on %d picture(s)",
        index.samples,
        len(index.shards),
        f" ({left_out} left out of each epoch, others each time)" if left_out else "",
        plan.crops_per_image,
        plan.steps_per_epoch,
        config.train.global_batch_size,
        inputs.pictures,
    )
    for setting in _without_effect(config, total_images):
        log.warning("without effect: %s", setting)
    if index.channels > config.data.channels:
        log.info("the shards hold colour pictures, which are trained on as luma")
    if inputs.first_weights is not None:
        log.info("starting from the generator of %s", config.train.start_from)
    start = inputs.start
    if start and start.meta.get("validation", inputs.measured_on) != inputs.measured_on:
        log.info(
            "the validation pictures, or their protocol, are others than before: their PSNR is not "
            "that of earlier epochs, and `best` is chosen among checkpoints from here on"
        )


def _without_effect(config: Config, total_images: int) -> list[str]:
    """Settings that this run will not come to use."""
    found = []
    train, adversarial = config.train, config.loss.adversarial
    if not adversarial.weight:
        found += ["loss.adversarial.r1_weight, since weight is 0"] * bool(adversarial.r1_weight)
        found += ["train.ramp_images, since loss.adversarial.weight is 0"] * bool(train.ramp_images)
    others = (adversarial.weight, config.loss.content.weight, config.loss.total_variation.weight)
    if any(others) and train.warmup_images >= total_images:
        found.append(
            f"all losses but the pixel loss: the run ends after {total_images} images, and "
            f"train.warmup_images is {train.warmup_images}"
        )
    for name in ("generator", "discriminator"):
        milestones = getattr(config.optimizer, name).milestones
        if milestones and milestones[-1] >= total_images:
            found.append(f"optimizer.{name}.milestones from {total_images} on, where the run ends")
    return found


def _changes(path: Path, config: Config) -> list[str]:
    """Settings that differ from those that a run's config.yaml holds."""
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        return [f"unknown, because {path} cannot be read: {error}"]
    earlier = settings.flatten(before if isinstance(before, dict) else {})
    return [
        f"{key} was {earlier[key]}, is {value}"
        for key, value in settings.flatten(yaml.safe_load(to_yaml(config))).items()
        if key in earlier and earlier[key] != value
    ]


def _identity(config: Config, index: shards.Index, plan: shards.Plan) -> dict[str, Any]:
    """What a run cannot change on its way: its networks, and the order of its samples."""
    data, model = config.data, config.model
    return {
        "generator": {
            **dataclasses.asdict(model.generator),
            "scale": data.scale,
            "channels": data.channels,
        },
        "discriminator": (
            {**dataclasses.asdict(model.discriminator), "channels": data.channels}
            if config.loss.adversarial.weight
            else None
        ),
        "data": {"shards": index.fingerprint, "seed": plan.seed},
    }


def _end_epoch(
    folder: Path,
    config: Config,
    networks: gan.Networks,
    identity: Mapping[str, Any],
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
    name = f"{config.data.scale}x_epoch{epoch}.pth.tar"
    bits = config.data.bits if config.data.channels == 1 else None
    generators.save_published(
        networks.evaluated(), folder / "models" / f"netG_{name}", identity["generator"], bits
    )
    if networks.discriminator is not None:
        generators.save_published(
            networks.discriminator, folder / "models" / f"netD_{name}", identity["discriminator"]
        )
