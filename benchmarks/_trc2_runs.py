"""What the TRC2 study runs: backbones, arms, orders and sizes, as `cl compare` runs them, and what they left behind."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from shutil import rmtree
from statistics import median

from _fit import active_weights, fitted, network
from _study import Comparisons, finished

from cl.cli.compare import Plan, make_plan, split_words
from cl.cli.compose import composed, plain
from cl.cli.execute import execute
from cl.cli.folder import is_done
from cl.core import Setting, StreamInfo
from cl.result import Result
from streams._tokenizers import trained_bpe

DOMAINS = ("c4", "wikitext", "gsm8k")
ORDERS = {"".join(domain[0] for domain in order): order for order in permutations(DOMAINS)}

BACKBONES: Mapping[str, Sequence[str]] = {
    "transformer": ("backbone=gpt",),
    "experts": ("backbone=gpt", "backbone.mlp='moe(experts=8, top=2, shared=1)'", "backbone.num_kv_heads=2"),
    "gated_deltanet": ("backbone=linear_memory", "backbone.blocks='linear_memory(rule=gated_delta)'"),
    "mamba2": ("backbone=linear_memory", "backbone.blocks='linear_memory(rule=mamba2)'"),
    "titans": ("backbone=neural_memory",),
    "trc2": ("backbone=trc2",),
}
VARIANTS: Mapping[str, Sequence[str]] = {
    "hippocampus_only": ("backbone=trc2", "backbone.has_thalamus=false"),
    "thalamus_only": ("backbone=trc2", "backbone.has_hippocampus=false"),
    "neither": ("backbone=trc2", "backbone.has_thalamus=false", "backbone.has_hippocampus=false"),
    "empty_when_measured": ("backbone=trc2", "backbone.reads_store=training"),
}
STORE = ("strategy.consolidation.ring_capacity=256", "strategy.consolidation.long_capacity=1024")
ARMS: Mapping[str, Sequence[str]] = {
    "alone": ("strategies=[naive]", "reference=naive"),
    "fixed": ("strategies=[consolidation]", "reference=consolidation", *STORE, "strategy.consolidation.is_fixed=true"),
    "consolidation": ("strategies=[consolidation]", "reference=consolidation", *STORE),
}

SHORTER, TURNS = 10, 3
"""Speeds are measured on runs with a tenth of the steps, so many times."""


@dataclass(frozen=True, kw_only=True)
class Trc2(Comparisons):
    """The runs of the study; the sizes are those of runs small enough for one core.

    Args:
        data: `data.root`, with `text/` below it.
        seeds: of each order.
        steps: of each domain, `rows` rows of `context` tokens each.
        words: more overrides for every run.
    """

    out: Path = Path("runs/trc2")
    page: Path = Path("docs/comparisons/trc2")
    seeds: int = 1
    steps: int = 200
    rows: int = 8
    context: int = 64
    vocabulary: int = 1024
    width: int = 64
    layers: int = 4
    words: Sequence[str] = ()

    def request(self, name: str) -> tuple[str, ...]:
        """Words for a backbone or a variant with as many active weights as the transformer."""
        common = (
            "+experiment=text_local",
            "stream.general=null",
            f"stream.context={self.context}",
            f"backbone.width={self.width}",
            f"backbone.num_layers={self.layers}",
            f"trainer.batch_size={self.rows}",
            "trainer.evaluate=seen",
            "trainer.eval_rows=96",
            "trainer.within_eval_rows=32",
            "tracking=none",
            *self.words,
        )
        target = active_weights(network([*common, *BACKBONES["transformer"]], self.info))
        return fitted([*common, *(BACKBONES | VARIANTS)[name]], target, self.info, multiple=4)

    @property
    def info(self) -> StreamInfo:
        """What rows look like, as far as the size of a network depends on it."""
        shape, setting = (self.context,), Setting.CONTINUAL_PRETRAINING
        return StreamInfo("text", setting, shape, self.vocabulary, 3, measure="loss", separator=self.vocabulary - 1)

    def tokenizer(self) -> Path:
        """One for all orders, since losses of different tokens cannot be compared: a BPE of C4."""
        with (Path(self.data) / "text" / "c4" / "train.jsonl").open() as lines:
            trained_bpe((json.loads(line)["text"] for line in lines), self.vocabulary, self.out, "c4")
        return (self.out / "tokenizers" / f"bpe-{self.vocabulary}-c4.json").absolute()

    def folder(self, budget: str, order: str, name: str, arm: str) -> Path:
        return self.out / budget / order / f"{name}-{arm}"

    def plan(
        self, budget: str, order: str, name: str, arm: str, words: Sequence[str], steps: int, seeds: Sequence[int] = ()
    ) -> Plan:
        """The runs of one `cl compare`: `words` with or without replay, in one order, with seeds of its own."""
        place = list(ORDERS).index(order)
        seeds = seeds or [place + len(ORDERS) * n for n in range(self.seeds)]
        own, others = split_words(
            (
                *words,
                *ARMS[arm],
                f"stream.order=[{','.join(ORDERS[order])}]",
                f"stream.tokenizer={self.tokenizer()}",
                f"trainer.max_steps={steps}",
                # only the controller looks at what is measured inside experiences
                f"trainer.eval_every={max(1, steps // 4) if arm == 'consolidation' else 0}",
                f"seeds=[{','.join(map(str, seeds))}]",
                f"data.root={self.data}",
                f"out={self.folder(budget, order, name, arm)}",
            )
        )
        return make_plan(plain(composed("compare", own)), others)

    def train(self, plans: Sequence[Plan]) -> None:
        """The runs of all of them."""
        self.run({folder: config for plan in plans for folder, config in plan.runs.items()}, plans[0].suite)

    def at_equal_tokens(self, orders: Sequence[str], names: Sequence[str], arms: Sequence[str]) -> None:
        words, every = {name: self.request(name) for name in names}, product(orders, names, arms)
        self.train([self.plan("tokens", order, name, arm, words[name], self.steps) for order, name, arm in every])

    def at_equal_time(self, orders: Sequence[str], names: Sequence[str], arms: Sequence[str]) -> None:
        """As many steps as the seconds of the transformer alone allow."""
        self.measure_speeds()
        words, every = {name: self.request(name) for name in names}, [*product(orders, names, arms)]
        steps = {(name, arm): max(1, round(self.steps * self.speed(name, arm))) for _, name, arm in every}
        self.train([self.plan("time", order, name, arm, words[name], steps[name, arm]) for order, name, arm in every])

    def measure_speeds(self) -> None:
        """Short runs of all, one after the other and all over again: what else a machine does meets all alike."""
        order, steps = next(iter(ORDERS)), max(1, self.steps // SHORTER)
        words = {name: self.request(name) for name in BACKBONES}
        plans = [
            self.plan("speed", order, name, arm, words[name], steps, range(TURNS))
            for name, arm in product(BACKBONES, ARMS)
        ]
        for turn in zip(*(plan.runs.items() for plan in plans), strict=True):
            for folder, config in turn:
                if not is_done(folder, config):
                    rmtree(folder, ignore_errors=True)
                    if execute(config, folder).status != "done":
                        raise SystemExit(f"{folder} was interrupted; the same command goes on")

    def speed(self, name: str, arm: str) -> float:
        """Of training, in that of the transformer alone: median over turns; nan where it was not measured."""
        plain, others = self.every("speed", "transformer", "alone"), self.every("speed", name, arm)
        ratios = [plain[turn].cost["train_s"] / others[turn].cost["train_s"] for turn in plain.keys() & others.keys()]
        return median(ratios) if ratios else math.nan

    def every(self, budget: str, name: str, arm: str) -> dict[tuple[str, int], Result]:
        """Finished runs by order and seed: what is compared in pairs."""
        runs = {order: finished(self.folder(budget, order, name, arm)) for order in ORDERS}
        return {(order, run.seed): run for order in ORDERS for run in runs[order]}

    def tokens_per_second(self, name: str, arm: str) -> float:
        """Of training: the transformer's, alone, times the speed in it; nan where it was not measured."""
        plain = self.every("speed", "transformer", "alone").values()
        rates = [run.cost["train_samples_per_s"] for run in plain]
        return self.speed(name, arm) * median(rates) if rates else math.nan
