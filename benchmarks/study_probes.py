"""The probe study: what each memory holds, at equal weights and, where it has a choice, at equal bytes of state.

    python benchmarks/study_probes.py [--out runs/probes] [--page FOLDER] [--seeds 1] [--quick]

Every backbone has two blocks, the same width and, by its hidden width, as many weights as the transformer (within 3 %).
Recall (`mqar`) and selective copying are asked at two sizes of state: an option of each memory is chosen so that a row
leaves about so many bytes behind, or as near as its weights allow. State tracking (`parity`, `s5`) depends on what the
state can do and not on its size, and is asked at the smaller one. Rows are trained at one length and measured at longer
ones and with more to hold. Every run is a `cl run`, and the same command goes on where it was stopped.

What is learnt in which time depends on the rate, and differently for each memory, so mqar is asked twice: at 0.003 for
1,500 steps and at 0.001 for 3,000.
"""

from __future__ import annotations

import math
from statistics import fmean, median

import torch
from _families import family
from _fit import active_weights
from _probe_runs import BATCH, MEMORIES, PROBES, Probes, built, chosen
from _study import table

FIGURE = "accuracy_by_state.png"


def spread(accuracies: list[float]) -> str:
    """In percent: the lowest and the highest, or one number where they are the same.

    Example:
        >>> spread([0.912, 0.249]), spread([0.991, 0.994])
        ('25 to 91', '99')
    """
    ends = [f"{100 * end(accuracies):.0f}" for end in (min, max)]
    return " to ".join(dict.fromkeys(ends))


def probe_table(study: Probes, probe: str) -> str:
    """Accuracy on every domain, by size of state."""
    rows, domains = [], []
    for _, name, target in study.plan([probe], list(MEMORIES)):
        runs = study.results(probe, name, target)
        if not runs:
            continue
        size, hidden, state = chosen(probe, name, target)
        domains = runs[0].domains
        found = [spread([run.R[-1][j] or 0.0 for run in runs]) for j in range(len(domains))]
        weights = active_weights(built(probe, MEMORIES[name], size, hidden))
        rate = median(run.cost["train_samples_per_s"] for run in runs)
        numbers = (*found, str(len(runs)), f"{rate:,.0f}")
        rows.append((state, (name, f"{state:,}", f"{weights:,}", *numbers)))
    if not rows:
        return "Not run yet.\n"
    ordered = [cells for _, cells in sorted(rows, key=lambda row: row[0])]
    return table(("backbone", "state, bytes", "weights", *domains, "seeds", "tokens/s"), ordered)


def plot(study: Probes) -> None:
    """Accuracy over bytes of state where two sizes are asked, on the domain after the one that was trained."""
    import matplotlib.pyplot as plt

    asked = [probe for probe, each in PROBES.items() if len(each.sizes) > 1]
    figure, panels = plt.subplots(1, len(asked), figsize=(13, 5), layout="constrained", squeeze=False)
    points = {}
    for axes, probe in zip(panels[0], asked, strict=True):
        ends = []
        for name in MEMORIES:
            targets = [target for _, _, target in study.plan([probe], [name])]
            found = {target: study.results(probe, name, target) for target in targets}
            label, color = family(name)
            line = [
                (chosen(probe, name, target)[2], 100 * fmean(run.R[-1][1] or 0.0 for run in runs), runs[0].domains[1])
                for target, runs in found.items()
                if runs
            ]
            if line:
                sizes, accuracies, domains = zip(*line, strict=True)
                (points[label],) = axes.plot(sizes, accuracies, marker="o", color=color, lw=1)
                ends.append((int(2 * math.log10(sizes[-1])), accuracies[-1], sizes[-1], name))
                axes.set(xscale="log", title=f"{probe}, {domains[0]}", xlabel="bytes of state", ylabel="accuracy, %")
        axes.spines[["top", "right"]].set_visible(False)
        last = (0, -math.inf)
        for place, accuracy, size, name in sorted(ends):
            # names of points that lie close together stand above each other
            height = max(accuracy, last[1] + 2.8) if place == last[0] else accuracy
            axes.annotate(name, (size, accuracy), fontsize=7, xytext=(1.08 * size, height))
            last = (place, height)
            axes.set_ylim(top=max(axes.get_ylim()[1], height + 3))
    figure.legend(points.values(), points, fontsize=8, ncols=2, loc="outside lower center", frameon=False)
    study.page.mkdir(parents=True, exist_ok=True)
    figure.savefig(study.page / FIGURE, dpi=110)
    plt.close(figure)


def page(study: Probes) -> str:
    """Everything from the results on disk."""
    parts = [
        "# Probes: what a memory holds\n",
        f"Made by `python benchmarks/study_probes.py --seeds {study.seeds}`; how it is done is in that file's "
        f"docstring. Accuracy in percent on what is asked, batches of {BATCH} rows, AdamW at one rate for all; "
        "the lowest and the highest of the seeds where they differ, their mean in the figure. The first column of "
        "accuracies is what was trained. The state of attention grows with the row; "
        "the others' does not. Training is short, and no rate suits all: a low number may mean slow to learn as well "
        "as unable. The memories that are matrices, ridge and titans see neighbours through a short convolution; "
        "attention, recurrences, rmt and armt do not, and must learn first that a value stands beside its key. In mqar "
        "a guess among the values of a row is one in as many as it has pairs; linear and mamba2 get well beyond it at "
        "0.003, attention and the delta rules at 0.001. Words of s5 are made of swaps of neighbours; with all 120 "
        "elements as letters nobody learnt more than the first letter of a word in as many steps. Beyond the length of "
        "training the state is carried by what can: recurrences that are not linear, and the delta rule with beta to "
        "2, whose step can be a reflection, which a swap is, and a change of sign, which parity is. Tokens/s were "
        "taken beside other work and say little.\n",
    ]
    parts.append(f"![Accuracy over bytes of state, a line for a memory at two sizes]({FIGURE})\n")
    for probe in PROBES:
        how = f"{PROBES[probe].steps:,} steps, learning rate {PROBES[probe].rate}.\n"
        parts += [f"## {probe}\n", how, probe_table(study, probe)]
    return "\n".join(parts)


def main() -> None:
    """Run what is not done, then write the page."""
    parser = Probes.options(__doc__)
    parser.add_argument("--probes", nargs="+", choices=PROBES, default=list(PROBES))
    parser.add_argument("--backbones", nargs="+", choices=MEMORIES, default=list(MEMORIES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    study = Probes.of(given)
    for probe, name, target in () if given.page_only else study.plan(given.probes, given.backbones):
        for seed in range(study.seeds):
            study.run(probe, name, target, seed)
    plot(study)
    study.write(page(study))


if __name__ == "__main__":
    main()
