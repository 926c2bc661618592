"""One-to-many self-distillation: all views of a row must say what its first, weakly changed view says.

    penalty = strength * mean over later views of KL(p_first || p_later) / C,  p_first detached, C outputs of the head

Views come from the stream `view_batch`; on a stream that shows every row once there is nothing to tie, and no penalty.

Source: "Do Your Best and Get Enough Rest for Continual Learning", CVPR 2025, and hankyul2/ViewBatchModel
(models/icarl.py): from the seventh epoch of an experience on, weight 1, mean over the outputs as well.
Differences: views of a row are found by its sample id. `group_by="label"` is the published code: neighbours of the same
label are taken for views, so that different images get tied wherever two rows of a class follow each other, and as many
as V later rows join where there are V - 1 later views. Their uniform noise on later views (prog-aug 1) is left out; the
softmax runs over all outputs of the head, theirs over the classes seen so far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl.core import Batch, Output
from cl.hooks import Contract, Strategy
from cl.state import TrainState, first_views
from strategies._checks import require_choice, require_count, require_number


class ViewBatch(Strategy):
    """Distil from the first view of a row into its other views.

    Args:
        strength: weight of the penalty; 0 leaves it out.
        warmup_epochs: first epochs of every experience without the penalty.
        group_by: "sample" ties the views of a row; "label" ties neighbours of one label, as published.
        views: V, most rows that join a first one with group_by=label; not used otherwise.

    Cost: none beyond the stream's rows.
    """

    contract = Contract(
        toy={"group_by": "label", "warmup_epochs": 1},
        zero={"strength": 0.0},
        why_not_better="the toy stream shows every row once, and tying rows of one label is no remedy for forgetting",
    )

    def __init__(self, strength: float = 1.0, warmup_epochs: int = 6, group_by: str = "sample", views: int = 4) -> None:
        require_number("view_batch.strength", strength)
        require_number("view_batch.warmup_epochs", warmup_epochs)
        require_choice("view_batch.group_by", group_by, ("sample", "label"))
        require_count("view_batch.views", views)
        self.strength, self.warmup_epochs, self.group_by, self.views = strength, warmup_epochs, group_by, views

    def penalty(self, state: TrainState, batch: Batch, output: Output) -> Tensor | None:
        if self.strength == 0 or state.epoch < self.warmup_epochs:
            return None
        current = batch.current()
        first = first_views(current) if self.group_by == "sample" else neighbours(current.targets, self.views)
        first = first.to(output.logits.device)
        (later,) = (first != torch.arange(len(first), device=first.device)).nonzero(as_tuple=True)
        if len(later) == 0:
            return None
        # half precision is summed in float32, double stays double
        logits = output.logits[: len(current)]
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        teacher = log_p.detach()[first[later]]
        return self.strength * (teacher.exp() * (teacher - log_p[later])).mean()


def neighbours(targets: Tensor, views: int) -> Tensor:
    """(B,) for each row the one that the published code takes for its first view.

    Example:
        >>> neighbours(torch.tensor([5, 5, 5, 5, 3, 5]), views=2).tolist()
        [0, 0, 0, 3, 4, 5]
    """
    first: list[int] = []
    for row, label in enumerate(targets.tolist()):
        joins = bool(first) and label == targets[first[-1]].item() and row - first[-1] <= views
        first.append(first[-1] if joins else row)
    return torch.tensor(first)
