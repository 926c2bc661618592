"""The state of a run: what hooks may read, what a step costs, and the label loss of a batch with mixed rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from cl.core import IGNORED, Batch, Data, Experience, Output, Part, Stream, StreamInfo
from cl.distributed import World
from cl.frozen import require_unchanged
from cl.scaling import LossScaler
from cl.seeding import Seeds, derive_seed, global_states, set_global_states
from cl.shards import gathered, model_shards, optimizer_shards


@dataclass
class Cost:
    """Work and memory, in rows and bytes.

    Args:
        forwards: rows sent through the backbone.
        backwards: rows whose gradient was taken.
        buffer_bytes: bytes kept for the sake of past experiences: stored rows, anchors, importances, teachers.
    """

    forwards: int = 0
    backwards: int = 0
    buffer_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forwards + other.forwards,
            self.backwards + other.backwards,
            self.buffer_bytes + other.buffer_bytes,
        )


@dataclass
class TrainState:
    """Everything a hook may read, and the few things it may call.

    Args:
        model: what is trained, after every `wrap`.
        stream: the planned stream.
        step: optimizer steps taken since the run began; `micro_step` counts inside accumulation, up to `micro_steps`.
        step_rows: rows of the stream in the running step, all micro-batches together.
        tokens: trained on since the run began, those that strategies add left out; a row that is no text is one token.
        share: what the micro-batch counts in its step: the factor of all its loss terms (see `shares`).
        total_steps: steps of the whole run; `experience_steps` are those of each experience.
        classes_seen: classes of this and every earlier experience, in order of appearance.
        masks_absent: the label loss leaves out logits of classes that no row of the batch has (`trainer.logit_mask`).
        strategies: all of the run, in order; the list is the trainer's.
        world: the processes of the run; `network` is what they send training rows through, None for the model itself.
        scaler: of the losses that are trained on; enabled under fp16 only.
        loss: a batch that the strategies have prepared -> its output, and the terms of its loss by name.
        note: name, number: write down what a strategy measured of the running experience (`Result.extra`).
        trace: name, number: a point of a curve over optimizer steps, such as a coefficient that a strategy controls
            (`Result.traces`, `train/NAME` in MLflow).
    """

    model: nn.Module
    optimizer: Optimizer
    stream: Stream
    seeds: Seeds
    device: torch.device
    autocast: Callable[[], Any]
    total_steps: int = 0
    experience_steps: list[int] = field(default_factory=list)
    step: int = 0
    micro_step: int = 0
    micro_steps: int = 1
    step_rows: int = 0
    share: float = 1.0
    epoch: int = 0
    tokens: int = 0
    classes_seen: tuple[int, ...] = ()
    spent: Cost = field(default_factory=Cost)
    masks_absent: bool = False
    strategies: Sequence[Any] = ()
    world: World = field(default_factory=World)
    network: Callable[[Batch], Output] | None = None
    scaler: LossScaler = field(default_factory=lambda: LossScaler(enabled=False), repr=False)
    loss: Callable[[Batch], tuple[Output, dict[str, Tensor]]] = field(init=False, repr=False)
    note: Callable[[str, float], None] = field(default=lambda name, value: None, repr=False)
    trace: Callable[[str, float], None] = field(default=lambda name, value: None, repr=False)
    # in the constructor, so that `dataclasses.replace` takes them along
    _experience: Experience | None = field(default=None, repr=False)
    _data: Data | None = field(default=None, repr=False)

    @property
    def has_begun(self) -> bool:
        """Whether there is a running experience; not before the first one, nor while the rows of the next are read."""
        return self._experience is not None

    @property
    def experience(self) -> Experience:
        """The running experience, or the one that has just ended.

        Raises:
            RuntimeError: there is none (`has_begun`).
        """
        if self._experience is None:
            raise RuntimeError("no experience has begun, so `state.experience` is not there yet; see `state.has_begun`")
        return self._experience

    @experience.setter
    def experience(self, experience: Experience) -> None:
        self._experience = experience

    @property
    def data(self) -> Data:
        """The rows that the running experience trains on.

        Raises:
            RuntimeError: there is none (`has_begun`), or Avalanche reads the rows (its strategies in `cl run`).
        """
        if self._data is None:
            raise RuntimeError("no rows are loaded, so `state.data` is not there; see `state.has_begun`")
        return self._data

    @data.setter
    def data(self, data: Data) -> None:
        self._data = data

    def leave(self) -> None:
        """Let go of an experience and its rows, so that those of the next one do not lie beside them in memory."""
        self._experience = self._data = None

    @property
    def info(self) -> StreamInfo:
        return self.stream.info

    @property
    def progress(self) -> float:
        """Share of the running experience's steps that are done; 0 before the first one."""
        if not self.has_begun or self.experience.id >= len(self.experience_steps):
            return 0.0
        before = sum(self.experience_steps[: self.experience.id])
        return (self.step - before) / max(1, self.experience_steps[self.experience.id])

    def forward(self, batch: Batch, model: Callable[[Batch], Output] | None = None) -> Output:
        """Send a batch through the model (or a teacher) under the run's precision, and count its rows."""
        num_rows = len(batch)
        self.count(num_rows, num_rows if torch.is_grad_enabled() else 0)
        with self.autocast():
            output: Output = (model or self.model)(batch)
        return output

    def split(self, batch: Batch) -> Batch:
        """The rows of a prepared batch that this process works on; the others' are counted as if they were its own."""
        if self.world.size == 1:
            return batch
        own = self.world.split(batch)
        self.count(forwards=len(batch) - len(own), backwards=len(batch) - len(own))
        return own

    def label_loss(self, output: Output, batch: Batch) -> Tensor:
        """The loss without penalties: the cross-entropy of the batch's parts."""
        if self.masks_absent:
            output = Output(without_absent(output.logits, batch))
        return cross_entropy(output, batch)

    def gradients(self, loss: Tensor, tensors: Iterable[Tensor]) -> Sequence[Tensor | None]:
        """Gradients of a loss of one's own by some tensors; None where one has no part in it.

        What a strategy takes in place of `loss.backward()` and `torch.autograd.grad`: under fp16 these lose what is
        small, and do not lie beside `p.grad`, which has its own size whenever a hook sees it.
        """
        return self.scaler.gradients(loss, tensors)

    def backward(self, loss: Tensor, parameters: Iterable[nn.Parameter]) -> None:
        """Let the gradients of a loss of one's own be `p.grad`, whatever was there."""
        parameters = list(parameters)
        for p, gradient in zip(parameters, self.gradients(loss, parameters), strict=True):
            p.grad = gradient

    def count(self, forwards: int = 0, backwards: int = 0) -> None:
        """Account for work that does not pass through `forward`, such as vectorised per-sample gradients."""
        self.spent.forwards += forwards
        self.spent.backwards += backwards

    def prepare(self, rows: Batch, generator: torch.Generator | None = None) -> Batch:
        """Stored rows, transformed, augmented when a generator is given, on the run's device."""
        return self.stream.prepare(rows, generator).to(self.device)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def state_dict(self, frozen: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Everything that the next step depends on, except strategies and the position in the stream.

        Args:
            frozen: weights that are left out, by name, each with its hash (`cl.frozen`).
        """
        frozen = dict(frozen or {})
        weights = {name: value for name, value in self.model.state_dict().items() if name not in frozen}
        return {
            "model": gathered(weights),
            "frozen": frozen,
            "optimizer": gathered(self.optimizer.state_dict()),
            "seeds": self.seeds.state_dict(),
            "generators": self.world.every(global_states(self.device)),
            "counters": [self.step, self.tokens, self.spent.forwards, self.spent.backwards],
            "classes_seen": list(self.classes_seen),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.load_weights(saved)
        self.optimizer.load_state_dict(optimizer_shards(saved["optimizer"], self.optimizer))
        self.seeds.load_state_dict(saved["seeds"])
        self._load_generators(saved)
        self.step, self.tokens, forwards, backwards = saved["counters"]
        self.spent = Cost(forwards, backwards)
        self.classes_seen = tuple(saved["classes_seen"])

    def _load_generators(self, saved: Mapping[str, Any]) -> None:
        """Torch's generators of this process; one that was not there when the state was saved draws anew."""
        if "generators" in saved:
            states = saved["generators"]
        else:  # a state of before holds those of the first process, and of all devices that it saw
            cuda = saved["cuda_rng"][self.device.index or 0 :][:1]
            states = [{"cpu": saved["torch_rng"]} | ({"cuda": cuda[0]} if cuda else {})]
        if self.world.rank < len(states):
            set_global_states(states[self.world.rank], self.device)
        else:
            torch.manual_seed(derive_seed(self.seeds.root, "torch", self.world.rank, saved["counters"][0]))

    def load_weights(self, saved: Mapping[str, Any]) -> None:
        """The model of a saved state.

        Raises:
            UserError: what was left out of it is not what the model has.
        """
        frozen = saved.get("frozen", {})  # a state of before holds everything
        require_unchanged(self.model, frozen)
        kept = self.model.state_dict() if frozen else {}
        weights = model_shards(saved["model"], self.model) | {name: kept[name] for name in frozen}
        self.model.load_state_dict(weights)


def clear_gradients(optimizer: Optimizer) -> None:
    """As `optimizer.zero_grad()`, without its profiler hooks, which take as long as a small layer."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None


def cross_entropy(output: Output, batch: Batch, parts: Sequence[Part] | None = None) -> Tensor:
    """Sum over parts of weight times the part's mean cross-entropy; next-token targets are flattened.

    A weight of 0 skips the part, so that rows without a label loss cost nothing here; one with nothing to learn is 0.
    """
    terms = []
    for part in batch.parts if parts is None else parts:
        if part.weight == 0 or len(part) == 0:
            continue
        is_all = len(part) == len(batch)
        term = mean_cross_entropy(
            output.logits if is_all else output.logits[part.rows], batch.targets if is_all else batch.targets[part.rows]
        )
        terms.append(term if part.weight == 1 else part.weight * term)
    if len(terms) == 1:
        return terms[0]
    return sum(terms[1:], start=terms[0]) if terms else output.logits.sum() * 0.0


def mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows (B,), or over the tokens (B, T) that are to be learnt: 0, and no NaN, where there are none.

    Example:
        >>> mean_cross_entropy(torch.zeros(1, 2, 4), torch.tensor([[3, IGNORED]])).exp().item()
        4.0
        >>> mean_cross_entropy(torch.zeros(1, 2, 4), torch.full((1, 2), IGNORED)).item()
        0.0
    """
    # half precision is summed in float32, double stays double
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    if logits.dim() == 2:
        return F.cross_entropy(logits, targets)
    total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)


