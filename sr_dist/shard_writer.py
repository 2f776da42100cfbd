"""Write shards from pictures.

Each picture belongs to one shard, and each shard is a job of its own, so any number of workers
writes the same bytes. A shard appears under its name when it is whole; what a stopped run finished
is kept in `.progress/` until `index.json` takes its place.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from sr_dist import files, images, pool, shard_reader, shards, storage, tars
from sr_dist.errors import UserError

Result = TypeVar("Result")
Progress = Callable[[Iterable[Result], str, int], Iterable[Result]]  # (items, what, total) → items

ENCODINGS = ("webp", "png", "jpeg", "keep")
_PROGRESS_FOLDER = ".progress"
_REJECTS = "rejects.jsonl"
_MEMBER_ENDINGS = {"webp": "webp", "png": "png", "jpeg": "jpg"}
_KEPT_ENDINGS = {"WEBP": "webp", "PNG": "png", "JPEG": "jpg", "MPO": "jpg"}
_MOST_PIXELS = {"webp": 16383, "jpeg": 65500}  # on a side
_SHARD_BYTES = 512 * 2**20  # of pixels (or kept files), which a worker holds in memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What decides the bytes of the shards, beside the pictures themselves."""

    tile: int = 256  # least side of a tile, pixels; 0 keeps pictures whole
    reductions: tuple[int, ...] = (1,)  # each picture is written at 1/r of its size, for each r
    encode: str = "webp"  # one of ENCODINGS; keep stores the original bytes, and needs tile=0
    samples_per_shard: int = 1000  # a shard is closed by the picture that reaches it, or 512 MiB
    channels: int = 3
    min_size: int = 96  # pictures with a shorter side are rejected
    seed: int = 0  # of the order in which pictures are written


@dataclasses.dataclass(frozen=True)
class Summary:
    samples: int
    shards: int
    rejects: list[str]  # the name of each and the reason
    already_complete: bool = False


@dataclasses.dataclass(frozen=True)
class _Source:
    path: Path
    name: str  # relative, as recorded
    sha256: str = ""  # of the file
    bytes: int = 0
    height: int = 0
    width: int = 0
    reject: str = ""  # the reason, where it cannot be used

    def tiles(self, options: Options) -> Iterator[tuple[int, list[tuple[int, int, int, int]]]]:
        """For each reduction (top, left, height, width) of every tile of the reduced picture.

        Every pixel lies in one tile, and no side is below options.tile; a picture smaller than that
        is one tile. A reduced picture below options.min_size has none.
        """
        for reduction in options.reductions:
            height, width = self.height // reduction, self.width // reduction
            if reduction > 1 and min(height, width) < options.min_size:
                continue
            yield (
                reduction,
                [
                    (top, left, bottom - top, right - left)
                    for top, bottom in _cuts(height, options.tile)
                    for left, right in _cuts(width, options.tile)
                ],
            )


