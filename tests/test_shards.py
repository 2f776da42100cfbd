from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sr_dist import shards
from sr_dist.errors import UserError

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


@settings(max_examples=60, deadline=None)
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


@settings(max_examples=60, deadline=None)
@given(plans)
def test_crops_of_one_sample_are_never_in_one_batch(plan: shards.Plan) -> None:
    for step in range(min(plan.steps_per_epoch, 20)):
        rows = [(shard, sample) for shard, sample, _ in shards.samples_of_step(plan, step)]
        assert len(set(rows)) == plan.global_batch_size


@settings(max_examples=60, deadline=None)
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


@settings(max_examples=200, deadline=None)
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
    counts = (10,) * 20
    lines = [shards._epoch_line(counts, 0, epoch) for epoch in range(3)]
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
    with pytest.raises(UserError, match="cannot (open|read) http://127.0.0.1:9/x/index.json"):
        shards.read_index("http://127.0.0.1:9/x")


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


def test_plan_refuses_crops_larger_than_the_pictures() -> None:
    with pytest.raises(UserError, match="crop_size is 192, but .* holds pictures of 128 pixels"):
        shards.make_plan(index(), seed=0, global_batch_size=2, crops_per_image=1, crop_size=192)


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
