"""The sentences of a report: what was compared, what came out, what is missing, what the numbers mean."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from cl.report.comparison import NOT_CONTINUAL, Estimate, StrategyRow, estimate, metrics_of
from cl.report.curves import SectionView
from cl.report.load import Section
from cl.report.style import Unit
from cl.result import Result


def headline(view: SectionView) -> str:
    """The outcome in one or two sentences; empty where no run has finished."""
    rows = [row for row in view.rows if row.final.is_defined]
    rivals = [row for row in rows if row.strategy != NOT_CONTINUAL]
    if not rows:
        return ""
    unit = view.unit
    best = (rivals or rows)[0]
    amount = f"{_with_unit(best.final.mean, unit)} final {unit.name.lower()}{_interval(best.final, unit)}"
    if len(rows) == 1:
        return f"{best.strategy} reaches {amount}."
    sentences = [f"{best.strategy} {'ends best with' if len(rivals) > 1 else 'reaches'} {amount}"]
    if best.difference.is_defined:
        sentences[0] += f", {_apart(best.difference, unit)} {view.reference}"
    closed = _gap_closed(best, rows, view.reference)
    if closed is not None:
        sentences[0] += f"; that is {100 * closed:.0f} % of the way from {view.reference} to {NOT_CONTINUAL}"
    if len(rivals) > 1 and rivals[1].strategy != view.reference:
        sentences.append(_runner_up(best, rivals[1], unit))
    return " ".join(f"{sentence}." for sentence in sentences)


def facts(section: Section) -> list[tuple[str, str]]:
    """What was compared, as names and values."""
    done = [result for label in section.labels for result in section.finished(label)]
    seeds = sorted({result.seed for result in done or section.results})
    count = section.num_experiences
    same = f"{count} experience{'s' * (count != 1)}"
    domains = "" if len(section.domains) == count else f", {len(section.domains)} domains"
    unfinished = len(section.unfinished())
    return [
        ("Stream", f"{section.stream} ({same}{domains})"),
        ("Setting", section.setting.replace("_", " ")),
        ("Backbone", section.backbone),
        ("Seeds", ranges(seeds)),
        ("Runs", f"{len(done)} finished" + (f", {unfinished} unfinished" if unfinished else "")),
        ("Environment", environment(done or section.results)),
    ]


def environment(results: Sequence[Result]) -> str:
    """Machine and versions; where runs differ, every value that occurs."""
    parts = [
        ("Python", [result.env.get("python") for result in results]),
        ("device", [result.env.get("device") for result in results]),
        ("threads", [result.env.get("threads") for result in results]),
    ]
    versions = [result.env.get("versions") or {} for result in results]
    parts += [(name, [each.get(name) for each in versions]) for name in ("cl-lab", "torch", "numpy")]
    known = [f"{name} {' / '.join(found)}" for name, values in parts if (found := _distinct(values))]
    return ", ".join(known) or "unknown"


def unfinished(section: Section) -> list[tuple[str, str]]:
    """(run, reason) of every run that is not in the table."""
    return [(f"{result.label}, seed {result.seed}", reason(result)) for result in section.unfinished()]


def reason(result: Result) -> str:
    """Why a run is not in the table."""
    progress = f"after {len(result.R)} of {len(result.experiences)} experiences"
    if result.status == "failed":
        return f"failed {progress}: {result.error or 'no reason was recorded'}"
    return f"interrupted or still running, {progress}" + (f": {result.error}" if result.error else "")


def glossary(view: SectionView) -> list[tuple[str, str]]:
    """Each number of the report in one line."""
    entries = [(metric.title, metric.note) for metric in metrics_of(view.section.measure)]
    if any(row.final.has_interval for row in view.rows):
        entries.append(
            (
                "Interval",
                "95 % bootstrap interval of the mean over seeds: percentile below 8 seeds, BCa from 8 on; with 3 to 7 "
                "seeds it is too narrow, so read it as the least uncertainty there is",
            )
        )
    if any(row.num_pairs for row in view.rows):
        entries += [
            (
                f"Difference to {view.reference}",
                f"final {view.unit.name.lower()} minus that of {view.reference}, paired by seed, with the interval of "
                "the paired difference",
            ),
            (
                "Test",
                "exact two-sided Wilcoxon signed-rank test on these pairs, adjusted by Holm for the number of "
                "strategies",
            ),
        ]
    is_relative = len(view.rows) > 1 and view.reference in (row.strategy for row in view.rows)
    entries += [
        (
            "Work",
            "samples sent forward plus samples sent backward through the network in training, mean over seeds"
            + (f"; × is times that of {view.reference}" if is_relative else ""),
        ),
        ("Kept", "bytes kept for past experiences: stored samples, importances, earlier models; the most at any time"),
    ]
    if len(view.strategies) > 1:
        note = f"no other strategy is both cheaper and better; {NOT_CONTINUAL} sees all data at once and takes no part"
        entries.append(("Front", note))
    return entries + [(column.title, column.note) for column in view.more]


def glossaries(views: Sequence[SectionView]) -> list[tuple[str, str]]:
    """One glossary of all sections; a name with several meanings comes with the measure of each."""
    found: dict[tuple[str, str], str] = {}
    for view in views:
        for entry in glossary(view):
            found.setdefault(entry, view.unit.name.lower())
    count = Counter(name for name, _ in found)
    return [(name if count[name] == 1 else f"{name} ({measure})", note) for (name, note), measure in found.items()]


def ranges(numbers: Iterable[int]) -> str:
    """Sorted numbers with runs of three and more shortened.

    Example:
        >>> ranges([0, 1, 2, 3, 7, 9, 10])
        '0–3, 7, 9, 10'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _runner_up(best: StrategyRow, second: StrategyRow, unit: Unit) -> str:
    shared = best.final.values.keys() & second.final.values.keys()
    ahead = estimate({seed: best.final.values[seed] - second.final.values[seed] for seed in sorted(shared)})
    if not ahead.has_interval:
        return f"Next is {second.strategy} with {_with_unit(second.final.mean, unit)}"
    # of the amount by which one is ahead, as the margin is, whatever the direction of the measure
    lead = sorted(math.copysign(1, ahead.mean) * end for end in (ahead.low, ahead.high))
    ends = " to ".join(unit.text(end, True) for end in lead)
    margin = f"{_difference(abs(ahead.mean), unit)}, interval {ends}"
    if (ahead.mean < 0) is unit.higher_is_better and ahead.mean:
        # a seed that only one of them has made the difference
        return f"On the seeds of both, {second.strategy} is ahead (by {margin})"
    clearly = ahead.low > 0 or ahead.high < 0
    return f"It is {'ahead of' if clearly else 'not clearly ahead of'} {second.strategy} (by {margin})"


