"""Train several strategies on the same seeds, in parallel, and report with intervals and tests.

Usage: cl compare [strategies=a,b,[c,d]] [seeds=5] [name=value ...]

  cl compare stream=permuted_mnist strategies=naive,joint,replay,derpp,ewc seeds=5 data.root=DATA
  cl compare 'strategies=naive,[derpp,refresh]' strategy.derpp.alpha=0.2   a composition in brackets
  cl compare seeds=3,7,11 jobs=2 out=FOLDER reference=naive
  cl compare launcher=submitit_slurm                                       one job per run on a cluster
  cl compare 'tune={optimizer.lr: [0.03, 0.1, 0.3]}' tune_seeds=2          each strategy at its own best setting

Every strategy gets the same seeds, so differences are tested in pairs. Each run has a process and a thread of its own;
one that dies is reported and the others go on. The same command again goes on with what is unfinished and repeats
nothing. Options of a strategy, those of an experiment too, apply to the runs that contain it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from cl.cli import build
from cl.cli.compose import composed, import_from_here, node_name, plain, seeded
from cl.cli.console import Pulse, progress_bars, progress_line
from cl.cli.execute import execute
from cl.cli.folder import RESULT, check_writable, is_done, make_ready
from cl.cli.pool import Job, run_jobs
from cl.core import StreamInfo, UserError

OWN = ("strategies", "seeds", "reference", "jobs", "out", "launcher", "tune", "tune_seeds", "tune_on")
OF_RUNS = ("seed", "strategy", "suite", "hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Plan:
    """What a comparison will run.

    Args:
        runs: folder of each run -> its config.
        compositions: label -> names of its strategies.
        words: label -> what `cl run` is told, but for the seed.
        measure: of the stream, "accuracy" or "loss".
    """

    out: Path
    runs: Mapping[Path, dict[str, Any]]
    reference: str
    jobs: int
    suite: str
    compositions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    measure: str = "accuracy"


def main(words: list[str]) -> int:
    """Compare; 0 when every run is done."""
    import_from_here()
    own, others = split_words(words)
    request = plain(composed("compare", [*own, *(word for word in others if not _strategy_of(word))]))
    console = Console(markup=False)
    if request["launcher"] != "local":
        from cl.cli.launch import require_launcher

        require_launcher(request["launcher"])
    if request["tune"] is not None:
        from cl.cli.tune import tuned

        plan = tuned(request, others, console)
    elif idle := [word for word in own if word.startswith(("tune_on=", "tune_seeds="))]:
        raise UserError(f"{idle[0]!r} is for the trials of tune={{...}}, which is not given")
    else:
        plan = make_plan(request, others)
    if request["launcher"] == "local":
        failures = run_all(plan, console)
    else:
        from cl.cli.launch import launch

        failures = launch(plan, request["launcher"], console)
    return _conclude(plan, failures, console)


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The comparison's own settings, written as Hydra reads them, and those of its runs.

    Example:
        >>> split_words(["strategies=naive,[derpp,ewc]", "seeds=1,2", "optimizer.lr=0.1"])
        (['strategies=[naive,[derpp,ewc]]', 'seeds=[1,2]'], ['optimizer.lr=0.1'])
    """
    own, others = [], []
    for word in words:
        name, _, value = word.partition("=")
        is_list = not _is_one(value) or (name == "strategies" and not value.startswith("["))
        if name in ("strategies", "seeds") and is_list:
            word = f"{name}=[{value}]"
        if name == "tune_on":
            word = f"{name}='{value}'"
        (own if name in OWN else others).append(word)
    return own, others


def _is_one(value: str) -> bool:
    """No comma outside brackets."""
    depth = 0
    for letter in value:
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            return False
    return True


def _strategy_of(word: str) -> str:
    """Name of the strategy that an option belongs to, or nothing."""
    parts = word.lstrip("+~").partition("=")[0].split(".")
    return node_name(parts[1]) if parts[0] == "strategy" and len(parts) > 1 else ""


def make_plan(request: Mapping[str, Any], words: Sequence[str], own: Mapping[str, Sequence[str]] | None = None) -> Plan:
    """Compose and check every composition; nothing is trained and nothing written.

    Args:
        own: label of a composition -> words for it alone.
    """
    compositions = [entry if isinstance(entry, list) else [entry] for entry in request["strategies"] or []]
    if not compositions:
        raise UserError("strategies is empty; name at least one, such as strategies=naive,replay")
    compositions = [[str(name) for name in names] for names in compositions]
    check_words(words, {node_name(name) for names in compositions for name in names})
    for names in compositions:
        if len(set(map(node_name, names))) < len(names):
            raise UserError(f"strategies has [{','.join(names)}], which names a strategy twice")
    labelled = {"+".join(map(node_name, names)): names for names in compositions}
    if len(labelled) < len(compositions):
        raise UserError(f"strategies names a composition twice: {', '.join(labelled)}")
    told = {
        label: [f"strategy=[{','.join(names)}]", *words_for(names, [*words, *(own or {}).get(label, ())])]
        for label, names in labelled.items()
    }
    configs = {label: composed("run", each) for label, each in told.items()}
    for label, config in configs.items():
        if dropped := _dropped(config, labelled[label]):
            told[label] += dropped
            configs[label] = composed("run", told[label])
    reference = request["reference"]
    if reference not in list(configs) and reference != "naive":
        raise UserError(f"reference is {reference!r}; it must be one of {', '.join(configs)}")
    jobs = (os.cpu_count() or 1) if request["jobs"] is None else request["jobs"]
    if type(jobs) is not int or jobs < 1:
        raise UserError(f"jobs is {jobs!r}; it must be an integer of at least 1, or null for one per core")

    seeds = seeds_of("seeds", request["seeds"])
    infos = [check(seeded(config, seeds[0])) for config in configs.values()]
    marks = sorted(build.fingerprint(seeded(config, 0)) for config in configs.values())
    suite = f"{infos[0].name}-{hashlib.sha256(' '.join(marks).encode()).hexdigest()[:8]}"
    out = Path(request["out"]) if request["out"] else Path("runs") / "compare" / suite
    check_writable(out)
    runs = {out / label / f"seed-{seed}": seeded(config, seed) for seed in seeds for label, config in configs.items()}
    return Plan(out, runs, reference, jobs, suite, labelled, told, infos[0].measure)


