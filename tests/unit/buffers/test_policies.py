"""Which rows stay: chi-square tests for the random policies, an exact model for the ring."""

from __future__ import annotations

from collections import Counter, deque
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from cl.buffers.base import draw_without_replacement, make_buffer
from cl.core import Batch

TRIALS = 1500


def offered(numbers: list[int], classes: list[int], tasks: list[int] | None = None) -> Batch:
    ids = torch.tensor(numbers)
    return Batch(
        ids.unsqueeze(1).float(),
        torch.tensor(classes),
        torch.tensor(classes),
        ids,
        None if tasks is None else torch.tensor(tasks),
        ids.unsqueeze(1),
    )


def times_kept(policy: str, capacity: int, classes: list[int], batch_size: int) -> Counter:
    """How often each row is in the buffer at the end, over many independent streams."""
    generator, kept = torch.Generator().manual_seed(0), Counter()
    cuts = torch.arange(len(classes)).split(batch_size)
    batches = [offered(rows.tolist(), [classes[row] for row in rows]) for rows in cuts]
    for _ in range(TRIALS):
        buffer = make_buffer(policy, capacity)
        for batch in batches:
            buffer.add(batch, generator)
        kept.update(buffer.columns["sample_ids"][: len(buffer)].tolist())
    return kept


def assert_equally_likely(counts: list[int], share: float) -> None:
    """Counts of rows that are each kept with probability `share`, `share * len(counts)` of them at a time."""
    expected = TRIALS * share
    statistic = sum((count - expected) ** 2 for count in counts) / (expected * (1 - share))
    assert chi2.sf(statistic * (len(counts) - 1) / len(counts), len(counts) - 1) > 1e-3, counts


@pytest.mark.parametrize("batch_size", [7, 60])
def test_reservoir_is_uniform_over_position(batch_size):
    kept = times_kept("reservoir", 12, [0] * 60, batch_size)
    assert_equally_likely([kept[i] for i in range(60)], 12 / 60)


@settings(max_examples=60, deadline=None)
@given(capacity=st.integers(1, 40), sizes=st.lists(st.integers(1, 30), max_size=8), seed=st.integers(0, 9))
def test_reservoir_is_algorithm_r_row_by_row(capacity, sizes, seed):
    """Vitter's loop over the same uniform numbers: the same row in every slot."""
    buffer, generator = make_buffer("reservoir", capacity), torch.Generator().manual_seed(seed)
    own, held, seen = torch.Generator().manual_seed(seed), {}, 0
    for size in sizes:
        for uniform in torch.rand(size, generator=own, dtype=torch.float64).tolist():
            slot = seen if seen < capacity else int(uniform * (seen + 1))
            if slot < capacity:
                held[slot] = seen
            seen += 1
        buffer.add(offered(list(range(seen - size, seen)), [0] * size), generator)
        assert buffer.columns["sample_ids"][: len(buffer)].tolist() == [held[slot] for slot in range(len(held))]


@pytest.mark.parametrize("policy", ["class_balanced", "experience_balanced"])
@pytest.mark.parametrize("arrival", ["one after the other", "mixed"])
def test_balanced_shares_and_uniform_within(policy, arrival):
    """Three groups of 20, 30 and 10 rows share 12 slots: 4 each, any row of a group as likely as any other."""
    sizes = [20, 30, 10]
    classes = [c for c, size in enumerate(sizes) for _ in range(size)]
    if arrival == "mixed":
        order = torch.randperm(60, generator=torch.Generator().manual_seed(1)).tolist()
        classes = [classes[i] for i in order]
    kept = times_kept(policy, 12, classes, batch_size=7)
    for group, size in enumerate(sizes):
        counts = [kept[i] for i, c in enumerate(classes) if c == group]
        assert sum(counts) == 4 * TRIALS
        assert_equally_likely(counts, 4 / size)


def test_slots_without_owner_go_to_the_largest_group():
    """10 slots for 3 groups: nobody holds fewer than 3, and none is empty."""
    buffer, generator = make_buffer("class_balanced", 10), torch.Generator().manual_seed(0)
    for group in range(3):
        buffer.add(offered(list(range(20)), [group] * 20), generator)
    assert sorted(len(members) for members in buffer.members.values()) == [3, 3, 4]
    assert len(buffer) == 10


def test_more_groups_than_slots_hold_the_newest_ones():
    """A group that holds nothing takes the place of the group seen first among those that hold a row."""
    buffer, generator, held = make_buffer("class_balanced", 3), torch.Generator().manual_seed(0), []
    for group in [0, 1, 2, 3, 4, 5, 0]:
        buffer.add(offered([group], [group]), generator)
        held.append(sorted(buffer.columns["targets"][: len(buffer)].tolist()))
    assert held == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [0, 4, 5]]


