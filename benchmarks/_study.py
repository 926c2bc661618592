"""What the studies share: a command line, runs that are not repeated, what these left behind, and tables of a page."""

from __future__ import annotations

import json
import math
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Self

import torch
from _records import keep, restore

from cl.cli.main import main as cl
from cl.metrics.statistics import ALPHA
from cl.result import Result, write_text

TRAIN_FILES = (
    "{name: c4, path: text/c4/train.jsonl}",
    '{name: wikitext, path: text/wikitext/train.txt, starts: "^ = [^=].* = $"}',
    "{name: gsm8k, path: text/gsm8k/train.jsonl, field: [question, answer]}",
)
TUNE_ON_TEXT = f"stream.domains=[{', '.join(TRAIN_FILES)}]"
"""Documents of the local training files are measured on in place of the test files."""

TYPES = {"str": str, "int": int, "Path": Path}
WRONG_REQUEST = 2


@dataclass(frozen=True, kw_only=True)
class Study:
    """Where things are and how much of them there is. Every field is an option of the command line.

    Args:
        out: folder of all runs.
        page: folder of the page.
        seeds: of every condition.
    """

    out: Path
    page: Path
    seeds: int

    @classmethod
    def options(cls, doc: str | None) -> ArgumentParser:
        """The command line, to which a study may add what it chooses its conditions by."""
        parser = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
        for each in fields(cls):
            name, has_default = f"--{each.name.removeprefix('is_')}", each.default is not MISSING
            if each.type == "bool":
                trial = "a trial of everything at a size that means nothing"
                parser.add_argument(name, dest=each.name, action="store_true", help=trial)
            elif each.type in TYPES:
                kind = TYPES[str(each.type)]
                parser.add_argument(name, type=kind, default=each.default, required=not has_default)
            else:
                parser.add_argument(name, nargs="+", default=each.default)
        parser.add_argument("--page-only", action="store_true", help="run nothing; write the page from what there is")
        return parser

    @classmethod
    def of(cls, given: Namespace) -> Self:
        """The study that a command line asks for, with the runs that its page was made of."""
        study = cls(**{each.name: getattr(given, each.name) for each in fields(cls)})
        restore(study.out, study.page, study.places)
        return study

    @property
    def places(self) -> dict[str, Path]:
        """Folders of this machine that settings of runs name."""
        return {"out": self.out}

    def write(self, text: str) -> None:
        """The page, and beside it the runs that it is made of."""
        write_text(self.page / "README.md", text)
        keep(self.out, self.page, self.places)


@dataclass(frozen=True, kw_only=True)
class Comparisons(Study):
    """A study whose runs are those of `cl compare`: the same command goes on where it was stopped.

    Args:
        data: `data.root`.
        jobs: runs at a time.
    """

    data: str
    jobs: int = 1

    @property
    def places(self) -> dict[str, Path]:
        return super().places | {"data": Path(self.data)}

    def compare(self, folder: Path, strategies: Sequence[str], *words: str, may_fail: bool = False) -> None:
        """One `cl compare`, the first strategy as reference.

        Args:
            may_fail: go on when a run fails; the page tells how many there are.
        """
        request = (f"strategies=[{','.join(strategies)}]", f"reference={label(strategies[0])}", f"seeds={self.seeds}")
        where = (f"data.root={self.data}", f"out={folder}", f"jobs={self.jobs}")
        carry_out(["compare", *words, *request, *where], may_fail)

    def run(self, runs: Mapping[Path, dict[str, Any]], suite: str) -> None:
        """What is not done of runs that were composed, without the reports of a comparison."""
        # here, so that tables can be written where hydra is not installed
        from rich.console import Console

        from cl.cli.compare import Plan, run_all

        failures = run_all(Plan(self.out, runs, "naive", self.jobs, suite), Console())
        if failures:
            raise SystemExit("; ".join(f"{folder}: {sentence}" for folder, sentence in failures.items()))


def carry_out(words: Sequence[str], may_fail: bool = False) -> None:
    """A command of `cl`; ends the study where that is refused or does not finish."""
    code = cl(list(words))
    if code == WRONG_REQUEST or (code and not may_fail):
        raise SystemExit(code)


def run_to_the_end(folder: Path, words: Sequence[str]) -> None:
    """`cl run` into a folder, or what is left of it where it was stopped."""
    if not (folder / "result.json").is_file():
        carry_out(["run", *words, f"out={folder}"])
    elif Result.load(folder / "result.json").status != "done":
        carry_out(["resume", str(folder)])


def label(composition: str) -> str:
    """Folder of a composition of strategies.

    Example:
        >>> label("[derpp,refresh]")
        'derpp+refresh'
    """
    return composition.strip("[]").replace(",", "+")


def finished(folder: Path, pattern: str = "*/seed-*/result.json") -> list[Result]:
    """The runs below a folder that were trained to the end, in the order of their names."""
    return [run for run in map(Result.load, sorted(folder.glob(pattern))) if run.status == "done"]


def chosen(folder: Path, composition: str | None = None) -> tuple[str, ...]:
    """What tuning chose in a comparison, as words: for the composition of this label, or for all there are."""
    path = folder / "tuning.json"
    notes = json.loads(path.read_text()) if path.is_file() else {}
    return tuple(word for name, note in notes.items() if composition in (None, name) for word in note["chosen"])


# tables


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *rows)) + "\n"


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and standard deviation; of one value only itself.

    Example:
        >>> spread([1.0, 2.0, 3.0], ".1f"), spread([2.0]), spread([])
        ('2.0 ± 1.0', '2.000', '')
    """
    if not values:
        return ""
    return f"{fmean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")


def student(differences: Sequence[float]) -> tuple[float, float, float]:
    """Student's t on paired differences: low and high end of the 95 % interval of their mean, and p of no difference.

    For the few seeds of a study, from which neither a bootstrap nor a test of ranks can tell anything (three allow a
    rank test no p below 0.25, and a bootstrap covers too little); it assumes that differences are about normal.

    Example:
        >>> low, high, p = student([1.0, 2.0, 3.0])
        >>> round(low, 2), round(high, 2), round(p, 3)
        (-0.48, 4.48, 0.074)
    """
    from scipy.stats import t, ttest_1samp

    if len(differences) < 2:
        return math.nan, math.nan, math.nan
    values = torch.tensor(differences, dtype=torch.float64)
    mean, error = float(values.mean()), float(values.std() / len(values) ** 0.5)
    if error == 0:
        return mean, mean, 1.0 if mean == 0 else 0.0
    half = float(t.ppf(1 - ALPHA / 2, len(values) - 1)) * error
    return mean - half, mean + half, float(ttest_1samp(differences, 0.0).pvalue)


def interval(differences: Sequence[float], form: str = ".3f") -> str:
    """Mean of differences with its 95 % Student interval; from one there is none.

    Example:
        >>> interval([1.0, 2.0, 3.0], ".1f"), interval([2.0], ".1f"), interval([])
        ('+2.0 [-0.5, +4.5]', '+2.0', '')
    """
    if len(differences) < 2:
        return "".join(f"{each:+{form}}" for each in differences)
    low, high, _ = student(differences)
    return f"{fmean(differences):+{form}} [{low:+{form}}, {high:+{form}}]"
