"""A backbone of ours as a model of Avalanche, and the other way round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cl.core import Batch, Output, UserError
from cl.interop._quiet import quiet, require_avalanche

require_avalanche()
with quiet():
    from avalanche.models import MultiTaskModule, avalanche_forward

_last: WeakKeyDictionary[nn.Module, Output] = WeakKeyDictionary()
"""Output of each network's latest call; beside the modules, because Avalanche copies them deeply."""
_announced: WeakKeyDictionary[nn.Module, Batch] = WeakKeyDictionary()
"""Rows that each network will be asked about next, with all that is known of them."""


def announce(model: nn.Module, batch: Batch) -> None:
    """Tell a network which rows the inputs are that Avalanche will hand to it: it hands over nothing else."""
    _announced[model] = batch


def _known(model: nn.Module, inputs: Tensor) -> Batch | None:
    """The rows announced, if these are their inputs."""
    batch = _announced.get(model)
    return batch if batch is not None and batch.inputs is inputs else None


_counters: list[Callable[[int, int], None]] = []


@contextmanager
def counting(count: Callable[[int, int], None]) -> Iterator[None]:
    """Tell `count` the rows that go forward through any network here, and those whose gradient can be taken."""
    _counters.append(count)
    try:
        yield
    finally:
        _counters.remove(count)


def _note(num_rows: int) -> None:
    for count in _counters:
        count(num_rows, num_rows if torch.is_grad_enabled() else 0)


def rows_of(inputs: Tensor, task_id: Tensor | None = None, targets: Tensor | None = None) -> Batch:
    """Inputs as a batch whose rows come from nowhere: a number of -1, experience 0."""
    zeros = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
    return Batch(inputs, zeros if targets is None else targets, zeros, zeros - 1, task_id)


class Network(nn.Module):
    """A backbone of ours that maps inputs to logits."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, inputs: Tensor) -> Tensor:
        return self.run(_known(self, inputs) or rows_of(inputs)).logits

    def run(self, batch: Batch) -> Output:
        """Call the backbone, and remember what it said."""
        _note(len(batch))
        output: Output = self.backbone(batch)
        _last[self] = output
        return output


class MultiHeadNetwork(MultiTaskModule):
    """A backbone of ours with a head per task, which Avalanche tells the task labels."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    run = Network.run

    def forward(self, inputs: Tensor, task_labels: Tensor | None) -> Any:
        if task_labels is None:
            return self.forward_all_tasks(inputs)
        if not isinstance(task_labels, Tensor):
            return self.forward_single_task(inputs, int(task_labels))
        return self.run(rows_of(inputs, task_labels.long())).logits

    def forward_single_task(self, inputs: Tensor, task_label: int) -> Tensor:
        labels = torch.full((len(inputs),), task_label, device=inputs.device)
        return self.run(rows_of(inputs, labels)).logits


class LabelledNetwork(MultiHeadNetwork):
    """A backbone with one head for strategies that give every model task labels; they are not looked at."""

    def forward(self, inputs: Tensor, task_labels: Tensor | None) -> Tensor:
        return self.run(_known(self, inputs) or rows_of(inputs)).logits


def as_model(backbone: nn.Module, num_heads: int = 1) -> nn.Module:
    """A backbone of ours as a model for Avalanche's strategies; the weights are shared.

    Args:
        num_heads: of the stream (`stream.info.num_heads`); with several, task labels choose the head.
    """
    return Network(backbone) if num_heads == 1 else MultiHeadNetwork(backbone)


class Foreign(nn.Module):
    """A model of theirs that maps a batch of ours to an output; it says nothing of its features."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Output:
        return Output(avalanche_forward(self.model, batch.inputs, batch.task_id))


def as_backbone(model: nn.Module) -> nn.Module:
    """A model of theirs as a backbone; the backbone itself where the model was made of one."""
    return model.backbone if isinstance(model, Network | MultiHeadNetwork) else Foreign(model)


def last_output(model: nn.Module, logits: Tensor) -> Output:
    """Everything that a model said with these logits; only the logits where it is not ours."""
    output = _last.get(model)
    return output if output is not None and output.logits is logits else Output(logits)


class Features(nn.Module):
    """The part of a backbone before its head, on its own."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, inputs: Tensor) -> Tensor:
        _note(len(inputs))
        hidden: Tensor = self.backbone.features(inputs)
        return hidden


def split(backbone: nn.Module, purpose: str) -> tuple[nn.Module, nn.Linear]:
    """Features and head of a backbone as two modules; the backbone keeps its features only.

    Args:
        purpose: who asks, for the sentence.

    Raises:
        UserError: the backbone has no `features` and linear `head`.
    """
    head = getattr(backbone, "head", None)
    if not isinstance(head, nn.Linear) or not hasattr(backbone, "features"):
        raise UserError(
            f"{purpose} needs a backbone with one linear head over its features (cl.backbones.Backbone), and "
            f"{type(backbone).__name__} is none"
        )
    backbone.head = nn.Identity()
    return Features(backbone), head
