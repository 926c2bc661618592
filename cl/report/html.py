"""One self-contained page: the table is plain HTML, the charts are drawn in the reader's browser from embedded JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from string import Template

from cl.report.comparison import NOT_CONTINUAL, Estimate, StrategyRow, metrics_of
from cl.report.curves import COSTS, SectionView
from cl.report.payload import css_colour, is_thinned, payload
from cl.report.revisit import law_text
from cl.report.style import Unit, bytes_text, count_text, looks, seconds_text
from cl.report.words import facts, glossary, headline, reason, unfinished

SCRIPTS = ("draw.js", "charts.js", "ranks.js", "revisit.js", "matrix.js", "within.js", "tokens.js", "page.js")


def page(views: Sequence[SectionView], title: str, date: str = "", warnings: Sequence[str] = ()) -> str:
    """The whole report.

    Args:
        date: as it is to be shown; none is shown when empty, so that a report made twice is the same file.
        warnings: sentences on files that could not be read.
    """
    assets = files("cl.report") / "assets"
    sections = "\n".join(_section(index, view, len(views)) for index, view in enumerate(views))
    return Template((assets / "report.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        date=f'<p class="date">{escape(date)}</p>' if date else "",
        style=(assets / "report.css").read_text(encoding="utf-8"),
        contents=_contents(views),
        warnings=_list("warnings", "Warnings", (escape(warning) for warning in _all_warnings(views, warnings))),
        sections=sections,
        data=payload(views),
        script="\n".join((assets / name).read_text(encoding="utf-8") for name in SCRIPTS),
    )


def _section(index: int, view: SectionView, num_sections: int) -> str:
    section = view.section
    heading = f"<h2>{escape(section.title)}</h2>" if num_sections > 1 else ""
    summary = headline(view)
    details = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts(section))
    # no level of headings is left out where the only section has none of its own
    level = 3 if heading else 2
    reasons = (f"<strong>{escape(run)}</strong> {escape(why)}" for run, why in unfinished(section))
    return f"""<section class="report" id="section-{index}" data-section="{index}">
{heading}
<dl class="facts">{details}</dl>
{f'<p class="headline">{escape(summary)}</p>' if summary else ""}
{_table(view)}
{_list("unfinished", "Not in the table", reasons, level)}
{_charts(view, is_thinned(view, num_sections), level)}
{_more(view)}
{_runs(view)}
{_glossary(view)}
</section>"""


def _contents(views: Sequence[SectionView]) -> str:
    if len(views) < 2:
        return ""
    links = "".join(
        f'<li><a href="#section-{index}">{escape(view.section.title)}</a></li>' for index, view in enumerate(views)
    )
    return f'<nav aria-label="Sections"><ul>{links}</ul></nav>'


def _table(view: SectionView) -> str:
    """The main table. Cells carry the number that they are sorted by."""
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


def _charts(view: SectionView, thinned: bool, level: int) -> str:
    if not view.strategies:
        return ""
    name = view.unit.name.lower()
    rows = [row for row in view.rows if row.final.is_defined]
    figures = []
    if view.num_experiences > 1:
        figures.append(_figure("course", f"{view.unit.name} over the domains seen so far", _course_label(view), "wide"))
    if len(view.strategies) > 1 and rows:
        figures.append(_figure("dots", f"Final {name}", f"Final {name} of each strategy with every seed.", key="final"))
        if any(row.metrics["forgetting_max"].is_defined for row in rows):
            label = "Forgetting of each strategy with every seed."
            figures.append(_figure("dots", "Forgetting (max)", label, key="forgetting_max"))
        for cost in COSTS:
            # when nobody keeps anything there is nothing to weigh
            if any(getattr(row, cost.key) > 0 for row in rows):
                label = f"Final {name} against cost: {cost.label}."
                figures.append(_figure("cost", cost.title, label, key=cost.key))
    if any(strategy.revisit for strategy in view.strategies):
        laws = "; ".join(f"{s.label} {law_text(s.revisit)}" for s in view.strategies if s.revisit)
        label = f"{view.unit.name} against the time since last practice: {laws}."
        figures.append(_figure("revisit", "What is left since last practice", label, "wide"))
    if view.ranks:
        means = ", ".join(f"{label} {mean:.2f}" for label, mean in view.ranks.average.items())
        title = f"Average rank by final {name}"
        figures.append(_figure("ranks", title, f"{title}: {means}.", note=view.ranks.sentence))
    # the last of an odd number would stand beside nothing
    narrow = [index for index, figure in enumerate(figures) if 'class="chart "' in figure]
    if len(narrow) % 2:
        figures[narrow[-1]] = figures[narrow[-1]].replace('class="chart "', 'class="chart wide"', 1)
    inside = [("heatmap", f"{view.unit.name} after each experience", f"{view.unit.name} on each domain, as a heatmap.")]
    if view.num_experiences > 1:
        inside.append(("curves", "How each domain is remembered", f"{view.unit.name} on each domain over the stream."))
    if any(strategy.within for strategy in view.strategies):
        label = f"{view.unit.name} on the first domains over optimizer steps."
        inside.append(("within", "Inside experiences", label, "wide"))
    if any(strategy.tokens for strategy in view.strategies):
        label = f"{view.unit.name} on each domain over tokens, and the learning rate."
        inside.append(("tokens", "Over tokens, with the schedule", label, "wide"))
    thin = '<p class="note">This stream is long: the page shows a part of R; the tables folder has all of it.</p>'
    return f"""<div class="legend" role="group" aria-label="Strategies shown"></div>