def _gap_closed(best: StrategyRow, rows: Sequence[StrategyRow], reference: str) -> float | None:
    """Share of the way from the reference to joint training; None where there is no such way."""
    ends = {row.strategy: row.final.mean for row in rows}
    if best.strategy == reference or reference not in ends or NOT_CONTINUAL not in ends:
        return None
    way, gone = ends[NOT_CONTINUAL] - ends[reference], best.final.mean - ends[reference]
    return gone / way if way and 0 <= gone / way <= 1 else None


def _apart(difference: Estimate, unit: Unit) -> str:
    side = "above" if difference.mean > 0 else "below"
    return f"{_difference(abs(difference.mean), unit)} {side}"


def _difference(amount: float, unit: Unit) -> str:
    # "5 %" of an accuracy could be read as a ratio
    return f"{unit.text(amount)} {'points' if unit.symbol == '%' else unit.symbol}"


def _with_unit(value: float, unit: Unit) -> str:
    return f"{unit.text(value)} {unit.symbol}"


def _interval(found: Estimate, unit: Unit) -> str:
    return f" (95 % interval {unit.text(found.low)} to {unit.text(found.high)})" if found.has_interval else ""


def _distinct(values: Iterable[object]) -> list[str]:
    return sorted({str(value) for value in values if value is not None})
