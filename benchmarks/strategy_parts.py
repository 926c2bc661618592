"""Parts of rehearsal, each against a bar: buffers, the Fisher information, and the start of a long stream.

    python benchmarks/strategy_overhead.py --tables buffers,fisher,start

Buffers: insertion and a draw at batch 64 and capacity 10,000 take at most 5 % of a step. Fisher information: one pass
takes at most a tenth of the loop over rows, as far as batches allow: it needs the gradients of a batch by what layers
return, so its limit is one plain forward and backward of the same batches, which is timed beside it; in processor time
of one thread, and in wall time of one for every core. power_law with 1,000 experiences starts in under a second.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _random_images import images
from strategy_overhead import BATCH_SIZE, run
from torch import nn

from cl.backbones.convnet import Convnet
from cl.backbones.mlp import Mlp
from cl.backbones.resnet18 import Resnet18
from cl.buffers.base import make_buffer, stored_rows
from cl.core import Setting
from cl.hooks import Strategy
from cl.state import TrainState
from cl.testing import discover
from strategies import _importance
from strategies._importance import mean_over_rows
from strategies._modes import evaluation_mode

CAPACITY = 10_000
POLICIES = ("reservoir", "class_balanced", "experience_balanced", "ring")
NUM_EXPERIENCES = 1000
NETWORKS: dict[str, tuple[Callable[..., nn.Module], int, int]] = {
    "MLP 784-100-100-10": (partial(Mlp, hidden=(100, 100)), 4096, 512),
    "MLP 784-256-256-10": (Mlp, 4096, 512),
    "convnet": (Convnet, 4096, 512),
    "convnet, 16 and 16 channels, 500 units": (partial(Convnet, channels=(16, 16), hidden=500), 4096, 512),
    "ResNet-18, width 20": (Resnet18, 128, 32),
}
"""By name: network, rows in one pass, rows one by one."""


def best(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of some calls: of the processor on one thread, of the clock on several."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = []
    for _ in range(repeats):
        begin = clock()
        call()
        times.append(clock() - begin)
    return min(times)


def buffer_shares(steps: int) -> list[str]:
    """Insertion of a batch and a draw as large, against a step of experience replay and one of plain training."""
    setting = Setting.CLASS_INCREMENTAL
    replay = next(plugin.load() for plugin in discover("strategies") if plugin.name == "replay")
    # in turns, so that a slower minute is one for both
    pairs = [[run(s, setting, steps).step_s for s in ([], [replay(capacity=CAPACITY)])] for _ in range(3)]
    plain_s, replay_s = map(min, zip(*pairs, strict=True))
    lines = [
        f"## Buffers: batch {BATCH_SIZE}, capacity {CAPACITY:,}",
        "",
        f"A plain step takes {1e3 * plain_s:.2f} ms, one with replay {1e3 * replay_s:.2f} ms. Full buffers, 20,000 "
        "rows seen.",
        "",
        "| policy | insertion, µs | draw and rows, µs | share of a step with replay | of a plain step |",
        "|---|---|---|---|---|",
    ]
    data = images(0, 20_000, Setting.DOMAIN_INCREMENTAL)
    for policy in POLICIES:
        buffer, generator = make_buffer(policy, CAPACITY), torch.Generator().manual_seed(0)
        for rows in stored_rows(data):
            buffer.add(rows, generator)
        batches = list(stored_rows(data, torch.arange(100 * BATCH_SIZE), BATCH_SIZE))
        add_s = best(lambda: [buffer.add(rows, generator) for rows in batches], 5) / len(batches)  # noqa: B023
        draw_s = best(lambda: [buffer.rows(buffer.draw(BATCH_SIZE, generator)) for _ in range(100)], 5) / 100  # noqa: B023
        share = [(add_s + draw_s) / step_s for step_s in (replay_s, plain_s)]
        lines.append(
            f"| {policy} | {1e6 * add_s:.0f} | {1e6 * draw_s:.0f} | {100 * share[0]:.1f} % | {100 * share[1]:.1f} % |"
        )
    return lines


class Learnt(Strategy):
    """Times the Fisher information at the end of the first experience, in one pass and row by row.

    Args:
        num_rows, num_alone: rows in one pass, and as many of them one by one.
    """

    settings = frozenset(Setting)

    def __init__(self, num_rows: int, num_alone: int) -> None:
        self.name, self.num_rows, self.num_alone = "learnt", num_rows, num_alone
        self.alone_s = self.together_s = self.plain_s = self.apart = 0.0

    def on_experience_end(self, state: TrainState) -> None:
        if state.experience.id > 0:
            return
        together, alone = torch.arange(self.num_rows), torch.arange(self.num_alone)
        found = self._fisher(state, alone)
        self.together_s = best(lambda: self._fisher(state, together), 5) / self.num_rows
        self.plain_s = best(lambda: self._plain(state, together), 5) / self.num_rows
        self.alone_s = best(lambda: found.update(loop=self._row_by_row(state, alone)), 3) / self.num_alone
        wanted = found.pop("loop")
        self.apart = max(float((found[name] - wanted[name]).abs().max() / wanted[name].max()) for name in wanted)

    def _plain(self, state: TrainState, index: torch.Tensor) -> None:
        """Gradients of batches, as many rows at a time."""
        with evaluation_mode(state.model):
            for some in index.split(_importance.ROWS_AT_A_TIME):
                batch = state.prepare(state.data.rows(some))
                loss = F.cross_entropy(state.model(batch).logits, batch.targets)
                torch.autograd.grad(loss, list(state.parameters().values()))

    def _fisher(self, state: TrainState, index: torch.Tensor) -> dict[str, Any]:
        return mean_over_rows(state, index, F.cross_entropy, torch.square)

    def _row_by_row(self, state: TrainState, index: torch.Tensor) -> dict[str, Any]:
        can, _importance._can_be_vectorised = _importance._can_be_vectorised, lambda _: False
        try:
            return self._fisher(state, index)
        finally:
            _importance._can_be_vectorised = can


def fishers() -> list[str]:
    """Both ways on the networks of the MNIST protocols and on the residual network, and a plain pass of the batches."""
    lines = [
        "## Fisher information",
        "",
        "| network | threads | row by row, µs a row | in one pass, µs a row | ratio | "
        "batches forward and backward alone, µs a row | highest ratio possible | largest difference |",
        "|---" * 8 + "|",
    ]
    before = torch.get_num_threads()
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        for name, (backbone, num_rows, num_alone) in NETWORKS.items():
            learnt = Learnt(num_rows, num_alone)
            run([learnt], Setting.CLASS_INCREMENTAL, 1, backbone, num_rows)
            each, one, plain = (1e6 * seconds for seconds in (learnt.alone_s, learnt.together_s, learnt.plain_s))
            lines.append(
                f"| {name} | {threads} | {each:.0f} | {one:.1f} | {each / one:.1f}x | {plain:.1f} | "
                f"{each / plain:.1f}x | {learnt.apart:.0e} |"
            )
    torch.set_num_threads(before)
    return lines


def starts() -> list[str]:
    """Seconds until a stream of 1,000 experiences is there, and until its last experience's rows are."""
    from streams.permuted import permuted
    from streams.power_law import power_law

    permuted("digits", 2)  # reading the images is not what is measured
    base_s = statistics.median(best(lambda: permuted("digits", NUM_EXPERIENCES), 1) for _ in range(3))
    base = permuted("digits", NUM_EXPERIENCES)
    lines = [
        f"## Start of power_law with {NUM_EXPERIENCES:,} experiences",
        "",
        f"Around permuted digits, which take {base_s:.2f} s themselves; bar: 1 s.",
        "",
        "| schedule | s until the stream is there | s to load the last experience |",
        "|---|---|---|",
    ]
    for kind in ("power_law", "lag_power", "exponential", "uniform", "power_law_unrestricted"):
        start_s = best(lambda: power_law(base, kind=kind), 3)  # noqa: B023
        stream = power_law(base, kind=kind)
        load_s = best(stream.experiences[-1].load, 1)
        lines.append(f"| `{kind}` | {start_s:.3f} | {load_s:.3f} |")
    return lines
