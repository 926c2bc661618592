"""What is logged, under which name, at which step: one fact for every tracker.

| section | step | names |
|---|---|---|
| `accuracy/`, `loss/`, `perplexity/`, `bpb/` | experiences seen, from 1 | `task_00`: the measure on column 0 of R |
| `format_valid/`, ... | experiences seen | what a stream measures beside R: well-formed answers |
| `forgetting/` | experiences seen | `task_00`: `max` definition, from the experience after the first visit |
| `summary/` | experiences seen | `accuracy_avg`, `perplexity_avg` (domains visited so far), `forgetting_avg`, `bwt` |
| `final/`, `cost/` | experiences seen | one point each, when the run is done |
| `lm_eval/` | experiences finished | `TASK/METRIC` of `cl evaluate` |
| `train/` | optimizer steps taken | `loss`, its terms, `lr`, traces; `within/task_00`: measured inside experiences |
| `tokens/` | tokens trained on | text: `task_00`: loss on column 0 of R, before, inside and after experiences; `lr` |

The three kinds of step never share a section, since a chart page has one x axis per section.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cl.metrics import EvalTable, Progress, bits_per_byte, perplexity, progress
from cl.result import Result

TRAIN, TOKENS = "train/", "tokens/"
LAST_VALUES = ("final/", "cost/")

MAX_NAMED = 40
"""Domains that a description names; a store takes no text of any length."""

# metrics whose field name differs from the key that the naming scheme gives to their last value
_FINAL_NAMES = {"final": "{measure}_avg", "forgetting_max": "forgetting_avg"}


class Point(NamedTuple):
    """One value of one curve.

    Args:
        step: optimizer steps taken for names under `train/`, tokens trained on under `tokens/`, else experiences seen.
    """

    name: str
    value: float
    step: int


def points(result: Result, stage: int | None = None) -> list[Point]:
    """Everything that a result says, as points; undefined values (None, NaN, infinity) are left out.

    Args:
        stage: only row `stage` of R, counted from 0. None: all rows, what was measured inside experiences, and the
            last values (`final/`, `cost/`) when the run is done.

    Example:
        >>> run = Result("s", ["naive"], "mlp", "domain_incremental", 0, ["a", "b"], ["a", "b"], [0, 1], "accuracy")
        >>> run.R = [[1.0, 0.25], [0.5, 1.0]]
        >>> [(p.name, p.value) for p in points(run, 1)][:3]
        [('accuracy/task_00', 0.5), ('accuracy/task_01', 1.0), ('forgetting/task_00', 0.5)]
    """
    # only `cl.metrics.stability` reads `within`, and the experience going on has entries but no row yet
    table = EvalTable.from_result(vars(result) | {"within": ()})
    if stage is not None:
        return defined(_evaluation(result, stage, progress(table.upto(stage + 1))) + _by_tokens(result, stage))
    found = _within(result) + _by_tokens(result)
    for i in range(len(result.R)):
        found += _evaluation(result, i, progress(table.upto(i + 1)))
    return defined(found) + (last_points(result) if result.status == "done" else [])


def last_points(result: Result) -> list[Point]:
    """`final/` and `cost/`: one point each, at the end of the run."""
    step = len(result.R)
    found: list[Point] = []
    for key, value in result.metrics.items():
        name = _FINAL_NAMES.get(key, key).format(measure=result.measure)
        if value is not None:
            found.append(Point(f"final/{name}", value, step))
    for key, amount in result.cost.items():
        if key == "wall_s":
            found.append(Point("cost/seconds", amount, step))
        elif key == "peak_memory_bytes":
            found.append(Point("cost/memory_mb", amount / 1e6, step))
        else:
            found.append(Point(f"cost/{key}", amount, step))
    return defined(found)


def train_points(losses: Mapping[str, float], lr: float, step: int) -> list[Point]:
    """Loss, its terms and the learning rate after `step` optimizer steps."""
    found = [Point(legal_name(f"{TRAIN}{name}"), float(value), step) for name, value in losses.items()]
    return defined([*found, Point(f"{TRAIN}lr", float(lr), step)])


def trace_point(name: str, value: float, step: int) -> Point:
    """What a strategy controls or measures."""
    return Point(legal_name(f"{TRAIN}{name}"), value, step)


def within_token_points(values: Iterable[float | None], tokens: int, lr: float) -> list[Point]:
    """The loss on every domain of a text stream, inside an experience, and the learning rate there."""
    row = list(values)
    found = [Point(_token_name(j, len(row)), value, tokens) for j, value in enumerate(row) if value is not None]
    return defined([*found, Point(f"{TOKENS}lr", lr, tokens)])


def within_points(values: Iterable[float | None], step: int) -> list[Point]:
    """The measure on every domain, inside an experience."""
    row = list(values)
    return defined(Point(_within_name(j, len(row)), value, step) for j, value in enumerate(row) if value is not None)


def defined(found: Iterable[Point]) -> list[Point]:
    """The points that hold a number: a store keeps NaN as a value and infinity as the largest double."""
    return [p for p in found if math.isfinite(p.value)]


def is_settled(point: Point, steps: int | None, experiences: int) -> bool:
    """Whether a point written earlier stays true for a run that goes on after `steps` and `experiences`.

    Args:
        steps: optimizer steps taken; None when nothing is left to train.
    """
    if point.name.startswith(TOKENS):
        # all of them are in the result, from which they are made again
        return False
    if point.name.startswith(TRAIN):
        return steps is None or point.step <= steps
    return not point.name.startswith(LAST_VALUES) and point.step <= experiences


def task_name(section: str, domain: int, num_domains: int) -> str:
    """Zero-padded, so that a page that sorts by name keeps the order of the stream.

    Example:
        >>> task_name("accuracy", 3, 10), task_name("accuracy", 3, 1000)
        ('accuracy/task_03', 'accuracy/task_003')
    """
    return f"{section}/task_{_number(domain, num_domains)}"


def legal_name(name: str) -> str:
    """In the alphabet that MLflow accepts, and a path as it wants them: one refused name loses a whole batch.

    Example:
        >>> legal_name("train/loss[my term]"), legal_name("train//a/../b/")
        ('train/loss_my term_', 'train/a/b')
    """
    parts = re.sub(r"[^\w\-.:/ ]", "_", name).split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))[:250].rstrip("/")


def description(result: Result) -> str:
    """Which domain each number in the names of curves is, as Markdown for the page of a run.

    Example:
        >>> print(description(Result("s", ["ewc"], "mlp", "domain_incremental", 0, ["a"], ["a"], [0], "accuracy")))
        ewc on s, domain incremental, mlp, seed 0
        <BLANKLINE>
        - `task_00`: a
    """
    width = len(result.domains)
    head = f"{result.label} on {result.stream}, {result.setting.replace('_', ' ')}, {result.backbone}, "
    head += f"seed {result.seed}"
    names = [f"- `task_{_number(j, width)}`: {name[:60]}" for j, name in enumerate(result.domains[:MAX_NAMED])]
    rest = [f"- and {width - MAX_NAMED} more, in `result.json`"] if width > MAX_NAMED else []
    return "\n".join([head, "", *names, *rest])


def matrix_table(result: Result) -> dict[str, Any]:
    """R in long form without empty cells, in the layout that MLflow's artifact viewer shows as a table."""
    cells = [
        [result.experiences[i], result.domains[j], value]
        for i, row in enumerate(result.R)
        for j, value in enumerate(row)
        if value is not None and math.isfinite(value)
    ]
    return {"columns": ["after_experience", "domain", result.measure], "data": cells}


