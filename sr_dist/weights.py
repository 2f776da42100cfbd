"""Files of weights: read without trusting them, fitted with a message that helps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sr_dist.errors import UserError


def read(path: Path) -> Any:
    """What `torch.save` wrote: tensors, numbers, texts and containers of them; nothing is executed.

    Raises:
        UserError: it is something else, or damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # unpickling raises whatever the bytes provoke
        if "Unsupported global" in str(error):
            reason = "it holds Python objects, which are not loaded because they could run code"
        else:
            reason = "it is damaged, or was not written by torch.save"
        raise UserError(f"{path} cannot be read as weights: {reason}") from None


def load(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """`module.load_state_dict`, strictly.

    Raises:
        UserError: naming the first key that is missing, unexpected or of another shape.
    """
    own = module.state_dict()
    for key in [*own, *(key for key in state if key not in own)]:
        if key not in state:
            raise UserError(f"{where}: weights lack {key}; they are of another model")
        if key not in own:
            raise UserError(f"{where}: weights hold {key}, which the model does not have")
        if not isinstance(state[key], Tensor):
            raise UserError(f"{where}: {key} is no tensor but {type(state[key]).__name__}")
        if state[key].shape != own[key].shape:
            raise UserError(
                f"{where}: {key} has shape {tuple(state[key].shape)}, the model's has "
                f"{tuple(own[key].shape)}; they differ in width, depth, scale or channels"
            )
    module.load_state_dict(state)


def contiguous(module: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU, in the memory order that files of weights have."""
    return {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
