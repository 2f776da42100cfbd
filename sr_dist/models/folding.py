"""A generator without its BatchNorm: the same function in fewer operations."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sr_dist import models


def fold_batch_norm(generator: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose convolutions do the work of the BatchNorm behind them.

    `generator`: one that `models.build_generator` made, on any device, of any floating dtype. It is
    left as it is. The copy is what `build_generator` makes with `norm="none"` and is saved and
    loaded as such. Its output is that of `generator.eval()` up to rounding. A generator without
    BatchNorm comes back as a plain copy.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in generator.modules()):
        return copy.deepcopy(generator).eval()
    state = generator.state_dict()
    arguments = {**models.infer_generator(state), "global_skip": generator.global_skip}
    some = next(generator.parameters())
    with torch.device("meta"):  # neither time nor random numbers for weights that are replaced
        folded = models.build_generator(**{**arguments, "norm": "none"})
    folded.to_empty(device=some.device).to(some.dtype)
    convolution = ""
    for name, module in generator.named_modules():
        if isinstance(module, nn.Conv2d):
            convolution = name  # in every family a BatchNorm is defined right behind its own
        elif isinstance(module, nn.BatchNorm2d):
            _fold(state, convolution, name, module.eps)
    for name, value in folded.state_dict().items():
        if name.endswith(".depthwise.bias"):  # two steps before the BatchNorm: it does nothing
            state.setdefault(name, torch.zeros_like(value))
    folded.load_state_dict(state)
    return folded.eval()


def _fold(state: dict[str, Tensor], convolution: str, norm: str, eps: float) -> None:
    """Replace the entries of `norm` in `state` by other ones of `convolution`.

    norm(w * x + b) = (gain w) * x + (gain (b - mean) + shift), a gain and a shift per channel. In
    float64, so that no more is lost than by the rounding to what is stored.
    """
    weight = state[f"{convolution}.weight"]
    gain = state.pop(f"{norm}.weight").double()
    gain = gain / (state.pop(f"{norm}.running_var").double() + eps).sqrt()
    shift, mean = state.pop(f"{norm}.bias").double(), state.pop(f"{norm}.running_mean").double()
    del state[f"{norm}.num_batches_tracked"]
    bias = state.get(f"{convolution}.bias", torch.zeros_like(mean)).double()
    state[f"{convolution}.weight"] = (weight * gain.view(-1, 1, 1, 1)).to(weight.dtype)
    state[f"{convolution}.bias"] = (gain * (bias - mean) + shift).to(weight.dtype)
