"""A store of rows with a fixed capacity; subclasses decide which slot a new row takes."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import cl.buffers
from cl.core import Batch, Data, UserError

COLUMNS = ("raw", "targets", "experience_id", "sample_ids", "task_id")


def draw_without_replacement(num_rows: int, size: int, generator: torch.Generator) -> Tensor:
    """`size` distinct numbers below `num_rows`, each subset equally likely; all of them when `size` is larger.

    Floyd's algorithm: its cost depends on `size` only, not on the capacity.

    Example:
        >>> sorted(draw_without_replacement(3, 5, torch.Generator()).tolist())
        [0, 1, 2]
    """
    if size >= num_rows:
        return torch.arange(num_rows)
    uniforms = torch.rand(size, generator=generator, dtype=torch.float64).tolist()
    chosen: dict[int, None] = {}
    for top, uniform in zip(range(num_rows - size, num_rows), uniforms, strict=True):
        pick = int(uniform * (top + 1))
        chosen[top if pick in chosen else pick] = None
    return torch.tensor(list(chosen))


class Buffer:
    """Rows as they were stored (`Batch.raw`), their labels and origin, and extra columns such as logits.

    Args:
        capacity: most rows ever held.
    """

    def __init__(self, capacity: int) -> None:
        if not isinstance(capacity, int) or capacity < 1:
            raise UserError(f"buffer capacity is {capacity!r}; it must be an integer of at least 1")
        self.capacity = capacity
        self.seen = 0
        self.filled = 0
        self.columns: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return self.filled

    def slots(self, batch: Batch, generator: torch.Generator) -> list[tuple[int, int]]:
        """(slot, row) pairs for the rows of `batch` that are to be stored; a slot may replace what it holds."""
        raise NotImplementedError

    def add(self, batch: Batch, generator: torch.Generator, **extra: Tensor) -> None:
        """Offer the rows of a batch, with extra columns (B, ...) that are stored beside them."""
        pairs = dict(self.slots(batch, generator))  # a slot taken twice keeps the later row
        if not pairs:
            return
        slots, rows = torch.tensor(list(pairs)), torch.tensor(list(pairs.values()))
        values = {name: getattr(batch, name) for name in COLUMNS} | extra
        for name, column in values.items():
            if column is not None:
                self._column(name, column).index_copy_(
                    0, slots.to(column.device), column.detach().index_select(0, rows.to(column.device))
                )
        self.filled = max(self.filled, int(slots.max()) + 1)

    def _column(self, name: str, like: Tensor) -> Tensor:
        if name not in self.columns:
            self.columns[name] = torch.zeros(self.capacity, *like.shape[1:], dtype=like.dtype, device=like.device)
        return self.columns[name]

    def draw(self, size: int, generator: torch.Generator) -> Tensor:
        """Slots of `size` distinct rows, or of all rows when there are fewer."""
        return draw_without_replacement(self.filled, size, generator)

    def rows(self, slots: Tensor) -> Batch:
        """Stored rows, ready for `TrainState.prepare`."""
        column = self.take(slots)
        return Batch(
            column["raw"], column["targets"], column["experience_id"], column["sample_ids"], column.get("task_id")
        )

    def take(self, slots: Tensor) -> dict[str, Tensor]:
        """Every column at the given slots."""
        return {name: column.index_select(0, slots.to(column.device)) for name, column in self.columns.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "filled": self.filled, "columns": dict(self.columns)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.filled = state["seen"], state["filled"]
        self.columns = dict(state["columns"])


def make_buffer(policy: str, capacity: int) -> Buffer:
    """The buffer whose file in this folder is named `policy`.

    Example:
        >>> make_buffer("reservoir", 10).capacity
        10
    """
    policies = sorted(module.name for module in pkgutil.iter_modules(cl.buffers.__path__) if module.name != "base")
    if policy not in policies:
        raise UserError(f"buffer policy {policy!r} does not exist; the policies are {', '.join(policies)}")
    module = import_module(f"cl.buffers.{policy}")
    buffer: Buffer = getattr(module, "".join(word.capitalize() for word in policy.split("_")))(capacity)
    return buffer


def stored_rows(data: Data, batch_size: int = 1000) -> Iterator[Batch]:
    """Every row of a data set as a buffer stores it, a batch at a time."""
    for low in range(0, len(data), batch_size):
        rows = data.rows(torch.arange(low, min(low + batch_size, len(data))))
        rows.raw = rows.inputs
        yield rows
