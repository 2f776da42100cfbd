#!/usr/bin/env python
"""Train on three ranks while faults strike at random; compare with a run that met none.

    python tests/soak.py                    20 faults, minutes long, a seed of its own
    python tests/soak.py --seed 7 --faults 50

Each fault ends the run, which is then started again by the same command: all ranks or one of them
killed, a signal to stop to one of them, the newest checkpoint damaged after a kill, a disk that is
full when some file is written, a checkpoint's or one of an epoch's end, for once or from then on
(the system call fails: not everyone can make a disk of that size). At the end weights, optimisers,
the CSV and TensorBoard's points are those of the unbroken run, bit for bit, or this script ends
with an AssertionError that names the difference.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sr_dist import checkpoint, dataset, images, shard_writer  # noqa: E402
from tests.helpers import Started, end_ranks, start_ranks  # noqa: E402
from tests.runs import assert_same_run  # noqa: E402

RANKS = 3  # with two, sums do not depend on the order of their addends
PATIENCE = 120  # seconds for anything; a run that hangs fails here
RECIPE = """
run: {{name: {name}, output_dir: {folder}/runs, timeout_minutes: 0.5}}
data: {{train: {folder}/shards, validation: {folder}/measured.png, crop_size: 32,
  crops_per_image: 1, num_workers: 1}}
model:
  generator: {{num_channels: 8, num_blocks: 1, global_skip: bicubic}}
  discriminator: {{head: gap}}
loss: {{content: {{weight: 0}}, adversarial: {{kind: bce}}}}
train: {{epochs: {epochs}, global_batch_size: 6, warmup_images: 40, ema_half_life: 40}}
tracking: {{log_every_steps: 2}}
checkpoint: {{every_steps: 3, keep: 4}}
"""


def prepare(folder: Path) -> None:
    for path in dataset.find_sample_photographs():
        if path.name in ("astronaut.png", "chelsea.png", "coffee.png"):
            images.save(images.decode(path, 3), folder / "images" / path.name)
    part = images.decode(folder / "images" / "chelsea.png", 3)[60:188, 120:280]
    images.save(part, folder / "measured.png")
    options = shard_writer.Options(tile=64, samples_per_shard=60, min_size=48)
    shard_writer.write(images.list_pictures(folder / "images"), folder / "shards", options)


def begin(recipe: Path, *full: str) -> list[Started]:
    """The ranks, slow enough to be caught at a step; `full`: of the disk, see full_disk.py."""
    worker = "full_disk.py" if full else "slow_steps.py"
    return start_ranks(RANKS, f"tests/workers/{worker}", *full, recipe)


def wait_for_steps(rank: Started, number: int) -> int:
    """Wait for `number` steps after its first, which is returned."""
    rank.wait_for("step ", timeout=PATIENCE)
    first = int(rank.said().partition("step ")[2].split()[0])
    rank.wait_for(f"step {first + number}\n", timeout=PATIENCE)
    return first


def end(ranks: list[Started]) -> tuple[list[int], str]:
    """Wait for the end: the ranks' statuses, and what they said."""
    ended = end_ranks(ranks, PATIENCE)
    return [done.returncode for done in ended], "".join(done.stderr for done in ended)


def kill_all(ranks: list[Started]) -> None:
    for rank in ranks:
        rank.signal(signal.SIGKILL)
    statuses, said = end(ranks)
    assert statuses == [-signal.SIGKILL] * RANKS, said


def kill_one(ranks: list[Started], chance: random.Random) -> None:
    victim = chance.randrange(RANKS)
    ranks[victim].signal(signal.SIGKILL)
    statuses, said = end(ranks)
    assert statuses.pop(victim) == -signal.SIGKILL and statuses == [1] * (RANKS - 1), said
    assert f"rank {victim} is gone" in said, said


def stop(ranks: list[Started], chance: random.Random) -> None:
    number = chance.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    chance.choice(ranks).signal(number)
    statuses, said = end(ranks)
    assert statuses == [75] * RANKS and "the same command goes on from there" in said, said


