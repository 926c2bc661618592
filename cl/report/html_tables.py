"""The tables of the page as plain HTML; a script makes them sortable by the number that each cell carries."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from html import escape

from cl.report.comparison import NOT_CONTINUAL, Estimate, StrategyRow, metrics_of
from cl.report.curves import SectionView
from cl.report.payload import css_colour
from cl.report.style import Unit, bytes_text, count_text, looks, seconds_text
from cl.report.words import glossary, reason


def main_table(view: SectionView) -> str:
    """The strategies, best first; empty where no run is finished."""
    rows = [row for row in view.rows if row.seeds]
    if not rows:
        return ""
    unit = view.unit
    metrics = metrics_of(view.section.measure)
    has_reference = any(row.difference.is_defined for row in rows)
    notes = dict(glossary(view))
    heads = ["Strategy", "Seeds", *(metric.title for metric in metrics)]
    heads += [f"Difference to {view.reference}", "Test"] if has_reference else []
    heads += ["Work", "Kept"]
    first = f' aria-sort="{"descending" if unit.higher_is_better else "ascending"}"'
    cells = [
        f'<th scope="col"{_title(notes.get(head))}{first if head == metrics[0].title else ""}>'
        f'<button type="button">{escape(head)}</button></th>'
        for head in heads
    ]
    best = {metric.key: _best(rows, metric.key, metric.sign) for metric in metrics}
    palette = looks(row.strategy for row in view.rows) | {s.label: s.look for s in view.strategies}
    body = []
    for row in rows:
        colour = css_colour(row.strategy, palette[row.strategy])
        out = [
            f'<th scope="row"><button type="button" class="pick" style="--c:{colour}" '
            f'data-strategy="{escape(row.strategy)}"><span>{_breakable(row.strategy)}</span></button></th>',
            _cell(len(row.seeds), str(len(row.seeds))),
        ]
        for metric in metrics:
            found = row.metrics[metric.key]
            out.append(_estimate_cell(unit, found, metric.is_change, "best" if row is best[metric.key] else ""))
        if has_reference:
            out.append(_estimate_cell(unit, row.difference, signed=True))
            mark = "significant" if row.is_significant else "test"
            out.append(_cell(row.p_holm, escape(row.test or "–"), mark))
        out.append(_cell(row.passes, escape(_work(row, rows, view.reference))))
        out.append(_cell(row.buffer_bytes, escape(bytes_text(row.buffer_bytes))))
        body.append(f"<tr>{''.join(out)}</tr>")
    return f"""<div class="scroll"><table class="main sortable">
<caption><span>{escape(_caption(view, rows))}</span></caption>
<thead><tr>{"".join(cells)}</tr></thead>
<tbody>{"".join(body)}</tbody>
</table></div>"""


def more_table(view: SectionView) -> str:
    """The second table, closed at first."""
    body = []
    for row in view.rows:
        found = [column.get(row.strategy) for column in view.more]
        if any(each.is_defined for each in found):
            cells = [_estimate_cell(column.unit, each) for column, each in zip(view.more, found, strict=True)]
            body.append(f'<tr><th scope="row">{_breakable(row.strategy)}</th>{"".join(cells)}</tr>')
    heads = [("Strategy", ""), *((column.head, column.note) for column in view.more)]
    return _details(f"More numbers ({len(view.more)})", heads, body) if body else ""


def runs_table(view: SectionView) -> str:
    """Every run, for those who look for one."""
    section, body = view.section, []
    used = {id(result) for label in section.labels for result in section.finished(label)}
    values = {row.strategy: row.final.values for row in view.rows}
    for result in sorted(section.results, key=lambda result: (result.label, result.seed)):
        final = values[result.label].get(result.seed) if id(result) in used else None
        speed, what = result.cost.get("train_samples_per_s"), "tokens" if result.course else "rows"
        status = escape(result.status)
        if result.status != "done":
            status = f"<span{_title(reason(result))}>{status}</span>"
        elif id(result) not in used:
            status = "replaced by a newer run"
        cells = [
            f'<th scope="row">{escape(result.label)}</th>',
            _cell(result.seed, str(result.seed)),
            f"<td>{status}</td>",
            _cell(math.nan if final is None else final, view.unit.text(final)),
            _cell(result.cost.get("train_s", math.nan), seconds_text(result.cost.get("train_s"))),
            _cell(speed or math.nan, f"{count_text(speed)} {what}/s" if speed else "–"),
            f"<td><code>{escape(result.mlflow_run_id or '–')}</code></td>",
        ]
        body.append(f"<tr>{''.join(cells)}</tr>")
    names = ("Strategy", "Seed", "Status", f"Final {view.unit.name.lower()}", "Training", "Speed", "MLflow run")
    return _details(f"All runs ({len(body)})", ((name, "") for name in names), body)


def _details(summary: str, heads: Iterable[tuple[str, str]], body: Sequence[str]) -> str:
    """A closed table that can be sorted. `heads`: (text, explanation)."""
    cells = "".join(
        f'<th scope="col"{_title(note)}><button type="button">{escape(head)}</button></th>' for head, note in heads
    )
    return (
        f'<details class="runs"><summary>{escape(summary)}</summary><div class="scroll"><table class="sortable">'
        f"<thead><tr>{cells}</tr></thead><tbody>{''.join(body)}</tbody></table></div></details>"
    )


def _caption(view: SectionView, rows: Sequence[StrategyRow]) -> str:
    unit = view.unit
    text = f"{unit.name} in {unit.symbol}, {unit.direction}"
    if any(row.final.has_interval for row in rows):
        text += "; mean over seeds, with its 95 % interval below"
    return f"{text}. Bold: best, {NOT_CONTINUAL} aside." if len(rows) > 1 else f"{text}."


def _work(row: StrategyRow, rows: Sequence[StrategyRow], reference: str) -> str:
    """Passes, and how many times those of the reference."""
    base = next((other.passes for other in rows if other.strategy == reference), math.nan)
    ratio = row.passes / base if base else math.nan
    return count_text(row.passes) if math.isnan(ratio) or row.strategy == reference else f"{ratio:.2g} ×"


def _best(rows: Sequence[StrategyRow], key: str, sign: int) -> StrategyRow | None:
    rivals = [row for row in rows if row.strategy != NOT_CONTINUAL and row.metrics[key].is_defined]
    return max(rivals, key=lambda row: sign * row.metrics[key].mean) if len(rivals) > 1 else None


def _estimate_cell(unit: Unit, found: Estimate, signed: bool = False, style: str = "") -> str:
    text = f'<span class="mean">{unit.text(found.mean, signed)}</span>'
    if found.has_interval:
        text += f'<span class="ci">{unit.text(found.low, signed)} to {unit.text(found.high, signed)}</span>'
    return _cell(found.mean, text, style)


def _cell(value: float, content: str, style: str = "") -> str:
    order = "" if math.isnan(value) else f' data-value="{value:.9g}"'
    return f"<td{order}{f' class={chr(34)}{style}{chr(34)}' if style else ''}>{content}</td>"


def _breakable(name: str) -> str:
    """A name that may be broken where its parts end."""
    return re.sub(r"([_+(,])", r"\1<wbr>", escape(name))


def _title(text: str | None) -> str:
    return f' title="{escape(text)}"' if text else ""
