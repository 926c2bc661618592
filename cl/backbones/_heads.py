"""The last layer: one linear map for all rows, or one per task where the setting gives task labels.

Shape legend: B rows, F features, C outputs of one head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl.core import Batch, Output, StreamInfo, UserError


class MultiHead(nn.Module):
    """One linear head per task; rows pick theirs by `task_id`.

    Separate modules and not one wide matrix: a head that no row asks for gets no gradient at all, so that momentum
    and weight decay leave it alone.

    Example:
        >>> head = MultiHead(4, 2, num_heads=3)
        >>> head(torch.zeros(5, 4), torch.tensor([0, 0, 2, 2, 0])).shape
        torch.Size([5, 2])
    """

    def __init__(self, num_features: int, num_outputs: int, num_heads: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(num_features, num_outputs) for _ in range(num_heads))

    def forward(self, hidden_BF: Tensor, task_id_B: Tensor | None = None) -> Tensor:
        if task_id_B is None:
            raise ValueError("a multi-head backbone needs rows with a task_id; this batch has none")
        tasks = torch.unique(task_id_B).tolist()
        if tasks[0] < 0 or tasks[-1] >= len(self.heads):
            raise ValueError(f"rows ask for the heads {tasks}; this backbone has 0 to {len(self.heads) - 1}")
        if len(tasks) == 1:
            logits_BC: Tensor = self.heads[tasks[0]](hidden_BF)
            return logits_BC
        every_BC = {task: self.heads[task](hidden_BF) for task in tasks}
        logits_BC = every_BC[tasks[0]]
        for task in tasks[1:]:
            logits_BC = torch.where((task_id_B == task).unsqueeze(1), every_BC[task], logits_BC)
        return logits_BC


class Backbone(nn.Module):
    """Features, then a head. Subclasses define `features`: inputs (B, ...) -> hidden (B, F)."""

    def __init__(self, info: StreamInfo, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.head: nn.Module = (
            nn.Linear(num_features, info.num_outputs)
            if info.num_heads == 1
            else MultiHead(num_features, info.num_outputs, info.num_heads)
        )

    def features(self, inputs: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, batch: Batch) -> Output:
        hidden_BF = self.features(batch.inputs)
        if isinstance(self.head, MultiHead):
            return Output(self.head(hidden_BF, batch.task_id), hidden_BF)
        return Output(self.head(hidden_BF), hidden_BF)


def require_width(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"backbone.{name} is {value!r}; it must be an integer of at least 1")


def require_image(info: StreamInfo, backbone: str, smallest: int = 1) -> tuple[int, int, int]:
    """Channels, height and width of the stream's rows.

    Raises:
        UserError: the rows are no images, or are too small for the backbone.
    """
    shape = info.input_shape
    if len(shape) != 3 or min(shape[1:]) < smallest:
        raise UserError(
            f"backbone {backbone} reads images (channels, height, width) of at least {smallest}x{smallest} pixels; "
            f"the rows of {info.name} have the shape {tuple(shape)}"
        )
    channels, height, width = shape
    return channels, height, width
