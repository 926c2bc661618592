"""The TRC2 study: is it the architecture or the replay that forgets less?

    python benchmarks/study_trc2.py --data DIR [--out runs/trc2] [--page FOLDER] [--seeds 3] [--steps 300]

Backbones (transformer, mixture of experts, gated DeltaNet, Mamba-2, Titans, TRC2), each alone, with a fixed replay and
with the consolidation controller, on C4, WikiText and GSM8K from local files in all six orders. Two budgets:

- tokens: the same steps and batches for everybody, and hidden widths such that every backbone has as many active
  weights as the transformer (those that touch a token: all of them, but of experts the chosen ones).
- time: as many steps as fit into the seconds of the transformer alone, by the rates measured in the first budget.

TRC2's ablation (both parts, hippocampus only, thalamus only, neither, and measured with an empty store) is trained in
the first order. Everything is `cl compare`, one folder each, so the same command goes on where it was stopped;
`--backbones`, `--arms` and `--orders` select some, `--words` adds overrides, and
`--page-only` writes the page of what is there.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from statistics import fmean, median

import torch
from torch import nn

from cl.backbones.mlps.moe import Moe
from cl.cli.build import make
from cl.cli.compose import composed, seeded
from cl.cli.main import main as cl
from cl.core import Setting, StreamInfo
from cl.metrics.statistics import bootstrap_ci, seeds_needed
from cl.result import Result, write_text

DOMAINS = ("c4", "wikitext", "gsm8k")
ORDERS = tuple(permutations(DOMAINS))
CONTEXT, VOCABULARY, BATCH = 128, 1024, 16
WIDTH, LAYERS = 128, 4

COMMON = (
    "+experiment=text_local",
    "stream.general=null",
    f"stream.context={CONTEXT}",
    f"stream.vocabulary={VOCABULARY}",
    f"trainer.batch_size={BATCH}",
    f"backbone.width={WIDTH}",
    "trainer.within_eval_rows=64",
    "tracking=none",
)
EXPERTS = "'moe(experts=8, top=2, shared=1)'"
BACKBONES: Mapping[str, Sequence[str]] = {
    "transformer": ("backbone=gpt", f"backbone.num_layers={LAYERS}"),
    "experts": ("backbone=gpt", f"backbone.num_layers={LAYERS}", f"backbone.mlp={EXPERTS}", "backbone.num_kv_heads=2"),
    "gated_deltanet": (
        "backbone=linear_memory",
        *(f"backbone.{word}" for word in ("blocks='linear_memory(rule=gated_delta)'", f"num_layers={LAYERS}")),
    ),
    "mamba2": (
        "backbone=linear_memory",
        "backbone.blocks='linear_memory(rule=mamba2)'",
        f"backbone.num_layers={LAYERS}",
    ),
    "titans": ("backbone=neural_memory", f"backbone.num_layers={LAYERS}"),
    "trc2": ("backbone=trc2", f"backbone.num_layers={LAYERS}"),
}
ABLATION: Mapping[str, Sequence[str]] = {
    "hippocampus_only": (*BACKBONES["trc2"], "backbone.has_thalamus=false"),
    "thalamus_only": (*BACKBONES["trc2"], "backbone.has_hippocampus=false"),
    "neither": (*BACKBONES["trc2"], "backbone.has_thalamus=false", "backbone.has_hippocampus=false"),
    "empty_when_measured": (*BACKBONES["trc2"], "backbone.reads_store=training"),
}
STORE = ("strategy.consolidation.ring_capacity=256", "strategy.consolidation.long_capacity=1024")
ARMS: Mapping[str, Sequence[str]] = {
    "alone": ("strategies=[naive]", "reference=naive"),
    "fixed": ("strategies=[consolidation]", "reference=consolidation", *STORE, "strategy.consolidation.is_fixed=true"),
    "consolidation": ("strategies=[consolidation]", "reference=consolidation", *STORE),
}


def active_weights(model: nn.Module) -> int:
    """Weights that touch a token: all of them, but of every mixture of experts only as many as are chosen."""
    idle = sum(
        sum(p.numel() for p in part.experts.parameters()) * (1 - part.top / len(part.experts))
        for part in model.modules()
        if isinstance(part, Moe)
    )
    return round(sum(p.numel() for p in model.parameters()) - idle)


def network(words: Sequence[str]) -> nn.Module:
    """The backbone that a request would build."""
    config = seeded(composed("run", [*COMMON, *words]), 0)
    info = StreamInfo("text", Setting.CONTINUAL_PRETRAINING, (CONTEXT,), VOCABULARY, 3, measure="loss", separator=0)
    made: nn.Module = make("backbone", config["backbone"])(info)
    return made


def fitted(words: Sequence[str], target: int) -> tuple[str, ...]:
    """The request with the hidden width, a multiple of 8, whose active weights come nearest to `target`."""
    counts = {width: active_weights(network([*words, f"backbone.mlp_width={width}"])) for width in (64, 128)}
    slope = (counts[128] - counts[64]) / 64
    width = max(8, 8 * round((64 + (target - counts[64]) / slope) / 8))
    return (*words, f"backbone.mlp_width={width}")


@dataclass(frozen=True)
class Study:
    """Where things are and how much of them there is."""

    data: str
    out: Path
    seeds: int
    steps: int
    jobs: int
    words: tuple[str, ...] = ()

    def folder(self, budget: str, order: Sequence[str], name: str, arm: str) -> Path:
        return self.out / budget / "".join(domain[0] for domain in order) / f"{name}-{arm}"

    def compare(self, budget: str, order: Sequence[str], name: str, arm: str, words: Sequence[str], steps: int) -> None:
        """One `cl compare`: a backbone with or without replay, in one order."""
        request = (
            *COMMON,
            *words,
            *ARMS[arm],
            f"stream.order=[{','.join(order)}]",
            f"trainer.max_steps={steps}",
            f"trainer.eval_every={max(1, steps // 5)}",
            f"seeds={self.seeds}",
            f"jobs={self.jobs}",
            f"data.root={self.data}",
            f"out={self.folder(budget, order, name, arm)}",
            *self.words,
        )
        if code := cl(["compare", *request]):
            raise SystemExit(code)

    def results(self, budget: str, order: Sequence[str], name: str, arm: str) -> list[Result]:
        """Finished runs, by seed."""
        found = [
            Result.load(path) for path in sorted(self.folder(budget, order, name, arm).glob("*/seed-*/result.json"))
        ]
        return [result for result in found if result.status == "done"]

    def every(self, budget: str, name: str, arm: str) -> dict[tuple[str, int], Result]:
        """Finished runs in all orders, by order and seed: what is compared in pairs."""
        return {
            (",".join(order), result.seed): result
            for order in ORDERS
            for result in self.results(budget, order, name, arm)
        }


def at_equal_tokens(
    study: Study, orders: Sequence[Sequence[str]], known: Mapping[str, Sequence[str]], arms: Sequence[str]
) -> None:
    """The backbones `known` by name, with every arm, in all orders."""
    target = active_weights(network(BACKBONES["transformer"]))
    for name, words in known.items():
        request = fitted(words, target)
        for order in orders:
            for arm in arms:
                study.compare("tokens", order, name, arm, request, study.steps)


def at_equal_time(study: Study, orders: Sequence[Sequence[str]], names: Sequence[str], arms: Sequence[str]) -> None:
    """As many steps as the seconds of the transformer alone allow."""
    target = active_weights(network(BACKBONES["transformer"]))
    seconds = _train_seconds(study, "transformer", "alone")
    for order in orders:
        for name in names:
            for arm in arms:
                steps = max(1, round(study.steps * seconds / _train_seconds(study, name, arm)))
                study.compare("time", order, name, arm, fitted(BACKBONES[name], target), steps)


def _train_seconds(study: Study, name: str, arm: str) -> float:
    """Of one run in the first budget: the median, since machines are shared."""
    return median(result.cost["train_s"] for result in study.every("tokens", name, arm).values())


# the page


def boundary(result: Result) -> float:
    """Mean loss of each domain when it was left, in nats."""
    return fmean(result.R[k][result.trained[k]] for k in range(len(result.R)))


def cell(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and 95 % interval over orders and seeds."""
    if not values:
        return ""
    low, high = bootstrap_ci(values)
    spread = "" if low != low else f" [{low:{form}}, {high:{form}}]"
    return f"{fmean(values):{form}}{spread}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *rows)) + "\n"


