from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sr_dist import shard_reader, shards, storage
from sr_dist.errors import UserError
from tests.helpers import REPOSITORY

plans = st.builds(
    lambda counts, seed, batch, crops, window: shards.Plan(
        (*counts, batch), seed, batch, crops, window
    ),
    st.lists(st.integers(0, 40), max_size=30),
    st.integers(0, 9),
    st.integers(1, 24),
    st.integers(1, 4),
    st.integers(1, 12),
)


@settings(max_examples=60)
@given(plans, st.integers(0, 3))
def test_an_epoch_holds_every_sample_once_but_for_a_part_of_a_batch(
    plan: shards.Plan, epoch: int
) -> None:
    first = epoch * plan.steps_per_epoch
    seen = Counter(
        row
        for step in range(first, first + plan.steps_per_epoch)
        for row in shards.samples_of_step(plan, step)
    )
    assert set(seen.values()) <= {1}
    samples = {(shard, sample) for shard, sample, _ in seen}
    assert len(seen) == len(samples) * plan.crops_per_image
    assert len(samples) + plan.left_out_per_epoch == sum(plan.counts)
    assert plan.left_out_per_epoch < plan.global_batch_size
    assert all(0 <= sample < plan.counts[shard] for shard, sample in samples)


@settings(max_examples=60)
@given(plans)
def test_crops_of_one_sample_are_never_in_one_batch(plan: shards.Plan) -> None:
    for step in range(min(plan.steps_per_epoch, 20)):
        rows = [(shard, sample) for shard, sample, _ in shards.samples_of_step(plan, step)]
        assert len(set(rows)) == plan.global_batch_size


@settings(max_examples=60)
@given(plans, st.data())
def test_windows_from_the_middle_are_those_from_the_start(
    plan: shards.Plan, data: st.DataObject
) -> None:
    lane = data.draw(st.integers(0, plan.global_batch_size - 1))
    step = data.draw(st.integers(0, plan.steps_per_epoch - 1))
    whole = list(shards.windows(plan, 0, lane))
    later = list(shards.windows(plan, 0, lane, step))
    assert sum(window.size for window in whole) == plan.samples_per_lane
    assert later[0].first * plan.crops_per_image <= step
    assert step < (later[0].first + later[0].size) * plan.crops_per_image
    for a, b in zip(whole[len(whole) - len(later) :], later, strict=True):
        assert (a.first, a.size) == (b.first, b.size)
        assert np.array_equal(a.order, b.order)


@settings(max_examples=60)
@given(plans, st.integers(0, 3))
def test_windows_end_where_shards_do_unless_shards_are_smaller(
    plan: shards.Plan, epoch: int
) -> None:
    filled = [count for count in plan.counts if count]
    assert plan.cuts_at_borders == (np.mean(filled) >= 4 * plan.window)
    for lane in range(plan.global_batch_size):
        borders, sizes = {0}, []
        for segment in shards.segments(plan, epoch, lane):
            borders.add(max(borders) + segment.stop - segment.start)
        for window in shards.windows(plan, epoch, lane):
            within = range(window.first + 1, window.first + window.size)
            assert not plan.cuts_at_borders or borders.isdisjoint(within)
            sizes.append(window.size)
        assert max(sizes) <= plan.window
        most = plan.samples_per_lane / plan.window + 2
        assert len(sizes) <= most + plan.cuts_at_borders * len(borders), "no smaller than needed"


@settings(max_examples=200)
@given(st.integers(1, 64), st.integers(1, 32), st.integers(1, 8))
def test_rows_are_divided_among_ranks_and_workers(
    world_size: int, per_rank: int, num_workers: int
) -> None:
    batch = world_size * per_rank
    rows = [
        row
        for rank in range(world_size)
        for worker in range(num_workers)
        for row in shards.rows_of_worker(batch, rank, world_size, worker, num_workers)
    ]
    assert rows == list(range(batch))


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int, int]]:
        plan = shards.Plan((30, 20, 50), seed, 4, 1, 8)
        first = epoch * plan.steps_per_epoch
        return [row for t in range(5) for row in shards.samples_of_step(plan, first + t)]

    orders = [order(0, 0), order(0, 1), order(0, 2), order(1, 0)]
    for a, one in enumerate(orders):
        for other in orders[a + 1 :]:
            assert one != other
    assert order(0, 1) == order(0, 1)