<div class="grid">{"".join(figures)}</div>
<div class="inside">
<h{level} class="part">Inside one strategy</h{level}>
<div class="choices"><label>Strategy <select class="strategy"></select></label>
<label>Runs <select class="matrix"></select></label></div>
{thin if thinned else ""}
<div class="grid">{"".join(_figure(*parts) for parts in inside)}</div>
</div>"""


def _figure(kind: str, title: str, label: str, style: str = "", key: str = "", note: str = "") -> str:
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<figure class="chart {style}" data-chart="{kind}" data-key="{key}" data-label="{escape(label)}">'
        f'<figcaption>{escape(title)} <span class="whose"></span></figcaption><div class="canvas"></div>'
        f"{below}</figure>"
    )


def _course_label(view: SectionView) -> str:
    ends = [f"{s.label} {view.unit.text(s.average.mean[-1])}" for s in view.strategies[:12]]
    return f"{view.unit.axis} over experiences seen; at the end: {', '.join(ends)}."


def _more(view: SectionView) -> str:
    """The second table, closed at first."""
    body = []
    for row in view.rows:
        found = [column.get(row.strategy) for column in view.more]
        if any(each.is_defined for each in found):
            cells = [_estimate_cell(column.unit, each) for column, each in zip(view.more, found, strict=True)]
            body.append(f'<tr><th scope="row">{_breakable(row.strategy)}</th>{"".join(cells)}</tr>')
    heads = [("Strategy", ""), *((column.head, column.note) for column in view.more)]
    return _details(f"More numbers ({len(view.more)})", heads, body) if body else ""


def _details(summary: str, heads: Iterable[tuple[str, str]], body: Sequence[str]) -> str:
    """A closed table that can be sorted. `heads`: (text, explanation)."""
    cells = "".join(
        f'<th scope="col"{_title(note)}><button type="button">{escape(head)}</button></th>' for head, note in heads
    )
    return (
        f'<details class="runs"><summary>{escape(summary)}</summary><div class="scroll"><table class="sortable">'
        f"<thead><tr>{cells}</tr></thead><tbody>{''.join(body)}</tbody></table></div></details>"
    )


def _runs(view: SectionView) -> str:
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


def _glossary(view: SectionView) -> str:
    entries = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(note)}</dd></div>" for name, note in glossary(view))
    return f'<details class="glossary" open><summary>What the numbers mean</summary><dl>{entries}</dl></details>'


def _all_warnings(views: Sequence[SectionView], warnings: Sequence[str]) -> list[str]:
    return [*warnings, *(warning for view in views for warning in view.section.warnings)]


def _breakable(name: str) -> str:
    """A name that may be broken where its parts end."""
    return re.sub(r"([_+(,])", r"\1<wbr>", escape(name))


def _list(style: str, title: str, items: Iterable[str], level: int = 2) -> str:
    lines = "".join(f"<li>{item}</li>" for item in items)
    return (
        f'<div class="notice {style}"><h{level} class="part">{title}</h{level}><ul>{lines}</ul></div>' if lines else ""
    )


def _title(text: str | None) -> str:
    return f' title="{escape(text)}"' if text else ""
