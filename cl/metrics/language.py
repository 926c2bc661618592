"""Metrics of language models: from token losses in nats to what papers report.

L[i, d] = mean token loss on held-out text of domain d after experience i, in nats; L[0, d] = b[d] before continual
pre-training. Averages over domains are taken in nats, never over perplexities: exp of a mean loss is the geometric
mean of the perplexities, and one badly known domain cannot drown the others.

Everything else (BWT, forgetting, transfer) is in `cl.metrics.forgetting`: give it a table with measure "loss".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from cl.metrics import forgetting
from cl.metrics.forgetting import mean
from cl.metrics.matrix import EvalTable, FloatArray


def perplexity(losses: ArrayLike, num_tokens: Sequence[float] | None = None) -> float:
    """Geometric mean of the perplexities behind token losses.

    exp(sum_d w_d L_d), w uniform over domains (macro) or proportional to `num_tokens` (micro)

    Args:
        losses: one loss or [D] losses, nats per token, under one tokenizer.
        num_tokens: [D] evaluated tokens.

    Example:
        >>> round(perplexity([math.log(4), math.log(16)]), 6), round(perplexity(math.log(4)), 6)
        (8.0, 4.0)
    """
    # a diverged loss is a result too: its perplexity is infinite
    with np.errstate(over="ignore"):
        return float(np.exp(mean(losses, num_tokens)))


def bits_per_byte(loss: ArrayLike, num_tokens: ArrayLike, num_bytes: ArrayLike) -> FloatArray:
    """Loss per byte of text, comparable across tokenizers.

    loss * num_tokens / (num_bytes * ln 2)

    Args:
        loss: nats per token; scalar or [D].
        num_tokens: tokens over which the loss was averaged.
        num_bytes: UTF-8 bytes of the same text.

    Example:
        >>> float(bits_per_byte(math.log(256), num_tokens=10, num_bytes=10))
        8.0
    """
    return np.asarray(loss) * np.asarray(num_tokens) / (np.asarray(num_bytes) * math.log(2))


def source_forgetting(table: EvalTable, domain: str) -> FloatArray:
    """[T], damage to what the model knew before the stream: the curve of the loss on its old distribution.

    L[i, domain] - L[0, domain]

    Args:
        domain: name of a held-out domain that the model was pre-trained on.

    Returns: nats after each experience; positive means worse.
    Raises: ValueError: the table holds accuracies or has no such domain.

    Example:
        >>> table = EvalTable.from_rows([[3.5, 2.0]], [3.0, 4.0], trained=[1], domains=["web", "code"], measure="loss")
        >>> source_forgetting(table, "web").tolist()
        [0.5]
    """
    _require_losses(table)
    if domain not in table.domains:
        raise ValueError(f"no domain {domain!r} in the table; there are {', '.join(table.domains)}")
    column = table.domains.index(domain)
    return table.R[:, column] - table.R_init[column]


def cumulative_forgetting(table: EvalTable) -> float:
    """All damage ever done to visited domains, even if it was repaired later; publish it next to the net value.

    sum_i sum_{d: v_d < i} max(0, L[i, d] - L[i-1, d])

    Returns: nats, summed over domains; 0 or more. NaN when T = 1.

    Example:
        >>> repaired = EvalTable.from_rows([[2.0], [3.0], [2.0]], trained=[0, None, 0], measure="loss")
        >>> cumulative_forgetting(repaired), forgetting.bwt(repaired)
        (1.0, 0.0)
    """
    _require_losses(table)
    if not table.earlier.any():
        return math.nan
    rises = np.maximum(0, np.diff(table.R, axis=0))
    return float(rises[table.visited[:-1]].sum())


def adaptation_gap(table: EvalTable, single: ArrayLike) -> float:
    """How much worse domains are learned than by models trained on one domain only: intransigence in nats.

    mean over visited d of L[v_d, d] - L_single[d]

    Args:
        single: [D], loss of a model trained on domain d alone, from the same start and with the same tokens.

    Example:
        >>> adaptation_gap(EvalTable.from_rows([[2.5, 4.0], [3.0, 2.0]], measure="loss"), single=[2.0, 2.0])
        0.25
    """
    _require_losses(table)
    return forgetting.intransigence(table, single)


def joint_gap(table: EvalTable, joint: ArrayLike) -> float:
    """Distance at the end to training on everything at once, at equal tokens.

    mean_d (L[T, d] - L_joint[d])

    Example:
        >>> joint_gap(EvalTable.from_rows([[2.5, 4.0], [3.0, 2.0]], measure="loss"), joint=[2.25, 2.25])
        0.25
    """
    _require_losses(table)
    return mean(table.last - np.asarray(joint))


def aufc_log_perplexity(table: EvalTable, positions: ArrayLike | None = None) -> float:
    """Area under the forgetting curve of the log-perplexity.

    Definition: the log-perplexity of domain d after experience i is its mean token loss L[i, d] in nats. Its forgetting
    curve is L[i, d] - L[v_d, d] from the end of the first visit v_d to the end of the run; the area is the trapezoid
    integral over `positions` divided by their range, so its unit is nats; AUFC is the mean over the domains first
    visited before the last experience. See `cl.metrics.forgetting.aufc`.
    """
    _require_losses(table)
    return forgetting.aufc(table, positions)


def language_summary(
    table: EvalTable,
    *,
    num_tokens: Sequence[float] | None = None,
    num_bytes: Sequence[float] | None = None,
    source: str | None = None,
    single: ArrayLike | None = None,
    joint: ArrayLike | None = None,
) -> dict[str, float]:
    """The scalars that a table of losses has on top of `summary`; NaN where undefined or where an input is missing.

    Args:
        num_tokens, num_bytes: [D] size of each held-out set, for the micro average and bits per byte.
        source: domain of the old distribution.
        single, joint: [D] references of `adaptation_gap` and `joint_gap`.

    Returns: always the same keys: perplexity, perplexity_micro, bits_per_byte (macro), cumulative_forgetting,
        source_forgetting (at the end), adaptation_gap, joint_gap.

    Example:
        >>> table = EvalTable.from_rows([[2.0, 4.0], [2.5, 1.5]], measure="loss")
        >>> metrics = language_summary(table, num_tokens=[10, 10], num_bytes=[40, 40])
        >>> round(metrics["perplexity"], 3), round(metrics["bits_per_byte"], 3), metrics["cumulative_forgetting"]
        (7.389, 0.721, 0.5)
    """
    _require_losses(table)
    if num_tokens is None or num_bytes is None:
        bpb = math.nan
    else:
        bpb = mean(bits_per_byte(table.last, num_tokens, num_bytes))
    return {
        "perplexity": perplexity(table.last),
        "perplexity_micro": math.nan if num_tokens is None else perplexity(table.last, num_tokens),
        "bits_per_byte": bpb,
        "cumulative_forgetting": cumulative_forgetting(table),
        "source_forgetting": math.nan if source is None else mean(source_forgetting(table, source)[-1:]),
        "adaptation_gap": math.nan if single is None else adaptation_gap(table, single),
        "joint_gap": math.nan if joint is None else joint_gap(table, joint),
    }


def _require_losses(table: EvalTable) -> None:
    if table.measure != "loss":
        raise ValueError(f"this metric needs losses in nats; the table holds the measure {table.measure!r}")
