"""The validation pictures of a run: measured after an epoch, a few of them shown."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from sr_dist import evaluate, images, storage, tracking
from sr_dist.errors import UserError

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The measuring was left, because the run is to stop."""


Look = Callable[[evaluate.Pair, Mapping[str, images.Picture]], None]

_ELSEWHERE = "another rank could not evaluate; it says why"
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
    # Each of `ranks` measures its share of the pictures and `total` adds up tensors of theirs; one
    # rank measures all.
    rank: int = 0
    ranks: int = 1
    total: Callable[[Tensor], Tensor] = torch.Tensor.clone
    interrupted: Callable[[], bool] = lambda: False  # asked before each picture

    def run(
        self, generator: nn.Module, tracker: tracking.Tracker, epoch: int, step: int
    ) -> list[evaluate.Mean]:
        """Bicubic and the model; of the first few pictures, the middle is shown.

        All ranks return the same numbers, whatever their number. What one of them cannot measure is
        raised by all.

        Raises:
            Interrupted: on all ranks, if one of them was; nothing has been shown or logged.
        """
        shown: dict[str, images.Picture] = {}

        def look(pair: evaluate.Pair, results: Mapping[str, images.Picture]) -> None:
            if len(shown) < self.samples:
                name = evaluate.unused_name(evaluate.file_name(pair.name), shown)
                part, of_results = evaluate.middle(pair, results, _SAMPLE_SIDE)
                shown[name] = evaluate.side_by_side(part, of_results)

        upscalers = {
            "bicubic": evaluate.classical("bicubic", self.scale),
            "SR": evaluate.learned(generator, scale=self.scale, tile=self.tile),
        }
        means = evaluate.averages(self._measure(upscalers, look))
        for name, picture in shown.items():
            tracker.picture(name, picture, epoch, step)
        for mean in means:
            values = {"psnr": mean.psnr, "ssim": mean.ssim}
            perceived = ""
            if mean.lpips is not None:
                values["lpips"] = mean.lpips
                perceived = f"  LPIPS {mean.lpips:.4f}"
            log.info(
                "epoch %d  %-8s PSNR %.3f dB  SSIM %.4f%s  (%s, border %d)",
                epoch,
                mean.upscaler,
                mean.psnr,
                mean.ssim,
                perceived,
                self.colour,
                self.scale,
            )
            tracker.scalars({f"{name}/{mean.upscaler}": v for name, v in values.items()}, step)
        return means

    def _measure(
        self, upscalers: Mapping[str, evaluate.Upscaler], look: Look
    ) -> list[evaluate.Row]:
        """A row for every picture and upscaler, from all ranks."""
        pictures = range(self._count())
        mine = [picture for picture in pictures if self._rank_of(picture) == self.rank]
        pairs = evaluate.read_pairs(
            self.data,
            scale=self.scale,
            channels=self.channels,
            bits=self.bits,
            reading=self.reading,
            wanted=set(mine).__contains__,
        )
        failure, rows, interrupted = None, [], False

        def uninterrupted() -> Iterator[evaluate.Pair]:
            for pair in pairs:
                if self.interrupted():
                    raise Interrupted
                yield pair

        try:
            rows = evaluate.evaluate(
                upscalers,
                uninterrupted(),
                colour=self.colour,
                border=self.scale,
                lpips=self.lpips,
                look=look,
            )
        except Interrupted:
            interrupted = True
        except Exception as error:
            failure = error
        found = torch.zeros(len(pictures), len(upscalers), 3, dtype=torch.float64)
        for place, row in enumerate(rows):
            picture, upscaler = divmod(place, len(upscalers))
            values = (row.psnr, row.ssim, row.lpips or 0.0)
            found[mine[picture], upscaler] = torch.tensor(values, dtype=torch.float64)
        flags = torch.tensor([interrupted, failure is not None], dtype=torch.float64)
        joined = self.total(torch.cat([found.flatten(), flags]))
        if failure is not None:
            raise failure
        if joined[-1]:
            raise UserError(_ELSEWHERE)
        if joined[-2]:
            raise Interrupted
        return [
            evaluate.Row(str(picture), name, psnr, ssim, None if self.lpips is None else lpips)
            for picture, of_upscalers in enumerate(joined[:-2].view_as(found).tolist())
            for name, (psnr, ssim, lpips) in zip(upscalers, of_upscalers, strict=True)
        ]

    def _count(self) -> int:
        """The number of pictures, if all ranks find the same."""
        failure, number = None, 0
        try:
            number = evaluate.count(self.data, self.reading)
        except Exception as error:
            failure = error
        failures, sum_, squares = self.total(
            torch.tensor([failure is not None, number, number**2], dtype=torch.float64)
        ).tolist()
        if failure is not None:
            raise failure
        if failures:
            raise UserError(_ELSEWHERE)
        if (sum_, squares) != (number * self.ranks, number**2 * self.ranks):
            raise UserError(
                f"rank {self.rank} finds {number} picture(s) in {self.data}, others another number"
            )
        return number

    def _rank_of(self, picture: int) -> int:
        """Rank 0, which writes, measures those that are shown."""
        return 0 if picture < self.samples else picture % self.ranks