def config_hash(settings: Mapping[str, Any]) -> str:
    """Twelve hex digits that agree exactly for runs that differ in nothing but the seed.

    Example:
        >>> config_hash({"seed": 0, "lr": 0.1}) == config_hash({"lr": 0.1, "seed": 1}) != config_hash({"lr": 0.2})
        True
    """
    kept = {str(key): value for key, value in settings.items() if key != "seed"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _number(domain: int, num_domains: int) -> str:
    return f"{domain:0{max(2, len(str(num_domains - 1)))}d}"


def _within_name(domain: int, num_domains: int) -> str:
    return TRAIN + task_name("within", domain, num_domains)


def _within(result: Result) -> list[Point]:
    width = len(result.domains)
    found = [Point(_within_name(int(domain), width), value, int(step)) for _, step, domain, value in result.within]
    return found + [trace_point(name, value, int(step)) for name, step, value in result.traces]


def _token_name(domain: int, num_domains: int) -> str:
    return task_name(TOKENS.rstrip("/"), domain, num_domains)


def _by_tokens(result: Result, stage: int | None = None) -> list[Point]:
    """The loss over tokens: after one experience, or everywhere. Empty where a run has no course."""
    width, at = len(result.domains), {int(step): (int(tokens), lr) for _, step, tokens, lr in result.course}
    ends = {int(experience): int(step) for experience, step, *_ in result.course}
    rows = {-1: result.R_init} | dict(enumerate(result.R))
    cells = [(ends.get(i), j, value) for i, row in rows.items() if stage in (None, i) for j, value in enumerate(row)]
    cells += [(int(step), int(j), value) for _, step, j, value in result.within] if stage is None else []
    known = [(*at[step], j, value) for step, j, value in cells if step in at and value is not None]
    rates = {tokens: lr for tokens, lr, *_ in known if tokens}
    found = [Point(_token_name(j, width), value, tokens) for tokens, _, j, value in known]
    return sorted(found + [Point(f"{TOKENS}lr", lr, tokens) for tokens, lr in rates.items()], key=lambda p: p.step)


def _evaluation(result: Result, stage: int, now: Progress) -> list[Point]:
    step, row, measure, width = stage + 1, result.R[stage], result.measure, len(result.domains)
    cells = [(j, value) for j, value in enumerate(row) if value is not None]
    found = [Point(task_name(measure, j, width), value, step) for j, value in cells]
    if measure == "loss":
        found += [Point(task_name("perplexity", j, width), perplexity(value), step) for j, value in cells]
        found.append(Point("summary/perplexity_avg", perplexity(now.seen_average), step))
    for name, experience, j, value in result.extra:
        if experience == stage:
            found.append(Point(task_name(legal_name(name), j, width), value, step))
    if result.num_bytes:
        bits = {j: float(bits_per_byte(value, result.num_tokens[j], result.num_bytes[j])) for j, value in cells}
        found += [Point(task_name("bpb", j, width), value, step) for j, value in bits.items()]
    found += [Point(task_name("forgetting", j, width), value, step) for j, value in now.forgetting.items()]
    return [
        *found,
        Point(f"summary/{measure}_avg", now.seen_average, step),
        Point("summary/forgetting_avg", now.forgetting_avg, step),
        Point("summary/bwt", now.bwt, step),
    ]
