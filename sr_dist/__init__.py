"""Distributed training of image super-resolution GANs from streamed tar shards."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

__version__ = "0.1.0"


def load(path_or_repo: str | Path, revision: str | None = None) -> nn.Module:
    """A trained generator to use: `sr = sr_dist.load("owner/name")(lr)`.

    On the CPU, in evaluation mode; its parameters want no gradients.

    `path_or_repo`: a model of the package (`swift_srgan_x4`), a run's folder, one of its
    checkpoints, a `.pth.tar` in the published format, an exported folder or `.safetensors` file, or
    a Hugging Face repository (`owner/name`; `revision` is its branch, tag or commit).

    `lr`: (N, C, H, W) float32 in [0, 1], RGB or gray; `sr`: (N, C, sH, sW), s being the
    generator's `scale`, nominally in [0, 1]: clamp it before pictures are made of it.

    Raises:
        sr_dist.errors.UserError: there is no generator, or its weights do not fit.
    """
    from sr_dist import generators  # here, so that `import sr_dist` does not load torch

    generator, _ = generators.load(path_or_repo, revision)
    return generator.requires_grad_(False)
