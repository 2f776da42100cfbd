"""The generator's and the discriminator's losses. Pictures are (N, C, H, W) float in [0, 1]."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from sr_dist import weights as weights_files
from sr_dist.errors import UserError

log = logging.getLogger(__name__)

Loss = Callable[[Tensor, Tensor], Tensor]

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


def pixel_loss(kind: str) -> Loss:
    """Mean distance of SR (first) from HR (second): `mse` or `l1`."""
    return {"mse": F.mse_loss, "l1": F.l1_loss}[kind]


def total_variation(sr: Tensor, kind: str) -> Tensor:
    """Differences of neighbouring pixels, averaged down and across, the two summed.

    `l1`: absolute differences. `l2`: squared differences, and the sum doubled, as published.
    """
    down = sr[..., 1:, :] - sr[..., :-1, :]
    right = sr[..., :, 1:] - sr[..., :, :-1]
    if kind == "l1":
        return down.abs().mean() + right.abs().mean()
    return 2 * (down.square().mean() + right.square().mean())


def generator_adversarial(fake: Tensor, kind: str) -> Tensor:
    """What the generator pays for D's logits on SR, (N, 1).

    `linear`: mean(1 - sigmoid(D)), the published Swift-SRGAN form. `bce`: -log sigmoid(D), the
    non-saturating form of Goodfellow et al. (2014) and SRGAN.
    """
    if kind == "linear":
        return (1 - torch.sigmoid(fake)).mean()
    return F.softplus(-fake).mean()


def discriminator_adversarial(real: Tensor, fake: Tensor, kind: str) -> Tensor:
    """What the discriminator pays for its logits on HR and SR, (N, 1) each.

    `linear`: 1 - mean sigmoid(D(HR)) + mean sigmoid(D(SR)), the published form. `bce`: binary
    cross-entropy with HR as 1 and SR as 0.
    """
    if kind == "linear":
        return 1 - torch.sigmoid(real).mean() + torch.sigmoid(fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


class ContentLoss(nn.Module):
    """Mean squared distance of MobileNetV2's last feature maps (Swift-SRGAN, section 3).

    The network is frozen and in evaluation mode; the gradient flows through it to SR alone.
    `normalize`: shift and scale pictures by ImageNet's mean and deviation, as the network was
    trained; without it, as the published code does. Gray pictures are repeated to three channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, features: nn.Module, *, normalize: bool) -> None:
        super().__init__()
        self.features = features.requires_grad_(False)
        self.normalize = normalize
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).view(1, 3, 1, 1))
        self.eval()

    def train(self, mode: bool = True) -> ContentLoss:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.features(self._prepared(hr))
        return F.mse_loss(self.features(self._prepared(sr)).float(), target.float())

    def _prepared(self, pictures: Tensor) -> Tensor:
        if pictures.shape[1] == 1:
            pictures = pictures.expand(-1, 3, -1, -1)
        return (pictures - self.mean) / self.std if self.normalize else pictures


def mobilenet_v2_features(weights: str) -> nn.Module:
    """MobileNetV2's convolutional part. `weights`: auto (torchvision's, downloaded once), a file
    with a state dict of `torchvision.models.mobilenet_v2`, or none (random).

    Raises:
        UserError: the download failed, or the file does not fit.
    """
    if weights == "none":
        log.warning("the content loss compares features of RANDOM weights: for tests only")
        return _features(None, "")
    if weights == "auto":
        url = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.url
        cache = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        try:
            state = torch.hub.load_state_dict_from_url(url, progress=False, weights_only=True)
        except Exception as error:  # urllib, sockets, TLS and file systems each raise their own
            raise UserError(
                f"the content loss needs MobileNetV2's weights, and downloading {url} to {cache} "
                f"failed: {error}. Put the file there, name one with "
                "loss.content.weights=FILE, or leave the loss out with loss.content.weight=0."
            ) from None
        return _features(state, url)
    path = Path(weights)
    if not path.is_file():
        raise UserError(
            f"loss.content.weights: {path} does not exist; expected auto, none, or a file with a "
            "state dict of torchvision's mobilenet_v2"
        )
    state = weights_files.read(path)
    if not isinstance(state, dict):
        raise UserError(
            f"loss.content.weights: {path} holds no state dict of torchvision's mobilenet_v2"
        )
    return _features(state, str(path))


def _features(state: dict[str, Tensor] | None, where: str) -> nn.Module:
    network = torchvision.models.mobilenet_v2(weights=None)
    if state is not None:
        weights_files.load(network, state, f"loss.content.weights: {where}")
    features: nn.Module = network.features
    return features
