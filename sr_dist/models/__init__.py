"""Generators and discriminators by name. Plain modules: they know nothing of ranks."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from sr_dist.models import swift_srgan


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

    Every generator has `reach`: the LR pixels on each side that one output pixel depends on.
    """
    generators = {"swift_srgan": swift_srgan.Generator}
    return generators[name](
        scale=scale,
        channels=channels,
        num_channels=num_channels,
        num_blocks=num_blocks,
        norm=norm,
        global_skip=global_skip,
    )


def build_discriminator(name: str, *, channels: int, head: str = "linear") -> nn.Module:
    """A discriminator (N, channels, H, W) in [0, 1] → logits (N, 1); H and W from 32 up."""
    discriminators = {"swift_srgan": swift_srgan.Discriminator}
    return discriminators[name](channels=channels, head=head)


def infer_generator(state: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `build_generator` that a published state dict fits; `global_skip` is none.

    Raises:
        ValueError: the state dict is of no generator known here.
    """
    if "initial.cnn.depthwise.weight" not in state:
        raise ValueError("no Swift-SRGAN generator: it lacks initial.cnn.depthwise.weight")
    return {"name": "swift_srgan", **swift_srgan.infer(state)}


def reach(generator: nn.Module) -> int:
    """See `build_generator`."""
    return cast(int, generator.reach)


def count_parameters(module: nn.Module) -> int:
    """Numbers in all parameters, those that are never trained included."""
    return sum(parameter.numel() for parameter in module.parameters())
