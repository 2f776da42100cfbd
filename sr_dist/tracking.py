"""What a run says of itself: TensorBoard, the CSV, sample pictures, the progress line."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import logging
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from sr_dist import files, images, machine

log = logging.getLogger(__name__)
skipped_log = logging.getLogger("sr_dist.skipped")  # of its own, since every rank speaks here

# The columns of the CSV that are means over an epoch's steps, and the scalars they come from.
EPOCH_MEANS = {
    "Loss_D": "loss/discriminator",
    "Loss_G": "loss/generator",
    "Score_D": "score/hr",
    "Score_G": "score/sr",
}
CSV_COLUMNS = ("Epoch", *EPOCH_MEANS, "PSNR", "SSIM")
# TensorBoard's page CUSTOM SCALARS: charts by group, and regular expressions for their scalars.
_LAYOUT = {
    "quality": {name: [f"{name.lower()}/.*"] for name in ("PSNR", "SSIM", "LPIPS")},
    "losses": {
        "generator": ["loss/(generator|pixel|content|adversarial|total_variation)"],
        "discriminator": ["loss/(discriminator|r1)"],
    },
    "scores": {"what the discriminator says of HR and SR": ["score/.*"]},
    "training": {
        "learning rates": ["learning_rate/.*"],
        "lengths of gradients": ["gradient/(generator|discriminator)"],
        "left out and skipped": ["gradient/left_out", "data/skipped"],
    },
    "machine": {
        "pictures/s": ["speed/pictures_per_second"],
        "share of time waited for data": ["speed/data_wait_share"],
        "memory, MB": ["memory/.*"],
    },
}
# The metrics by which its page HPARAMS compares runs.
_COMPARED = ("psnr/SR", "ssim/SR", "lpips/SR")
# The sections of the configuration that make the difference, the most telling first.
_SECTIONS = ("model", "loss", "optimizer", "train", "data")


_tell = threading.excepthook


def _tell_of_thread(failed: threading.ExceptHookArgs) -> None:
    """Not of TensorBoard's, whose error is raised by the next call of its writer."""
    if type(failed.thread).__name__ != "_AsyncWriterThread":
        _tell(failed)


class Tracker:
    """Writes into the run's folder, for rank 0; `Silent` has the same methods for the others.

    `first_step`: where a resumed run goes on; TensorBoard points and CSV rows of a run that had got
    further before it stopped are dropped, so none is doubled.
    """

    def __init__(self, folder: Path, *, first_step: int, first_epoch: int) -> None:
        self.folder = folder
        threading.excepthook = _tell_of_thread
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self.csv = folder / "logs" / "metrics_1_train_results.csv"
        self.rows = [row for row in _read_rows(self.csv) if int(row["Epoch"]) <= first_epoch]

    def config(self, text: str, settings: Mapping[str, object], step: int) -> None:
        """The configuration as text, and its `settings` (dotted key → value) to compare runs by."""
        block = "".join(f"    {line}\n" for line in text.splitlines())
        self.writer.add_text("config", block, step)
        self.writer.add_custom_scalars(
            {
                group: {
                    title: ["Multiline", tags]
                    for title, tags in charts.items()
                    if title != "LPIPS" or settings.get("evaluation.lpips")
                }
                for group, charts in _LAYOUT.items()
            }
        )
        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for section in _SECTIONS
            for key, value in settings.items()
            if key.startswith(f"{section}.")
        }
        # Into the run itself: SummaryWriter.add_hparams would open another one beside it.
        for part in hparams(plain, dict.fromkeys(_COMPARED, 0.0)):  # type: ignore[no-untyped-call]
            self.writer._get_file_writer().add_summary(part)  # type: ignore[no-untyped-call]

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        with self._named():
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def picture(self, name: str, picture: images.Picture, epoch: int, step: int) -> None:
        """Into `samples/epoch_N/NAME.png` and TensorBoard."""
        path = self.folder / "samples" / f"epoch_{epoch}" / f"{name}.png"
        images.save(picture, path)
        pixels = np.ascontiguousarray(picture)
        with self._named():
            self.writer.add_image(f"samples/{name}", pixels, step, dataformats="HWC")

    def epoch(self, values: Mapping[str, float | int | str]) -> None:
        """Append a row of `CSV_COLUMNS`; the file always holds all epochs so far."""
        self.rows.append({column: str(values[column]) for column in CSV_COLUMNS})
        text = io.StringIO()
        writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        files.write_whole(self.csv, text.getvalue())
        self.flush()

    def flush(self) -> None:
        """
        Raises:
            OSError: something written to TensorBoard since the start has not got to its file.
        """
        with self._named():
            self.writer.flush()

    def close(self) -> None:
        with self._named():
            self.writer.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(self.folder / "tensorboard")
            raise