def fill_disk(recipe: Path, chance: random.Random) -> str:
    """A run whose disk is full in its midst; what was written then."""
    of_checkpoint = ("training.pt", "ema.safetensors", "meta.json")
    name = chance.choice([*of_checkpoint, ".png", ".csv", "netG_", "netD_"])
    number = chance.randint(1, 3) if name in of_checkpoint else 1  # there is one an epoch
    how = chance.choice(["once", "on"])
    statuses, said = end(begin(recipe, name, str(number), how))
    assert statuses[0] == 2 and set(statuses[1:]) <= {1, 2}, (statuses, said)
    assert "No space left" in said and "cannot use" in said, said
    return f"full disk at {name}, {number}, {how}"


def damage(checkpoints: Path, chance: random.Random) -> str:
    """Damage the newest checkpoint in one of several ways."""
    newest = max(path for path in checkpoints.iterdir() if path.name[5:].isdigit())
    victim = chance.choice(sorted(path for path in newest.iterdir() if path.is_file()))
    way = chance.choice(["truncated", "altered", "deleted", "emptied"])
    data = bytearray(victim.read_bytes())
    if way == "truncated":
        victim.write_bytes(data[: len(data) // 2])
    elif way == "altered":
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif way == "deleted":
        victim.unlink()
    else:
        victim.write_bytes(b"")
    return f"{newest.name}/{victim.name} {way}"


def soak(folder: Path, seed: int, faults: int, say: Callable[[str], None]) -> None:
    chance = random.Random(seed)
    prepare(folder)
    epochs = 1 + faults // 2  # of 24 steps; a fault lets up to 9 pass, a full disk 24
    recipes = {}
    for name in ("unbroken", "struck"):
        recipes[name] = folder / f"{name}.yaml"
        recipes[name].write_text(RECIPE.format(name=name, folder=folder, epochs=epochs))
    statuses, said = end(begin(recipes["unbroken"]))
    assert statuses == [0] * RANKS, said
    checkpoints = folder / "runs" / "struck" / "checkpoints"
    kinds = ["kill all", "kill one", "stop", "damage", "full disk"]
    left = [kinds[number % len(kinds)] for number in range(faults)]
    chance.shuffle(left)
    began = time.monotonic()
    for number, kind in enumerate(left, start=1):
        start = checkpoint.find_newest(checkpoints)
        if kind == "full disk":
            what = fill_disk(recipes["struck"], chance)
        else:
            ranks = begin(recipes["struck"])
            # Two steps beyond a checkpoint at the least, so that the run gets on.
            first = wait_for_steps(ranks[0], chance.randint(4, 8))
            whole = 0 if start is None else start.step
            assert first == whole + 1, f"it began at step {first}, not after {whole}"
            what = kind
            if kind == "stop":
                stop(ranks, chance)
            elif kind == "kill one":
                kill_one(ranks, chance)
            else:
                kill_all(ranks)
            if kind == "damage":
                what = damage(checkpoints, chance)
        there = checkpoints.glob("step-" + 8 * "[0-9]")
        newest = max((path.name for path in there), default="none")
        say(f"{number:3} of {faults}  {time.monotonic() - began:5.0f} s  {what}; newest: {newest}")
    statuses, said = end(begin(recipes["struck"]))
    assert statuses == [0] * RANKS, said
    assert_same_run(folder / "runs" / "unbroken", folder / "runs" / "struck")
    left_behind = [path for path in (folder / "runs" / "struck").rglob(".*") if path.is_file()]
    assert left_behind == [folder / "runs" / "struck" / ".lock"], left_behind
    say(f"{faults} faults, {24 * epochs} steps: all as in the unbroken run")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the faults")
    parser.add_argument("--faults", type=int, default=20)
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    soak(folder, arguments.seed, arguments.faults, lambda line: print(line, flush=True))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
