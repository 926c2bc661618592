"""What a backbone remembers between calls: nested dicts of tensors, and the few things that are done with them.

Tensors have the rows of the batch first; a tensor without dimensions is a number that all rows share.

Shape legend: B rows, T tokens, S documents of a batch, X trailing sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.common.varlen import cu_seqlens_from_reset

State = dict[str, Any]
"""Tensors by name, nested: {"memory": (B, ...), "inner": {"tail": (B, ...)}}."""


def mapped(change: Callable[..., Tensor], state: Mapping[str, Any], *others: Mapping[str, Any]) -> State:
    """`change` applied to every tensor, together with the tensors of the same place in `others`."""
    return {
        name: mapped(change, value, *(other[name] for other in others))
        if isinstance(value, Mapping)
        else change(value, *(other[name] for other in others))
        for name, value in state.items()
    }


def detached(state: State) -> State:
    """The same numbers, through which no gradient flows: truncated back-propagation is this, called every k segments.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> detached({"memory": x * 2})["memory"].requires_grad
        False
    """
    return mapped(torch.Tensor.detach, state)


def rows_of(state: State, index: Tensor | slice) -> State:
    """What the rows `index` remember.

    Example:
        >>> rows_of({"memory": torch.arange(3), "position": torch.tensor(7)}, torch.tensor([2]))
        {'memory': tensor([2]), 'position': tensor(7)}
    """
    return mapped(lambda value: value[index] if value.dim() else value, state)


def where_rows(is_new_B: Tensor, fresh: State, state: State) -> State:
    """`fresh` for the rows where a document starts, `state` for the others; shared numbers stay those of `state`."""

    def chosen(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(is_new_B.view(-1, *[1] * (old.dim() - 1)), new.to(old.dtype), old) if old.dim() else old

    return mapped(chosen, fresh, state)


@dataclass(frozen=True)
class Packing:
    """The documents of a batch as the kernels take them: one row of sequences with offsets.

    Args:
        shape: (B, T).
        cu_seqlens: (S + 1,) where each document begins in the row of B * T tokens.
        row: (S,) row of the batch that each document lies in.
        is_new: (S,) whether it starts here, or goes on from what the row remembers.
        last: (B,) the document that each row ends with.
    """

    shape: tuple[int, int]
    cu_seqlens: Tensor
    row: Tensor
    is_new: Tensor
    last: Tensor

    @staticmethod
    def of(reset_BT: Tensor) -> Packing:
        """From "a document starts here" flags; reads them, so it waits for the device.

        Example:
            >>> packing = Packing.of(torch.tensor([[False, False, True], [True, False, False]]))
            >>> packing.cu_seqlens.tolist(), packing.row.tolist(), packing.is_new.tolist(), packing.last.tolist()
            ([0, 2, 3, 6], [0, 0, 1], [False, True, True], [1, 2])
        """
        num_rows, num_tokens = reset_BT.shape
        cu_seqlens = cu_seqlens_from_reset(reset_BT)
        first = cu_seqlens[:-1].long()
        row_S = first // num_tokens
        last_B = torch.bincount(row_S, minlength=num_rows).cumsum(0) - 1
        return Packing((num_rows, num_tokens), cu_seqlens, row_S, reset_BT.bool().flatten()[first], last_B)

    def tokens(self, x_BTX: Tensor) -> Tensor:
        """(1, B * T, X)."""
        return x_BTX.flatten(0, 1).unsqueeze(0)

    def rows(self, y_1NX: Tensor) -> Tensor:
        """(B, T, X), back from what `tokens` gave."""
        return y_1NX.view(*self.shape, *y_1NX.shape[2:])

    def start(self, state: State, fresh: State) -> State:
        """What each document starts with: what its row remembers, or `fresh` (B rows of it) where it is new."""
        return where_rows(self.is_new, rows_of(fresh, self.row), rows_of(state, self.row))

    def end(self, state_S: State) -> State:
        """What each row remembers: the state after its last document."""
        return rows_of(state_S, self.last)
