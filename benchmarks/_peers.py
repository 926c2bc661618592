"""Loops that ours is measured beside: what a person writes in plain PyTorch, Avalanche's, and transformers' Trainer."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones.gpt import Gpt
from cl.core import Stream
from streams._images import load_images

# images: permuted MNIST on 784-256-256-10

Rates = tuple[float, float]
"""(train, evaluation) in samples per second."""

NUM_EXPERIENCES = 2
CAPACITY = 1000


def network() -> nn.Module:
    """The network of all three."""
    layers = (nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return nn.Sequential(*layers)


def plain(root: str, batch_size: int, with_replay: bool, num_experiences: int = NUM_EXPERIENCES) -> tuple[Rates, Rates]:
    """What a person writes who wants it fast and simple: with the permuting in its time, and with that for free."""
    images = load_images("mnist", root)
    train, test = images.inputs.flatten(1).float() / 255, images.eval_inputs.flatten(1).float() / 255
    model, buffer = network(), PlainReservoir(CAPACITY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    orders = [torch.randperm(784) for _ in range(num_experiences)]
    begin = time.perf_counter()
    tests = [test.index_select(1, order) for order in orders]
    permute_eval_s = time.perf_counter() - begin
    train_s = eval_s = permute_train_s = 0.0
    for order in orders:
        begin = time.perf_counter()
        inputs = train.index_select(1, order)
        permute_train_s += time.perf_counter() - begin
        begin = time.perf_counter()
        for rows in torch.randperm(len(inputs)).split(batch_size):
            x, y = inputs.index_select(0, rows), images.targets.index_select(0, rows)
            optimizer.zero_grad()
            if with_replay and buffer.seen:
                old_x, old_y = buffer.draw(len(x))
                logits = model(torch.cat((x, old_x)))
                loss = F.cross_entropy(logits[: len(x)], y) + F.cross_entropy(logits[len(x) :], old_y)
            else:
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            if with_replay:
                buffer.add(x, y)
        train_s += time.perf_counter() - begin
        begin = time.perf_counter()
        with torch.no_grad():
            for held_out in tests:
                correct = 0
                for x, y in zip(held_out.split(batch_size), images.eval_targets.split(batch_size), strict=True):
                    correct += (model(x).argmax(1) == y).sum().item()
        eval_s += time.perf_counter() - begin
    num_train, num_eval = num_experiences * len(images.targets), num_experiences**2 * len(images.eval_targets)
    inside = num_train / (train_s + permute_train_s), num_eval / (eval_s + permute_eval_s)
    return inside, (num_train / train_s, num_eval / eval_s)


class PlainReservoir:
    """Reservoir sampling over float rows, as simply as it is usually written."""

    def __init__(self, capacity: int) -> None:
        self.inputs, self.targets = torch.zeros(capacity, 784), torch.zeros(capacity, dtype=torch.int64)
        self.capacity, self.seen = capacity, 0

    def draw(self, size: int) -> tuple[Tensor, Tensor]:
        """Distinct rows."""
        rows = torch.randperm(min(self.seen, self.capacity))[:size]
        return self.inputs[rows], self.targets[rows]

    def add(self, x: Tensor, y: Tensor) -> None:
        """Offer rows."""
        for row in range(len(x)):
            slot = self.seen if self.seen < self.capacity else int(torch.randint(self.seen + 1, ()))
            if slot < self.capacity:
                self.inputs[slot], self.targets[slot] = x[row], y[row]
            self.seen += 1


def avalanche(root: str, batch_size: int, with_replay: bool) -> Rates:
    """Avalanche's PermutedMNIST with its Naive or Replay, as documented."""
    warnings.simplefilter("ignore")
    from avalanche.benchmarks.classic import PermutedMNIST
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive as TheirNaive
    from avalanche.training.supervised import Replay as TheirReplay

    benchmark = PermutedMNIST(n_experiences=NUM_EXPERIENCES, dataset_root=root, seed=0)
    model = network()
    settings = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": batch_size,
        "train_epochs": 1,
        "eval_mb_size": batch_size,
        "evaluator": EvaluationPlugin(),
    }
    strategy = TheirReplay(mem_size=CAPACITY, **settings) if with_replay else TheirNaive(**settings)
    train_s = eval_s = 0.0
    for experience in benchmark.train_stream:
        begin = time.perf_counter()
        strategy.train(experience)
        train_s += time.perf_counter() - begin
        begin = time.perf_counter()
        strategy.eval(benchmark.test_stream)
        eval_s += time.perf_counter() - begin
    return NUM_EXPERIENCES * 60_000 / train_s, NUM_EXPERIENCES**2 * 10_000 / eval_s


# text: a decoder, AdamW

LR = 1e-3


def llama(width: int, num_layers: int, num_heads: int) -> dict[str, Any]:
    """The Llama of transformers with as many weights in each block as our decoder."""
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 8 * -(-width // 3),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
    }


class Clock:
    """Notes the end of every step: in processor time, or on a card in its own time, which nobody waits for."""

    def __init__(self, device: str) -> None:
        self.is_card = device == "cuda"
        self.marks: list[Any] = []

    def tick(self) -> None:
        if self.is_card:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.process_time())

    def stamps(self) -> list[float]:
        """Seconds."""
        if not self.is_card:
            return self.marks
        torch.cuda.synchronize()
        return [self.marks[0].elapsed_time(mark) / 1e3 for mark in self.marks]


def adamw(parameters: Any) -> torch.optim.AdamW:
    """The optimizer of all."""
    return torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), weight_decay=0.1)


def plain_text(
    made: Callable[..., Gpt],
    stream: Stream,
    tokens: Tensor,
    batch_size: int,
    steps: int,
    is_separated: bool = True,
    device: str = "cpu",
) -> list[float]:
    """Stamps of what a person writes who wants it fast and simple; on a card under bfloat16 autocast."""
    model, (context,) = made(stream.info).to(device), stream.info.input_shape
    if not is_separated:
        model.separator = None
    optimizer = adamw(model.parameters())
    tokens, places, clock = tokens.to(device), torch.arange(context + 1, device=device), Clock(device)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / steps)
        starts = torch.randint((len(tokens) - 1) // context, (batch_size, 1), device=device) * context
        rows = tokens[starts + places]
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=clock.is_card):
            logits = model.head(model.features(rows[:, :-1]))
            loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        clock.tick()
    return clock.stamps()


def huggingface(
    sizes: dict[str, Any], stream: Stream, tokens: Tensor, batch_size: int, steps: int, device: str = "cpu"
) -> list[float]:
    """Stamps of transformers' Trainer."""
    from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback, TrainingArguments
    from transformers import Trainer as Theirs

    context, options = stream.info.input_shape[0], {key: v for key, v in sizes.items() if key != "model_type"}
    config = AutoConfig.for_model("llama", vocab_size=stream.info.num_outputs, use_cache=False, **options)
    rows = tokens[: len(tokens) // context * context].view(-1, context)
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=LR,
            weight_decay=0.1,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine",
            optim="adamw_torch",  # the same as ours, not their fused one
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=not clock.is_card,
            bf16=clock.is_card,
        )
        data = [{"input_ids": row, "labels": row} for row in rows[: steps * batch_size]]

        class Watch(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.tick()

        Theirs(AutoModelForCausalLM.from_config(config), arguments, train_dataset=data, callbacks=[Watch()]).train()
    return clock.stamps()