def test_empty_shards_are_no_small_ones() -> None:
    assert shards.Plan((0,) * 50 + (31, 33), 0, 4, 1, 8).cuts_at_borders
    assert not shards.Plan((31, 32), 0, 4, 1, 8).cuts_at_borders


def test_every_window_has_an_order_of_its_own() -> None:
    plan = shards.Plan((6400,), 0, 32, 1, 16)  # of whose lanes the first two begin alike
    orders = [
        window.order[:, 0].tolist()
        for epoch in range(2)
        for lane in range(2)
        for window in shards.windows(plan, epoch, lane)
        if window.size == 16
    ]
    assert len(orders) > 40
    assert len({tuple(order) for order in orders}) == len(orders)
    cut = shards.Plan((64,) * 8, 0, 1, 1, 16)  # at borders, some windows in the middle
    pairs = [
        (one.order, other.order)
        for epoch in range(40)
        for one, other in itertools.pairwise(shards.windows(cut, epoch, 0))
        if one.size == other.size == 8
    ]
    assert len(pairs) > 5 and not any(np.array_equal(one, other) for one, other in pairs)


def test_one_shard_gives_other_batches_each_epoch() -> None:
    plan = shards.Plan((40,), 0, 4, 1, 8)
    together = [
        {
            frozenset(sample for _, sample, _ in shards.samples_of_step(plan, t))
            for t in range(epoch * 10, epoch * 10 + 10)
        }
        for epoch in range(2)
    ]
    assert not together[0] & together[1]


def test_shards_are_permuted_and_the_line_is_turned_each_epoch() -> None:
    plan = shards.Plan((10,) * 20, 0, 4, 1, 8)
    lines = [shards._epoch_line(plan, epoch) for epoch in range(3)]
    orders = {tuple(order.tolist()) for order, _, _ in lines}
    assert len(orders) == 3 and all(sorted(order) == list(range(20)) for order in orders)
    assert len({offset for _, _, offset in lines}) == 3


def test_first_windows_of_lanes_differ_in_size() -> None:
    plan = shards.Plan((1000,), 0, 8, 1, 16)
    sizes = [next(shards.windows(plan, 0, lane)).size for lane in range(8)]
    assert sizes == [16, 14, 12, 10, 8, 6, 4, 2]


def test_window_is_bounded_by_what_it_holds() -> None:
    arguments = {"seed": 0, "global_batch_size": 2, "crops_per_image": 1, "crop_size": 96}
    small = index(shards=(shards.Shard("a.tar", 100, 100 * 50_000, "0"),))
    large = index(shards=(shards.Shard("a.tar", 100, 100 * 800_000, "0"),))
    assert shards.make_plan(small, **arguments).window == 4 * 2**20 // 50_000
    assert shards.make_plan(large, **arguments).window == 4 * 2**20 // 800_000


def test_fingerprint_is_of_the_content() -> None:
    moved = dataclasses.replace(index(), root="elsewhere")
    other = index(shards=(index().shards[0], dataclasses.replace(index().shards[1], sha256="1")))
    assert moved.fingerprint == index().fingerprint != other.fingerprint


def test_addresses_that_cannot_be_read_say_why() -> None:
    with pytest.raises(
        UserError, match="http://127.0.0.1:9/x/index.json cannot be read at byte 0 after 2"
    ):
        shards.read_index("http://127.0.0.1:9/x", storage.Settings(attempts=2))


def index(**changes: object) -> shards.Index:
    values: dict[str, object] = {
        "root": "data/shards",
        "channels": 3,
        "smallest_side": 128,
        "shards": (shards.Shard("a.tar", 5, 100, "0"), shards.Shard("b.tar", 6, 100, "0")),
        "options": {},
    }
    return shards.Index(**{**values, **changes})  # type: ignore[arg-type]