def without_absent(logits: Tensor, batch: Batch) -> Tensor:
    """Logits (B, C) with the classes at -1e9 that no row of the batch has, so that their outputs get no gradient.

    A class counts per head where rows have a head. Source: Lesort et al., "Challenging Common Assumptions about
    Catastrophic Forgetting", CoLLAs 2023 ("group" masking).

    Example:
        >>> rows = Batch(torch.zeros(2, 1), torch.tensor([0, 2]), torch.zeros(2), torch.arange(2))
        >>> without_absent(torch.ones(2, 3), rows)[0].tolist()
        [1.0, -1000000000.0, 1.0]
    """
    head = batch.heads
    present = torch.zeros(int(head.max()) + 1, logits.shape[-1], dtype=torch.bool, device=logits.device)
    present[head, batch.targets] = True
    return masked(logits, present[head])


def masked(logits: Tensor, present: Tensor) -> Tensor:
    """Logits with those at -1e9 that are not present, in float32 or better: half precision cannot hold the number."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(~present, -1e9)


def first_views(batch: Batch) -> Tensor:
    """(B,) for each row the first one of the batch with the same origin: itself, unless the row is shown again.

    Example:
        >>> ids = torch.tensor([7, 7, 2, 7])
        >>> first_views(Batch(torch.zeros(4, 1), torch.zeros(4), torch.zeros(4), ids)).tolist()
        [0, 0, 2, 0]
    """
    origins = torch.stack([batch.experience_id.long(), batch.sample_ids.long()], dim=1)
    group = torch.unique(origins, dim=0, return_inverse=True)[1]
    place = torch.arange(len(batch), device=group.device)
    first = place.new_full((len(batch),), len(batch)).scatter_reduce(0, group, place, reduce="amin")
    return first[group]


def shares(batches: Sequence[Batch]) -> list[float]:
    """What each micro-batch counts in its step: its part of the rows, or of the tokens to learn where rows are text.

    Example:
        >>> rows = [Batch(torch.zeros(n, 4), torch.zeros(n, 4), torch.zeros(n), torch.arange(n)) for n in (1, 3)]
        >>> rows[1].targets[:, 1:] = IGNORED
        >>> [round(share, 3) for share in shares(rows)]
        [0.571, 0.429]
    """
    if len(batches) == 1:
        return [1.0]
    if batches[0].targets.dim() == 1:
        counts = [float(len(batch)) for batch in batches]
    else:
        # what rides along with a micro-batch is divided by its share, so that of one with nothing to learn is not 0
        counts = [max(1e-9, int((batch.targets != IGNORED).sum())) for batch in batches]
    return [count / sum(counts) for count in counts]


def current_rows(done: list[tuple[Batch, Output]]) -> tuple[Batch, Output]:
    """The stream's own rows of a step's micro-batches, their logits and what the head read, detached."""
    rows = [batch.current() for batch, _ in done]
    if done[0][1].logits.shape[0] != len(done[0][0]):  # a share of the rows: nobody may take it for the output
        return Batch.cat(rows) if len(rows) > 1 else rows[0], Output(done[0][1].logits.new_empty(0))
    logits = [output.logits.detach()[: batch.num_current] for batch, output in done]
    hidden = [output.hidden.detach()[: batch.num_current] for batch, output in done if output.hidden is not None]
    if len(done) == 1:
        return rows[0], Output(logits[0], hidden[0] if hidden else None)
    return Batch.cat(rows), Output(torch.cat(logits), torch.cat(hidden) if hidden else None)


def tensor_bytes(*values: Any) -> int:
    """Bytes held by the tensors in nested dicts and lists.

    Example:
        >>> tensor_bytes({"a": torch.zeros(2, 3)}, [torch.zeros(1, dtype=torch.uint8)])
        25
    """
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, Mapping):
            total += tensor_bytes(*value.values())
        elif isinstance(value, list | tuple):
            total += tensor_bytes(*value)
    return total