class Silent(Tracker):
    """Does nothing."""

    def __init__(self) -> None:
        pass

    def config(self, text: str, settings: Mapping[str, object], step: int) -> None: ...
    def scalars(self, values: Mapping[str, float], step: int) -> None: ...
    def picture(self, name: str, picture: images.Picture, epoch: int, step: int) -> None: ...
    def epoch(self, values: Mapping[str, float | int | str]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class Skipped:
    """Counts the samples that gave way to others on this rank, and names the first of them."""

    _NAMED = 20

    def __init__(self, count: int) -> None:
        self.count = count
        self.named = 0

    def add(self, messages: Sequence[str]) -> None:
        self.count += len(messages)
        for message in messages[: self._NAMED - self.named]:
            skipped_log.warning("skipped: %s", message)
            self.named += 1
            if self.named == self._NAMED:
                skipped_log.warning("further skipped samples are counted, not named")


class Saturation:
    """Tells once of a discriminator so sure, and of all pictures, that its sigmoid has no slope.

    The loss of `kind` linear then has none either; others do.
    """

    def __init__(self, kind: str) -> None:
        self.kind, self.told = kind, False

    def look(self, values: Mapping[str, float]) -> None:
        scores = [values[name] for name in ("score/hr", "score/sr") if name in values]
        if self.kind != "linear" or self.told or not scores:
            return
        if max(scores) < 1e-4 or min(scores) > 1 - 1e-4:
            self.told = True
            log.warning(
                "the discriminator scores HR and SR alike, at %.0f: it has saturated, where the "
                "linear loss has no gradient. Lower optimizer.discriminator.learning_rate, or take "
                "loss.adversarial.kind=bce, which has one",
                values["score/hr"],
            )


class EpochMeans:
    """Sums of the `EPOCH_MEANS` scalars, kept on the device: adding waits for nothing.

    `sums`: (2, n) float64, the sums and how often each was added. A sum over ranks is the whole;
    a rank that goes on from a checkpoint starts with it, the others with zeros.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, len(EPOCH_MEANS), dtype=torch.float64, device=device)

    def add(self, scalars: Mapping[str, Tensor]) -> None:
        for column, name in enumerate(EPOCH_MEANS.values()):
            if name in scalars:
                finite = torch.isfinite(scalars[name])  # of a step that was left out
                self.sums[0, column] += torch.where(finite, scalars[name], 0.0)
                self.sums[1, column] += finite


def epoch_row(sums: Tensor) -> dict[str, float | str]:
    """The means by column, from `EpochMeans.sums`; empty where nothing was added."""
    totals, counts = sums.tolist()
    return {
        column: total / count if count else ""
        for column, total, count in zip(EPOCH_MEANS, totals, counts, strict=True)
    }


@dataclasses.dataclass(frozen=True)
class Work:
    """What a run has to do, in pictures, which are HR crops, over all ranks."""

    total: int
    done: int = 0  # before this start of it
    cheap: int = 0  # the first of them, which cost less
    dearer: float = 1.0  # how many times as much the others cost
    evaluations: int = 0  # after this start
    evaluation: float = 0.0  # what one costs, guessed, in cheap pictures

    def cost(self, pictures: int) -> float:
        """Of the first `pictures`, in cheap ones."""
        return min(pictures, self.cheap) + self.dearer * max(0, pictures - self.cheap)


class Progress:
    """One line that says how far the run is: live on a terminal, now and then in a log.

    Also keeps the time spent waiting for data.
    """

    def __init__(self, work: Work, *, visible: bool) -> None:
        self.work, self.done = work, work.done
        self.marked = self.stepped = time.perf_counter()
        self.waited = self.waited_at_mark = 0.0
        self.done_at_mark = work.done
        self.pauses: list[float] = []  # seconds that evaluations took
        self.saving = 0.0  # seconds that checkpoints alone took
        self.pace = self.weight = 0.0  # seconds a cheap picture; and how much that mean holds
        live = visible and sys.stderr.isatty()
        # Without tqdm's own time left, which knows neither of warm-ups nor of evaluations.
        form = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}"
        self.bar = tqdm(total=work.total, initial=work.done, bar_format=form) if live else None
        self.said = ""
        self.visible = visible

    def advance(self, pictures: int, waited: float) -> None:
        """After a step: `waited` seconds passed before its batch was there."""
        before = self.work.cost(self.done) - self.work.cost(self.work.done)
        cost = self.work.cost(self.done + pictures) - self.work.cost(self.done)
        now = time.perf_counter()
        # Later steps weigh more, so that a slow beginning is forgotten. The first one, in which
        # much is done for once, weighs nothing once there is another.
        weight = cost * before
        self.weight += weight
        share = weight / self.weight if before else 1.0
        self.pace += share * ((now - self.stepped) / cost - self.pace)
        if not before and self.visible and self.bar is None:  # in a log, lines are far apart
            log.info("the first step took %.1f s", now - self.stepped)
        self.done, self.stepped = self.done + pictures, now
        self.waited += waited
        if self.bar is not None:
            self._say_left(refresh=False)
            self.bar.update(pictures)

    def left(self) -> float:
        """Seconds: training and saving as so far, and evaluations that take as long as before.

        Before the first evaluation, its length is guessed from its pixels.
        """
        work = self.work
        begun, total = work.cost(work.done), work.cost(work.total)
        # One that came soon after the start does not say that as many will come all the time.
        saving = self.saving / max(work.cost(self.done) - begun, (total - begun) / 10)
        training = (self.pace + saving) * (total - work.cost(self.done))
        evaluation = statistics.fmean(self.pauses) if self.pauses else self.pace * work.evaluation
        return training + evaluation * max(0, work.evaluations - len(self.pauses))

    def report(self, epoch: str, scalars: Mapping[str, float]) -> dict[str, float]:
        """Show the line, with the losses among `scalars`.

        Returns pictures/s and the share of time waited for data, both since the last report, and
        the memory in use.
        """
        now = time.perf_counter()
        elapsed = now - self.marked
        rate = (self.done - self.done_at_mark) / elapsed
        share = (self.waited - self.waited_at_mark) / elapsed
        self.marked, self.done_at_mark, self.waited_at_mark = now, self.done, self.waited
        losses = {
            name.removeprefix("loss/"): f"{value:.4f}"
            for name, value in scalars.items()
            if name.startswith("loss/")
        }
        if self.bar is not None:
            networks = [losses[name] for name in ("generator", "discriminator") if name in losses]
            self.bar.set_description(f"epoch {epoch}", refresh=False)
            self.said = f", {rate:.1f} pictures/s, data wait {share:.1%}, "
            self.said += f"loss {' / '.join(networks)}"
        elif self.visible:
            log.info(
                "epoch %s  %d/%d pictures  %.1f pictures/s  %s left  data wait %.1f%%  %s",
                epoch,
                self.done,
                self.work.total,
                rate,
                _clock(self.left()),
                100 * share,
                " ".join(f"{name} {value}" for name, value in losses.items()),
            )
        return {
            "speed/pictures_per_second": rate,
            "speed/data_wait_share": share,
            **{f"memory/{name}": value for name, value in machine.megabytes_in_use().items()},
        }

    @contextlib.contextmanager
    def paused(self, evaluates: bool) -> Iterator[None]:
        """Leave the time of work that is no training out of pictures/s."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.marked += seconds
        self.stepped += seconds
        if not evaluates:
            self.saving += seconds
        else:
            self.pauses.append(seconds)
            if self.pace:  # none before the first step
                self._say_left(refresh=True)

    def _say_left(self, refresh: bool) -> None:
        if self.bar is not None:
            text = f"{_clock(self.left())} left{self.said}"
            self.bar.set_postfix_str(text, refresh=refresh)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
