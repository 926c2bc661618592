"""Rows of an Avalanche data set, many at once; the only file that looks inside `AvalancheDataset`.

A data loader asks a data set for whole batches when it has `__getitems__`, and `fast_fetching` gives Avalanche's data
sets that method. So every loader of every strategy (replay, importances, episodic memories) gathers tensors in place
of fetching, transforming and stacking rows one at a time, and draws exactly the same rows as before. Data sets that are
not made of tensors, or that transform their rows, are read as always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, TensorDataset
from torch.utils.data._utils.collate import default_collate, default_collate_fn_map

from cl.interop._quiet import quiet, require_avalanche

require_avalanche()
with quiet():
    from avalanche.benchmarks.utils import AvalancheDataset
    from avalanche.benchmarks.utils.data_attribute import DataAttribute
    from avalanche.benchmarks.utils.flat_data import ConstantSequence, FlatData

Columns = list[Tensor]
_kept: dict[int, Tensor] = {}


def _once(owner: Any, make: Callable[[], Tensor]) -> Tensor:
    """What `make` returns, kept as long as its owner lives; Avalanche's classes compare by content and have no hash."""
    if id(owner) not in _kept:
        _kept[id(owner)] = make()
        finalize(owner, _kept.pop, id(owner), None)
    return _kept[id(owner)]


class Leaf:
    """A data set of ours at the bottom of one of theirs; `columns` gives many rows at once."""

    def columns(self, index: Tensor, is_train: bool) -> Columns:
        """Inputs and targets of the rows `index` (B,)."""
        raise NotImplementedError


class Collated(list[Tensor]):
    """The columns of a whole batch: to a data loader, a single item that needs no stacking."""


def columns(dataset: Any, index: Tensor) -> Columns | None:
    """Columns of the rows `index` (B,) in the order of an item; None where rows must be fetched one by one.

    Example:
        >>> data = TensorDataset(torch.arange(6.0), torch.arange(6))
        >>> [column.tolist() for column in columns(data, torch.tensor([4, 1]))]
        [[4.0, 1.0], [4, 1]]
    """
    if isinstance(dataset, AvalancheDataset):
        flat = dataset._flat_data
        found = _flat_columns(flat, index, flat._transform_groups.current_group)
        if found is None:
            return None
        shown = [a for a in dataset._data_attributes.values() if a.use_in_getitem]
        return [*found, *(_attribute(a)[index] for a in shown)]
    return _leaf_columns(dataset, index, "train")


def _flat_columns(flat: Any, index: Tensor, group: str) -> Columns | None:
    """Through a subset and a concatenation to what they are made of."""
    for transforms in (getattr(flat, "_frozen_transform_groups", None), getattr(flat, "_transform_groups", None)):
        if transforms is not None and _transform(transforms.transform_groups, group) is not None:
            return None
    if flat._indices is not None:
        index = _once(flat, lambda: torch.as_tensor(list(flat._indices)))[index]
    if len(flat._datasets) == 1:
        return _leaf_columns(flat._datasets[0], index, group)
    return _gathered(flat._datasets, flat._cumulative_sizes, index, group)


def _transform(groups: Any, group: str) -> Any:
    """Transform of a group; looked up without leaving an entry in a table that makes them on demand."""
    found = groups.get(group)
    make = getattr(groups, "default_factory", None)
    return make() if found is None and group not in groups and make is not None else found


def _gathered(datasets: Sequence[Any], ends: Sequence[int], index: Tensor, group: str) -> Columns | None:
    """Rows of several data sets laid end to end, in the order asked for."""
    stops = torch.as_tensor(ends)
    owner = torch.searchsorted(stops, index, right=True)
    order = owner.argsort(stable=True)
    found: list[Columns] = []
    for k in owner.unique().tolist():
        local = index[owner == k] - (int(stops[k - 1]) if k else 0)
        part = _leaf_columns(datasets[k], local, group)
        if part is None or (found and len(part) != len(found[0])):
            return None
        found.append(part)
    if len(found) == 1:
        return found[0]
    back = order.argsort()
    return [torch.cat(pieces)[back] for pieces in zip(*found, strict=True)]


