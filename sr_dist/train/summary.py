"""What rank 0 says of a run before its first step."""

from __future__ import annotations

import logging
from pathlib import Path

import yaml

from sr_dist import gan, machine, models, resuming, settings
from sr_dist.config import Config, to_yaml
from sr_dist.distributed import Processes
from sr_dist.train.checks import Inputs

log = logging.getLogger(__name__)


def say(
    config: Config,
    processes: Processes,
    inputs: Inputs,
    networks: gan.Networks,
    course: resuming.Course,
    *,
    checkpoint_bytes: int,
    free_bytes: int,
) -> list[str]:
    """What will be done, on what. Returns the settings that a run which goes on has changed."""
    index, plan, start = inputs.index, inputs.plan, inputs.start
    log.info(
        "%s on %s, precision %s; %s parameters in the generator, %s in the discriminator; "
        "checkpoints of about %.0f MB, %.0f GB free",
        "1 process" if processes.world_size == 1 else f"{processes.world_size} processes",
        processes.device.type,
        processes.mixed_precision,
        f"{models.count_parameters(networks.generator):,}",
        f"{models.count_parameters(networks.discriminator):,}" if networks.discriminator else 0,
        checkpoint_bytes / 1e6,
        free_bytes / 1e9,
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
        0 if inputs.validation is None else inputs.validation.pictures,
    )
    if processes.mixed_precision == "bf16" and not machine.has_bf16(processes.device):
        log.warning(
            "train.mixed_precision bf16: this machine does not compute in it and emulates it, "
            "slower than no (fp32)"
        )
    for setting in _without_effect(config, course.total_images):
        log.warning("without effect: %s", setting)
    if index.channels > config.data.channels:
        log.info("the shards hold colour pictures, which are trained on as luma")
    if inputs.first_weights is not None:
        log.info("starting from the generator of %s", config.train.start_from)
    if start is None:
        return []
    if start.meta.get("validation", inputs.measured_on) != inputs.measured_on:
        log.info(
            "the validation pictures, or their protocol, are others than before: their PSNR is not "
            "that of earlier epochs, and `best` is chosen among checkpoints from here on"
        )
    log.info("going on from %s, step %d of %d", start.folder, start.step, course.last_step)
    # Its own, or that of the run which run.resume names.
    changes = _changes(start.run / "config.yaml", config)
    ranks = start.meta.get("world_size", processes.world_size)
    if ranks != processes.world_size:
        changes.append(f"the number of processes was {ranks}, is {processes.world_size}")
    precision = start.meta.get("mixed_precision", processes.mixed_precision)
    if precision != processes.mixed_precision:  # which the launcher may have been told
        changes.append(f"mixed precision was {precision}, is {processes.mixed_precision}")
    for change in changes:
        log.info("changed since its last start: %s", change)
    return changes


def say_that_it_is_done(folder: Path, epochs: int) -> None:
    log.info(
        "%s has its %d epoch(s); raise train.epochs to train it further: as it is, it is only "
        "measured again",
        folder,
        epochs,
    )


def say_that_it_was_dry(folder: Path, begun: bool) -> None:
    rest = "is as it was" if begun else "has not been begun"
    log.info("all is as it should be; the run's folder is %s, and it %s", folder, rest)


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
