"""The label loss of a batch with mixed rows, against numbers written out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from cl.core import IGNORED, Batch, Output, Part, Source
from cl.state import Cost, cross_entropy, first_views, shares, tensor_bytes

LOGITS = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [0.0, math.log(4.0)]])
TARGETS = torch.tensor([0, 0, 0])
ROW_LOSSES = [math.log(2.0), math.log(4 / 3), math.log(5.0)]
"""-log of 1/2, 3/4 and 1/5."""


def batch(*parts, targets=TARGETS):
    ids = torch.arange(len(targets))
    return Batch(torch.zeros(len(targets), 1), targets, ids, ids, parts=parts)


def test_one_part_is_the_mean():
    assert cross_entropy(Output(LOGITS), batch()).item() == pytest.approx(sum(ROW_LOSSES) / 3)


def test_parts_add_up_with_their_weights():
    loss = cross_entropy(Output(LOGITS), batch(Part(0, 1), Part(1, 3, Source.REPLAY, "r", 0.5)))
    assert loss.item() == pytest.approx(ROW_LOSSES[0] + 0.5 * (ROW_LOSSES[1] + ROW_LOSSES[2]) / 2)


def test_a_weight_of_zero_gives_the_rows_no_gradient():
    logits = LOGITS.clone().requires_grad_()
    cross_entropy(Output(logits), batch(Part(0, 2), Part(2, 3, Source.ANCHOR, "a", 0.0))).backward()
    assert logits.grad[2].abs().sum() == 0
    assert logits.grad[:2].abs().sum() > 0


def test_nothing_but_weight_zero_is_a_zero_that_can_go_backward():
    logits = LOGITS.clone().requires_grad_()
    loss = cross_entropy(Output(logits), batch(Part(0, 3, weight=0.0)))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.abs().sum() == 0


def test_only_the_parts_asked_for():
    replay = Part(1, 3, Source.REPLAY, "r", 2.0)
    loss = cross_entropy(Output(LOGITS), batch(Part(0, 1), replay), parts=[replay])
    assert loss.item() == pytest.approx(ROW_LOSSES[1] + ROW_LOSSES[2])


def test_next_tokens_are_averaged_over_rows_and_time():
    logits, targets = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    loss = cross_entropy(Output(logits), batch(targets=targets))
    assert loss.item() == pytest.approx(F.cross_entropy(logits.view(10, 7), targets.view(10)).item())


def test_a_part_with_nothing_to_learn_is_zero_and_takes_nothing_from_the_others():
    logits, targets = torch.randn(3, 5, 7).requires_grad_(), torch.randint(7, (3, 5))
    targets[2] = IGNORED
    parts = Part(0, 2), Part(2, 3, Source.REPLAY, "r"), Part(3, 3, Source.ANCHOR, "a")
    loss = cross_entropy(Output(logits), batch(*parts, targets=targets))
    loss.backward()
    assert loss.item() == pytest.approx(F.cross_entropy(logits[:2].flatten(0, 1), targets[:2].flatten()).item())
    assert logits.grad[:2].abs().sum() > 0
    assert logits.grad[2].abs().sum() == 0


def test_nothing_to_learn_at_all_is_a_zero_that_can_go_backward():
    logits = torch.randn(2, 5, 7).requires_grad_()
    loss = cross_entropy(Output(logits), batch(targets=torch.full((2, 5), IGNORED)))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.abs().sum() == 0


def test_rows_can_ride_along_with_a_micro_batch_that_has_nothing_to_learn():
    rows = [batch(targets=torch.zeros(2, 3, dtype=torch.int64)), batch(targets=torch.full((2, 3), IGNORED))]
    full, empty = shares(rows)
    assert full == pytest.approx(1.0)
    assert 0 < empty < 1e-6
    assert sum(shares([rows[1], rows[1]])) == 1.0


def test_rows_of_one_number_are_views_of_one_row_within_an_experience_only():
    experiences, numbers = torch.tensor([0, 1, 0, 1]), torch.tensor([5, 5, 5, 6])
    rows = Batch(torch.zeros(4, 1), torch.zeros(4), experiences, numbers)
    assert first_views(rows).tolist() == [0, 1, 0, 3]


def test_reduced_precision_is_summed_in_float32():
    assert cross_entropy(Output(LOGITS.bfloat16()), batch()).dtype == torch.float32


def test_costs_add():
    assert Cost(1, 2, 3) + Cost(10, 20, 30) == Cost(11, 22, 33)


def test_tensor_bytes_reaches_into_nested_state():
    assert tensor_bytes({"a": [torch.zeros(3)], "b": (torch.zeros(2, dtype=torch.float64), 5, "x")}) == 12 + 16
