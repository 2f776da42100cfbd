"""The original scripts' loop and loader, written plainly, for `tools/benchmark.py` to compare with.

Their losses are the same as ours, so that both do the same work; the original reached no weight
with two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from sr_dist import losses, models

Step = Callable[[Tensor, Tensor], tuple[float, ...]]


class Networks:
    """Generator, discriminator and content features; NCHW in fp32, as they come."""

    def __init__(
        self,
        device: torch.device,
        scale: int,
        generator: nn.Module | None = None,
        features: nn.Module | None = None,
    ) -> None:
        self.generator = generator or models.build_generator("swift_srgan", scale=scale, channels=3)
        self.discriminator = models.build_discriminator("swift_srgan", channels=3)
        self.features = features or torchvision.models.mobilenet_v2(weights=None).features
        for network in (self.generator, self.discriminator, self.features):
            network.to(device)
        self.features.eval().requires_grad_(False)


def step(networks: Networks, device: torch.device, learning_rate: float = 1e-3) -> Step:
    """One iteration on float batches: two forwards of the generator, every loss read back."""
    generator, discriminator = networks.generator, networks.discriminator
    optimizer_g = torch.optim.AdamW(generator.parameters(), lr=learning_rate)
    optimizer_d = torch.optim.AdamW(discriminator.parameters(), lr=learning_rate)
    mse = nn.MSELoss()

    def run(lr: Tensor, hr: Tensor) -> tuple[float, ...]:
        lr, hr = lr.to(device), hr.to(device)
        sr = generator(lr)
        discriminator.zero_grad()
        real = torch.sigmoid(discriminator(hr)).mean()
        fake = torch.sigmoid(discriminator(sr)).mean()
        loss_d = 1 - real + fake
        loss_d.backward(retain_graph=True)
        optimizer_d.step()
        generator.zero_grad()
        sr = generator(lr)
        fake = torch.sigmoid(discriminator(sr)).mean()
        adversarial = 1 - fake
        content = mse(networks.features(sr), networks.features(hr))
        pixel = mse(sr, hr)
        variation = losses.total_variation(sr, "l2")
        loss_g = pixel + 0.001 * adversarial + 0.006 * content + 2e-8 * variation
        loss_g.backward()
        optimizer_g.step()
        return loss_d.item(), loss_g.item(), real.item(), fake.item()

    return run


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """A crop and its LR of each picture: the whole picture is decoded for every one of them."""

    def __init__(self, paths: Sequence[Path], crop_size: int, scale: int, length: int) -> None:
        self.paths, self.length = paths, length
        self.hr = transforms.Compose(
            [
                transforms.RandomCrop(crop_size),
                transforms.RandomHorizontalFlip(),
                transforms.RandomVerticalFlip(),
                transforms.ToTensor(),
            ]
        )
        self.lr = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.Resize(
                    crop_size // scale, interpolation=transforms.InterpolationMode.BICUBIC
                ),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        hr = self.hr(Image.open(self.paths[number % len(self.paths)]).convert("RGB"))
        return self.lr(hr), hr


def loader(
    paths: Sequence[Path],
    *,
    crop_size: int,
    scale: int,
    batch_size: int,
    length: int,
    num_workers: int,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """(LR, HR) batches, float in [0, 1]."""
    pictures = Pictures(paths, crop_size, scale, length)
    return DataLoader(pictures, batch_size, shuffle=True, num_workers=num_workers, drop_last=True)
