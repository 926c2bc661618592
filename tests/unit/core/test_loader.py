"""How long to train, and which rows come next: pure functions of the position."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl.core import Batch, Experience, Setting, Stream, StreamInfo, TensorData, UserError, shuffled
from cl.loader import Budget, check_rows, steps_from, steps_in, tokens_per_row
from cl.seeding import Seeds
from cl.state import TrainState
from cl.testing import toy_stream

NUM_ROWS = 50


def experience(order=shuffled, num_rows=NUM_ROWS, announced=None):
    data = TensorData(torch.arange(num_rows, dtype=torch.uint8).unsqueeze(1), torch.zeros(num_rows, dtype=torch.int64))
    return Experience(0, "only", "only", lambda: data, num_rows if announced is None else announced, order=order)


def state_of(one, augment=None, seed=0):
    info = StreamInfo("s", Setting.DOMAIN_INCREMENTAL, (1,), 2, 1)
    stream = Stream(info, [one], [], transform=lambda raw: raw.float(), augment=augment)
    return TrainState(torch.nn.Identity(), None, stream, Seeds(seed), torch.device("cpu"), None)


def row_ids(budget, start=0, order=shuffled, seed=0):
    one = experience(order)
    steps = steps_from(state_of(one, seed=seed), one, one.load(), budget, start)
    return [(epoch, [batch.sample_ids.tolist() for batch in batches]) for epoch, batches in steps]


# budgets


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        (Budget(batch_size=10), 5),
        (Budget(batch_size=16), 4),
        (Budget(epochs=3, batch_size=16), 12),
        (Budget(epochs=2, batch_size=16, accumulation=3), 4),
        (Budget(max_steps=7, batch_size=16), 7),
        (Budget(max_tokens=1, batch_size=16), 1),
        (Budget(max_tokens=50, batch_size=16), 4),
        (Budget(max_tokens=51, batch_size=16), 5),
        (Budget(max_tokens=100, batch_size=64), 2),
        (Budget(max_tokens=51, batch_size=8, accumulation=2), 5),
        (Budget(max_tokens=49, batch_size=8, accumulation=2), 4),
    ],
)
def test_steps_by_hand(budget, steps):
    assert budget.steps(NUM_ROWS) == steps


@given(st.integers(1, 300), st.integers(1, 70), st.integers(1, 4), st.integers(1, 2000), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_a_token_budget_is_reached_by_the_fewest_steps(num_rows, batch_size, accumulation, max_tokens, per_row):
    budget = Budget(max_tokens=max_tokens, batch_size=batch_size, accumulation=accumulation)
    steps = budget.steps(num_rows, per_row)
    rows_of_a_step = batch_size * accumulation
    whole_epoch = [min(rows_of_a_step, num_rows - low) for low in range(0, num_rows, rows_of_a_step)]

    def tokens(count):
        epochs, rest = divmod(count, len(whole_epoch))
        return per_row * (epochs * num_rows + sum(whole_epoch[:rest]))

    assert tokens(steps) >= max_tokens
    assert tokens(steps - 1) < max_tokens


def test_tokens_are_counted_before_anything_is_loaded():
    assert tokens_per_row(toy_stream(Setting.CONTINUAL_PRETRAINING).info) == 8
    assert tokens_per_row(toy_stream(Setting.CLASS_INCREMENTAL).info) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"epochs": 1, "max_steps": 5}, "epochs and max_steps"),
        ({"epochs": 0}, "trainer.epochs is 0"),
        ({"max_tokens": -3}, "trainer.max_tokens is -3"),
        ({"batch_size": 2.5}, "trainer.batch_size is 2.5"),
        ({"max_steps": [5, True]}, r"trainer.max_steps is \[5, True\]"),
        (
            {"max_steps": []},
            r"trainer.max_steps is \[\]; it must be an integer of at least 1, or a list",
        ),
        ({"epochs": [1, 2]}, r"trainer.epochs is \[1, 2\]; it must be an integer of at least 1$"),
        ({"accumulation": 0}, "trainer.accumulation is 0"),
    ],
)
def test_a_bad_budget_is_named(arguments, words):
    with pytest.raises(UserError, match=words):
        Budget(**arguments)


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        (Budget(epochs=2, batch_size=16), 8),
        (Budget(max_steps=7, batch_size=16), 21),
        (Budget(max_tokens=40, batch_size=16), 10),
        (Budget(max_steps=[7, 9], batch_size=16), 7),
        (Budget(max_steps=(7, 9), batch_size=16), 7),
    ],
)
def test_an_experience_that_holds_three_has_three_budgets(budget, steps):
    """Of 50 rows: 120 tokens are two epochs of 4 steps and 20 rows; epochs count its own rows, a list is as it is."""
    assert steps_in(replace(experience(), merged=3), budget, state_of(experience()).info) == steps


# rows


def test_every_row_comes_once_per_epoch_in_the_order_of_the_experience():
    steps = row_ids(Budget(epochs=2, batch_size=16))
    epochs = [[i for e, batches in steps for ids in batches if e == epoch for i in ids] for epoch in (0, 1)]
    assert [sorted(rows) for rows in epochs] == [list(range(NUM_ROWS))] * 2
    assert epochs[0] != epochs[1]
    expected = shuffled(NUM_ROWS, 0, Seeds(0).fresh("order", 0, 0)).tolist()
    assert epochs[0] == expected


def test_last_batch_of_an_epoch_is_smaller():
    assert [len(ids) for _, batches in row_ids(Budget(epochs=1, batch_size=16)) for ids in batches] == [16, 16, 16, 2]


@pytest.mark.parametrize(
    "budget", [Budget(epochs=3, batch_size=8), Budget(max_steps=13, batch_size=16, accumulation=2)]
)
def test_any_position_can_be_entered_directly(budget):
    whole = row_ids(budget)
    for start in range(len(whole) + 1):
        assert row_ids(budget, start) == whole[start:]


def test_accumulation_groups_micro_batches():
    grouped = row_ids(Budget(epochs=1, batch_size=8, accumulation=3))
    assert [[len(ids) for ids in batches] for _, batches in grouped] == [[8, 8, 8], [8, 8, 8], [2]]
    flat = [ids for _, batches in grouped for ids in batches]
    assert flat == [ids for _, batches in row_ids(Budget(epochs=1, batch_size=8)) for ids in batches]


def test_blocks_do_not_show(monkeypatch):
    """Rows are gathered many batches at a time; how many must not matter."""
    many = row_ids(Budget(epochs=1, batch_size=4))
    monkeypatch.setattr("cl.loader.BLOCK_BYTES", 1)
    assert row_ids(Budget(epochs=1, batch_size=4)) == many


@pytest.mark.parametrize("by", ["augment", "augment_rows"])
def test_augmentation_depends_on_the_position_only(by):
    def noise(given, generator):
        inputs = given if by == "augment" else given.inputs
        return inputs + torch.rand(inputs.shape, generator=generator)

    def inputs(start, number=0):
        one = replace(experience(), id=number)
        state = state_of(one)
        state.stream = replace(state.stream, **{by: noise})
        steps = steps_from(state, one, one.load(), Budget(epochs=2, batch_size=8), start)
        return [batch.inputs for _, batches in steps for batch in batches]

    whole = inputs(0)
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], inputs(5), strict=True))
    # micro-batch 5 of the second epoch of experience 3, drawn again by hand
    order = shuffled(NUM_ROWS, 1, Seeds(0).fresh("order", 3, 1))[40:48]
    drawn = torch.rand((8, 1), generator=Seeds(0).fresh("augment", 3, 1, 5))
    assert torch.equal(inputs(0, number=3)[7 + 5], order[:, None] + drawn)
    # 50 rows are 7 batches: the next one, the same one in the next epoch, the same one of the next experience
    for other in (whole[1], whole[7], inputs(0, number=1)[0]):
        assert not torch.equal(whole[0].frac(), other.frac())


def test_raw_rows_travel_along_unchanged():
    one = experience()
    for _, batches in steps_from(state_of(one), one, one.load(), Budget(epochs=1, batch_size=8), 0):
        for batch in batches:
            assert isinstance(batch, Batch)
            assert batch.raw.dtype == torch.uint8
            assert batch.raw.flatten().tolist() == batch.sample_ids.tolist() == batch.inputs.flatten().tolist()


@pytest.mark.parametrize("length", [0, NUM_ROWS - 1, NUM_ROWS + 1])
def test_an_order_of_another_length_is_refused(length):
    """It would shift every later position; an order that is too short once made the loop wait forever."""
    with pytest.raises(UserError, match=f"names {length} rows"):
        row_ids(Budget(epochs=1, batch_size=8), order=lambda n, epoch, generator: torch.arange(length) % n)


def test_an_order_may_repeat_rows():
    steps = row_ids(Budget(epochs=1, batch_size=25), order=lambda n, epoch, generator: torch.arange(n) % 5)
    assert [max(ids) for _, batches in steps for ids in batches] == [4, 4]


def test_an_experience_must_hold_what_it_announced():
    empty, liar = experience(num_rows=0), experience(announced=NUM_ROWS + 1)
    with pytest.raises(UserError, match="no training rows"):
        check_rows(empty.load(), empty)
    with pytest.raises(UserError, match=f"announced {NUM_ROWS + 1} rows but its data holds {NUM_ROWS}"):
        check_rows(liar.load(), liar)


def test_batches_per_epoch_round_up():
    assert Budget(batch_size=16).batches_per_epoch(NUM_ROWS) == math.ceil(NUM_ROWS / 16)
    assert [Budget().batches_per_epoch(rows) for rows in (64, 65, 128, 129)] == [1, 2, 2, 3]
