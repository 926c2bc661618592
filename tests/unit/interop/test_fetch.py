"""Whole batches in place of rows: the same rows, from every loader of Avalanche, and nothing left behind."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("avalanche")
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from avalanche.benchmarks.utils.data_loader import (
    GroupBalancedInfiniteDataLoader,
    ReplayDataLoader,
    TaskBalancedDataLoader,
)

from cl.core import Setting
from cl.interop._benchmark import Rows
from cl.interop._fetch import columns, fast_fetching, same_rows
from cl.interop.avalanche import as_benchmark
from cl.testing import toy_stream


def two_datasets():
    train = as_benchmark(toy_stream(Setting.TASK_INCREMENTAL)).train_stream
    return train[0].dataset, train[1].dataset


def logits_of(dataset):
    values = [torch.full((2,), float(row)) for row in range(len(dataset))]
    return AvalancheDataset([dataset], data_attributes=[DataAttribute(values, "logits", use_in_getitem=True)])


LOADERS = {
    "plain": lambda a, b: DataLoader(a, batch_size=17, shuffle=True),
    "subset": lambda a, b: DataLoader(a.subset([5, 3, 3, 9]), batch_size=3),
    "subset of a concatenation": lambda a, b: DataLoader(b.concat(a).subset([200, 0, 191, 192, 383]), batch_size=2),
    "replay": lambda a, b: ReplayDataLoader(
        a, b.subset([1, 5, 7]), batch_size=16, batch_size_mem=2, oversample_small_tasks=True, shuffle=True
    ),
    "balanced": lambda a, b: TaskBalancedDataLoader(a.concat(b), batch_size=20, oversample_small_groups=True),
    "infinite": lambda a, b: [
        batch for batch, _ in zip(GroupBalancedInfiniteDataLoader([a, b], batch_size=8), range(5), strict=False)
    ],
    "stored logits": lambda a, b: DataLoader(logits_of(a.subset(list(range(40)))), batch_size=8, shuffle=True),
    "tensors": lambda a, b: DataLoader(
        AvalancheDataset([TensorDataset(torch.arange(10.0), torch.arange(10))]), batch_size=4, shuffle=True
    ),
}


def batches(make):
    torch.manual_seed(0)
    return [list(batch) for batch in make(*two_datasets())]


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS.keys())
def test_same_rows(make, monkeypatch):
    slow = batches(make)
    monkeypatch.setattr(Rows, "__getitem__", lambda *_: pytest.fail("a row was fetched on its own"))
    with fast_fetching():
        fast = batches(make)
    assert len(slow) == len(fast) > 0
    for left, right in zip(slow, fast, strict=True):
        assert [c.dtype for c in left] == [c.dtype for c in right]
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_rows_behind_a_transform_are_read_as_always(data):
    dataset = data.items()
    assert columns(dataset, torch.arange(3)) is None
    with fast_fetching():
        inputs, targets = next(iter(DataLoader(dataset, batch_size=3)))
    assert torch.equal(inputs, data.inputs[:3].float() / 2) and targets.tolist() == [0, 1, 2]


def test_nothing_is_left_behind():
    from torch.utils.data import ConcatDataset

    with fast_fetching(), fast_fetching():
        assert hasattr(AvalancheDataset, "__getitems__")
    assert not hasattr(AvalancheDataset, "__getitems__") and not hasattr(ConcatDataset, "__getitems__")


def test_same_rows_or_others():
    first, second = two_datasets()
    assert same_rows(first, first.train()) and not same_rows(first, second)
    assert not same_rows(first, first.concat(second)) and not same_rows(first, first.subset([0, 1]))
