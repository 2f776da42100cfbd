"""Generators and discriminators by name. Plain modules: they know nothing of ranks."""

from __future__ import annotations

from types import ModuleType
from typing import Any, cast

from torch import nn
from torch.nn.utils import parametrizations

from sr_dist.models import srgan, swift_srgan, unet

# A family has a Generator, the KEYS that its state dicts alone have, and `infer`, which reads the
# generator's arguments off such a state dict; or a Discriminator; or both.
GENERATORS: dict[str, ModuleType] = {"swift_srgan": swift_srgan, "srgan": srgan}
DISCRIMINATORS: dict[str, ModuleType] = {"swift_srgan": swift_srgan, "srgan": srgan, "unet": unet}


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
    generator: nn.Module = GENERATORS[name].Generator(
        scale=scale,
        channels=channels,
        num_channels=num_channels,
        num_blocks=num_blocks,
        norm=norm,
        global_skip=global_skip,
    )
    return generator


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
    discriminator: nn.Module = DISCRIMINATORS[name].Discriminator(channels=channels, head=head)
    if spectral_norm:
        for module in list(discriminator.modules()):
            if isinstance(module, nn.Conv2d | nn.Linear):
                parametrizations.spectral_norm(module)
    return discriminator


def infer_generator(state: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `build_generator` that a state dict fits; `global_skip` is none.

    Raises:
        ValueError: the state dict is of no generator known here, or a weight has an odd shape.
    """
    for name, family in GENERATORS.items():
        if state.keys() >= family.KEYS:
            return {"name": name, **family.infer(state)}
    known = "; ".join(f"{' and '.join(sorted(f.KEYS))} ({n})" for n, f in GENERATORS.items())
    raise ValueError(f"no generator known here: it has none of {known}")


def reach(generator: nn.Module) -> tuple[int, int]:
    """LR pixels on each side that a feature depends on, and that an output pixel does on features.

    An output pixel depends on no LR pixel further away than their sum.
    """
    return cast(int, generator.reach_of_extract), cast(int, generator.reach_of_enlarge)


def count_parameters(module: nn.Module) -> int:
    """Numbers in all parameters, those that are never trained included."""
    return sum(parameter.numel() for parameter in module.parameters())
