"""Re-run a published result and say whether it holds.

Usage: cl reproduce [NAME ...] [data.root=DIR] [seeds=3] [jobs=N] [out=DIR] [page=FILE]

  cl reproduce                                     the claims, with protocol and source, nothing run
  cl reproduce split_mnist_er_200 data.root=DATA   one of them
  cl reproduce all data.root=DATA                  every claim that is not marked expensive
  cl reproduce all page=docs/reproduction.md       also write the table as a Markdown page

Each claim is a config in configs/experiment/ whose `claim` block holds what is expected, how far off it may be, where
the number comes from and how long it takes. Exit code 1 when a claim does not hold, or a run of it did not finish.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cl.cli import listing
from cl.cli.compare import MOST_SEEDS, Plan, check, run_all
from cl.cli.compose import composed, seeded
from cl.cli.folder import RESULT, check_writable, is_done
from cl.core import UserError
from cl.result import Result, environment, write_text

OPTIONS = {"seeds": "3", "jobs": "", "out": "runs/reproduce", "page": ""}
HEAD = ("claim", "what", "expected", "ours", "seeds", "verdict", "source")


@dataclass(frozen=True)
class Claim:
    """A published or measured number, and how to check ours against it.

    Args:
        metric: key of `Result.metrics`; written in percent.
        expected, tolerance: ours holds when its mean over seeds is no further off.
        above, below: bounds instead of a tolerance.
        each_above: bound that also every single seed must keep.
        minus: name of another claim; the metric is then the difference to it, paired by seed.
        published: the number in the source, which `expected` may differ from for a stated reason.
        recalled: a published number that nobody here has read at its source; printed, never asserted.
        differs: why ours is known to be elsewhere, such as a number of one seed that more seeds did not give; printed
            below the table, and the verdict is then "differs" in place of "FAILS".
        note: what a reader should know of the protocol; printed below the table.
        is_expensive: left out of `all`.
    """

    name: str
    line: str
    metric: str = "final"
    expected: float = math.nan
    tolerance: float = math.nan
    above: float = -math.inf
    below: float = math.inf
    each_above: float = -math.inf
    minus: str = ""
    published: float | None = None
    recalled: float | None = None
    source: str = ""
    differs: str = ""
    note: str = ""
    minutes: float = 1.0
    is_expensive: bool = False

    @property
    def wanted(self) -> str:
        """The expectation in words."""
        what = f"minus {self.minus} " if self.minus else ""
        what = f"{self.metric} " * (self.metric != "final") + what
        if not self.is_asserted:
            return f"{what}published (unverified) {self.recalled:g}"
        each = f", each seed > {self.each_above:g}" * math.isfinite(self.each_above)
        if not math.isnan(self.expected):
            return f"{what}{self.expected:g} ± {self.tolerance:g}{each}"
        bounds = [f"> {self.above:g}"] * math.isfinite(self.above) + [f"< {self.below:g}"] * math.isfinite(self.below)
        return what + ", ".join(bounds) + each

    @property
    def is_asserted(self) -> bool:
        """Whether there is anything that ours must keep."""
        return self.recalled is None

    def holds(self, values: Sequence[float]) -> bool:
        """Whether the mean over seeds is where it should be, and every seed beyond its bound."""
        mean = sum(values) / len(values)
        if min(values) <= self.each_above:
            return False
        if not math.isnan(self.expected):
            return abs(mean - self.expected) <= self.tolerance
        return self.above < mean < self.below


def main(words: list[str]) -> int:
    """Check the claims named, or list them all."""
    options, names, others = dict(OPTIONS), [], []
    for word in words:
        name, _, value = word.partition("=")
        if name in options and value:
            options[name] = value
        elif "=" in word:
            others.append(word)
        else:
            names.append(word)
    for name in ("seeds", "jobs"):
        if options[name] and (not options[name].isdigit() or not 1 <= int(options[name]) <= MOST_SEEDS):
            raise UserError(f"{name} is {options[name]!r}; it must be a number of at least 1 and at most {MOST_SEEDS}")
    if others and not names:
        raise UserError(f"{' '.join(others)}: nothing is run without the name of a claim, or `all`")
    known = {entry.name: read_claims(entry.name, entry.line) for entry in listing.experiments()}
    known = {name: claims for name, claims in known.items() if claims}
    for name in names:
        if name not in (*known, "all"):
            near = "".join(f" (did you mean {each}?)" for each in get_close_matches(name, known, 1))
            raise UserError(f"{name!r} is no claim{near}; the claims are all, {', '.join(known)}")
    if "all" in names:
        affordable = [name for name, claims in known.items() if not claims[0].is_expensive]
        names = [*affordable, *(name for name in names if name not in ("all", *affordable))]
    claims = [claim for name in names or known for claim in known[name]]
    console = Console()
    results: dict[str, list[Result]] = {}
    if names:
        needed = {claim.name for claim in claims} | {claim.minus for claim in claims if claim.minus}
        results = run_claims(sorted(needed), options, others, console)
    rows = [judged(claim, results, int(options["seeds"])) for claim in claims]
    console.print(_table(rows))
    if options["page"]:
        write_text(Path(options["page"]), page(rows, claims, words, results))
    return int(any(row[5] in ("FAILS", "not done") for row in rows))


def read_claims(name: str, line: str) -> list[Claim]:
    """Claims of one experiment, the main one first; none when its config makes none."""
    import yaml

    content = yaml.safe_load((listing.ROOT / "configs" / "experiment" / f"{name}.yaml").read_text()) or {}
    block = dict(content.get("claim") or {})
    further = block.pop("also", [])
    common = {key: block[key] for key in ("source", "minutes", "is_expensive") if key in block}
    return [Claim(name, line, **(common | each)) for each in ([block, *further] if block else [])]


def run_claims(
    names: Sequence[str], options: Mapping[str, str], words: Sequence[str], console: Console
) -> dict[str, list[Result]]:
    """Results of each experiment, by name; what is done already is not repeated."""
    seeds, out = range(int(options["seeds"])), Path(options["out"])
    for folder in [out, *([Path(options["page"]).parent] if options["page"] else [])]:
        check_writable(folder)
    configs = {name: composed("run", [f"+experiment={name}", *words]) for name in names}
    runs: dict[Path, dict[str, Any]] = {
        out / name / f"seed-{seed}": seeded(config, seed) for name, config in configs.items() for seed in seeds
    }
    # of each experiment one run is enough to say what is wrong with all
    for config in {folder.parent: config for folder, config in runs.items() if not is_done(folder, config)}.values():
        check(config)
    run_all(Plan(out, runs, "naive", int(options["jobs"] or 2), "reproduce"), console)
    found = {name: [out / name / f"seed-{seed}" / RESULT for seed in seeds] for name in names}
    return {name: [Result.load(path) for path in paths if path.is_file()] for name, paths in found.items()}


def judged(claim: Claim, results: Mapping[str, Sequence[Result]], num_seeds: int = 1) -> tuple[str, ...]:
    """A line of the table; no verdict for a claim that was not run, and "not done" where a seed is missing."""
    values = _values(claim, results)
    head = (claim.name, claim.line, claim.wanted)
    if not values:
        return (*head, "", "", "" if not results else "not done", claim.source)
    mean = sum(values) / len(values)
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    ours = f"{mean:.2f}{spread}"
    if len(values) < num_seeds:
        return (*head, ours, f"{len(values)} of {num_seeds}", "not done", claim.source)
    return (*head, ours, str(len(values)), verdict(claim, values), claim.source)


def verdict(claim: Claim, values: Sequence[float]) -> str:
    """holds, FAILS, differs (fails, for a reason that the claim states) or not asserted."""
    if not claim.is_asserted:
        return "not asserted"
    if claim.holds(values):
        return "holds"
    return "differs" if claim.differs else "FAILS"


def _values(claim: Claim, results: Mapping[str, Sequence[Result]]) -> list[float]:
    """The metric of each finished seed, in percent."""

    def by_seed(name: str) -> dict[int, float]:
        done = [result for result in results.get(name, ()) if result.status == "done"]
        found = {result.seed: result.metrics[claim.metric] for result in done}
        return {seed: math.nan if value is None else 100 * value for seed, value in found.items()}

    ours = by_seed(claim.name)
    if claim.minus:
        theirs = by_seed(claim.minus)
        ours = {seed: value - theirs[seed] for seed, value in ours.items() if seed in theirs}
    return list(ours.values())


def page(
    rows: Sequence[Sequence[str]],
    claims: Sequence[Claim],
    words: Sequence[str],
    results: Mapping[str, Sequence[Result]],
) -> str:
    """The table as a Markdown page, with the command, the date and the versions that made it."""
    elsewhere = ("data.root=", "out=", "jobs=", "page=", "tracking=")
    command = " ".join(word for word in words if not word.startswith(elsewhere))
    runs = [result for each in results.values() for result in each]
    env = runs[0].env if runs else environment()
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    remarks = dict.fromkeys((claim.name, text) for claim in claims for text in (claim.note, claim.differs) if text)
    return (
        f"# Published numbers\n\nMade by `cl reproduce {command} data.root=DATA` on {date.today()}: {len(runs)} runs, "
        f"Python {env['python']}, {versions}.\nOurs: mean ± standard deviation over seeds, in percent. A claim holds "
        "when the mean is within the tolerance that was fixed before it was run.\n"
        "A ladder row, where a source names one, is a line of this project's two ordered lists of numbers to reproduce "
        "(rehearsal;\nhypernetworks and projection), a method card its notes on one method. Neither is in the "
        "repository: what a row asks for\nstands in the claim's file in `configs/experiment/`.\n\n"
        + "\n".join(f"| {' | '.join(line)} |" for line in lines)
        + "\n\n"
        + "".join(f"- `{name}`: {remark}\n" for name, remark in remarks)
    )


def _table(rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("claim", *HEAD[2:-1]):
        table.add_column(name, overflow="fold")
    colours = {"holds": "[green]holds[/]", "FAILS": "[bold red]FAILS[/]", "differs": "[yellow]differs[/]"}
    for row in rows:
        table.add_row(row[0], *row[2:5], colours.get(row[5], row[5]))
    return table
