"""Choose settings for each strategy before a comparison, on rows that the comparison does not measure.

    cl compare strategies=naive,derpp seeds=5 'tune={optimizer.lr: [0.03, 0.1, 0.3]}' tune_seeds=2

Every combination of the listed values is run for every composition with `tune_on` (held-out training rows, by default)
and with seeds that the comparison does not use; the best mean final measure wins. Settings of a strategy are tried in
the compositions that contain it. The runs stay in `<out>-tuning`, so the same command repeats nothing and `cl report`
shows them; what was tried and chosen is in `<out>/tuning.json`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cl.cli.compare import Plan, check_words, make_plan, run_all, seeds_of, words_for
from cl.cli.compose import node_name
from cl.cli.folder import CONFIG, RESULT
from cl.core import UserError
from cl.report.style import UNITS, Unit
from cl.result import Result, write_text

NOTES = "tuning.json"
FIRST_SEED = 1000
"""Seeds of the tuning runs count from here, unless they are listed."""


@dataclass(frozen=True)
class Trial:
    """One combination of settings of one composition.

    Args:
        plan: its runs on the tuning seeds; without any where there is no other setting to choose.
    """

    label: str
    words: tuple[str, ...]
    plan: Plan

    @property
    def final(self) -> float:
        """Mean final measure over the seeds; NaN unless every run is done and has one."""
        paths = [folder / RESULT for folder in self.plan.runs]
        results = [Result.load(path) for path in paths if path.is_file()]
        finals = [result.metrics["final"] for result in results if result.status == "done"]
        known = [final for final in finals if final is not None]
        return math.fsum(known) / len(known) if known and len(known) == len(paths) else math.nan


def tuned(request: Mapping[str, Any], words: Sequence[str], console: Console) -> Plan:
    """The comparison with the settings chosen for each composition; runs the trials that are not done.

    Raises:
        UserError: no values to choose from, seeds that the comparison uses too, or a composition whose every trial
            failed.
    """
    values, seeds = _values(request["tune"]), _seeds(request)
    plan = make_plan(request, words)
    check_words(list(values), {node_name(name) for names in plan.compositions.values() for name in names})
    folder = plan.out.with_name(f"{plan.out.name}-tuning")
    trials = []
    for label, names in plan.compositions.items():
        choices = [choice for choice in grid(values, names) if choice]
        for choice in choices:
            own = request | {"strategies": [list(names)], "seeds": seeds, "reference": label}
            own["out"] = str(folder / label / ",".join(choice))
            on = {label: (*choice, request["tune_on"])}
            try:
                trial = make_plan(own, words_for(names, words), on)
            except UserError as error:
                raise UserError(f"{error} (in the trials, which run with {' '.join(on[label])})") from None
            # with nothing to choose from, a composition needs no run
            trials.append(Trial(label, choice, trial if len(choices) > 1 else replace(trial, runs={})))
    _check_out(plan, trials)
    runs = {path: config for trial in trials for path, config in trial.plan.runs.items()}
    if runs:
        console.print(f"tuning {', '.join(values)} with {request['tune_on']}: {len(runs)} runs", highlight=False)
        run_all(replace(plan, out=folder, runs=runs, suite=f"{plan.suite}-tuning"), console)
    chosen = {}
    for label in _labels(trials):
        first, *others = [trial for trial in trials if trial.label == label]
        chosen[label] = best([first, *others], plan.measure) if others else first
    _write(plan.out / NOTES, trials, chosen, request)
    console.print(_table(trials, chosen, UNITS[plan.measure]))
    return make_plan(request | {"out": str(plan.out)}, words, {label: trial.words for label, trial in chosen.items()})


def _check_out(plan: Plan, trials: Sequence[Trial]) -> None:
    """Refuse a folder whose runs have settings that cannot be chosen, before any trial runs for it."""
    known = _known(plan.out / NOTES)
    for label in _labels(trials):
        choices = [list(trial.words) for trial in trials if trial.label == label]
        begun = any((folder / CONFIG).is_file() for folder in plan.runs if folder.parent.name == label)
        if begun and known.get(label, {}).get("chosen") not in choices:
            raise UserError(
                f"{plan.out / label} holds runs with settings that this tuning did not choose; "
                "choose another folder with out=FOLDER"
            )


def _known(path: Path) -> dict[str, Any]:
    """What tuning has noted in a folder, by composition."""
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _labels(trials: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(trial.label for trial in trials))


def best(trials: Sequence[Trial], measure: str) -> Trial:
    """The trial with the best mean; of equals the one listed first."""
    done = [trial for trial in trials if not math.isnan(trial.final)]
    if not done:
        raise UserError(
            f"no setting of {trials[0].label} could be trained to the end with a finite measure; tune over other values"
        )
    return (min if measure == "loss" else max)(done, key=lambda trial: trial.final)


def grid(values: Mapping[str, Sequence[Any]], names: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of the values that concern a composition, as words.

    Example:
        >>> grid({"optimizer.lr": [0.1, 0.2], "strategy.ewc.strength": [1]}, ["replay"])
        [('optimizer.lr=0.1',), ('optimizer.lr=0.2',)]
    """
    columns = [[f"{key}={_written(value)}" for value in column] for key, column in values.items()]
    columns = [column for column in columns if words_for(names, column)]
    return list(itertools.product(*columns))


