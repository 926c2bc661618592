"""What the oracles share: a float64 toy run, a recorder that notes every step, and the mutation check.

An oracle derives again, plainly and from recorded inputs, what a strategy should have done. It is worth something only
if it notices when the strategy does nothing; `dies` is how each oracle shows that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.config import TrainerConfig
from cl.core import Batch, Output, Setting, Stream
from cl.hooks import Strategy
from cl.observe import Observer
from cl.state import TrainState
from cl.testing import ToyNet, toy_stream
from cl.trainer import Trainer

LEARNING_RATE = 0.1
BATCH_SIZE = 16
SGD = partial(torch.optim.SGD, lr=LEARNING_RATE)


@dataclass
class Step:
    """One training step as it was: rows with their parts, weights before and after it, gradients, loss terms."""

    batch: Batch
    experience: int
    before: dict[str, Tensor]
    terms: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)


class Recorder(Strategy):
    """Notes what happens at its place in the list; changes nothing. Placed last, it sees what the others made."""

    settings = frozenset(Setting)

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.ends: list[nn.Module] = []
        self.start: nn.Module | None = None

    def on_run_start(self, state: TrainState) -> None:
        self.start = deepcopy(state.model)

    def penalty(self, state: TrainState, batch: Batch, output: Output) -> None:
        self.steps.append(Step(batch, state.experience.id, weights(state.model)))

    def on_gradients(self, state: TrainState) -> None:
        parameters = state.parameters().items()
        self.steps[-1].gradients = {n: p.grad.clone() for n, p in parameters if p.grad is not None}

    def step(self, state: TrainState, batch: Batch, update: Callable[[], None]) -> None:
        update()
        self.steps[-1].after = weights(state.model)

    def on_experience_end(self, state: TrainState) -> None:
        self.ends.append(deepcopy(state.model))


class _Terms(Observer):
    """Writes the loss terms, which only the loop sees, beside the recorded steps."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_step(self, state: TrainState, losses: dict[str, float], lr: float) -> None:
        self.recorder.steps[-1].terms = dict(losses)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def stream_of(setting: Setting | Stream) -> Stream:
    """The toy stream with inputs in float64; tokens stay what they are."""
    stream = toy_stream(setting) if isinstance(setting, Setting) else setting
    if stream.info.setting == Setting.CONTINUAL_PRETRAINING:
        return stream
    return replace(stream, transform=lambda raw: raw.double() / 127.5 - 1.0)


def run(
    strategies: Sequence[Strategy],
    setting: Setting | Stream = Setting.DOMAIN_INCREMENTAL,
    backbone: Callable[..., nn.Module] = ToyNet,
    optimizer: Any = SGD,
    **config: Any,
) -> tuple[Recorder, Trainer]:
    """Train in float64 with a recorder behind the strategies."""
    recorder = Recorder()
    trainer = Trainer(
        stream_of(setting),
        lambda info: backbone(info).double(),
        [*strategies, recorder],
        optimizer=optimizer,
        config=TrainerConfig(**({"epochs": 1, "batch_size": BATCH_SIZE, "device": "cpu"} | config)),
        observers=[_Terms(recorder)],
    )
    trainer.run()
    return recorder, trainer


def gradient(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradient by name; zeros where a parameter has no part in the loss."""
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


def label_loss(model: nn.Module, rows: Batch) -> Tensor:
    return F.cross_entropy(model(rows).logits, rows.targets)


def flat(vectors: dict[str, Tensor]) -> Tensor:
    return torch.cat([vector.flatten() for vector in vectors.values()])


def rows_of(batch: Batch) -> list[tuple[int, int]]:
    """Identity of each row: experience and number."""
    return list(zip(batch.experience_id.tolist(), batch.sample_ids.tolist(), strict=True))


def close(found: Any, wanted: Any, rtol: float = 1e-6, atol: float = 1e-7) -> None:
    """Equal up to the float32 in which the trainer computes losses."""
    for name in wanted if isinstance(wanted, dict) else []:
        torch.testing.assert_close(found[name], wanted[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    if not isinstance(wanted, dict):
        found, wanted = torch.as_tensor(found).double(), torch.as_tensor(wanted).double()
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


class Opaque:
    """A data set that is not held in tensors."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def rows(self, index):
        return self.data.rows(index)


def opaque(stream: Stream) -> Stream:
    """The stream with data sets that are not tensors."""
    hidden = [replace(e, load=lambda load=e.load: Opaque(load())) for e in stream.experiences]
    return replace(stream, experiences=hidden)


def same_rows(found: Batch, wanted: Batch) -> None:
    for name in ("inputs", "targets", "experience_id", "sample_ids", "task_id"):
        left, right = getattr(found, name), getattr(wanted, name)
        assert (left is None) == (right is None)
        assert left is None or torch.equal(left, right), name


def plain_sum(stream: Stream, experiences: range) -> Batch:
    """All rows of some experiences, one after the other."""
    chosen = [stream.experiences[k] for k in experiences]
    return Batch.cat([e.load().rows(torch.arange(e.num_samples)) for e in chosen])


def dies(check: Callable[[], None]) -> None:
    """The oracle must fail: what it checks has been turned off."""
    with pytest.raises(AssertionError):
        check()


@pytest.fixture
def lab() -> SimpleNamespace:
    """The helpers above; a fixture, because test modules cannot import each other."""
    names = (run, stream_of, weights, gradient, label_loss, flat, rows_of, close, opaque, same_rows, plain_sum, dies)
    return SimpleNamespace(
        Recorder=Recorder,
        lr=LEARNING_RATE,
        batch_size=BATCH_SIZE,
        **{function.__name__: function for function in names},
    )


@pytest.fixture
def lora() -> SimpleNamespace:
    """Toy runs on text with an adapter beside the embedding and the head, all other weights frozen."""
    peft = pytest.importorskip("peft")
    rank, scale = 3, 2.0
    A = {"first": "first.lora_embedding_A.default", "head": "head.lora_A.default.weight"}
    B = {"first": "first.lora_embedding_B.default", "head": "head.lora_B.default.weight"}

    class Adapted(ToyNet):
        def __init__(self, info):
            super().__init__(info)
            self.requires_grad_(False)
            config = peft.LoraConfig(r=rank, lora_alpha=rank * scale, target_modules=["first", "head"])
            peft.inject_adapter_in_model(config, self)

    def trained(*strategies, **options):
        return run(strategies, Setting.CONTINUAL_PRETRAINING, Adapted, **options)

    def of(recorder, experience):
        return [step for step in recorder.steps if step.experience == experience]

    def adapters(model, layer):
        values = dict(model.named_parameters()) if isinstance(model, nn.Module) else model
        return (next(value for name, value in values.items() if name.endswith(part[layer])) for part in (A, B))

    return SimpleNamespace(trained=trained, of=of, adapters=adapters, A=A, B=B, RANK=rank, SCALE=scale)
