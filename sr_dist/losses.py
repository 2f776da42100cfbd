"""The generator's and the discriminator's losses. Pictures are (N, C, H, W) float in [0, 1]."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sr_dist import weights as weights_files
from sr_dist.errors import UserError

log = logging.getLogger(__name__)

Loss = Callable[[Tensor, Tensor], Tensor]
Mean = Callable[[Tensor], Tensor]

# The kinds that a configuration chooses from; what they are is said below.
PIXEL = ("mse", "l1", "charbonnier")
CONTENT_DISTANCES = ("mse", "l1")
ADVERSARIAL = ("linear", "bce", "least_squares", "hinge", "relativistic_average")
TOTAL_VARIATION = ("l1", "l2")

_CHARBONNIER_EPSILON = 1e-3
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


def pixel_loss(kind: str) -> Loss:
    """Mean distance of SR (first) from HR (second): `mse`, `l1`, or `charbonnier`.

    Charbonnier (Lai et al., arXiv 1710.01992): sqrt(d² + ε²) with ε = 1e-3.
    """
    kinds: dict[str, Loss] = {"mse": F.mse_loss, "l1": F.l1_loss, "charbonnier": _charbonnier}
    return kinds[kind]


def _charbonnier(sr: Tensor, hr: Tensor) -> Tensor:
    return ((sr - hr).square() + _CHARBONNIER_EPSILON**2).sqrt().mean()


def total_variation(sr: Tensor, kind: str) -> Tensor:
    """Differences of neighbouring pixels, averaged down and across, the two summed.

    `l1`: absolute differences. `l2`: squared differences, and the sum doubled, as published.
    """
    down = sr[..., 1:, :] - sr[..., :-1, :]
    right = sr[..., :, 1:] - sr[..., :, :-1]
    if kind == "l1":
        return down.abs().mean() + right.abs().mean()
    return 2 * (down.square().mean() + right.square().mean())


def generator_adversarial(
    fake: Tensor, kind: str, real: Tensor | None = None, mean: Mean = torch.mean
) -> Tensor:
    """What the generator pays for D's logits on SR, of any shape.

    `linear`: mean(1 - sigmoid(D)), the published Swift-SRGAN form. `bce`: -log sigmoid(D), the
    non-saturating form of Goodfellow et al. (2014) and SRGAN. `least_squares`: (D - 1)² / 2 (Mao et
    al., arXiv 1611.04076). `hinge`: -D (Lim and Ye, arXiv 1705.02894). `relativistic_average`
    (Jolicoeur-Martineau, arXiv 1807.00734, as ESRGAN): cross-entropy of SR being judged more real
    than HR is on average, and the reverse, halved; needs `real`, D's logits on HR, and averages by
    `mean`.
    """
    if kind == "linear":
        return (1 - torch.sigmoid(fake)).mean()
    if kind == "bce":
        return F.softplus(-fake).mean()
    if kind == "least_squares":
        return (fake - 1).square().mean() / 2
    if kind == "hinge":
        return -fake.mean()
    assert kind == "relativistic_average" and real is not None
    return (F.softplus(real - mean(fake)).mean() + F.softplus(mean(real) - fake).mean()) / 2


def discriminator_adversarial(
    real: Tensor, fake: Tensor, kind: str, label_smoothing: float = 0.0, mean: Mean = torch.mean
) -> Tensor:
    """What the discriminator pays for its logits on HR and SR, of equal shape.

    `linear`: 1 - mean sigmoid(D(HR)) + mean sigmoid(D(SR)), the published form. `bce`: binary
    cross-entropy with HR as 1 and SR as 0. `least_squares`: ((D(HR) - 1)² + D(SR)²) / 2. `hinge`:
    max(0, 1 - D(HR)) + max(0, 1 + D(SR)). `relativistic_average`: cross-entropy of each against the
    other's `mean`, halved. `label_smoothing`: HR's target is 1 minus this (Salimans et al., arXiv
    1606.03498); linear and hinge have no target to smooth.
    """
    target = 1 - label_smoothing
    if kind == "linear":
        return 1 - torch.sigmoid(real).mean() + torch.sigmoid(fake).mean()
    if kind == "bce":
        return _cross_entropy(real, target) + _cross_entropy(fake, 0.0)
    if kind == "least_squares":
        return ((real - target).square().mean() + fake.square().mean()) / 2
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    assert kind == "relativistic_average"
    return (_cross_entropy(real - mean(fake), target) + _cross_entropy(fake - mean(real), 0.0)) / 2


def _cross_entropy(logits: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def gradient_penalty(real: Tensor, hr: Tensor) -> Tensor:
    """R1 (Mescheder et al., arXiv 1801.04406): half the squared norm of D's gradient at HR.

    `real`: D's logits on `hr`, which requires a gradient. The logits of a picture are averaged.
    """
    total = real.flatten(1).mean(1).sum()
    (gradient,) = torch.autograd.grad(total, hr, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean() / 2


class ContentLoss(nn.Module):
    """Mean distance of feature maps, averaged over the layers that `features` returns.

    `features`: (N, 3, H, W) → a list of maps, as `content_features` builds it; it is frozen and in
    evaluation mode, and the gradient flows through it to SR alone. `distance`: `mse` (published,
    SRGAN) or `l1`. `normalize`: shift and scale pictures by ImageNet's mean and deviation, as the
    network was trained; without it, as the published Swift-SRGAN code does. Gray pictures are
    repeated to three channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, features: nn.Module, *, normalize: bool, distance: str) -> None:
        super().__init__()
        self.features = features.requires_grad_(False)
        self.normalize = normalize
        self.distance = {"mse": F.mse_loss, "l1": F.l1_loss}[distance]
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).view(1, 3, 1, 1))
        self.eval()

    def train(self, mode: bool = True) -> ContentLoss:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        with torch.no_grad():
            targets = self.features(self._prepared(hr))
        found = self.features(self._prepared(sr))
        distances = [
            self.distance(a.float(), b.float()) for a, b in zip(found, targets, strict=True)
        ]
        return torch.stack(distances).mean()

    def _prepared(self, pictures: Tensor) -> Tensor:
        if pictures.shape[1] == 1:
            pictures = pictures.expand(-1, 3, -1, -1)
        return (pictures - self.mean) / self.std if self.normalize else pictures


