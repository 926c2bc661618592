"""The TRC2 study: is it the architecture or the replay that forgets less?

    python benchmarks/study_trc2.py --data DIR [--out runs/trc2] [--page FOLDER] [--seeds 1] [--steps 200] [--time]

Backbones (transformer, mixture of experts, gated DeltaNet, Mamba-2, Titans, TRC2), each alone, with a fixed replay and
with the consolidation controller, on C4, WikiText and GSM8K from local files in all six orders, cut into tokens by one
BPE of C4. Every order has seeds of its own, so that six orders with one seed each are six pairs. Two budgets:

- tokens: the same steps and batches for everybody, and hidden widths such that every backbone has as many active
  weights as the transformer (those that touch a token: all of them, but of experts the chosen ones). TRC2's ablation
  (hippocampus only, thalamus only, neither, and measured with an empty store) is trained like this as well.
- time, with `--time`: as many steps as fit into the seconds of the transformer alone. How fast everything is, is
  measured beforehand on short runs that take turns in one process.

Runs are those of `cl compare`, so the same command goes on where it was stopped, and pieces may be run in any order:
`--only` (backbones and variants), `--arms` and `--orders` select them. `--words` adds overrides; `--page-only` writes
the page of what is there. Sizes of the page are those of the options: give it those of the runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, median

from _fit import active_weights, network
from _study import interval, spread, table
from _trc2_runs import ARMS, BACKBONES, DOMAINS, ORDERS, TURNS, VARIANTS, Trc2

from cl.metrics.statistics import ALPHA, holm, seeds_needed, wilcoxon_signed_rank
from cl.result import Result

Run = tuple[str, str]
"""A backbone or a variant, and an arm."""

QUESTIONS: Sequence[tuple[str, Run, Run]] = (
    ("architecture, with the same replay", ("transformer", "consolidation"), ("trc2", "consolidation")),
    ("architecture and replay", ("transformer", "alone"), ("trc2", "consolidation")),
    ("replay, for the transformer", ("transformer", "alone"), ("transformer", "consolidation")),
    ("replay, for TRC2", ("trc2", "alone"), ("trc2", "consolidation")),
    ("architecture, without replay", ("transformer", "alone"), ("trc2", "alone")),
    ("router and store, with the same replay", ("experts", "consolidation"), ("trc2", "consolidation")),
    ("controller in place of fixed replay", ("trc2", "fixed"), ("trc2", "consolidation")),
)
"""What is asked, the first before all others: what forgets, what it is replaced by."""


def forgetting(run: Result) -> float:
    """Area under the forgetting curve of the log perplexity, in nats."""
    return float(run.metrics["aufc_log_perplexity"] or 0.0)


def boundary(run: Result) -> float:
    """Mean loss of each domain when it was left, in nats: what was learned."""
    return fmean(run.R[k][run.trained[k]] or 0.0 for k in range(len(run.R)))


def final(run: Result, domain: str) -> float:
    """Loss of a domain at the end, in nats; its column does not depend on the order."""
    return run.R[-1][run.domains.index(domain)] or 0.0


def at_the_end(run: Result) -> float:
    """Mean loss of all domains at the end, in nats: what learning and forgetting together have left."""
    return fmean(final(run, domain) for domain in DOMAINS)


def perplexity(losses: Sequence[float]) -> str:
    """Of the mean loss, so that one bad run does not hide the others."""
    return f"{math.exp(fmean(losses)):.1f}"


def paired(study: Trc2, budget: str, before: Run, after: Run, value: Callable[[Result], float]) -> list[float]:
    """What `after` saves in runs of the same order and seed."""
    left, right = study.every(budget, *before), study.every(budget, *after)
    return [value(left[key]) - value(right[key]) for key in sorted(left.keys() & right.keys())]


# the page


def results_table(study: Trc2, budget: str) -> str:
    """One row per backbone and arm that has runs."""
    rows = []
    for name in BACKBONES:
        for arm in ARMS:
            runs = list(study.every(budget, name, arm).values())
            if runs:
                rows.append(
                    (
                        f"{name}, {arm}",
                        spread([forgetting(run) for run in runs]),
                        spread([float(run.metrics["forgetting_max"] or 0.0) for run in runs]),
                        perplexity([boundary(run) for run in runs]),
                        *(perplexity([final(run, domain) for run in runs]) for domain in DOMAINS),
                        f"{runs[0].cost['updates'] / len(runs[0].R):,.0f}",
                        f"{study.tokens_per_second(name, arm):,.0f}",
                        f"{median(run.cost['peak_memory_bytes'] for run in runs) / 1e6:,.0f}",
                        str(len(runs)),
                    )
                )
    head = ("run", "AUFC (nats)", "forgetting (nats)", "boundary ppl", *(f"final {domain}" for domain in DOMAINS))
    return table((*head, "steps a domain", "tokens/s", "MB", "runs"), rows)


def answers(study: Trc2, budget: str) -> str:
    """How much less is forgotten, taken apart into replay and architecture."""
    saved = [paired(study, budget, before, after, forgetting) for _, before, after in QUESTIONS]
    learned, left = (
        [paired(study, budget, before, after, value) for _, before, after in QUESTIONS]
        for value in (boundary, at_the_end)
    )
    p = [wilcoxon_signed_rank(each) for each in saved]
    # the first question was chosen beforehand and is tested alone; the others share their risk
    adjusted = [p[0], *holm(p[1:])]
    rivals = sum(bool(each) for each in saved[1:])
    rows = []
    for number, ((name, before, after), each) in enumerate(zip(QUESTIONS, saved, strict=True)):
        if each:
            needed = seeds_needed(max(1, rivals) if number else 1)
            found = f"p = {adjusted[number]:.3f}"
            if len(each) < needed:
                verdict = f"cannot be told: {len(each)} pairs, {needed} needed"
            elif adjusted[number] < ALPHA:
                verdict = f"{'less' if fmean(each) > 0 else 'more'} forgotten, {found}"
            else:
                verdict = f"not significant, {found}"
            runs = f"{', '.join(before)} → {', '.join(after)}"
            losses = (interval(learned[number]), interval(left[number]))
            rows.append((name, runs, interval(each), verdict, *losses, str(len(each))))
    losses = ("boundary loss saved", "final loss saved")
    head = ("what", "runs", "AUFC saved", "ranks (Wilcoxon, Holm)", *losses, "pairs")
    return table(head, rows) if rows else "No pairs yet.\n"


def reach(study: Trc2, budget: str) -> str:
    """Whether TRC2 with consolidation forgets at most half of what the transformer alone does, and what saves it."""
    plain, ours = study.every(budget, "transformer", "alone"), study.every(budget, "trc2", "consolidation")
    keys = plain.keys() & ours.keys()
    if not keys or fmean(forgetting(plain[key]) for key in keys) <= 0:
        return "The transformer alone has not been run, or forgets nothing: no share can be given.\n"
    share = fmean(forgetting(ours[key]) for key in keys) / fmean(forgetting(plain[key]) for key in keys)
    half = sum(forgetting(ours[key]) <= forgetting(plain[key]) / 2 for key in keys)
    replay, architecture = QUESTIONS[2], QUESTIONS[0]
    saved = [paired(study, budget, *question[1:], forgetting) for question in (replay, architecture)]
    parts = ""
    if all(saved):
        parts = (
            f" Replay saves {interval(saved[0])} nats of the difference in the transformer already, and the "
            f"architecture {interval(saved[1])} beyond it."
        )
    return (
        f"TRC2 with consolidation has {share:.0%} of the AUFC of the transformer alone (aim: at most 50 %), and at "
        f"most half in {half} of {len(keys)} pairs.{parts}\n"
    )


def ablation_table(study: Trc2) -> str:
    """TRC2 and what is left of it, and what the missing part saves."""
    rows = []
    for arm in ARMS:
        for name in ("trc2", *VARIANTS):
            runs = list(study.every("tokens", name, arm).values())
            if runs:
                each = paired(study, "tokens", (name, arm), ("trc2", arm), forgetting) if name in VARIANTS else []
                rows.append(
                    (
                        f"{name}, {arm}",
                        spread([forgetting(run) for run in runs]),
                        interval(each) if each else "",
                        perplexity([boundary(run) for run in runs]),
                        str(len(runs)),
                    )
                )
    return table(("run", "AUFC (nats)", "saved by all of TRC2", "boundary ppl", "runs"), rows)


def sizes_table(study: Trc2) -> str:
    """Weights of every backbone: of experts all are stored, and few are used."""
    rows = []
    for name in BACKBONES:
        words = study.request(name)
        made = network(words, study.info)
        stored = sum(p.numel() for p in made.parameters())
        rows.append((name, words[-1].split("=")[1], f"{active_weights(made):,}", f"{stored:,}"))
    return table(("backbone", "hidden units", "active weights", "stored weights"), rows)


def page(study: Trc2) -> str:
    """Everything from the results on disk; what is not there is left out."""
    num_pairs = len(ORDERS) * study.seeds
    parts = [
        "# TRC2: architecture or replay?\n",
        f"Made by `python benchmarks/study_trc2.py --data DATA --seeds {study.seeds} --steps {study.steps}` (equal "
        "tokens, ablation), then by the same command with `--time` (equal time); how it is done is in that file's "
        f"docstring. {study.steps} steps of {study.rows} rows of {study.context} tokens for "
        f"each domain, {study.layers} layers of width {study.width}, a BPE of {study.vocabulary:,} tokens. Learning "
        "rate and schedule are those of `experiment=text_local` for all, tuned for none of them. Networks are small "
        "and training is short; nothing is said of larger ones.\n",
        sizes_table(study),
        f"Lower is better everywhere but for tokens/s (medians of {TURNS} short runs that took turns, on the machine "
        "of the runs in equal time; those at equal tokens may be of another). Tables of "
        "results have the mean and the standard deviation over orders and seeds; orders differ much, so differences "
        "are taken between runs of the same order and seed, with "
        f"95 % Student intervals. {num_pairs} pairs allow a test of ranks no p below {2 / 2**num_pairs:.2g}: the first "
        "question is tested by itself, the others together, with Holm's adjustment, and "
        f"{seeds_needed(len(QUESTIONS) - 1)} pairs are the fewest with which one of {len(QUESTIONS) - 1} can be "
        "significant. An interval without zero among the others is a hint, no finding. Who has learnt less has less to "
        "forget: read forgetting beside the loss at boundaries and at the end, above all at equal time. All pairs "
        "share three domains: nothing is said of other ones.\n",
    ]
    for budget in ("tokens", "time"):
        if any(study.every(budget, name, arm) for name in BACKBONES for arm in ARMS):
            parts += [f"## Equal {budget}\n", results_table(study, budget), "### Where the gain comes from\n"]
            parts += ["Positive is less.\n", answers(study, budget), reach(study, budget)]
    if any(study.every("tokens", name, arm) for name in VARIANTS for arm in ARMS):
        parts += ["## Ablation at equal tokens\n", ablation_table(study)]
    return "\n".join(parts)


def main() -> None:
    """Run what is not done, then write the page."""
    parser, every = Trc2.options(__doc__), [*BACKBONES, *VARIANTS]
    parser.add_argument("--only", nargs="+", choices=every, default=every)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--time", action="store_true", help="the second budget, after speeds")
    given = parser.parse_args()
    study = Trc2.of(given)
    if given.time and not given.page_only:
        study.at_equal_time(given.orders, [name for name in given.only if name in BACKBONES], given.arms)
    elif not given.page_only:
        study.at_equal_tokens(given.orders, given.only, given.arms)
    study.write(page(study))


if __name__ == "__main__":
    main()
