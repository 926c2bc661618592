"""What TRC2 costs beside the mixture of experts it is built on: ratios of whole training steps, in one run.

    python benchmarks/trc2_speed.py [--width 256 --layers 6 --tokens 256 --rows 8 --vocabulary 1024 --slots 512]

Three networks with the same columns take steps in turn, so that all of them meet the same disturbances; medians count.
The share of the store is what a step with store, critic and `commit` takes longer than one without them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

from cl.backbones.gpt import Gpt
from cl.backbones.trc2 import Trc2
from cl.core import Batch, Setting, StreamInfo

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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 256), ("layers", 6), ("tokens", 256), ("rows", 8), ("vocabulary", 1024)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--slots", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = Setting.CONTINUAL_PRETRAINING
    info = StreamInfo("random", setting, (given.tokens,), given.vocabulary, 1, measure="loss")
    # most tokens follow the one before, so that there is something to learn and to be surprised by
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(given.vocabulary, (given.rows, given.tokens + 1), generator=generator)
    is_next = torch.rand(tokens.shape, generator=generator) < 0.7
    for t in range(1, given.tokens + 1):
        tokens[:, t] = torch.where(is_next[:, t], (tokens[:, t - 1] * 7 + 1) % given.vocabulary, tokens[:, t])
    ids = torch.zeros(given.rows, dtype=torch.int64)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], ids, ids).to(device)
    sizes = {"width": given.width, "num_layers": given.layers, "num_kv_heads": 2}
    models: dict[str, nn.Module] = {
        "experts": Gpt(info, mlp=EXPERTS, **sizes),
        "without store": Trc2(info, mlp=EXPERTS, has_hippocampus=False, **sizes),
        "trc2": Trc2(info, mlp=EXPERTS, num_slots=given.slots, min_surprise=0.0, **sizes),
    }
    steps = {name: trainer_step(model.to(device).train(), batch) for name, model in models.items()}
    seconds(steps, 3, device)
    times = {name: median(found) for name, found in seconds(steps, given.repeats, device).items()}
    for name, model in models.items():
        weights = sum(p.numel() for p in model.parameters())
        rate = given.rows * given.tokens / times[name]
        print(f"{name:14} {weights:12,} weights {1e3 * times[name]:9.1f} ms a step {rate:10,.0f} tokens/s")
    filled = int(models["trc2"].hippocampus.is_filled.sum())
    print(f"trc2 at {times['experts'] / times['trc2']:.2f} of the throughput of the experts (bar 0.6)")
    share = 1 - times["without store"] / times["trc2"]
    print(f"store, critic and writes: {share:.1%} of a step at {filled} of {given.slots} slots (bar 10%)")


if __name__ == "__main__":
    main()