def _leaf_columns(dataset: Any, index: Tensor, group: str) -> Columns | None:
    if isinstance(dataset, AvalancheDataset):
        return columns(dataset, index)
    if isinstance(dataset, FlatData):
        return _flat_columns(dataset, index, group)
    if isinstance(dataset, Leaf):
        return dataset.columns(index, group == "train")
    if isinstance(dataset, TensorDataset):
        return [tensor.index_select(0, index) for tensor in dataset.tensors]
    return None


def _attribute(attribute: DataAttribute) -> Tensor:
    """All values of a per-row attribute, such as labels of tasks or stored logits."""
    data = attribute.data
    if isinstance(data, ConstantSequence) and len(data):
        return torch.as_tensor(data[0]).expand(len(data))

    def read() -> Tensor:
        found = list(data)
        return torch.stack(found) if found and isinstance(found[0], Tensor) else torch.as_tensor(found)

    return _once(attribute, read)


def _items(dataset: Any, indices: list[int]) -> list[Any]:
    """`__getitems__` of Avalanche's data sets."""
    found = columns(dataset, torch.as_tensor(indices)) if dataset.collate_fn is default_collate else None
    return [dataset[i] for i in indices] if found is None else [Collated(found)]


def _concat_items(dataset: Any, indices: list[int]) -> list[Any]:
    """`__getitems__` of torch's concatenation, which Avalanche puts around its own data sets."""
    found = None
    if all(isinstance(part, AvalancheDataset) and part.collate_fn is default_collate for part in dataset.datasets):
        found = _gathered(dataset.datasets, dataset.cumulative_sizes, torch.as_tensor(indices), "")
    return [dataset[i] for i in indices] if found is None else [Collated(found)]


def _as_batch(items: list[Collated], *, collate_fn_map: Any = None) -> Columns:
    """What a data loader makes of the one item of a collated batch."""
    return list(items[0])


@contextmanager
def fast_fetching() -> Iterator[None]:
    """Inside, data loaders over Avalanche's data sets fetch whole batches. May be nested."""
    methods = {AvalancheDataset: _items, ConcatDataset: _concat_items}
    added = [kind for kind in methods if "__getitems__" not in vars(kind)]
    for kind in added:
        kind.__getitems__ = methods[kind]
    if added:
        default_collate_fn_map[Collated] = _as_batch
    try:
        yield
    finally:
        for kind in added:
            del kind.__getitems__
        if added:
            default_collate_fn_map.pop(Collated, None)


def same_rows(left: Any, right: Any) -> bool:
    """Whether two data sets of theirs show the same rows; conservative, since rows are not looked at.

    Example:
        >>> same_rows([1], [1])
        False
    """
    if not isinstance(left, AvalancheDataset) or not isinstance(right, AvalancheDataset) or len(left) != len(right):
        return False
    bottoms = [dataset._flat_data._datasets for dataset in (left, right)]
    return len(bottoms[0]) == len(bottoms[1]) and all(a is b for a, b in zip(*bottoms, strict=True))


def bytes_in(thing: Any, row_bytes: int, seen: set[int], is_outside: Callable[[Any], Any]) -> int:
    """Bytes of the tensors in a graph of objects; a data set counts the rows it shows, whoever holds them.

    Args:
        row_bytes: of one row of a data set.
        seen: numbers of objects that do not count, or were counted.
        is_outside: says of an object that it is not part of the graph.
    """
    if id(thing) in seen or thing is None or isinstance(thing, str | int | float | type):
        return 0
    seen.add(id(thing))
    if is_outside(thing):
        return 0
    if isinstance(thing, Tensor):
        return thing.numel() * thing.element_size()
    if isinstance(thing, AvalancheDataset):
        return len(thing) * row_bytes
    inner = list(thing.values()) if isinstance(thing, dict) else list(thing) if isinstance(thing, list | tuple) else []
    inner += list(vars(thing).values()) if hasattr(thing, "__dict__") and not isinstance(thing, FunctionType) else []
    return sum(bytes_in(each, row_bytes, seen, is_outside) for each in inner)
