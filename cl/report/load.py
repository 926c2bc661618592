"""Find the results of a folder and sort them into what can be compared with what."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cl.metrics.matrix import EvalTable
from cl.report.variants import CONFIG_FILE, name_variants
from cl.result import Result

RESULT_FILE = "result.json"
STATUSES = ("done", "interrupted", "failed")


@dataclass
class Loaded:
    """What a folder holds.

    Args:
        results: every readable run, in the order of its names, which a copy of the folder keeps, and then oldest file
            first, so that of two runs of one seed the later one is the newer.
        warnings: one sentence per file that could not be read, or that was left out.
    """

    results: list[Result]
    warnings: list[str] = field(default_factory=list)


def load_folder(folder: Path | str) -> Loaded:
    """Read every result under a folder; runs that differ only in a setting get it added to their strategy's name.

    A run that goes on from another one (`cl extend`, `cl rewarm`, `cl fork_anneal`) lies beside it by default and is no
    seed of the comparison there: it is left out, with a warning, unless the folder holds nothing else. So is, without
    one, the copy of a run among MLflow's artifacts.

    Args:
        folder: searched recursively; may itself be a run folder.

    Raises:
        ValueError: there is no such folder, no result in it, or none of its results can be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give the folder of a run or of a comparison")
    paths = sorted(folder.rglob(RESULT_FILE))
    # a copy is no second run, and no run that is left out either
    paths = [path for path in paths if not is_copy(path)] or paths
    if not paths:
        raise ValueError(f"there is no {RESULT_FILE} under {folder}; give the folder of a run or of a comparison")
    found, warnings = [], []
    branches = [path for path in paths if _is_branch(path)]
    if len(branches) < len(paths):
        paths = [path for path in paths if path not in branches]
        warnings += [
            f"{path.parent} goes on from another run and is left out; `cl report {path.parent}` shows it"
            for path in branches
        ]
    for path in paths:
        try:
            found.append((path, _read(path)))
        except (ValueError, OSError) as error:
            warnings.append(str(error))
    if not found:
        raise ValueError(warnings[-1])
    found.sort(key=lambda each: (*_names(each[1]), each[0].stat().st_mtime, each[0]))
    return Loaded(name_variants(found), warnings)


def is_copy(path: Path) -> bool:
    """Whether a file is what a run sent to MLflow, which keeps it in `RUN_ID/artifacts`."""
    return path.parent.name == "artifacts" and bool(re.fullmatch("[0-9a-f]{32}", path.parent.parent.name))


def _names(result: Result) -> tuple[object, ...]:
    return *_kind(result), result.strategy, result.seed


def _kind(result: Result) -> tuple[object, ...]:
    """What runs of one section agree in."""
    return result.stream, result.setting, result.backbone, result.measure, tuple(result.domains)


def _is_branch(path: Path) -> bool:
    """Whether the config beside a result says where its run began."""
    config = path.with_name(CONFIG_FILE)
    try:
        return any(line.startswith("origin:") for line in config.read_text().splitlines())
    except (OSError, UnicodeDecodeError):
        return False


def load_results(folder: Path | str) -> list[Result]:
    """The readable results under a folder, in the order of `Loaded`. Raises as `load_folder`."""
    return load_folder(folder).results


def table_of(result: Result) -> EvalTable:
    """The evaluation table of a run; one without any row yet has zero experiences.

    Raises:
        ValueError: the numbers do not make a table; the sentence says why.
    """
    return EvalTable.from_result(vars(result))


@dataclass
class Section:
    """Runs on one stream with one backbone, evaluated on the same domains: what may share a table.

    Args:
        title: distinct within one report.
        results: every run, whatever its status.
        warnings: one sentence per finished run that a newer one of the same strategy and seed replaces.
    """

    stream: str
    setting: str
    backbone: str
    measure: str
    domains: list[str]
    title: str = ""
    results: list[Result] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """Strategies in alphabetical order, with or without a finished run."""
        return sorted({result.label for result in self.results})

    @property
    def num_experiences(self) -> int:
        """Experiences of the longest run; a joint run has one where the others have T."""
        return max(len(result.experiences) for result in self.results)

    def finished(self, label: str) -> list[Result]:
        """The finished runs of a strategy, one per seed, by seed."""
        by_seed = {result.seed: result for result in self.results if result.label == label and result.status == "done"}
        return [by_seed[seed] for seed in sorted(by_seed)]

    def shown(self, label: str) -> list[Result]:
        """The finished runs of a strategy, or, where there is none, those that got through an experience."""
        partial = {result.seed: result for result in self.results if result.label == label and result.R}
        return self.finished(label) or [partial[seed] for seed in sorted(partial)]

    def unfinished(self) -> list[Result]:
        """Interrupted, running and failed runs that no finished run of the same strategy and seed replaces."""
        finished = {(label, result.seed) for label in self.labels for result in self.finished(label)}
        return [r for r in self.results if r.status != "done" and (r.label, r.seed) not in finished]