def _dropped(config: Any, names: Sequence[str]) -> list[str]:
    """Words that take away the options which an experiment sets of strategies that are not in the composition."""
    nodes = config.get("strategy") or {}
    others = [name for name in nodes if name not in map(node_name, names) and "_target_" not in (nodes[name] or {})]
    return [f"~strategy.{name}" for name in others]


def check_words(words: Sequence[str], known: set[str]) -> None:
    """Refuse settings of a single run, and options of strategies that are not compared."""
    for word in words:
        if word.partition("=")[0].lstrip("+") in OF_RUNS:
            raise UserError(f"{word!r} is for `cl run`; `cl compare` takes strategies=..., seeds=... and out=...")
        name = _strategy_of(word)
        if name and name not in known:
            raise UserError(f"{word!r} is for {name}, which is not compared; strategies are {', '.join(sorted(known))}")


def words_for(names: Sequence[str], words: Sequence[str]) -> list[str]:
    """The words that concern a composition: all but the options of other strategies."""
    nodes = ["", *map(node_name, names)]
    return [word for word in words if _strategy_of(word) in nodes]


def seeds_of(name: str, given: Any, first: int = 0) -> list[int]:
    """The seeds that a setting asks for: so many from the first on, or those listed."""
    seeds = list(range(first, first + given)) if type(given) is int and given <= MOST_SEEDS else given
    is_list = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not is_list or not seeds or len(set(seeds)) < len(seeds):
        raise UserError(
            f"{name} is {given!r}; it must be a number of seeds of at least 1 and at most {MOST_SEEDS}, "
            "or a list of different seeds"
        )
    return seeds


def check(config: Mapping[str, Any]) -> StreamInfo:
    """Build a run without training it, so that what is wrong is said at once; returns what its stream says."""
    return build.make_trainer(config, {}, run_dir=None, observers=()).state.info


def run_all(plan: Plan, console: Console) -> dict[str, str]:
    """Run what is not done; returns the sentence of each run that failed."""
    unfinished = {str(folder): config for folder, config in plan.runs.items() if not is_done(folder, config)}
    if len(unfinished) < len(plan.runs):
        console.print(f"{len(plan.runs) - len(unfinished)} of {len(plan.runs)} runs are done already", highlight=False)
    prepare_tracking(plan)
    failures: dict[str, str] = {}
    with progress_bars(console) as bars:
        overall = bars.add_task("", name="all runs", total=len(unfinished))
        tasks: dict[str, Any] = {}

        def show(name: str, message: Mapping[str, Any]) -> None:
            if "total" not in message:
                return
            label = str(Path(name).relative_to(plan.out))
            if name not in tasks:
                tasks[name] = bars.add_task("", name=label, total=message["total"])
            bars.update(tasks[name], completed=message["done"], description=progress_line(message))

        jobs = [Job(name, run_one, (config, name, plan.suite)) for name, config in unfinished.items()]
        for ending in run_jobs(jobs, plan.jobs, show):
            bars.advance(overall)
            if ending.name in tasks:
                bars.remove_task(tasks[ending.name])
            label = Path(ending.name).relative_to(plan.out)
            if ending.error:
                failures[ending.name] = ending.error
                word = ("stopped", "yellow") if ending.error.startswith("interrupted") else ("failed", "red")
                bars.console.print(Text.assemble(word, f" {label}: {ending.error}"))
            elif not console.is_terminal:
                console.print(f"done {label}", highlight=False)
    return failures


def run_one(send: Callable[[Mapping[str, Any]], None], config: dict[str, Any], folder: str, suite: str) -> None:
    """The job of one run: start it, or go on from its checkpoint."""
    run_dir = Path(folder)
    import_from_here()
    result = execute(
        config, run_dir, resume=make_ready(run_dir), observers=[Pulse(send)], suite=suite, say=lambda sentence: None
    )
    if result.status != "done":
        send({"error": f"{result.status}; the same command goes on with it"})


def prepare_tracking(plan: Plan) -> None:
    """Create the embedded store once, before several processes want to."""
    node = next(iter(plan.runs.values())).get("tracking") or {}
    if node.get("_target_"):
        from cl.tracking import check_store, prepare_store

        uri = build.make("tracking", node).uri
        check_store(uri)
        prepare_store(uri)


def _conclude(plan: Plan, failures: Mapping[str, str], console: Console) -> int:
    """Report on what is done; 1 when something is not."""
    from cl.cli.report import report_on

    if any((folder / RESULT).is_file() for folder in plan.runs):
        report_on(plan.out, console, reference=plan.reference)
    if failures:
        console.print(f"{len(failures)} of {len(plan.runs)} runs did not finish; the same command goes on with them")
    return int(bool(failures))
