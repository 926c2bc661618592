"""Continual-learning metrics and statistics: pure functions of numbers, without torch.

    table = EvalTable.from_result(json.loads(Path("result.json").read_text()))
    summary(table)["bwt"]

| module | holds |
|---|---|
| `matrix` | `EvalTable`: what was measured, where and when |
| `forgetting` | averages, transfer, forgetting at the ends of the experiences |
| `stability` | worst cases inside experiences |
| `language` | perplexity, bits per byte and what else needs losses in nats |
| `overview` | every scalar of a run, and its curves |
| `statistics`, `comparison`, `aggregate` | intervals and tests over seeds, strategies and streams |
| `cost` | performance against cost |

docs/metrics.md has every formula with its source, and when it is undefined.
"""

from cl.metrics.aggregate import Ranking, average_ranks, interquartile_mean
from cl.metrics.comparison import Row, compare
from cl.metrics.cost import pareto_front
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
from cl.metrics.stability import min_acc, recovery, stability_gap, wc_acc
from cl.metrics.statistics import Interval, bootstrap_ci, holm, seeds_needed, wilcoxon_signed_rank

__all__ = [
    "EvalTable",
    "Interval",
    "Progress",
    "Ranking",
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
    "forgetting_by_lag",
    "forgetting_first",
    "forgetting_max",
    "forgetting_max_by_domain",
    "fwt",
    "holm",
    "interquartile_mean",
    "intransigence",
    "joint_gap",
    "language_summary",
    "learning",
    "min_acc",
    "pareto_front",
    "per_experience",
    "perplexity",
    "progress",
    "recovery",
    "seeds_needed",
    "seen_average",
    "source_forgetting",
    "stability_gap",
    "summary",
    "wc_acc",
    "wilcoxon_signed_rank",
]
