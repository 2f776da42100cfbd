"""Trains two GAN steps on this rank's rows of fixed batches, for every way of training below.

Rank 0 saves what came of it: equal_steps.py OUTPUT.pt

In double precision, so that what is not equal stands out: in single precision AdamW and BatchNorm
enlarge rounding to the size of a step wherever a gradient, or a contrast, is nearly nothing.
"""

import dataclasses
import sys

import torch

from sr_dist import config, distributed, gan, ranks, tensors
from sr_dist.models import unet

single = tensors.to_float
tensors.to_float = lambda batch: single(batch).double()
torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
torch.set_default_dtype(torch.float64)
unet._WIDTH = 16  # of 64: the same layers, in a third of the time
ROWS, STEPS, RATE = 4, 2, 1e-4
WITHOUT_BATCHNORM = ("none", {"name": "unet"}, False)
# (settings of the loss, settings of the optimisers, parts of a batch, networks)
WAYS = {
    "all terms": (
        {
            "content": config.Content(weights="none", weight=0.1),
            "adversarial": config.Adversarial(kind="bce", weight=0.1, label_smoothing=0.1),
            "total_variation": config.TotalVariation(weight=1e-3),
        },
        {},
        1,
        WITHOUT_BATCHNORM,
    ),
    "clipping, in two parts": (
        {
            "content": config.Content(weight=0.0),
            "adversarial": config.Adversarial(kind="hinge", weight=0.1),
        },
        {"clip_norm": 0.01},
        2,
        WITHOUT_BATCHNORM,
    ),
    "BatchNorm and averages of all ranks, with R1": (
        {
            "content": config.Content(weight=0.0),
            "adversarial": config.Adversarial(
                kind="relativistic_average", weight=0.1, r1_weight=1.0
            ),
        },
        {},
        1,
        ("batch", {"name": "swift_srgan", "head": "gap"}, True),
    ),
    "BatchNorm of all ranks, and factors": (
        {
            "content": config.Content(weight=0.0),
            "adversarial": config.Adversarial(kind="bce", weight=0.1),
        },
        {},
        1,
        ("batch", {"name": "swift_srgan", "head": "linear"}, True),
    ),
}


def train(processes: distributed.Processes, way: str) -> dict[str, torch.Tensor]:
    loss, changes, parts, (norm, discriminator, sync_batchnorm) = WAYS[way]
    adamw = dataclasses.asdict(config.AdamW(learning_rate=RATE, **changes))
    sends_factors = "factors" in way and processes.world_size > 1
    torch.manual_seed(0)
    networks = gan.build_networks(
        processes,
        generator={
            "name": "swift_srgan",
            "scale": 4,
            "channels": 3,
            "num_channels": 8,
            "num_blocks": 1,
            "norm": norm,
        },
        discriminator={**discriminator, "channels": 3},
        optimizer={"generator": adamw, "discriminator": adamw},
        half_life=20,
        sync_batchnorm=sync_batchnorm,
        factors=ranks.Factors(ROWS, parts) if sends_factors else None,
    )
    objective = gan.build_objective(
        **dataclasses.asdict(config.Loss(**loss)), device=processes.device
    )
    before = networks.generator.state_dict()
    before = {key: value.detach().clone() for key, value in before.items()}
    random = torch.Generator().manual_seed(7)
    each = ROWS // processes.world_size
    mine = slice(each * processes.rank, each * (processes.rank + 1))
    for step in range(STEPS):
        hr = torch.randint(256, (ROWS, 3, 32, 32), generator=random, dtype=torch.uint8)[mine]
        gan.apply_settings(networks, {n: adamw for n in networks.optimizers}, ROWS * step, 100)
        gan.training_step(
            processes,
            networks,
            objective.at(ROWS * step, warmup_images=0, ramp_images=2 * ROWS),
            hr[..., ::4, ::4].contiguous(),
            hr,
            images_seen=ROWS * step,
            images=ROWS,
            accumulation_steps=parts if processes.world_size <= ROWS // parts else 1,
        )
    after = {
        f"{name}.{key}": value.detach().clone()
        for name, module in networks.weights.items()
        for key, value in module.state_dict().items()
    }
    return after | {f"before.{key}": value for key, value in before.items()}


with distributed.joined("no", seed=0) as processes:
    found = {way: train(processes, way) for way in WAYS}
    if processes.is_main:
        torch.save({"world_size": processes.world_size, **found}, sys.argv[1])