def _written(value: Any) -> str:
    """A value as Hydra reads it.

    Example:
        >>> _written(None), _written(True), _written("cosine"), _written([1, "a"])
        ('null', 'true', 'cosine', "[1, 'a']")
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_written(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(repr(each) if isinstance(each, str) else _written(each) for each in value) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _values(given: Any) -> dict[str, list[Any]]:
    is_grid = isinstance(given, Mapping) and all(isinstance(each, list) and each for each in given.values())
    if not is_grid or not given:
        raise UserError(
            f"tune is {given!r}; it must name settings and lists of values, such as {{optimizer.lr: [0.03, 0.1]}}"
        )
    return dict(given)


def _seeds(request: Mapping[str, Any]) -> list[int]:
    given = request["tune_seeds"]
    used, seeds = seeds_of("seeds", request["seeds"]), seeds_of("tune_seeds", given, FIRST_SEED)
    if shared := sorted(set(seeds) & set(used)):
        why = f"the comparison uses {', '.join(map(str, shared))} too"
        raise UserError(f"tune_seeds is {given!r}; it must be a number of seeds, or a list of other seeds: {why}")
    return seeds


def _write(path: Path, trials: Sequence[Trial], chosen: Mapping[str, Trial], request: Mapping[str, Any]) -> None:
    """Note what was tried and chosen; other compositions in the folder keep their lines."""
    known = _known(path)
    for label, winner in chosen.items():
        tried = {" ".join(trial.words): trial.final for trial in trials if trial.label == label and trial.plan.runs}
        known[label] = {
            "chosen": list(winner.words),
            "tried": {setting: None if math.isnan(final) else final for setting, final in tried.items()},
            "seeds": [config["seed"] for config in winner.plan.runs.values()],
            "on": request["tune_on"],
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(known, indent=1) + "\n")


def _table(trials: Sequence[Trial], chosen: Mapping[str, Trial], unit: Unit) -> Table:
    table = Table(title="the trials", title_justify="left", box=None, pad_edge=False)
    table.add_column("strategy", no_wrap=True)
    table.add_column("setting", overflow="fold")
    table.add_column(f"final, {unit.symbol}", no_wrap=True, justify="right")
    table.add_column("", no_wrap=True)
    for trial in trials:
        final = unit.text(trial.final) if math.isfinite(trial.final) else "failed" if trial.plan.runs else ""
        table.add_row(trial.label, " ".join(trial.words), final, "chosen" if trial is chosen[trial.label] else "")
    return table