def results_table(study: Study, budget: str) -> str:
    """One row per backbone and arm that has runs."""
    rows = []
    for name in BACKBONES:
        for arm in ARMS:
            runs = list(study.every(budget, name, arm).values())
            if not runs:
                continue
            # a domain's column does not depend on the order
            at = {domain: [run.R[-1][run.domains.index(domain)] for run in runs] for domain in DOMAINS}
            rates = [run.cost["train_samples_per_s"] * CONTEXT for run in runs]
            rows.append(
                (
                    f"{name}, {arm}",
                    cell([run.metrics["aufc_log_perplexity"] for run in runs]),
                    cell([run.metrics["forgetting_max"] for run in runs]),
                    *(f"{_perplexity(values):.1f}" for values in ([boundary(run) for run in runs], *at.values())),
                    f"{median(rates):,.0f}",
                    f"{median(run.cost['peak_memory_bytes'] for run in runs) / 1e6:,.0f}",
                    str(len(runs)),
                )
            )
    head = ("run", "AUFC (log perplexity)", "forgetting (nats)", "boundary ppl", *(f"final ppl {d}" for d in DOMAINS))
    return table((*head, "tokens/s", "MB", "runs"), rows)


def _perplexity(losses: Sequence[float]) -> float:
    """Of the mean loss, so that one bad run does not hide the others."""
    return float(torch.tensor(losses).mean().exp())