def sections(results: Sequence[Result]) -> list[Section]:
    """Sort runs into sections, in order of first appearance.

    Two runs share a section when stream, setting, backbone, measure and evaluated domains agree: a mean over runs with
    different columns of R would be a mean of different quantities.
    """
    found: dict[tuple[object, ...], Section] = {}
    for result in results:
        section = found.setdefault(
            _kind(result),
            Section(result.stream, result.setting, result.backbone, result.measure, list(result.domains)),
        )
        section.results.append(result)
    _name(list(found.values()))
    for section in found.values():
        section.warnings = _replaced(section)
    return list(found.values())


def _name(sections: Sequence[Section]) -> None:
    """Titles as short as keeps them apart: stream and backbone, then setting, measure and domains, then a number."""
    for section in sections:
        section.title = f"{section.stream} · {section.backbone}"
    for extra in (
        lambda section: section.setting.replace("_", " "),
        lambda section: section.measure,
        lambda section: f"{len(section.domains)} domains",
        lambda section: f"no. {sections.index(section) + 1}",
    ):
        titles = [section.title for section in sections]
        for section, title in zip(sections, titles, strict=True):
            alike = [other for other, named in zip(sections, titles, strict=True) if named == title]
            if len({extra(other) for other in alike}) > 1:
                section.title = f"{title} · {extra(section)}"


def _replaced(section: Section) -> list[str]:
    counts: dict[tuple[str, int], int] = {}
    for result in section.results:
        if result.status == "done":
            counts[result.label, result.seed] = counts.get((result.label, result.seed), 0) + 1
    return [
        f"{label}, seed {seed} on {section.title}: {count} finished runs; the newest is used"
        for (label, seed), count in counts.items()
        if count > 1
    ]


def _read(path: Path) -> Result:
    result = Result.load(path)
    problem = _problem(result)
    if problem:
        raise ValueError(f"{path} is not a complete result: {problem}")
    try:
        table_of(result)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a complete result: {error}") from None
    return result


def _problem(result: Result) -> str:
    """What the readers of a result rely on and a hand-edited file may break."""
    for name in ("stream", "backbone", "setting", "measure", "status", "error"):
        if not isinstance(getattr(result, name), str):
            return f"`{name}` is no text: {getattr(result, name)!r}"
    for name in ("strategy", "domains", "experiences"):
        value = getattr(result, name)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            return f"`{name}` is no list of names: {value!r}"
    for name in ("metrics", "cost", "env"):
        if not isinstance(getattr(result, name), dict):
            return f"`{name}` is no object: {getattr(result, name)!r}"
    wrong = {key: value for key, value in result.cost.items() if isinstance(value, str | list | dict)}
    if wrong:
        return f"`cost` holds what is no number: {wrong!r}"
    if not isinstance(result.env.get("versions", {}), dict):
        return f"`env` holds versions that are no object: {result.env['versions']!r}"
    if not isinstance(result.course, list) or not all(map(_is_point, result.course)):
        return f"`course` is no list of [experience, step, tokens, learning rate]: {str(result.course)[:80]}"
    if not isinstance(result.mlflow_run_id, str | None):
        return f"`mlflow_run_id` is no text: {result.mlflow_run_id!r}"
    if not isinstance(result.seed, int):
        return f"`seed` is no whole number: {result.seed!r}"
    if result.status not in STATUSES:
        return f"status is {result.status!r}; allowed are {', '.join(STATUSES)}"
    if result.status == "done" and not result.R:
        return "status is 'done' and R is empty"
    return ""


def _is_point(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 4 and all(isinstance(number, int | float) for number in entry)
