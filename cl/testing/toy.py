"""Two-second streams for every setting, and the network that learns them: what the contract suites run on.

Synthetic, so that no data set and no library version changes a number: every class is two points in pixel space with
noise around them, every text experience a table of which token follows which.

Shape legend: B rows, T tokens of a text row, F width of the hidden layer.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from cl.backbones import Backbone
from cl.core import Batch, EvalSet, Experience, Output, Setting, Stream, StreamInfo, TensorData
from cl.seeding import derive_seed

NUM_EXPERIENCES = 3
NUM_ROWS = 192
NUM_EVAL_ROWS = 96
SHAPE = (1, 8, 8)
NUM_CLASSES = 4
CLASSES_PER_EXPERIENCE = 2
"""Of the class-incremental stream; the other image streams have `NUM_CLASSES` in every experience."""
CLOUDS_PER_CLASS, SUBSPACE = 2, 8
NUM_TOKENS, VOCABULARY = 8, 8


def toy_stream(setting: Setting, seed: int = 0, num_experiences: int = NUM_EXPERIENCES) -> Stream:
    """The toy stream of a setting.

    class_incremental: two new classes per experience, one head. domain_incremental: the same four labels for other
    points in every experience, one head. task_incremental: other labels for the same points, a head per experience.
    continual_pretraining: token rows, another table of successors in every experience, loss in nats; general rows have
    a table of their own.

    Example:
        >>> stream = toy_stream(Setting.TASK_INCREMENTAL)
        >>> stream.info.num_heads, len(stream.experiences[2].load())
        (3, 192)
    """
    is_text = setting == Setting.CONTINUAL_PRETRAINING
    is_class = setting == Setting.CLASS_INCREMENTAL
    is_task = setting == Setting.TASK_INCREMENTAL
    width = CLASSES_PER_EXPERIENCE if is_class else NUM_CLASSES
    experiences, eval_sets = [], []
    for k in range(num_experiences):
        task_id = k if is_task else None
        classes = tuple(range(k * width, (k + 1) * width)) if is_class else tuple(range(width))
        load = partial(_text, seed, k) if is_text else partial(_images, seed, k, classes, task_id)
        name = f"toy {k}"
        experiences.append(
            Experience(k, name, name, partial(load, True), NUM_ROWS, () if is_text else classes, task_id)
        )
        eval_sets.append(EvalSet(name, partial(load, False), NUM_EVAL_ROWS))
    info = StreamInfo(
        name=f"toy_{setting}",
        setting=setting,
        input_shape=(NUM_TOKENS,) if is_text else SHAPE,
        num_outputs=VOCABULARY if is_text else width * (num_experiences if is_class else 1),
        num_experiences=num_experiences,
        num_heads=num_experiences if is_task else 1,
        measure="loss" if is_text else "accuracy",
    )
    if is_text:
        return Stream(info, experiences, eval_sets, general=partial(_text, seed, num_experiences, True))
    return Stream(info, experiences, eval_sets, centred)


def centred(raw: Tensor) -> Tensor:
    """uint8 pixels -> float32 in [-1, 1]."""
    return raw / 127.5 - 1.0


def _generator(seed: int, *names: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, "toy", *names))


def _images(seed: int, k: int, classes: tuple[int, ...], task_id: int | None, is_train: bool) -> TensorData:
    """Clouds of rows around points of a narrow subspace, so that experiences compete for the same few features."""
    basis = torch.randn(SUBSPACE, math.prod(SHAPE), generator=_generator(seed, "basis")) / SUBSPACE**0.5
    num_points = CLOUDS_PER_CLASS * len(classes)
    # heads keep the outputs of tasks apart; only other labels for the same points make them disturb each other
    shown = 0 if task_id is not None else k
    points = torch.randn(num_points, SUBSPACE, generator=_generator(seed, "points", shown)) @ basis
    points = points[torch.randperm(num_points, generator=_generator(seed, "labels", k))]
    cloud = torch.arange(NUM_ROWS if is_train else NUM_EVAL_ROWS) % num_points
    noise = torch.randn(len(cloud), *SHAPE, generator=_generator(seed, "rows", k, int(is_train)))
    raw = (128 + 40 * points[cloud].view(-1, *SHAPE) + 20 * noise).clamp(0, 255).to(torch.uint8)
    return TensorData(raw, torch.tensor(classes)[cloud % len(classes)], k, task_id)


def _text(seed: int, k: int, is_train: bool) -> TensorData:
    """Rows of a Markov chain in which three of four tokens follow a permutation of the vocabulary."""
    successor = torch.randperm(VOCABULARY, generator=_generator(seed, "successors", k))
    generator = _generator(seed, "rows", k, int(is_train))
    num_rows = NUM_ROWS if is_train else NUM_EVAL_ROWS
    tokens = [torch.randint(VOCABULARY, (num_rows,), generator=generator)]
    for _ in range(NUM_TOKENS):
        stray = torch.randint(VOCABULARY, (num_rows,), generator=generator)
        is_stray = torch.rand(num_rows, generator=generator) < 0.25
        tokens.append(torch.where(is_stray, stray, successor[tokens[-1]]))
    rows = torch.stack(tokens, dim=1)
    return TensorData(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), k)


class Tally:
    """Rows that went forward and backward through every copy of a network; copies of it are the same tally."""

    def __init__(self) -> None:
        self.forwards = 0
        self.backwards = 0

    def __deepcopy__(self, memo: dict[int, object]) -> Tally:
        return self

    def note(self, inputs: Tensor, weight: Tensor, output: Output, row_numel: int) -> None:
        """Count a call of the network, and its gradient when one is taken."""
        if torch.is_inference_mode_enabled():  # evaluation is not training work
            return
        # under torch.func.vmap the rows of the outer dimension are visible in the unwrapped tensor only
        num_rows = torch.func.debug_unwrap(inputs).numel() // row_numel
        self.forwards += num_rows
        if torch.func.debug_unwrap(weight, recurse=False) is not weight:
            # weights are wrapped while torch.func differentiates by them, and tensors take no hooks there
            self.backwards += num_rows
            return
        watched = [t for t in (output.logits, output.hidden) if t is not None and t.requires_grad]
        if watched:
            torch.autograd.graph.register_multi_grad_hook(watched, lambda _: self._went_back(num_rows), mode="any")

    def _went_back(self, num_rows: int) -> None:
        self.backwards += num_rows


class ToyNet(Backbone):
    """One hidden layer under a linear head (or a head per task); reads images, or tokens one at a time.

    Its `tally` counts the rows that pass, whoever sends them: the trainer, a strategy, a copy kept as teacher.
    """

    settings = frozenset(Setting)

    def __init__(self, info: StreamInfo, num_features: int = 12) -> None:
        super().__init__(info, num_features)
        self.row_numel = math.prod(info.input_shape)
        is_text = info.setting == Setting.CONTINUAL_PRETRAINING
        self.first: nn.Module = (
            nn.Embedding(info.num_outputs, num_features) if is_text else nn.Linear(self.row_numel, num_features)
        )
        self.is_text = is_text
        self.tally = Tally()

    def features(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.first(inputs if self.is_text else inputs.flatten(1))
        return hidden.relu()

    def forward(self, batch: Batch, start: int = 0) -> Output:
        output = super().forward(batch, start)
        self.tally.note(batch.inputs, self.first.weight, output, self.num_features if start else self.row_numel)
        return output

    def stage_outputs(self, inputs: Tensor, stop: int | None = None) -> list[Tensor]:
        outputs = super().stage_outputs(inputs, stop)
        self.tally.note(inputs, self.first.weight, Output(outputs[-1]), self.row_numel)
        return outputs
