"""What a recipe reaches in how many minutes, against the original scripts' loop and loader.

Ours is timed from the photographs on: writing the shards, starting up and evaluating are in it. Of
the reference only training is. Both have the machine to themselves, one after the other; what was
measured is kept in the output folder, and not measured again.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from benchmarks import measuring, original
from sr_dist import config, evaluate, files, generators, losses, tiles
from sr_dist.errors import UserError

log = logging.getLogger(__name__)

Points = list[tuple[float, float]]  # minutes, dB

_REPOSITORY = Path(__file__).resolve().parents[2]
_ABOVE = 1.0  # dB above bicubic: the mark to which both are timed
_ORIGINAL_BATCH = 16
_ORIGINAL_CROP = 96
_LISTED = (1, 2, 3, 5, 10, 20, 30, 45, 60)  # minutes of the table


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    _check(arguments)
    output, settings = arguments.output, config.load(arguments.config)
    output.mkdir(parents=True, exist_ok=True)
    bicubic = _psnr(evaluate.classical("bicubic", settings.data.scale), arguments, settings)
    curves = {"ours": _kept(output / "ours.json", lambda: _ours(arguments, settings))}
    minutes = arguments.minutes or curves["ours"][-1][0]
    curves["reference"] = _kept(
        output / "reference.json", lambda: _reference(arguments, settings, minutes)
    )
    print(table(curves, bicubic), file=sys.stderr)
    draw(curves, bicubic, output / "curve.svg")
    mark = bicubic + _ABOVE
    ours, reference = (reached(points, mark) for points in curves.values())
    within = reference is not None
    until = reference if reference is not None else curves["reference"][-1][0]
    return {
        "what": "curve",
        "ours": ours,
        "reference": until,
        # Where the reference was not there at its end, the true ratio is above this one.
        "ratio": None if ours is None else round(until / ours, 3),
        "reference_got_there": within,
        "unit": f"minutes to {mark:.2f} dB, bicubic and {_ABOVE:g}",
        "last": {name: points[-1] for name, points in curves.items()},
        "config": {"recipe": arguments.config.name, "photographs": str(arguments.photographs)},
        **measuring.about(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }


def _kept(path: Path, measured: Callable[[], Iterable[tuple[float, float]]]) -> Points:
    """The points in a file, which is written where it is not there."""
    if path.exists():
        log.info("as measured before: %s", path)
    else:
        files.write_whole(path, json.dumps(list(measured())))
    return [(minutes, psnr) for minutes, psnr in json.loads(path.read_text())]


def reached(points: Points, mark: float) -> float | None:
    """Minutes after which a curve is at `mark` dB, between its points; None if it never is."""
    before = (0.0, float("-inf"))
    for minutes, psnr in points:
        if psnr >= mark:
            if before[1] == float("-inf"):
                return minutes
            share = (mark - before[1]) / (psnr - before[1])
            return round(before[0] + share * (minutes - before[0]), 2)
        before = (minutes, psnr)
    return None


def table(curves: dict[str, Points], bicubic: float) -> str:
    """The best dB that each had by then, as Markdown; nothing where it was not measured so long."""
    last = max(points[-1][0] for points in curves.values())
    listed = [minutes for minutes in _LISTED if minutes <= last + 1]
    rows = [
        "| minutes | " + " | ".join(map(str, listed)) + " |",
        "|---" * (1 + len(listed)) + "|",
    ]
    for name, points in curves.items():
        cells = []
        for minutes in listed:
            before = [psnr for at, psnr in points if at <= minutes <= points[-1][0] + 1]
            cells.append(f"{max(before):.2f}" if before else "")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*rows, f"(bicubic: {bicubic:.2f} dB)"])


def draw(curves: dict[str, Points], bicubic: float, path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "curve"  # the same file for the same numbers
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, points), style in zip(curves.items(), ("o-", "s-"), strict=True):
        label = {"ours": "sr_dist", "reference": "the original loop"}[name]
        axes.plot(*zip(*points, strict=True), style, markersize=3, label=label)
    axes.axhline(bicubic, color="gray", linestyle="--", linewidth=1, label="bicubic")
    axes.set(xlabel="minutes", ylabel="PSNR, dB (luma, border 4)")
    ends = (points[-1][1] for points in curves.values())
    axes.set_ylim(bottom=min(bicubic, *ends) - 3)  # an untrained network is far below
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, metadata={"Date": None})


def _check(arguments: argparse.Namespace) -> None:
    for option in ("photographs", "hr", "lr", "output", "content_weights"):
        if getattr(arguments, option) is None:
            raise UserError(f"curve needs --{option.replace('_', '-')}; see the example in --help")
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise UserError(f"--minutes: expected more than 0, found {arguments.minutes}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("curve draws with matplotlib: pip install 'sr_dist[plot]'") from None


def _psnr(
    upscaler: evaluate.Upscaler, arguments: argparse.Namespace, settings: config.Config
) -> float:
    scale = settings.data.scale
    pairs = evaluate.read_pairs(str(arguments.hr), scale=scale, channels=3, lr_folder=arguments.lr)
    rows = evaluate.evaluate({"SR": upscaler}, pairs, colour="y", border=scale)
    return evaluate.averages(rows)[0].psnr


def _of(generator: nn.Module, arguments: argparse.Namespace, settings: config.Config) -> float:
    learned = evaluate.learned(generator, scale=settings.data.scale, tile=tiles.SIDE)
    return round(_psnr(learned, arguments, settings), 3)


def _ours(arguments: argparse.Namespace, settings: config.Config) -> Iterator[tuple[float, float]]:
    """The recipe to its end, a point an epoch."""
    output = arguments.output.resolve()
    began = time.time()
    images, pictures = output / "images", str(arguments.photographs)
    _run("tools/make_dataset.py", "--source", "folder", "--input", pictures, "--output", images)
    split = ("--val-fraction", "0.1", "--output", images)
    _run("tools/split_dataset.py", "--images", images, *split)
    shards = ("--reduce", "1", "2", "--output", output / "shards")
    _run("tools/make_shards.py", "--images", images / "train.txt", *shards)
    kind = "single_gpu" if torch.cuda.is_available() else "cpu_2_processes"
    _run(
        *("-m", "accelerate.commands.launch", "--config_file"),
        _REPOSITORY / "launch" / "accelerate" / f"{kind}.yaml",
        *("launch/train.py", "--config", arguments.config.resolve()),
        *(f"data.train={output / 'shards'}", f"data.validation={images / 'val.txt'}"),
        *(f"run.output_dir={output / 'runs'}", "run.name=ours"),
    )
    for epoch in range(1, settings.train.epochs + 1):
        path = output / "runs/ours/models" / f"netG_{settings.data.scale}x_epoch{epoch}.pth.tar"
        generator, _ = generators.load(path)
        after = (path.stat().st_mtime - began) / 60
        yield round(after, 2), _of(generator, arguments, settings)


def _run(*given: object) -> None:
    words = [str(word) for word in given]
    log.info("%s", " ".join(words))
    done = subprocess.run([sys.executable, *words], cwd=_REPOSITORY, stdout=2)
    if done.returncode:
        raise UserError(f"this command failed, for the reason above: python {' '.join(words)}")


def _reference(
    arguments: argparse.Namespace, settings: config.Config, minutes: float
) -> Iterator[tuple[float, float]]:
    """The original loop for so many minutes, on the photographs that ours was trained on."""
    listing = arguments.output / "images" / "train.txt"
    paths = [listing.parent / line for line in listing.read_text().splitlines()]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    features = losses.content_features("mobilenet_v2", str(arguments.content_weights))
    torch.manual_seed(0)
    networks = original.Networks(device, settings.data.scale, features=features.features)
    step = original.step(networks, device)
    batches = original.loader(
        paths,
        crop_size=_ORIGINAL_CROP,
        scale=settings.data.scale,
        batch_size=_ORIGINAL_BATCH,
        length=_ORIGINAL_BATCH * 10**6,
        num_workers=1,
    )
    spent, next_point = 0.0, 0.0
    began = time.perf_counter()
    for lr, hr in batches:
        step(lr, hr)
        minutes_now = (spent + time.perf_counter() - began) / 60
        if minutes_now < min(next_point, minutes):
            continue
        spent = 60 * minutes_now
        yield round(minutes_now, 2), _of(networks.generator.eval(), arguments, settings)
        log.info("reference: %.1f of %.1f minutes", minutes_now, minutes)
        if minutes_now >= minutes:
            return
        next_point = minutes_now + arguments.every
        networks.generator.train()
        began = time.perf_counter()  # measuring is not counted
