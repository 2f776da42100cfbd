"""Generators and discriminators by name. Plain modules: they know nothing of ranks."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.nn.utils import parametrizations

from sr_dist.models import srgan, swift_srgan, unet

GENERATORS = {"swift_srgan": swift_srgan.Generator, "srgan": srgan.Generator}


def build_generator(
    name: str,
    *,
    scale: int,
    channels: int,
    num_channels: int = 64,
    num_blocks: int = 16,
    norm: str = "batch",
    global_skip: str = "none",
) -> nn.Module:
    """A generator (N, channels, H, W) → (N, channels, scale·H, scale·W), both nominally in [0, 1].

    `name`: a key of `GENERATORS`. Every generator is two steps, `enlarge(extract(lr), lr)`:
    features (N, num_channels, H, W), then SR; see `reach`.
    """
    return GENERATORS[name](
        scale=scale,
        channels=channels,
        num_channels=num_channels,
        num_blocks=num_blocks,
        norm=norm,
        global_skip=global_skip,
    )


def build_discriminator(
    name: str, *, channels: int, head: str = "linear", spectral_norm: bool = False
) -> nn.Module:
    """A discriminator (N, channels, H, W) in [0, 1] → logits; H and W from 32 up.

    `name`: swift_srgan or srgan, logits (N, 1) by `head` (linear or gap); unet, logits
    (N, 1, H, W) and no head. `spectral_norm` (Miyato et al., arXiv 1802.05957): of every
    convolution and linear layer; unet has its own.
    """
    if name == "unet":
        return unet.Discriminator(channels=channels)
    family = {"swift_srgan": swift_srgan.Discriminator, "srgan": srgan.Discriminator}[name]
    discriminator: nn.Module = family(channels=channels, head=head)
    if spectral_norm:
        for module in list(discriminator.modules()):
            if isinstance(module, nn.Conv2d | nn.Linear):
                parametrizations.spectral_norm(module)
    return discriminator


def infer_generator(state: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `build_generator` that a state dict fits; `global_skip` is none.

    Raises:
        ValueError: the state dict is of no generator known here.
    """
    if "initial.cnn.depthwise.weight" in state:
        return {"name": "swift_srgan", **swift_srgan.infer(state)}
    if "initial.0.weight" in state and "middle.0.weight" in state:
        return {"name": "srgan", **srgan.infer(state)}
    raise ValueError(
        "no generator known here: neither initial.cnn.depthwise.weight (swift_srgan) nor "
        "initial.0.weight and middle.0.weight (srgan) is in it"
    )


def reach(generator: nn.Module) -> tuple[int, int]:
    """LR pixels on each side that a feature depends on, and that an output pixel does on features.

    An output pixel depends on no LR pixel further away than their sum.
    """
    return cast(int, generator.reach_of_extract), cast(int, generator.reach_of_enlarge)


def count_parameters(module: nn.Module) -> int:
    """Numbers in all parameters, those that are never trained included."""
    return sum(parameter.numel() for parameter in module.parameters())