def test_classes_of_different_heads_are_different_groups():
    buffer, generator = make_buffer("class_balanced", 12), torch.Generator().manual_seed(0)
    for task in range(2):
        buffer.add(offered(list(range(40)), [0, 1] * 20, [task] * 40), generator)
    pairs = Counter(zip(buffer.columns["task_id"].tolist(), buffer.columns["targets"].tolist(), strict=True))
    assert pairs == {(0, 0): 3, (0, 1): 3, (1, 0): 3, (1, 1): 3}


@settings(max_examples=150, deadline=None)
@given(
    share=st.integers(1, 6),
    num_classes=st.integers(1, 4),
    stream=st.lists(st.integers(0, 3), min_size=1, max_size=80),
    batch_size=st.integers(1, 20),
)
def test_ring_is_first_in_first_out_within_a_class(share, num_classes, stream, batch_size):
    """Exact while no class arrives late: each class holds its newest `share` rows."""
    stream = list(range(num_classes)) + [c % num_classes for c in stream]
    buffer, generator = make_buffer("ring", share * num_classes), torch.Generator().manual_seed(0)
    model = {c: deque(maxlen=share) for c in range(num_classes)}
    # the first batch shows every class, so that shares never shrink
    cuts = [0, *range(num_classes, len(stream), batch_size), len(stream)]
    for low, high in pairwise(cuts):
        if high > low:
            buffer.add(offered(list(range(low, high)), stream[low:high]), generator)
        for number in range(low, high):
            model[stream[number]].append(number)
        held = buffer.columns["sample_ids"][: len(buffer)].tolist()
        assert sorted(held) == sorted(number for queue in model.values() for number in queue)


@settings(max_examples=60, deadline=None)
@given(capacity=st.integers(1, 12), sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_fifo_holds_the_newest_rows(capacity, sizes):
    buffer, seen = make_buffer("fifo", capacity), 0
    for size in sizes:
        buffer.add(offered(list(range(seen, seen + size)), [0] * size), torch.Generator())
        seen += size
        held = buffer.columns["sample_ids"][: len(buffer)].tolist()
        assert sorted(held) == list(range(max(0, seen - capacity), seen))


def test_a_shrinking_ring_gives_up_its_oldest_rows():
    buffer, generator = make_buffer("ring", 6), torch.Generator().manual_seed(0)
    buffer.add(offered(list(range(10)), [0] * 10), generator)
    buffer.add(offered([10, 11], [1, 1]), generator)
    assert sorted(buffer.columns["sample_ids"].tolist()) == [6, 7, 8, 9, 10, 11]
    buffer.add(offered([12, 13, 14], [1, 0, 0]), generator)
    assert sorted(buffer.columns["sample_ids"].tolist()) == [9, 10, 11, 12, 13, 14]


def test_every_subset_is_drawn_equally_often():
    generator, subsets = torch.Generator().manual_seed(0), Counter()
    for _ in range(TRIALS):
        subsets[tuple(sorted(draw_without_replacement(6, 3, generator).tolist()))] += 1
    counts = [subsets[subset] for subset in combinations(range(6), 3)]
    statistic = sum((count - TRIALS / 20) ** 2 / (TRIALS / 20) for count in counts)
    assert chi2.sf(statistic, 19) > 1e-3, counts


@pytest.mark.parametrize("size", [1, 7, 64, 99])
def test_draws_are_floyds_loop(size):
    """Over the same uniform numbers, in the order of the draw."""
    uniforms = torch.rand(size, generator=torch.Generator().manual_seed(3), dtype=torch.float64).tolist()
    chosen = []
    for top, uniform in zip(range(100 - size, 100), uniforms, strict=True):
        pick = int(uniform * (top + 1))
        chosen.append(top if pick in chosen else pick)
    assert draw_without_replacement(100, size, torch.Generator().manual_seed(3)).tolist() == chosen


@settings(max_examples=200, deadline=None)
@given(num_rows=st.integers(0, 300), size=st.integers(0, 300), seed=st.integers(0, 1000))
def test_draws_are_distinct_and_in_range(num_rows, size, seed):
    drawn = draw_without_replacement(num_rows, size, torch.Generator().manual_seed(seed)).tolist()
    assert len(drawn) == len(set(drawn)) == min(size, num_rows)
    assert set(drawn) <= set(range(num_rows))
