"""The validation pictures of a run: measured after an epoch, a few of them shown."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

from torch import nn

from sr_dist import evaluate, images, storage, tracking

log = logging.getLogger(__name__)

_SAMPLE_SIDE = 512  # HR pixels of a sample picture's panels, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validation:
    """What is measured, and how."""

    data: str  # see evaluate.read_pairs
    scale: int
    channels: int
    bits: int
    reading: storage.Settings
    colour: str  # y or rgb
    tile: int  # LR pixels
    samples: int  # pictures shown
    lpips: evaluate.Distance | None

    def run(
        self, generator: nn.Module, tracker: tracking.Tracker, epoch: int, step: int
    ) -> list[evaluate.Mean]:
        """Bicubic and the model; of the first few pictures, the middle is shown."""
        shown: set[str] = set()

        def look(pair: evaluate.Pair, results: Mapping[str, images.Picture]) -> None:
            if len(shown) < self.samples:
                name = evaluate.unused_name(evaluate.file_name(pair.name), shown)
                shown.add(name)
                part, of_results = evaluate.middle(pair, results, _SAMPLE_SIDE)
                tracker.picture(name, evaluate.side_by_side(part, of_results), epoch, step)

        upscalers = {
            "bicubic": evaluate.classical("bicubic", self.scale),
            "SR": evaluate.learned(generator, scale=self.scale, tile=self.tile),
        }
        pairs = evaluate.read_pairs(
            self.data,
            scale=self.scale,
            channels=self.channels,
            bits=self.bits,
            reading=self.reading,
        )
        rows = evaluate.evaluate(
            upscalers, pairs, colour=self.colour, border=self.scale, lpips=self.lpips, look=look
        )
        means = evaluate.averages(rows)
        for mean in means:
            values = {"psnr": mean.psnr, "ssim": mean.ssim}
            perceived = ""
            if mean.lpips is not None:
                values["lpips"] = mean.lpips
                perceived = f"  LPIPS {mean.lpips:.4f}"
            log.info(
                "epoch %d  %-8s PSNR %.3f dB  SSIM %.4f%s",
                epoch,
                mean.upscaler,
                mean.psnr,
                mean.ssim,
                perceived,
            )
            tracker.scalars({f"{name}/{mean.upscaler}": v for name, v in values.items()}, step)
        return means
