"""One training step: the discriminator's, then the generator's, on one forward of the generator."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from sr_dist import losses
from sr_dist.distributed import Processes

Scalars = dict[str, Tensor]  # detached, on the device

# The averaged generator forgets its random start: its half-life is never more than this share of
# the images seen so far (Karras et al. 2022, EDM).
_EMA_RAMP = 0.05


@dataclasses.dataclass(frozen=True)
class Objective:
    """The generator's loss: terms and weights; a weight of 0 leaves the term out."""

    pixel: str
    pixel_weight: float
    content: nn.Module | None
    content_weight: float
    adversarial: str
    adversarial_weight: float
    total_variation: str
    total_variation_weight: float

    def pixel_only(self) -> Objective:
        """The objective of the warm-up."""
        return dataclasses.replace(
            self, content_weight=0.0, adversarial_weight=0.0, total_variation_weight=0.0
        )


def discriminator_step(
    processes: Processes,
    discriminator: nn.Module,
    optimizer: torch.optim.Optimizer,
    sr: Tensor,
    hr: Tensor,
    kind: str,
) -> Scalars:
    """Update the discriminator on `hr` and the detached `sr`, (B, C, sH, sW) float in [0, 1].

    The two pass in separate batches, each with its own BatchNorm statistics, and are
    back-propagated together.
    """
    optimizer.zero_grad(set_to_none=True)
    real, fake = discriminator(hr), discriminator(sr.detach())
    loss = losses.discriminator_adversarial(real, fake, kind)
    processes.backward(loss)
    optimizer.step()
    return {
        "loss/discriminator": loss.detach(),
        "score/hr": torch.sigmoid(real.detach()).mean(),
        "score/sr": torch.sigmoid(fake.detach()).mean(),
    }


def generator_step(
    processes: Processes,
    optimizer: torch.optim.Optimizer,
    discriminator: nn.Module | None,
    sr: Tensor,
    hr: Tensor,
    objective: Objective,
) -> Scalars:
    """Update the generator, whose output `sr` is, against the frozen discriminator.

    `discriminator`: the bare module, not DistributedDataParallel: its parameters get no gradient,
    so there is nothing to reduce.
    """
    optimizer.zero_grad(set_to_none=True)
    terms: Scalars = {}
    if objective.pixel_weight:
        terms["pixel"] = objective.pixel_weight * losses.pixel_loss(objective.pixel)(sr, hr)
    if objective.content_weight:
        assert objective.content is not None
        with processes.autocast():
            terms["content"] = objective.content_weight * objective.content(sr, hr)
    if objective.adversarial_weight:
        assert discriminator is not None
        discriminator.requires_grad_(False)
        with processes.autocast():
            fake = discriminator(sr)
        discriminator.requires_grad_(True)
        terms["adversarial"] = objective.adversarial_weight * losses.generator_adversarial(
            fake.float(), objective.adversarial
        )
    if objective.total_variation_weight:
        terms["total_variation"] = objective.total_variation_weight * losses.total_variation(
            sr, objective.total_variation
        )
    loss = torch.stack(list(terms.values())).sum()
    processes.backward(loss)
    optimizer.step()
    scalars = {f"loss/{name}": term.detach() for name, term in terms.items()}
    return {"loss/generator": loss.detach(), **scalars}


@torch.no_grad()
def update_average(
    average: nn.Module, generator: nn.Module, *, half_life: float, images_seen: int, images: int
) -> None:
    """Move `average`, BatchNorm statistics included, towards `generator` after `images` more."""
    half_life = min(half_life, max(images_seen, 1) * _EMA_RAMP)
    share = 1 - 0.5 ** (images / half_life)
    pairs = list(zip(average.state_dict().values(), generator.state_dict().values(), strict=True))
    floating = [pair for pair in pairs if pair[0].is_floating_point()]
    torch._foreach_lerp_([a for a, _ in floating], [b for _, b in floating], share)
    for mine, theirs in pairs:
        if not mine.is_floating_point():
            mine.copy_(theirs)


def learning_rate(peak: float, schedule: str, images_seen: int, total_images: int) -> float:
    """`constant`, or `cosine`: half a period, from `peak` to 0 at `total_images`."""
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, images_seen / total_images)))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
