"""What TRC2 costs beside the mixture of experts it is built on: ratios of whole training steps, in one run.

    python benchmarks/trc2_speed.py [--width 256 --layers 6 --tokens 256 --rows 8 --vocabulary 1024 --slots 512]
        [--repeats 15]

Three networks with the same columns take steps in turn, so that all of them meet the same disturbances; medians count.
Every slot of the store is filled beforehand, so that it is searched, read and written as late in a stream. Its share is
what a step with store, critic and `commit` takes longer than one without them. Writes the table to `--out`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

from cl.backbones.gpt import Gpt
from cl.backbones.trc2 import Trc2
from cl.backbones.trc2_parts.hippocampus import Hippocampus
from cl.core import Batch, Setting, StreamInfo
from cl.result import write_text

EXPERTS = "moe(experts=8, top=2, shared=1)"


def trainer_step(model: nn.Module, batch: Batch) -> Callable[[], None]:
    """One optimizer step on a batch, as the trainer takes it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        output = model(batch)
        loss = F.cross_entropy(output.logits.flatten(0, 1).float(), batch.targets.flatten())
        optimizer.zero_grad()
        (loss + sum(output.auxiliary.values())).backward()
        optimizer.step()
        if model.commits:
            model.commit(batch, output)

    return step


def seconds(steps: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Times of each step, taken in turn."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            found[name].append(time.perf_counter() - begin)
    return found


def learnable(rows: int, tokens: int, vocabulary: int) -> Batch:
    """Random text in which most tokens follow from the one before: something to learn, and to be surprised by."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(vocabulary, (rows, tokens + 1), generator=generator)
    is_next = torch.rand(text.shape, generator=generator) < 0.7
    for t in range(1, tokens + 1):
        text[:, t] = torch.where(is_next[:, t], (text[:, t - 1] * 7 + 1) % vocabulary, text[:, t])
    ids = torch.zeros(rows, dtype=torch.int64)
    return Batch(text[:, :-1], text[:, 1:], ids, ids)


@torch.no_grad()
def fill(store: Hippocampus) -> None:
    """Every slot holds something, and has been of use."""
    store.keys.normal_()
    store.values.normal_()
    store.use.uniform_()
    store.surprise.uniform_()
    store.is_filled.fill_(True)


def report(given: argparse.Namespace, models: dict[str, nn.Module], times: dict[str, float], written: int) -> str:
    """The page: what was measured, under which conditions, and the two bars."""
    lines = ["| network | weights | ms a step | tokens/s |", "| --- | --- | --- | --- |"]
    for name, model in models.items():
        rate, size = given.rows * given.tokens / times[name], sum(p.numel() for p in model.parameters())
        lines.append(f"| {name} | {size:,} | {1e3 * times[name]:.1f} | {rate:,.0f} |")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    share, filled = 1 - times["without store"] / times["trc2"], int(models["trc2"].episodes.hippocampus.is_filled.sum())
    against, rows = times["experts"] / times["trc2"], chr(10).join(lines)
    options = " ".join(f"--{name} {value}" for name, value in vars(given).items() if name != "out")
    return f"""# Speed of TRC2

Made by `python benchmarks/trc2_speed.py {options}`; what is
compared is in its docstring. Width {given.width}, {given.layers} layers, {given.rows} rows of {given.tokens} tokens,
medians of {given.repeats} steps, torch {torch.__version__}, {where}.

{rows}

TRC2 has {against:.2f} of the throughput of the experts (bar 0.6). Store, critic and writes take {share:.1%} of a step
(bar 10 %), at {filled} of {given.slots} slots filled, {written} of which the timed steps wrote.
"""


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 256), ("layers", 6), ("tokens", 256), ("rows", 8), ("vocabulary", 1024)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--slots", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/trc2_speed.md"))
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    info = StreamInfo("random", Setting.CONTINUAL_PRETRAINING, (given.tokens,), given.vocabulary, 1, measure="loss")
    batch = learnable(given.rows, given.tokens, given.vocabulary).to(device)
    sizes = {"width": given.width, "num_layers": given.layers, "num_kv_heads": 2}
    full = Trc2(info, mlp=EXPERTS, num_slots=given.slots, min_surprise=0.0, **sizes)
    models: dict[str, nn.Module] = {
        "experts": Gpt(info, mlp=EXPERTS, **sizes),
        "without store": Trc2(info, mlp=EXPERTS, has_hippocampus=False, **sizes),
        "trc2": full,
    }
    steps = {name: trainer_step(model.to(device).train(), batch) for name, model in models.items()}
    store = full.episodes.hippocampus
    fill(store)
    seconds(steps, 2, device)
    before = int(store.clock)
    times = {name: median(found) for name, found in seconds(steps, given.repeats, device).items()}
    written = int((store.step > before).sum())
    text = report(given, models, times, written)
    print(text)
    write_text(given.out, text)


if __name__ == "__main__":
    main()