def _cuts(length: int, tile: int) -> list[tuple[int, int]]:
    parts = max(1, length // tile) if tile else 1
    edges = [length * part // parts for part in range(parts + 1)]
    return list(zip(edges, edges[1:], strict=False))


def write(
    pictures: Sequence[tuple[Path, str]],
    output: Path,
    options: Options,
    *,
    executor: Executor | None = None,
    strict: bool = False,
    progress: Progress[Any] = lambda items, what, total: items,
) -> Summary:
    """Write `pictures` (path, recorded name) as shards and `index.json` into `output`.

    `executor`: any of `concurrent.futures`'s kind whose workers see the same paths; None: this
    process. Goes on where a stopped run of the same pictures and options was. Pictures that
    cannot be used are listed in `rejects.jsonl`, or are fatal with `strict`.

    Raises:
        UserError: `output` holds something else, no picture can be used, or `strict` met a reject.
    """
    assert options.encode != "keep" or (not options.tile and options.reductions == (1,)), (
        "the original bytes are whole pictures"
    )
    check_output(pictures, output)
    # So that workers of this machine that are forked (before Python 3.14) need not load torch.
    _tar_writer()
    run = functools.partial(pool.in_turn, executor)
    read = run(functools.partial(_probe, options), pictures)
    sources = list(progress(read, "reading", len(pictures)))
    _stop_on_reject(sources, strict)
    recorded = {**dataclasses.asdict(options), "inputs": _fingerprint(sources)}
    recorded["reductions"] = list(options.reductions)  # as JSON reads it back
    if options.reductions == (1,):  # as in shards from before there were any
        del recorded["reductions"]
    jobs = _jobs([source for source in sources if not source.reject], output, options)
    made = [place for place in (output, *output.parents) if not place.exists()]
    done = _open_output(output, recorded, _fingerprint([s for job in jobs for s in job.sources]))
    if done is not None:
        return done
    try:
        results = []
        for result in progress(run(_write_shard, jobs), "writing", len(jobs)):
            results.append(result)
            _stop_on_reject([_Source(Path(), **reject) for reject in result["rejects"]], strict)
        rejects = [{"name": s.name, "reject": s.reject} for s in sources if s.reject]
        rejects += [reject for result in results for reject in result["rejects"]]
        written = [result for result in results if result["count"]]
        if not written:
            first = f"{rejects[0]['name']} {rejects[0]['reject']}"
            raise UserError(f"none of {len(pictures)} pictures can be used; first: {first}")
    except UserError:
        _remove_ours(output)
        for place in made:
            if not any(place.iterdir()):
                place.rmdir()
        raise
    remove_partial(output)
    # The list of rejects comes first: index.json marks the shards as complete.
    lines = [
        json.dumps({"source": reject["name"], "reason": reject["reject"]}) + "\n"
        for reject in sorted(rejects, key=lambda reject: reject["name"])
    ]
    (output / _REJECTS).unlink(missing_ok=True)
    if lines:
        files.write_whole(output / _REJECTS, "".join(lines))
    names = ("name", "count", "bytes", "sha256", "mark_every", "marks")
    listed = [shards.Shard(**{name: result[name] for name in names}) for result in written]
    side = min(result["smallest_side"] for result in written)
    text = shards.index_text(options.channels, side, listed, recorded)
    files.write_whole(output / shards.INDEX_NAME, text)
    shutil.rmtree(output / _PROGRESS_FOLDER)
    return Summary(sum(shard.count for shard in listed), len(listed), _rejects(output))


def check_output(pictures: Sequence[tuple[Path, str]], output: Path) -> None:
    """Refuse an `output` that can be no folder of shards: what `write` can say before all else.

    Raises:
        UserError: it is a file, or holds `pictures`.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; expected a folder, or nothing, there")
    if output.resolve() in {folder.resolve() for folder in {path.parent for path, _ in pictures}}:
        raise UserError(f"{output} holds pictures that are read; choose another --output")


def _fingerprint(sources: Sequence[_Source]) -> str:
    """A hash of the names and contents of the pictures."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source.name}\0{source.sha256}\n".encode())
    return digest.hexdigest()


def _open_output(output: Path, recorded: dict[str, Any], partition: str) -> Summary | None:
    """Make the folder ready. Returns the summary of a run that is complete already.

    `partition`: a hash of which picture goes into which shard, which a run that goes on must share.
    """
    output.mkdir(parents=True, exist_ok=True)
    progress = output / _PROGRESS_FOLDER
    inputs = progress / "inputs.json"
    if (output / shards.INDEX_NAME).exists():
        index = shards.read_index(str(output))
        if index.options != recorded:
            raise UserError(
                f"{output} holds shards of other pictures or options; delete it or choose another "
                "--output"
            )
        unreadable, differing = shard_reader.look_at_files(index)
        if problems := unreadable + differing:
            raise UserError(f"{problems[0]}; delete {output}, and run the same command again")
        shutil.rmtree(progress, ignore_errors=True)
        rejects = _rejects(output)
        return Summary(index.samples, len(index.shards), rejects, already_complete=True)
    started = {**recorded, "shards": partition}
    if inputs.exists():
        if json.loads(inputs.read_text()) != started:
            raise UserError(
                f"{output} holds an unfinished run with other pictures or options; delete it or "
                "choose another --output"
            )
    elif any(output.glob("*.tar")):
        raise UserError(
            f"{output} holds tars without an {shards.INDEX_NAME}; choose another --output, or "
            f"index them with 'python tools/make_shards.py index {output}'"
        )
    remove_partial(output)
    progress.mkdir(exist_ok=True)
    files.write_whole(inputs, json.dumps(started))
    return None


def _rejects(output: Path) -> list[str]:
    """The pictures that are listed there as rejected, each with the reason."""
    path = output / _REJECTS
    lines = path.read_text().splitlines() if path.exists() else []
    return ["{source} {reason}".format(**json.loads(line)) for line in lines]


def remove_partial(output: Path) -> None:
    """Remove what processes that ended, or were taken for dead, left unfinished."""
    for pattern in (
        ".shard-*.part",
        "shard-*.part",
        f".{shards.INDEX_NAME}.*.part",
        ".rejects.jsonl.*.part",
    ):
        for partial in output.glob(pattern):
            partial.unlink(missing_ok=True)
    files.remove_partial(output / _PROGRESS_FOLDER)


def _remove_ours(output: Path) -> None:
    for result in (output / _PROGRESS_FOLDER).glob("shard-*.json"):
        (output / f"{result.stem}.tar").unlink(missing_ok=True)
    shutil.rmtree(output / _PROGRESS_FOLDER)


def _probe(options: Options, picture: tuple[Path, str]) -> _Source:
    path, name = picture
    try:
        digest, size = storage.sha256_of_file(str(path))
    except OSError as error:
        return _Source(path, name, reject=f"cannot be read: {error.strerror}")
    source = _Source(path, name, digest, size)
    try:
        height, width, *_ = images.header(path)
    except images.PictureError as error:
        return dataclasses.replace(source, reject=str(error))
    least = options.min_size * min(options.reductions)
    if min(height, width) < least:
        reason = f"is {width}x{height} pixels; the short side must be {least} or more"
        return dataclasses.replace(source, reject=reason)
    most = _MOST_PIXELS.get(options.encode)
    if not options.tile and most is not None and max(height, width) > most:
        reason = f"is {width}x{height} pixels; {options.encode} holds {most} on a side"
        return dataclasses.replace(source, reject=reason)
    if options.encode == "keep":
        with Image.open(path, formats=images.FORMATS) as image:
            if image.format not in _KEPT_ENDINGS:
                reason = f"is {image.format}, which shards cannot keep"
                return dataclasses.replace(source, reject=reason)
    return dataclasses.replace(source, height=height, width=width)


def _stop_on_reject(sources: list[_Source], strict: bool) -> None:
    for source in sources if strict else []:
        if source.reject:
            raise UserError(f"{source.name} {source.reject} (--strict)")


@dataclasses.dataclass(frozen=True)
class _Job:
    number: int
    first_key: int
    sources: tuple[_Source, ...]
    output: Path
    options: Options

    @property
    def name(self) -> str:
        return f"shard-{self.number:06d}"


def _jobs(sources: list[_Source], output: Path, options: Options) -> list[_Job]:
    """Shuffled pictures, as many to a shard as reach samples_per_shard, or what memory holds."""
    order = np.random.default_rng(options.seed).permutation(len(sources))
    jobs: list[_Job] = []
    held: list[_Source] = []
    key = samples = size = 0
    for place, number in enumerate(order.tolist()):
        source = sources[number]
        held.append(source)
        samples += sum(len(tiles) for _, tiles in source.tiles(options))
        pixels = source.height * source.width * options.channels
        size += source.bytes if options.encode == "keep" else pixels
        full = samples >= options.samples_per_shard or size >= _SHARD_BYTES
        if full or place == len(order) - 1:
            jobs.append(_Job(len(jobs), key, tuple(held), output, options))
            held, key, samples, size = [], key + samples, 0, 0
    return jobs


def _write_shard(job: _Job) -> dict[str, Any]:
    """Write one shard, or return what is recorded of it if it is there already."""
    record = job.output / _PROGRESS_FOLDER / f"{job.name}.json"
    target = job.output / f"{job.name}.tar"
    if record.exists():
        result: dict[str, Any] = json.loads(record.read_text())
        if not result["count"] or (target.exists() and target.stat().st_size == result["bytes"]):
            return result
    samples, rejects = [], []
    for source in job.sources:
        try:
            samples += list(_samples(source, job.options))
        except images.PictureError as error:
            rejects.append({"name": source.name, "reject": str(error)})
    # Tiles of one picture are apart in the shard.
    order = np.random.default_rng([job.options.seed, job.number]).permutation(len(samples))
    offsets: list[int] = []
    digest, size = "", 0
    if samples:
        with (
            files.whole(target) as file,
            _tar_writer()(file, encoder=False, mtime=0, user="", group="") as tar,
        ):
            for place, number in enumerate(order.tolist()):
                tar.write({"__key__": f"{job.first_key + place:09d}", **samples[number][0]})
        digest, size = storage.sha256_of_file(str(target))
        offsets = _offsets(target)
    marked = shards.mark(shards.Shard(target.name, len(samples), size, digest), offsets)
    result = {
        "name": target.name,
        "count": len(samples),
        "bytes": size,
        "sha256": digest,
        "mark_every": marked.mark_every,
        "marks": marked.marks,
        "smallest_side": min((side for _, side in samples), default=0),
        "rejects": rejects,
    }
    files.write_whole(record, json.dumps(result))
    return result


def _offsets(tar: Path) -> list[int]:
    """Where each sample begins."""
    with tar.open("rb") as file:
        return [sample.offset for sample in tars.read_samples(file, passed_over=sys.maxsize)]


def _tar_writer() -> Any:
    import webdataset  # here: it loads torch, for which a mistake should not have to wait

    return webdataset.TarWriter


def _reduce(
    picture: images.Picture | images.DeepPicture, factor: int
) -> images.Picture | images.DeepPicture:
    if factor == 1:
        return picture
    from sr_dist import tensors  # here, so that writing shards starts without torch otherwise

    return tensors.reduce(picture, factor)


def _samples(source: _Source, options: Options) -> Iterator[tuple[dict[str, bytes], int]]:
    """Each tile's members and its shorter side.

    Raises:
        PictureError: the file cannot be decoded.
    """
    try:
        data = source.path.read_bytes()
    except OSError as error:
        raise images.PictureError(f"cannot be read: {error.strerror}") from None
    picture = images.decode(data, options.channels)
    digest = hashlib.sha256(data).hexdigest()
    for reduction, tiles in source.tiles(options):
        reduced = _reduce(picture, reduction)
        for top, left, height, width in tiles:
            if options.encode == "keep":
                with Image.open(io.BytesIO(data), formats=images.FORMATS) as image:
                    ending, encoded = _KEPT_ENDINGS[str(image.format)], data
            else:
                tile = reduced[top : top + height, left : left + width].copy()
                # 16-bit gray keeps its depth, which PNG alone holds.
                kind = options.encode if tile.dtype == np.uint8 else "png"
                encoded = images.encode(tile, kind)
                ending = _MEMBER_ENDINGS[kind]
            about = {
                "source": source.name,
                "sha256": digest,
                **({} if reduction == 1 else {"reduction": reduction}),
                "tile": [top, left, height, width],
                "crc32": zlib.crc32(encoded),  # of the picture beside it
            }
            members = {ending: encoded, "json": json.dumps(about).encode()}
            yield members, min(height, width)