def gains(study: Study, budget: str) -> str:
    """How much less is forgotten, taken apart into replay and architecture, run by run of the same order and seed."""
    runs = {
        (name, arm): {key: run.metrics["aufc_log_perplexity"] for key, run in study.every(budget, name, arm).items()}
        for name in ("transformer", "trc2")
        for arm in ARMS
    }
    pairs = (
        ("all of it", ("transformer", "alone"), ("trc2", "consolidation")),
        ("replay: the same for the transformer", ("transformer", "alone"), ("transformer", "consolidation")),
        ("architecture, with the same replay", ("transformer", "consolidation"), ("trc2", "consolidation")),
        ("architecture, without replay", ("transformer", "alone"), ("trc2", "alone")),
        ("controller instead of fixed replay", ("transformer", "fixed"), ("transformer", "consolidation")),
    )
    rows = []
    for name, before, after in pairs:
        shared = sorted(runs[before].keys() & runs[after].keys())
        differences = [runs[before][key] - runs[after][key] for key in shared]
        low, high = bootstrap_ci(differences) if len(differences) > 1 else (float("nan"),) * 2
        verdict = "cannot be told" if not (low > 0 or high < 0) else "less forgotten" if low > 0 else "more forgotten"
        if len(differences) < seeds_needed():
            verdict = f"too few pairs: {seeds_needed()} are needed"
        if differences:
            rows.append((name, cell(differences), verdict, str(len(differences))))
    return table(("part of the gain", "AUFC saved (95 %)", "verdict", "pairs"), rows)


def ablation_table(study: Study) -> str:
    """The first order only."""
    rows = []
    for name in ("trc2", *ABLATION):
        for arm in ARMS:
            runs = study.results("tokens", ORDERS[0], name, arm)
            if runs:
                saved = [run.metrics["aufc_log_perplexity"] for run in runs]
                lost = [run.metrics["forgetting_max"] for run in runs]
                rows.append(
                    (f"{name}, {arm}", cell(saved), cell(lost), f"{_perplexity([boundary(r) for r in runs]):.1f}")
                )
    return table(("run", "AUFC", "forgetting (nats)", "boundary ppl"), rows)


def page(study: Study) -> str:
    """Everything from the results on disk; a number that is not there is left out."""
    target = active_weights(network(BACKBONES["transformer"]))
    parts = [
        "# TRC2: architecture or replay?\n",
        f"Made by `python benchmarks/study_trc2.py --data DATA --seeds {study.seeds} --steps {study.steps}`; how it is "
        f"done is in that file's docstring. {study.steps} steps of {BATCH} rows of {CONTEXT} tokens for each domain, "
        f"{target:,} active weights, learning rate and schedule of `experiment=text_local` for all. Intervals are 95 % "
        "bootstrap intervals over orders and seeds; lower is better everywhere but for tokens/s.\n",
    ]
    for budget in ("tokens", "time"):
        if any(study.every(budget, name, arm) for name in BACKBONES for arm in ARMS):
            parts += [f"## Equal {budget}\n", results_table(study, budget), "### Where the gain comes from\n"]
            parts += ["Differences of runs with the same order and seed.\n", gains(study, budget)]
    parts += [f"## Ablation, order {', '.join(ORDERS[0])}, equal tokens\n", ablation_table(study)]
    return "\n".join(parts)


def main() -> None:
    """Run what is not done, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/trc2"))
    parser.add_argument("--page", type=Path, default=Path("docs/comparisons/trc2"))
    for name, value in (("seeds", 3), ("steps", 300), ("jobs", 2), ("orders", len(ORDERS))):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--words", nargs="+", default=())
    parser.add_argument("--no-time", action="store_true", help="leave the second budget out")
    parser.add_argument("--no-ablation", action="store_true")
    parser.add_argument("--page-only", action="store_true")
    given = parser.parse_args()
    study = Study(given.data, given.out, given.seeds, given.steps, given.jobs, tuple(given.words))
    if not given.page_only:
        at_equal_tokens(study, ORDERS[: given.orders], {name: BACKBONES[name] for name in given.backbones}, given.arms)
        if "trc2" in given.backbones and not given.no_ablation:
            at_equal_tokens(study, ORDERS[:1], ABLATION, given.arms)
        if not given.no_time:
            at_equal_time(study, ORDERS[: given.orders], given.backbones, given.arms)
    write_text(given.page / "README.md", page(study))


if __name__ == "__main__":
    main()
