"""What every buffer keeps: its capacity, the rows as they were, its state."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl.buffers.base import Buffer, make_buffer, stored_rows
from cl.core import Batch, TensorData, UserError

POLICIES = ["reservoir", "class_balanced", "experience_balanced", "ring", "fifo"]
SHAPES = [(), (3,), (8,), (1, 4, 4), (2, 3, 5)]


def batch_of(first: int, classes: list[int], shape=(8,), dtype=torch.uint8, task=None, experience=0) -> Batch:
    """Rows whose every pixel is their number."""
    numbers = torch.arange(first, first + len(classes))
    raw = numbers.to(dtype).view(-1, *(1 for _ in shape)).expand(-1, *shape).contiguous()
    return Batch(
        raw.float(),
        torch.tensor(classes),
        torch.full((len(classes),), experience),
        numbers,
        None if task is None else torch.full((len(classes),), task),
        raw,
    )


def contents(buffer: Buffer) -> Batch:
    return buffer.rows(torch.arange(len(buffer)))


def classes_strategy():
    return st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=40), min_size=1, max_size=8)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=60, deadline=None)
@given(capacity=st.integers(1, 30), batches=classes_strategy(), shape=st.sampled_from(SHAPES), seed=st.integers(0, 9))
def test_holds_distinct_rows_as_they_were_and_never_too_many(policy, capacity, batches, shape, seed):
    buffer, generator, offered = make_buffer(policy, capacity), torch.Generator().manual_seed(seed), {}
    for classes in batches:
        rows = batch_of(len(offered), classes, shape, torch.int32)
        extra = rows.raw.view(len(rows), -1).double().sum(1, keepdim=True)
        buffer.add(rows, generator, extra=extra)
        offered |= dict(enumerate(classes, start=len(offered)))
        assert len(buffer) <= capacity
        assert all(len(column) == capacity for column in buffer.columns.values())
    held = contents(buffer)
    numbers = held.sample_ids.tolist()
    assert len(set(numbers)) == len(numbers)
    assert held.targets.tolist() == [offered[number] for number in numbers]
    assert (held.inputs.view(len(held), -1) == held.sample_ids.unsqueeze(1)).all()
    assert torch.equal(
        buffer.take("extra", torch.arange(len(buffer))), held.inputs.view(len(held), -1).double().sum(1, keepdim=True)
    )
    assert len(buffer) == min(capacity, len(offered)) or policy not in ("reservoir", "fifo")
    assert buffer.seen == len(offered)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_larger_than_the_capacity(policy):
    buffer, generator = make_buffer(policy, 5), torch.Generator().manual_seed(0)
    for first in (0, 64):
        buffer.add(batch_of(first, [0, 1] * 32, dtype=torch.int32), generator)
        assert len(buffer) <= 5
        assert len(contents(buffer).sample_ids.unique()) == len(buffer)


@pytest.mark.parametrize("capacity", [20, 10], ids=["all taken", "some taken"])
@pytest.mark.parametrize("policy", POLICIES)
def test_rows_are_detached_copies(policy, capacity):
    buffer, generator = make_buffer(policy, capacity), torch.Generator().manual_seed(0)
    rows = batch_of(0, [0, 1] * 8, dtype=torch.float32)
    # three: what fills whole words is copied as such, which has no gradient
    logits = torch.ones(16, 3, requires_grad=True) * 2
    buffer.add(rows, generator, logits=logits)
    before = {name: column.clone() for name, column in buffer.columns.items()}
    rows.raw.zero_()
    assert all(torch.equal(column, before[name]) for name, column in buffer.columns.items())
    assert not any(column.requires_grad for column in buffer.columns.values())
    taken = contents(buffer)
    taken.inputs.fill_(9)
    assert torch.equal(buffer.columns["raw"], before["raw"])


@pytest.mark.parametrize("policy", POLICIES)
def test_parts_of_wider_rows_are_held_as_they_are(policy):
    """Eight bytes that do not begin at a whole word once could not be written."""
    buffer, generator = make_buffer(policy, 10), torch.Generator().manual_seed(0)
    wide = torch.randint(256, (64, 19), dtype=torch.uint8, generator=generator)
    for low in range(0, 64, 8):
        rows = batch_of(low, [0, 1] * 4)
        rows.raw = wide[low : low + 8, 3:11]
        buffer.add(rows, generator, values=wide[low : low + 8].float()[:, 1:5])
    held = contents(buffer)
    assert torch.equal(held.inputs, wide[held.sample_ids, 3:11])
    assert torch.equal(buffer.take("values", torch.arange(10)), wide[held.sample_ids].float()[:, 1:5])


@pytest.mark.parametrize("policy", POLICIES)
def test_state_round_trip_goes_on_exactly(policy):
    """After a save, both buffers take the same rows, and the saved state is not written to."""
    original, generator = make_buffer(policy, 12), torch.Generator().manual_seed(0)
    for k in range(3):
        original.add(batch_of(20 * k, [k, k + 1] * 10, task=0, experience=k), generator)
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    copy, untouched = make_buffer(policy, 12), torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    copy.load_state_dict(saved)
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    for buffer, its_own in zip((original, copy), generators, strict=True):
        for k in range(3, 8):
            buffer.add(batch_of(20 * k, [k, k + 1] * 10, task=0, experience=k), its_own)
    assert original.state_dict().keys() == copy.state_dict().keys()
    for name, column in original.columns.items():
        assert torch.equal(column, copy.columns[name])
    assert {k: v for k, v in original.state_dict().items() if k != "columns"} == {
        k: v for k, v in copy.state_dict().items() if k != "columns"
    }
    draws = [buffer.draw(5, its_own) for buffer, its_own in zip((original, copy), generators, strict=True)]
    assert torch.equal(*draws)
    for name, column in saved["columns"].items():
        assert torch.equal(column, untouched["columns"][name])
    assert saved.get("members") == untouched.get("members")


def test_the_task_of_a_row_stays_with_it():
    buffer, generator = make_buffer("reservoir", 8), torch.Generator().manual_seed(0)
    for task in range(3):
        buffer.add(batch_of(4 * task, [0, 1] * 2, task=task), generator)
    held = contents(buffer)
    assert torch.equal(held.task_id, held.sample_ids // 4)


def test_wrong_requests_are_named():
    for capacity in (0, True, 2.0):
        with pytest.raises(UserError, match=f"buffer capacity is {capacity}; it must be an integer of at least 1"):
            make_buffer("reservoir", capacity)
    with pytest.raises(UserError, match="buffer policy is 'base'; the policies are class_balanced, "):
        make_buffer("base", 1)
    text = batch_of(0, [0, 1])
    text.targets = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(UserError, match="class_balanced needs one class per row"):
        make_buffer("class_balanced", 4).add(text, torch.Generator())


def test_stored_rows_visits_every_row_once():
    data = TensorData(torch.arange(25).view(-1, 1), torch.zeros(25, dtype=torch.int64))
    batches = list(stored_rows(data, batch_size=10))
    assert [len(batch) for batch in batches] == [10, 10, 5]
    assert torch.equal(torch.cat([batch.raw for batch in batches]), data.inputs)
    chosen = list(stored_rows(data, torch.tensor([3, 1])))
    assert chosen[0].sample_ids.tolist() == [3, 1]
