"""One self-contained page: tables are plain HTML, charts are drawn in the reader's browser from embedded JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from string import Template

from cl.report.curves import COSTS, SectionView
from cl.report.html_tables import main_table, more_table, runs_table
from cl.report.payload import is_thinned, payload
from cl.report.revisit import law_text
from cl.report.words import facts, glossaries, headline, unfinished

SCRIPTS = (
    *("draw.js", "labels.js", "charts.js", "ranks.js", "revisit.js"),
    *("matrix.js", "within.js", "tokens.js", "page.js"),
)


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
        glossary=_glossary(views),
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
{main_table(view)}
{_list("unfinished", "Not in the table", reasons, level)}
{_charts(view, is_thinned(view, num_sections), level)}
{more_table(view)}
{runs_table(view)}
</section>"""


def _contents(views: Sequence[SectionView]) -> str:
    if len(views) < 2:
        return ""
    links = "".join(
        f'<li><a href="#section-{index}">{escape(view.section.title)}</a></li>' for index, view in enumerate(views)
    )
    return f'<nav aria-label="Sections"><ul>{links}</ul></nav>'


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


def _glossary(views: Sequence[SectionView]) -> str:
    entries = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(note)}</dd></div>" for name, note in glossaries(views))
    return f'<details class="glossary" open><summary>What the numbers mean</summary><dl>{entries}</dl></details>'


def _all_warnings(views: Sequence[SectionView], warnings: Sequence[str]) -> list[str]:
    return [*warnings, *(warning for view in views for warning in view.section.warnings)]


def _list(style: str, title: str, items: Iterable[str], level: int = 2) -> str:
    lines = "".join(f"<li>{item}</li>" for item in items)
    return (
        f'<div class="notice {style}"><h{level} class="part">{title}</h{level}><ul>{lines}</ul></div>' if lines else ""
    )
