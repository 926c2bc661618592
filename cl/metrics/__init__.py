"""Continual-learning metrics and statistics: pure functions of numbers, without torch.

    table = EvalTable.from_result(json.loads(Path("result.json").read_text()))
    summary(table)["bwt"]

| module | holds |
|---|---|
| `matrix` | `EvalTable`: what was measured, where and when |
| `forgetting` | averages, transfer, forgetting at the ends of the experiences |
| `stability` | worst cases inside experiences |
| `recurrence` | domains that come back: retention against time without practice |
| `facilitation` | steps until an experience is learnt, later ones against the first |
| `sensitivity` | how modules of the network react to a new experience, from snapshots of its weights |
| `language` | perplexity, bits per byte and what else needs losses in nats |
| `overview` | every scalar of a run, and its curves |
| `statistics`, `comparison`, `aggregate` | intervals and tests over seeds, strategies and streams |
| `cost` | performance against cost |

docs/metrics.md has every formula with its source, and when it is undefined.
"""

from cl.metrics.aggregate import Ranking, average_ranks, interquartile_mean
from cl.metrics.comparison import Row, compare
from cl.metrics.cost import pareto_front
from cl.metrics.facilitation import forward_facilitation, steps_to_reach
from cl.metrics.forgetting import (
    aufc,
    average,
    bwt,
    diaz_rodriguez,
    final,
    forgetting_by_lag,
    forgetting_first,
    forgetting_max,
    forgetting_max_by_domain,
    fwt,
    intransigence,
    learning,
    seen_average,
)
from cl.metrics.language import (
    adaptation_gap,
    aufc_log_perplexity,
    bits_per_byte,
    cumulative_forgetting,
    joint_gap,
    language_summary,
    perplexity,
    source_forgetting,
)
from cl.metrics.matrix import EvalTable, WithinPoint
from cl.metrics.overview import Progress, per_experience, progress, summary
from cl.metrics.recurrence import (
    PowerLaw,
    RevisitCurve,
    fit_power_law,
    late_average,
    retention_exponent,
    revisit_curve,
)
from cl.metrics.stability import min_acc, recovery, stability_gap, wc_acc
from cl.metrics.statistics import Interval, bootstrap_ci, holm, seeds_needed, wilcoxon_signed_rank

__all__ = [
    "EvalTable",
    "Interval",
    "PowerLaw",
    "Progress",
    "Ranking",
    "RevisitCurve",
    "Row",
    "WithinPoint",
    "adaptation_gap",
    "aufc",
    "aufc_log_perplexity",
    "average",
    "average_ranks",
    "bits_per_byte",
    "bootstrap_ci",
    "bwt",
    "compare",
    "cumulative_forgetting",
    "diaz_rodriguez",
    "final",
    "fit_power_law",
    "forgetting_by_lag",
    "forgetting_first",
    "forgetting_max",
    "forgetting_max_by_domain",
    "forward_facilitation",
    "fwt",
    "holm",
    "interquartile_mean",
    "intransigence",
    "joint_gap",
    "language_summary",
    "late_average",
    "learning",
    "min_acc",
    "pareto_front",
    "per_experience",
    "perplexity",
    "progress",
    "recovery",
    "retention_exponent",
    "revisit_curve",
    "seeds_needed",
    "seen_average",
    "source_forgetting",
    "stability_gap",
    "steps_to_reach",
    "summary",
    "wc_acc",
    "wilcoxon_signed_rank",
]
