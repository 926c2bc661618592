"""The last layer: one linear map for all rows, or one per task where the setting gives task labels; what is under it.

Shape legend: B rows, F features, C outputs of one head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.core import Batch, Output, Setting, StreamInfo, UserError


class WeightNorm(nn.Module):
    """Logits by weights of length 1, without biases: logit_c = h . w_c / |w_c|.

    No class can be preferred by the size of its weights, as those seen last are by a linear head.

    Source: Lesort et al., "Challenging Common Assumptions about Catastrophic Forgetting", CoLLAs 2023, `weightnorm`
    (TLESORT/SCoLe-SCaling-Continual-Learning Models/model.py), He's normal weights at the start.

    Example:
        >>> head = WeightNorm(2, 1)
        >>> head.weight.data = torch.tensor([[3.0, 4.0]])
        >>> round(head(torch.tensor([[1.0, 1.0]])).item(), 4)
        1.4
    """

    def __init__(self, num_features: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, num_features))
        nn.init.kaiming_normal_(self.weight)

    def forward(self, hidden_BF: Tensor) -> Tensor:
        return F.linear(hidden_BF, F.normalize(self.weight, dim=1))


HEADS: dict[str, Callable[[int, int], nn.Module]] = {"linear": nn.Linear, "weight_norm": WeightNorm}
"""By name: features, outputs -> head."""


class MultiHead(nn.Module):
    """One head per task, of a kind in `HEADS`; rows pick theirs by `task_id`.

    Separate modules and not one wide matrix: a head that no row asks for gets no gradient at all, so that momentum
    and weight decay leave it alone.

    Example:
        >>> head = MultiHead(4, 2, num_heads=3)
        >>> head(torch.zeros(5, 4), torch.tensor([0, 0, 2, 2, 0])).shape
        torch.Size([5, 2])
    """

    def __init__(self, num_features: int, num_outputs: int, num_heads: int, kind: str = "linear") -> None:
        super().__init__()
        self.heads = nn.ModuleList(HEADS[kind](num_features, num_outputs) for _ in range(num_heads))

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


@dataclass(frozen=True)
class Stage:
    """One step of a backbone's features.

    Args:
        run: inputs of the stage -> its outputs (B, units, ...), activation included.
        modules: whose parameters it uses.
    """

    run: Callable[[Tensor], Tensor]
    modules: tuple[nn.Module, ...]


class Backbone(nn.Module):
    """Features, then a head. Subclasses define `features`: inputs (B, ...) -> hidden (B, F), or the `stages` of it.

    Class attributes:
        settings: of the streams whose rows it can read; images, unless a subclass says otherwise.

    Attributes:
        between: by number k, what is done to the outputs of the first k stages before the next one reads them;
            strategies that work on inner layers put something here.
    """

    settings: ClassVar[frozenset[Setting]] = frozenset(Setting) - {Setting.CONTINUAL_PRETRAINING}

    def __init__(self, info: StreamInfo, num_features: int, head: str = "linear") -> None:
        super().__init__()
        if head not in HEADS:
            raise UserError(f"backbone.head is {head!r}; it must be one of {', '.join(HEADS)}")
        if info.setting not in self.settings:
            raise UserError(
                f"backbone {type(self).__name__.lower()} reads no rows of the {info.setting} setting, which stream "
                f"{info.name} has; text is read by backbone=gpt and backbone=hf"
            )
        self.num_features = num_features
        self.between: dict[int, Callable[[Tensor], Tensor]] = {}
        self.head: nn.Module = (
            HEADS[head](num_features, info.num_outputs)
            if info.num_heads == 1
            else MultiHead(num_features, info.num_outputs, info.num_heads, head)
        )

    def commit(self, batch: Batch, output: Output) -> None:
        """After the optimizer step: write what outlives a training batch, from the state in its output.

        The only thing that changes memory kept in buffers; does nothing here. Called by `commit_all`, and not for an
        output without a state.
        """

    @property
    def commits(self) -> bool:
        """Whether `commit` does anything; the trainer asks once, before the first step."""
        return type(self).commit is not Backbone.commit

    def traces(self) -> Mapping[str, Tensor]:
        """What the network draws curves of over optimizer steps, by name, such as its time constants.

        Asked whenever the model is measured (`Result.traces`, `train/NAME` in MLflow); nothing here.
        """
        return {}

    def stages(self) -> Sequence[Stage]:
        """The steps of `features`, in order: strategies that split a backbone, or mask its layers, do it by them."""
        if type(self).features is Backbone.features:
            raise NotImplementedError(f"{type(self).__name__} must define features or stages")
        return (Stage(self.features, tuple(m for name, m in self.named_children() if name != "head")),)

    def features(self, inputs: Tensor) -> Tensor:
        return self._outputs(inputs)[-1]

    def stage_outputs(self, inputs: Tensor, stop: int | None = None) -> list[Tensor]:
        """Outputs of the first `stop` stages (all of them without it)."""
        return self._outputs(inputs, stop=stop)

    def _outputs(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> list[Tensor]:
        """Outputs of the stages `[start, stop)`; what they read where there is none."""
        outputs = []
        for number, stage in enumerate(self.stages()[start:stop], start + 1):
            hidden = stage.run(hidden)
            if number in self.between:
                hidden = self.between[number](hidden)
            outputs.append(hidden)
        return outputs or [hidden]

    def forward(self, batch: Batch, start: int = 0) -> Output:
        """Predict; the inputs of the batch are what the first `start` stages would have handed on."""
        is_plain = start == 0 and not self.between
        hidden_BF = self.features(batch.inputs) if is_plain else self._outputs(batch.inputs, start)[-1]
        if isinstance(self.head, MultiHead):
            return Output(self.head(hidden_BF, batch.task_id), hidden_BF)
        return Output(self.head(hidden_BF), hidden_BF)


def commit_all(backbones: Iterable[Backbone], done: Iterable[tuple[Batch, Output]]) -> None:
    """Every backbone's `commit`, for the batches of a step whose outputs hold a state.

    One that was read with something between its stages, as where `remind` has frozen the early ones, leaves none.
    """
    for backbone, (batch, output) in product(backbones, done):
        if output.state is not None:
            backbone.commit(batch, output)


def channels_last(maps: Tensor) -> Tensor:
    """Maps (B, channels, height, width) with the channels of a pixel side by side in memory.

    What convolutions make of them is laid out in the same way, and pooling above all is faster so: on the CPU a step of
    the convnet or of ResNet-18 takes 1.2 to 1.5 times less. Torch's own memory format leaves maps of one channel alone.

    Example:
        >>> channels_last(torch.zeros(5, 1, 28, 28)).stride()
        (784, 1, 28, 1)
    """
    _, channels, _, width = maps.shape
    return maps.movedim(1, 3).flatten(2).unflatten(2, (width, channels)).movedim(3, 1)


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
