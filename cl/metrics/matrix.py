"""The evaluation table: what was measured, where and when. Every metric is a pure function of it.

Rows are experiences in training order, columns are evaluated domains. The two differ: a domain may be taught by
several experiences (a revisit), by none (a held-out set), or together with others in one experience; and an experience
may rehearse domains that are not its own.
Shape legend: T experiences, D domains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]
IntArray: TypeAlias = NDArray[np.int64]

MEASURES = ("accuracy", "loss")

# evaluation averages in float32: a perfect score may come back a few units in the last place above 1
_ACCURACY_SLACK = 1e-5


class WithinPoint(NamedTuple):
    """One evaluation in the middle of an experience.

    Args:
        experience: row of R during which it was taken.
        step: optimizer step; orders the points of one experience.
        domain: column of R that was evaluated.
        value: the measure.
    """

    experience: int
    step: int
    domain: int
    value: float


@dataclass(frozen=True, eq=False)
class EvalTable:
    """The measure on every domain after every experience; built by `from_rows` or `from_result`.

    R[i, j] = measure on domain j after training experience i; NaN where it was not evaluated.

    Args:
        R: [T, D]; accuracies are fractions in [0, 1], losses are nats. T = 0 is a run stopped in its first experience.
        R_init: [D], the measure before any training.
        trained: [T], the domain that each experience teaches; None where it is no single evaluated domain.
        domains: [D] distinct column names.
        experiences: [T] row names.
        measure: "accuracy" (higher is better) or "loss" (lower is better).
        within: evaluations inside experiences; only `cl.metrics.stability` and `cl.metrics.facilitation` read them.
        practises: [T] domains whose rows each experience trains on, where that is not `trained` alone; empty where it
            is `trained` throughout.

    Raises:
        ValueError: lengths disagree, an index points nowhere, a domain name occurs twice, an accuracy leaves [0, 1].

    Source: R of Lopez-Paz & Ranzato (2017). Differences: their columns are experiences and ours are domains, so that
        a revisit adds a row and no column.
    """

    R: FloatArray
    R_init: FloatArray
    trained: tuple[int | None, ...]
    domains: tuple[str, ...]
    experiences: tuple[str, ...]
    measure: str = "accuracy"
    within: tuple[WithinPoint, ...] = ()
    practises: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"measure is {self.measure!r}; allowed are {', '.join(MEASURES)}")
        _require_length("R_init", self.R_init, self.num_domains, "column of R")
        _require_length("domains", self.domains, self.num_domains, "column of R")
        _require_length("trained", self.trained, self.num_experiences, "row of R")
        _require_length("experiences", self.experiences, self.num_experiences, "row of R")
        if len(set(self.domains)) < self.num_domains:
            raise ValueError(f"domains {list(self.domains)} name a column twice; a revisit adds a row and no column")
        for domain in self.trained:
            if domain is not None:
                _require_index("trained", domain, self.num_domains, "domain")
        if self.practises:
            _require_length("practises", self.practises, self.num_experiences, "row of R")
        for domain in (domain for row in self.practises for domain in row):
            _require_index("practises", domain, self.num_domains, "domain")
        for point in self.within:
            _require_index("within", point.experience, self.num_experiences, "experience")
            _require_index("within", point.domain, self.num_domains, "domain")
        if self.measure == "accuracy":
            values = np.concatenate([self.R.ravel(), self.R_init, [point.value for point in self.within]])
            impossible = values[(values < -_ACCURACY_SLACK) | (values > 1 + _ACCURACY_SLACK)]
            if impossible.size:
                raise ValueError(f"accuracy {impossible[0]:g} is impossible; accuracies are fractions in [0, 1]")
        # one table is shared by many readers
        self.R.setflags(write=False)
        self.R_init.setflags(write=False)

    @classmethod
    def from_rows(
        cls,
        R: Sequence[ArrayLike] | FloatArray,
        R_init: ArrayLike | None = None,
        *,
        trained: Sequence[int | None] | None = None,
        domains: Sequence[str] | None = None,
        experiences: Sequence[str] | None = None,
        measure: str = "accuracy",
        within: Iterable[Sequence[float]] = (),
        practises: Sequence[Sequence[int]] = (),
    ) -> EvalTable:
        """Build a table from plain lists, in which None, NaN and infinity (a diverged run) mean "not evaluated".

        Args: as the fields of the class, but
            R_init: nothing was evaluated when None.
            trained: -1 also means None; without it experience i teaches domain i, which needs a square R.
            domains, experiences: counted from "0" when None.
            within: entries (experience, step, domain, value); those without a value are dropped.

        Raises:
            ValueError: R is ragged or holds something that is no number, or as for the class.

        Example:
            >>> table = EvalTable.from_rows([[0.9, None], [0.6, 0.8], [0.85, 0.7]], trained=[0, 1, 0])
            >>> table.first_visit.tolist(), table.learned.tolist()
            ([0, 1], [0.9, 0.8])
        """
        widths = sorted({np.size(row) for row in R})
        if len(widths) > 1:
            raise ValueError(f"R is ragged: its rows have {widths[0]} to {widths[-1]} values")
        values = _numbers("R", R if widths else np.empty((0, len(domains or ()))), num_axes=2)
        T, D = values.shape
        if D == 0:
            raise ValueError("R has no columns; expected one per evaluated domain")
        if trained is None and T != D:
            raise ValueError(f"R has {T} rows and {D} columns; `trained` must say which domain each row teaches")
        return cls(
            R=values,
            R_init=np.full(D, np.nan) if R_init is None else _numbers("R_init", R_init, num_axes=1),
            trained=tuple(range(T)) if trained is None else tuple(None if j in (None, -1) else int(j) for j in trained),
            domains=tuple(map(str, range(D) if domains is None else domains)),
            experiences=tuple(map(str, range(T) if experiences is None else experiences)),
            measure=measure,
            within=tuple(point for point in map(_within_point, within) if not math.isnan(point.value)),
            practises=tuple(tuple(map(int, row)) for row in practises),
        )

    @classmethod
    def from_result(cls, result: Mapping[str, Any]) -> EvalTable:
        """Read the table of a `result.json`; what an interrupted run lists beyond its last row of R is left out.

        Args:
            result: `R`, and where present `R_init`, `experiences`, `domains`, `trained`, `practises`, `measure`,
                `within`. Without `domains` every experience is a domain of its own.

        Raises:
            ValueError: as for `from_rows`.

        Example:
            >>> table = EvalTable.from_result({"R": [[0.9, None]], "experiences": ["a", "b"], "trained": [0, 1]})
            >>> table.experiences, table.domains
            (('a',), ('a', 'b'))
        """
        if "R" not in result:
            raise ValueError(f"the result has no table R; its keys are {', '.join(result)}")
        rows, experiences, trained = result["R"], result.get("experiences"), result.get("trained")
        domains = result.get("domains") or experiences
        if trained is None and experiences is not None and domains == experiences:
            trained = range(len(experiences))
        within = map(_within_point, result.get("within", ()))
        return cls.from_rows(
            rows,
            result.get("R_init") or None,
            trained=None if trained is None else trained[: len(rows)],
            domains=domains,
            experiences=None if experiences is None else experiences[: len(rows)],
            measure=result.get("measure", "accuracy"),
            within=[point for point in within if point.experience < len(rows)],
            practises=(result.get("practises") or ())[: len(rows)],
        )

    def to_result(self) -> dict[str, Any]:
        """The keys of `result.json`, with None where not evaluated and -1 where no single domain was trained."""
        return {
            "R": [_with_none(row) for row in self.R],
            "R_init": _with_none(self.R_init),
            "experiences": list(self.experiences),
            "domains": list(self.domains),
            "trained": [-1 if domain is None else domain for domain in self.trained],
            "measure": self.measure,
            "within": [list(point) for point in self.within],
            "practises": [list(row) for row in self.practises],
        }

    @property
    def num_experiences(self) -> int:
        """T."""
        return int(self.R.shape[0])

    @property
    def num_domains(self) -> int:
        """D."""
        return int(self.R.shape[1])

    @cached_property
    def taught(self) -> BoolArray:
        """[T, D], what experience i is there to teach: its own domain, or where it has none all that it practises."""
        own = [() if domain is None else (domain,) for domain in self.trained]
        return self._cells(one or all_of for one, all_of in zip(own, self.practises or own, strict=True))

    @cached_property
    def practised(self) -> BoolArray:
        """[T, D], whether experience i trains on rows of domain j: what it teaches, and what it rehearses."""
        practised = self.taught | self._cells(self.practises) if self.practises else self.taught
        practised.setflags(write=False)
        return practised

    def _cells(self, columns: Iterable[Sequence[int]]) -> BoolArray:
        """[T, D], True in the given columns of each row."""
        cells = np.zeros((self.num_experiences, self.num_domains), dtype=bool)
        rows = [(i, j) for i, row in enumerate(columns) for j in row]
        if rows:
            cells[tuple(np.array(rows).T)] = True
        cells.setflags(write=False)
        return cells

    @property
    def recurs(self) -> bool:
        """Whether a domain comes back: taught, or rehearsed by the stream, in more than one experience."""
        return bool((self.practised.sum(axis=0) > 1).any())

    @cached_property
    def first_visit(self) -> IntArray:
        """[D], the experience that taught each domain first; T for a domain that was never taught."""
        taught = self.taught
        return np.where(taught.any(axis=0), _first_true(taught), self.num_experiences)

    @property
    def visited(self) -> BoolArray:
        """[T, D], whether domain j was taught by experience i or before."""
        return np.arange(self.num_experiences)[:, None] >= self.first_visit

    @property
    def seen(self) -> BoolArray:
        """[T, D], `visited`, but all True as long as no experience has taught a single domain.

        A joint run trains on everything at once.
        """
        return self.visited | ~self.visited.any(axis=1, keepdims=True)

    @property
    def earlier(self) -> BoolArray:
        """[D], the domains first visited before the last experience: those that can have been forgotten."""
        return self.first_visit < self.num_experiences - 1

    @property
    def learned(self) -> FloatArray:
        """[D], R[j, j] of the literature: the measure at the end of the first visit; NaN for a domain never taught."""
        values = np.full(self.num_domains, np.nan)
        (taught,) = np.nonzero(self.first_visit < self.num_experiences)
        values[taught] = self.R[self.first_visit[taught], taught]
        return values

    @property
    def last(self) -> FloatArray:
        """[D], the last row of R; all NaN while no experience has ended."""
        return self.R[-1] if self.num_experiences else np.full(self.num_domains, np.nan)

    def worsening(self, before: ArrayLike, after: ArrayLike) -> FloatArray:
        """How much worse `after` is than `before`: the fall of an accuracy, the rise of a loss."""
        change = np.subtract(before, after)
        return change if self.measure == "accuracy" else -change

    def best(self, values: ArrayLike) -> FloatArray:
        """The best evaluated value along the first axis; NaN where there is none."""
        reduce = np.fmax.reduce if self.measure == "accuracy" else np.fmin.reduce
        return reduce(values, axis=0, initial=np.nan)

    def worst(self, values: ArrayLike) -> FloatArray:
        """The worst evaluated value along the first axis; NaN where there is none."""
        reduce = np.fmin.reduce if self.measure == "accuracy" else np.fmax.reduce
        return reduce(values, axis=0, initial=np.nan)

    def upto(self, num_experiences: int) -> EvalTable:
        """The table as it stood when `num_experiences` experiences had ended."""
        return replace(
            self,
            R=self.R[:num_experiences],
            trained=self.trained[:num_experiences],
            experiences=self.experiences[:num_experiences],
            within=tuple(point for point in self.within if point.experience < num_experiences),
            practises=self.practises[:num_experiences],
        )

    def mask_untrained(self) -> EvalTable:
        """Forget what was measured on a domain before its first visit.

        For a backbone with one head per task: an untrained head answers by chance, which says nothing of transfer.
        What needs those cells (FWT) becomes NaN.

        Example:
            >>> EvalTable.from_rows([[0.9, 0.5], [0.7, 0.8]], R_init=[0.5, 0.5]).mask_untrained().R.tolist()
            [[0.9, nan], [0.7, 0.8]]
        """
        return replace(
            self,
            R=np.where(self.visited, self.R, np.nan),
            R_init=np.full(self.num_domains, np.nan),
            within=tuple(point for point in self.within if self.visited[point.experience, point.domain]),
        )


def _first_true(flags: BoolArray) -> IntArray:
    """Row of the first True of each column; 0 where there is none."""
    return flags.argmax(axis=0) if len(flags) else np.zeros(flags.shape[1], dtype=np.int64)


def _numbers(name: str, values: Any, num_axes: int) -> FloatArray:
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must hold numbers and nulls only: {error}") from None
    if array.ndim != num_axes:
        raise ValueError(f"{name} has {array.ndim} axes; expected {num_axes}")
    return np.where(np.isfinite(array), array, np.nan)


def _within_point(entry: Sequence[float]) -> WithinPoint:
    try:
        experience, step, domain, value = entry
    except (TypeError, ValueError):
        raise ValueError(f"within holds {entry!r}; expected (experience, step, domain, value)") from None
    return WithinPoint(int(experience), int(step), int(domain), float(_numbers("within", value, num_axes=0)))


def _with_none(values: FloatArray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _require_length(name: str, values: Sized, expected: int, per: str) -> None:
    if len(values) != expected:
        raise ValueError(f"{name} has {len(values)} entries; expected {expected}, one per {per}")


def _require_index(name: str, index: int, size: int, noun: str) -> None:
    if not 0 <= index < size:
        raise ValueError(f"{name} points at {noun} {index}; there are {size}, counted from 0")