@dataclasses.dataclass(frozen=True)
class _FeatureNetwork:
    """A torchvision network whose `features`, a sequence of modules, give the maps."""

    layers: dict[str, int]  # name → place in the sequence
    default: str
    divisor: float  # of the maps
    weights: str  # torchvision's name for them
    megabytes: int


def _vgg19_layers() -> dict[str, int]:
    """convB_N: the Nth convolution of block B, before its activation."""
    places, place = {}, 0
    for block, convolutions in enumerate((2, 2, 4, 4, 4), start=1):
        for number in range(1, convolutions + 1):
            places[f"conv{block}_{number}"] = place
            place += 2  # the convolution and its activation
        place += 1  # the pooling
    return places


# SRGAN divides VGG's maps by 12.75, so that their distance is of the size of the pixels' (Ledig et
# al., section 3.2).
CONTENT_NETWORKS = {
    "mobilenet_v2": _FeatureNetwork(
        layers={str(place): place for place in range(19)},
        default="18",
        divisor=1.0,
        weights="MobileNet_V2_Weights.IMAGENET1K_V1",
        megabytes=14,
    ),
    "vgg19": _FeatureNetwork(
        layers=_vgg19_layers(),
        default="conv5_4",
        divisor=12.75,
        weights="VGG19_Weights.IMAGENET1K_V1",
        megabytes=548,
    ),
}


class FeatureMaps(nn.Module):
    """(N, 3, H, W) → the maps at some places of a sequence, no further than the last of them."""

    def __init__(
        self, sequence: nn.Sequential, places: Sequence[int], divisor: float = 1.0
    ) -> None:
        super().__init__()
        self.features = sequence[: max(places) + 1]
        self.places = frozenset(places)
        self.divisor = divisor

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for place, module in enumerate(self.features):
            x = module(x)
            if place in self.places:
                maps.append(x / self.divisor if self.divisor != 1 else x)
        return maps


def content_features(network: str, weights: str, layers: Sequence[str] = ()) -> nn.Module:
    """The network of a content loss: (N, 3, H, W) → a list of feature maps.

    `network`: mobilenet_v2 (layers 0 to 18 of torchvision's `features`, by default the last, as
    published) or vgg19 (conv1_1 to conv5_4, before their activation, by default the last, as
    SRGAN). `weights`: auto (torchvision's, downloaded once), a file with a state dict of
    torchvision's network, or none (random).

    Raises:
        UserError: an unknown layer, the download failed, or the file does not fit.
    """
    from torchvision import models  # at need: slow to import

    kind = CONTENT_NETWORKS[network]
    unknown = [layer for layer in layers if layer not in kind.layers]
    if unknown:
        names = list(kind.layers)
        raise UserError(
            f"loss.content.layers: {network} has no layer {unknown[0]!r}; it has {names[0]} to "
            f"{names[-1]}"
        )
    if network == "mobilenet_v2":
        sequence = models.mobilenet_v2(weights=None).features
    else:
        sequence = models.vgg.make_layers(models.vgg.cfgs["E"])
    if weights == "none":
        log.warning("the content loss compares features of RANDOM weights: for tests only")
    else:
        state, where = _content_weights(network, kind, weights)
        held = {key: value for key, value in state.items() if key.startswith("features.")}
        network_of = nn.ModuleDict({"features": sequence})  # torchvision's names
        weights_files.load(network_of, held, f"loss.content.weights: {where}")
    places = [kind.layers[layer] for layer in layers or (kind.default,)]
    return FeatureMaps(sequence, places, kind.divisor)


def _content_weights(
    network: str, kind: _FeatureNetwork, weights: str
) -> tuple[dict[str, Tensor], str]:
    """A state dict of torchvision's network, and where it came from."""
    if weights == "auto":
        from torchvision import models

        url = models.get_weight(kind.weights).url
        cache = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        try:
            with contextlib.ExitStack() as stack:
                if not cache.is_file():  # one of a machine's processes downloads
                    cache.parent.mkdir(parents=True, exist_ok=True)
                    lock = stack.enter_context(cache.with_suffix(".lock").open("w"))
                    fcntl.flock(lock, fcntl.LOCK_EX)
                state = torch.hub.load_state_dict_from_url(url, progress=False, weights_only=True)
        except Exception as error:  # urllib, sockets, TLS and file systems each raise their own
            raise UserError(
                f"the content loss needs the weights of {network}, and downloading {url} "
                f"({kind.megabytes} MB) to {cache} failed: {error}. Put the file there, name one "
                "with loss.content.weights=FILE, or leave the loss out with loss.content.weight=0."
            ) from None
        return state, url
    path = Path(weights)
    if not path.is_file():
        raise UserError(
            f"loss.content.weights: {path} does not exist; expected auto, none, or a file with a "
            f"state dict of torchvision's {network}"
        )
    state = weights_files.read(path)
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no state dict of torchvision's {network}")
    return state, str(path)
