"""Everything that can be wrong with a run, looked at before anything is built or written."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch

from sr_dist import (
    checkpoint,
    distributed,
    evaluate,
    files,
    generators,
    lpips,
    resuming,
    shard_reader,
    shards,
    storage,
)
from sr_dist.checkpoint import Checkpoint
from sr_dist.config import Config
from sr_dist.distributed import Processes
from sr_dist.errors import UserError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run reads, found to be as it should."""

    reading: storage.Settings
    index: shards.Index
    plan: shards.Plan
    validation: evaluate.Checked | None  # known to rank 0
    measured_on: str  # rank 0: the fingerprint of the validation pictures, and the protocol
    identity: dict[str, Any]
    start: Checkpoint | None  # what the run goes on from
    listed: list[str]  # the checkpoints that were there when it was chosen
    first_weights: dict[str, torch.Tensor] | None  # what a new one starts from


def check(config: Config, processes: Processes, checkpoints: Path) -> Inputs:
    """Find what the run reads. `checkpoints`: the folder of its own.

    Raises:
        UserError: the configuration does not fit the data, the machine or the run's checkpoint.
    """
    data = config.data
    _check_processes(config, processes)
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
        global_batch_size=config.train.global_batch_size,
        crops_per_image=data.crops_per_image,
        crop_size=data.crop_size,
    )
    validation, measured_on = None, ""
    if processes.is_main:
        # Each crop of a step is of another shard, if there are as many.
        lanes_here = plan.global_batch_size * distributed.local_world_size() // processes.world_size
        _check_shards(config, index, reading, min(lanes_here, len(index.shards)))
        validation = _check_validation(config, reading)
        measured_on = f"{config.evaluation.protocol} {validation.fingerprint}"
        files.check_unclaimed(checkpoints.parent)
    identity = _identity(config, index, plan)
    listed = checkpoint.listed(checkpoints)
    start = resuming.find_start(checkpoints, config.run.resume, identity)
    first_weights = None
    if start is None and config.train.start_from is not None:
        first_weights = generators.load_state(Path(config.train.start_from), identity["generator"])
    return Inputs(
        reading, index, plan, validation, measured_on, identity, start, listed, first_weights
    )


def _check_processes(config: Config, processes: Processes) -> None:
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
    if config.train.global_batch_size % parts:
        raise UserError(
            f"train.global_batch_size {config.train.global_batch_size} does not divide among "
            f"{processes.world_size} processes in {config.train.accumulation_steps} part(s) each; "
            f"choose a multiple of {parts}"
        )
    if config.loss.adversarial.r1_weight and processes.mixed_precision == "fp16":
        raise UserError("loss.adversarial.r1_weight loses its gradient in fp16; use bf16 or no")
    if config.train.cuda_graphs:
        _check_graphs(config, processes)
    if config.data.decode == "nvjpeg" and processes.device.type != "cuda":
        raise UserError("data.decode=nvjpeg needs a GPU, and none is here; use data.decode=cpu")
    if config.data.decode == "nvjpeg":
        _check_nvjpeg(processes.device)


def _check_graphs(config: Config, processes: Processes) -> None:
    """A CUDA graph holds what one GPU does, and nothing that the CPU decides on the way."""
    several = processes.world_size > 1
    relativistic = config.loss.adversarial.kind == "relativistic_average"
    reasons = {
        "needs a GPU, and none is here": processes.device.type != "cuda",
        "cannot do fp16, whose scale is found by trying; use bf16 or no": (
            processes.mixed_precision == "fp16"
        ),
        "cannot do train.sync_batchnorm on several processes": (
            several and config.train.sync_batchnorm
        ),
        "cannot do relativistic_average on several processes": (
            several and relativistic and config.loss.adversarial.weight > 0
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise UserError(f"train.cuda_graphs {reason}; or leave it off")


def _check_nvjpeg(device: torch.device) -> None:
    from torchvision import io  # at need: slow to import

    tiny = io.encode_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8))
    try:
        io.decode_jpeg(tiny, device=device)
    except RuntimeError as error:
        raise UserError(
            "data.decode=nvjpeg: this torchvision does not decode on the GPU "
            f"({str(error).splitlines()[0]}); use data.decode=cpu"
        ) from None


def _check_shards(
    config: Config, index: shards.Index, reading: storage.Settings, open_at_once: int
) -> None:
    problems = shard_reader.check_files(index, reading, open_at_once)
    if problems and config.stream.on_error == "stop":
        more = f" ({len(problems)} shards are not as indexed)" if len(problems) > 1 else ""
        raise UserError(
            f"shard {problems[0]}{more}; write the shards again, or train on what can be read "
            "of damaged ones with stream.on_error=skip"
        )
    for problem in problems:
        log.warning("shard %s", problem)


def _check_validation(config: Config, reading: storage.Settings) -> evaluate.Checked:
    data = config.data
    if data.channels == 3 and evaluate.is_gray(data.validation, reading):
        raise UserError(
            f"{data.validation} holds gray pictures alone, but data.channels is 3; validate on "
            "colour pictures (without its lists tools/split_dataset.py divides anew, and with "
            "another --seed otherwise), or train with data.channels 1"
        )
    return evaluate.check(
        data.validation,
        scale=data.scale,
        channels=data.channels,
        bits=data.bits,
        least=lpips.LEAST if config.evaluation.lpips is not None else 0,
        reading=reading,
    )


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
