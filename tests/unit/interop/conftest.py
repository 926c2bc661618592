"""Small data sets of Avalanche's."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset


class Items(Dataset):
    """Rows behind a transform, one at a time."""

    def __init__(self, inputs, targets, transform):
        self.inputs, self.targets, self.transform = inputs, targets.tolist(), transform

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, row):
        return self.transform(self.inputs[row]), self.targets[row]


def half(raw):
    return raw.float() / 2


def jittered(raw):
    return raw.float() + torch.rand(())


@pytest.fixture
def data():
    """Random pixels of six classes, and ways to show them."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 255, (120, 1, 4, 4), generator=generator, dtype=torch.uint8)
    targets = torch.arange(120) % 6

    def items(transform=half):
        from avalanche.benchmarks.utils import as_classification_dataset

        return as_classification_dataset(Items(inputs, targets, transform))

    def tensors(rows=slice(None)):
        from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute

        columns = TensorDataset(inputs[rows].float(), targets[rows])
        return AvalancheDataset([columns], data_attributes=[DataAttribute(targets[rows].tolist(), "targets")])

    return SimpleNamespace(inputs=inputs, targets=targets, items=items, tensors=tensors, half=half, jittered=jittered)