def test_plan_says_how_many_samples_are_needed() -> None:
    arguments = {"seed": 0, "crops_per_image": 4, "crop_size": 96}
    with pytest.raises(UserError, match="holds 11 samples; a global batch needs 12"):
        shards.make_plan(index(), global_batch_size=12, **arguments)
    assert shards.make_plan(index(), global_batch_size=11, **arguments).steps_per_epoch == 4


def test_crops_larger_than_the_smallest_picture_are_refused() -> None:
    shards.check_size(index(), 128)
    message = "crop_size is 192, but .* holds pictures of 128 pixels[.] .* --tile 192 or more"
    with pytest.raises(UserError, match=message):
        shards.check_size(index(), 192)
    for smallest, said in (
        ("0.tar: sample 7", "pixels, such as 0.tar: sample 7[.]"),
        (5, "pixels[.]"),
    ):
        options = {"indexed": True, "smallest": smallest}
        message = f"pictures of 128 {said} .* index --min-size 192"
        with pytest.raises(UserError, match=message) as refused:
            shards.check_size(index(options=options), 192)
        assert "--tile" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not an index of shards"),
        ('{"format": 9}', "has format 9; this version reads 1"),
        ('{"format": 1, "channels": 3}', "not an index of shards"),
        (
            '{"format": 1, "channels": 3, "smallest_side": 9, "options": {}, "shards": []}',
            "lists no sample",
        ),
    ],
)
def test_files_that_are_no_index(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(UserError, match=message):
        shards.read_index(str(tmp_path))


def test_missing_index_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make_shards.py --images"):
        shards.read_index(str(tmp_path))


@pytest.mark.parametrize("address", ["pipe:cat x", "nosuchscheme://x"])
def test_addresses_of_unknown_schemes_are_refused(address: str) -> None:
    with pytest.raises(UserError):
        shards.read_index(address)


def test_index_reads_back_from_folder_and_file(sharded: Path) -> None:
    one, other = shards.read_index(str(sharded)), shards.read_index(f"{sharded}/index.json")
    assert one == other
    assert one.samples == json.loads((sharded / "index.json").read_text())["samples"]
    assert one.address(0) == f"{sharded}/shard-000000.tar"


def test_marks_say_where_samples_begin(sharded: Path) -> None:
    found = shards.read_index(str(sharded))
    for number, shard in enumerate(found.shards):
        samples = list(shard_reader.read_samples(found.address(number)))
        assert shard.mark_every == 1 and shard.marks == tuple(s.offset for s in samples)
        for most in (100, 6, 1):
            described = shards.mark(shard, shard.marks, most)
            held = dataclasses.replace(found, shards=(described,))
            for start in (0, 1, 7, len(samples) - 1):
                later = shard_reader.read_range(held, 0, start, len(samples), storage.DEFAULT)
                assert list(later) == samples[start:]
            some = shard_reader.read_range(held, 0, 3, 9, storage.DEFAULT)
            assert list(some) == samples[3:9]


def test_marks_are_few() -> None:
    shard = shards.Shard("a.tar", 1000, 10**6, "0")
    marked = shards.mark(shard, range(0, 10**6, 1000))
    assert (marked.mark_every, len(marked.marks)) == (16, 63)
    assert marked.stretch(999) == shards.Stretch(992, 1000, 992_000, None)
    assert marked.stretch(15) == shards.Stretch(0, 16, 0, 16_000)
    assert shard.stretch(999) == shards.Stretch(0, 1000, 0, None)
    many = json.loads(shards.index_text(3, 9, [marked] * 10_000, {}))["shards"]
    assert sum(len(shard["marks"]) for shard in many) <= 200_000
    assert (many[0]["mark_every"], many[0]["marks"][1]) == (64, 64_000)


def test_brace_ranges_name_some_of_the_shards(sharded: Path) -> None:
    some = shards.read_index(f"{sharded}/shard-{{000001..000002}}.tar")
    whole = shards.read_index(str(sharded))
    assert some.shards == whole.shards[1:] and some.root == whole.root
    with pytest.raises(UserError, match="lists no shard-000003.tar .1 of 4 are missing."):
        shards.read_index(f"{sharded}/shard-{{000000..000003}}.tar")
    with pytest.raises(UserError, match="is a tar; expected the folder"):
        shards.read_index(f"{sharded}/shard-000000.tar")


def test_an_index_that_leads_elsewhere_is_refused(sharded: Path, tmp_path: Path) -> None:
    for change in (
        {"name": "../../etc/passwd"},
        {"name": ""},
        {"count": -1},
        {"bytes": 2**70},
        {"marks": ["x"]},
        {"mark_every": 0},
        {"marks": [512, 0]},
        {"marks": [0]},
        {"name": "shard-000000.tar"},
        {"name": "a\nb.tar"},
        {"name": "a?b.tar"},
        {"count": 2**61},
        {"count": True},
        {"sha256": None},
        {"extra": 1},
    ):
        values = json.loads((sharded / "index.json").read_text())
        values["shards"][1] |= change
        (tmp_path / "index.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match="is not an index of shards"):
            shards.read_index(str(tmp_path))


@settings(max_examples=25)
@given(
    world_size=st.sampled_from([1, 2, 3, 8, 64, 509, 512]),
    per_rank=st.integers(1, 3),
    num_workers=st.integers(0, 8),
    num_shards=st.integers(1, 5000),
    seed=st.integers(0, 2**31),
)
def test_schedule_of_any_size(
    world_size: int, per_rank: int, num_workers: int, num_shards: int, seed: int
) -> None:
    """Lanes are disjoint, complete and of equal length, and their rows are those of one rank."""
    random = np.random.default_rng(seed)
    batch = world_size * per_rank
    counts = tuple(int(count) for count in random.integers(0, 60, num_shards)) + (batch,)
    plan = shards.Plan(counts, seed, batch, 2, 16)
    firsts = np.concatenate([[0], np.cumsum(counts)])
    seen = np.zeros(sum(counts), int)
    for lane in range(batch):
        length = 0
        for segment in shards.segments(plan, 1, lane):
            assert 0 <= segment.start < segment.stop <= counts[segment.shard]
            first = int(firsts[segment.shard])
            seen[first + segment.start : first + segment.stop] += 1
            length += segment.stop - segment.start
        assert length == plan.samples_per_lane, "every rank does the same number of steps"
    assert seen.max() <= 1 and len(seen) - seen.sum() == plan.left_out_per_epoch < batch
    workers = max(1, num_workers)
    rows = [
        shards.rows_of_worker(batch, rank, world_size, worker, workers)
        for rank in range(world_size)
        for worker in range(workers)
    ]
    assert [row for its in rows for row in its] == list(range(batch))


PLANNED = """
import re, sys, time
from sr_dist import shards
index = shards.read_index(sys.argv[1])
began = time.process_time()
plan = shards.make_plan(index, seed=0, global_batch_size=4096, crops_per_image=4, crop_size=96)
middle = plan.steps_per_epoch // 2
for lane in shards.rows_of_worker(4096, 100, 512, 0, 1):
    window = next(shards.windows(plan, 3, lane, middle))
    next(shards.segments(plan, 3, lane, window.first))
rows = shards.samples_of_step(plan, 3 * plan.steps_per_epoch + middle)
seconds = time.process_time() - began
# Not ru_maxrss, which begins with that of the process that started this one.
megabytes = int(re.search("VmHWM:\\s+([0-9]+) kB", open("/proc/self/status").read())[1]) / 1024
print(index.samples, seconds, megabytes, len(set(rows)))
"""


def test_a_billion_samples_are_planned_in_no_time(tmp_path: Path) -> None:
    """An epoch of 10^9 samples in 100,000 shards, from its middle, for one rank of 512.

    Processor time of the planning, which other work does not change much; memory with the index.
    """
    listed = [
        shards.Shard(f"{n:06d}.tar", 9_000 + n % 2_001, 10**9, f"{n:064x}", 5_500, (0, 10**8))
        for n in range(100_000)
    ]
    (tmp_path / "index.json").write_text(shards.index_text(3, 128, listed, {}))
    done = subprocess.run(
        [sys.executable, "-c", PLANNED, tmp_path],
        capture_output=True, text=True, check=True, cwd=REPOSITORY,
    )  # fmt: skip
    samples, seconds, megabytes, rows = map(float, done.stdout.split())
    assert samples > 9.9e8 and rows == 4096
    assert seconds < 2 and megabytes < 500


def distances(plan: shards.Plan, epoch: int) -> float:
    """How many steps apart neighbours of the file order come, as a share of a full shuffle's."""
    first = epoch * plan.steps_per_epoch
    times: dict[tuple[int, int], int] = {}
    for step in range(plan.steps_per_epoch):
        for shard, sample, crop in shards.samples_of_step(plan, first + step):
            if crop == 0:
                times[shard, sample] = step
    apart = [
        abs(times[shard, sample] - times[shard, sample + 1])
        for shard, sample in times
        if (shard, sample + 1) in times
    ]
    random = np.random.default_rng(0)
    shuffled = random.permutation(len(times)) // plan.global_batch_size
    return float(np.mean(apart) / np.abs(np.diff(shuffled)).mean())


def test_mixing_against_a_full_shuffle() -> None:
    """Neighbours stay within a window of their lane; crops of one sample are a round apart.

    The window bounds how far apart neighbours get: with 64 of 1,250 samples a lane, about a
    twentieth of a full shuffle. Tiles and pictures were shuffled when the shards were written.
    """
    plan = shards.Plan((100,) * 100, 0, 8, 1, 64)
    shares = [distances(plan, epoch) for epoch in range(2)]
    assert all(0.04 < share < 0.08 for share in shares)
    whole = shards.Plan((100,) * 100, 0, 8, 1, 1250)
    assert distances(whole, 0) > 0.6  # two windows a lane


def test_crops_of_a_sample_are_about_a_window_apart() -> None:
    plan = shards.Plan((64,) * 4, 0, 4, 3, 16)
    times: dict[tuple[int, int], list[int]] = {}
    for step in range(plan.steps_per_epoch):
        for shard, sample, _ in shards.samples_of_step(plan, step):
            times.setdefault((shard, sample), []).append(step)
    gaps = np.concatenate([np.diff(its) for its in times.values()])
    assert gaps.min() >= 1 and gaps.mean() == pytest.approx(13, abs=2.5)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


def refused_or_read(folder: Path, content: bytes) -> None:
    (folder / "index.json").write_bytes(content)
    try:
        assert shards.read_index(str(folder)).samples > 0
    except UserError as error:
        assert "index.json" in str(error)


def changed_index(folder: Path, text: bytes, data: st.DataObject) -> None:
    """One with a value that does not belong there, one with changed bytes, and any bytes."""
    whole = json.loads(text)
    place: dict[str, object] = whole
    if data.draw(st.booleans()):
        place = whole["shards"][data.draw(st.integers(0, len(whole["shards"]) - 1))]
    name = data.draw(st.sampled_from([*place, "new"]))
    place[name] = data.draw(JSON)
    refused_or_read(folder, json.dumps(whole).encode())
    changed = bytearray(text)
    for _ in range(data.draw(st.integers(1, 5))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    refused_or_read(folder, bytes(changed))
    refused_or_read(folder, data.draw(st.binary(max_size=200)))


ONE_FOLDER = [HealthCheck.function_scoped_fixture]


@settings(max_examples=150, suppress_health_check=ONE_FOLDER)
@given(st.data())
def test_an_index_of_any_bytes_is_refused_or_read(
    tmp_path: Path, sharded: Path, data: st.DataObject
) -> None:
    changed_index(tmp_path, (sharded / "index.json").read_bytes(), data)


@pytest.mark.slow
@settings(max_examples=20_000, suppress_health_check=ONE_FOLDER)
@given(st.data())
def test_an_index_of_any_bytes_at_length(
    tmp_path: Path, sharded: Path, data: st.DataObject
) -> None:
    """The same for minutes: a decorator alone says how many examples."""
    changed_index(tmp_path, (sharded / "index.json").read_bytes(), data)


def test_a_deep_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="is not valid JSON"):
        shards.read_index(str(tmp_path))
