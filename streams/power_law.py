"""Rehearsal by the environment: what was learnt comes back, by a schedule that decays with the time since.

An environment around any stream: in phase t the learner gets the N rows of experience t, and n[j, t] rows of every
earlier experience j. The matrix n is all there is to a schedule; `counts` computes it.

Source: Gandhi et al., "Natural Mitigation of Catastrophic Interference: Continual Learning in Power-Law Learning
Environments", 2024 (arXiv 2401.10393), and archana53/power-law-for-CI (environments.py, run.py), which holds its
schedules. The restricted `power_law` of that code is a growing power of position and no decaying power of lag;
`lag_power` is the latter, and with an offset the form (lag + c)^-a of the memory literature.
Differences: fractions of rows are apportioned by largest remainders, so that every fixed-budget schedule rehearses
exactly the same number of rows (the code rounds down, and its schedules differ by a few rows per phase).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from cl.core import Data, Experience, Setting, Stream, UserError
from cl.seeding import derive_seed
from streams._mixed import draw, passes, require_base
from streams._settings import require_choice, require_integer

SETTINGS = (Setting.CLASS_INCREMENTAL, Setting.DOMAIN_INCREMENTAL)

SHAPES: dict[str, dict[str, float]] = {
    "power_law": {"exponent": 4.0, "offset": 10.0},
    "lag_power": {"exponent": 1.0, "offset": 0.0},
    "exponential": {"scale": 1.0},
    "uniform": {},
    "power_law_unrestricted": {"exponent": 5.6, "offset": 10.0},
    "joint": {},
    "sequential": {},
}
"""Schedules, and the parameters that each takes with their published values."""

BUDGETED = ("power_law", "lag_power", "exponential", "uniform")
"""Schedules that rehearse ratio * N rows in every phase; the others have totals of their own."""


def counts(
    kind: str,
    num_experiences: int,
    num_rows: int,
    ratio: float = 1.0,
    exponent: float | None = None,
    offset: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """Rows of each experience in each phase.

    n[t, t] = N, n[j, t] = 0 for j > t, and for the lag d = t - j >= 1

        sequential              0
        joint                   N
        power_law_unrestricted  N ((d + c) / c)^-a          a = 5.6, c = 10
        power_law               r N (j + c)^a / sum_j ...   a = 4,   c = 10   (position j, oldest 0)
        lag_power               r N (d + c)^-a / sum_j ...  a = 1,   c = 0
        exponential             r N exp(-d / s) / sum_j ... s = 1
        uniform                 r N / t

    Args:
        kind: one of the names above.
        num_rows: N, rows of a new experience.
        ratio: r in (0, 1], rehearsed rows per new row.
        exponent, offset, scale: a, c, s; the published value when None.

    Returns: (T, T) int64, row j, column t.
    Raises: UserError: a value outside its range, or one that the schedule does not have.
    Cost: O(T^2 log T).

    Example:
        >>> counts("uniform", 3, 100, ratio=0.5)
        tensor([[100,  50,  25],
                [  0, 100,  25],
                [  0,   0, 100]])
    """
    shape = _shape(kind, ratio, {"exponent": exponent, "offset": offset, "scale": scale})
    n = torch.zeros(num_experiences, num_experiences, dtype=torch.int64)
    budget = math.floor(ratio * num_rows + 1e-9)
    if budget < 1:
        raise UserError(
            f"stream.ratio is {ratio!r}, which rehearses none of {num_rows} rows; it must be at least 1 / {num_rows}"
        )
    for t in range(1, num_experiences):
        weights = _weights(kind, t, **shape)
        if kind in BUDGETED:
            n[:t, t] = _apportioned(weights, budget)
        else:
            n[:t, t] = (num_rows * weights).round().long()
    if kind in BUDGETED:
        rehearsed = n.sum(dim=0)[1:]
        assert (rehearsed == budget).all(), "schedules are compared at equal rehearsal"
    assert n.max() <= num_rows, "more rows than there are"
    n.fill_diagonal_(num_rows)
    return n


def _shape(kind: str, ratio: float, given: dict[str, float | None]) -> dict[str, float]:
    """The parameters of a schedule, checked."""
    require_choice("stream.kind", kind, tuple(SHAPES))
    if not _is_number(ratio) or not 0 < ratio <= 1:
        raise UserError(
            f"stream.ratio is {ratio!r}; it must be above 0 and at most 1, since an old experience has no more rows "
            "than a new one"
        )
    if ratio != 1 and kind not in BUDGETED:
        raise UserError(
            f"stream.ratio is {ratio!r}, which kind {kind} does not have; it must be 1 unless kind is one of "
            f"{', '.join(BUDGETED)}"
        )
    own = SHAPES[kind]
    for name, value in given.items():
        if value is None:
            continue
        if name not in own:
            known = ", ".join(own) or "no parameter"
            raise UserError(f"stream.{name} is {value!r}, which kind {kind} does not have; it has {known}")
        # position 0 has the weight c^a, so c = 0 would leave phase 1 with nothing to rehearse
        may_be_zero = name == "exponent" or (name == "offset" and kind == "lag_power")
        if not _is_number(value) or value < 0 or (value == 0 and not may_be_zero):
            least = "of at least 0" if may_be_zero else "above 0"
            raise UserError(f"stream.{name} is {value!r}; it must be a finite number {least}")
    return own | {name: float(value) for name, value in given.items() if value is not None}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _weights(kind: str, t: int, exponent: float = 0.0, offset: float = 0.0, scale: float = 1.0) -> Tensor:
    """(t,) weight of each earlier experience in phase t, oldest first; shares of N where the budget is not fixed."""
    position = torch.arange(t, dtype=torch.float64)
    lag = t - position
    if kind == "power_law":
        # relative to the newest, so that no power overflows
        return ((position + offset) / (t - 1 + offset)) ** exponent
    if kind == "lag_power":
        return ((lag + offset) / (1 + offset)) ** -exponent
    if kind == "power_law_unrestricted":
        return ((lag + offset) / offset) ** -exponent
    if kind == "exponential":
        return torch.exp((1 - lag) / scale)
    return torch.zeros(t, dtype=torch.float64) if kind == "sequential" else torch.ones(t, dtype=torch.float64)


def _apportioned(weights: Tensor, total: int) -> Tensor:
    """Whole numbers in proportion to the weights that add up to `total`: largest remainders, newer first at a tie.

    Example:
        >>> _apportioned(torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64), 7).tolist()
        [2, 2, 3]
    """
    quota = total * weights / weights.sum()
    whole = (quota + 1e-9).floor().long()
    missing = total - int(whole.sum())
    order = (quota - whole).flip(0).argsort(descending=True, stable=True)
    whole[len(weights) - 1 - order[:missing]] += 1
    return whole


def power_law(
    base: Stream,
    kind: str = "power_law",
    ratio: float = 1.0,
    exponent: float | None = None,
    offset: float | None = None,
    scale: float | None = None,
    num_rows: int | None = None,
    buffer_rows: int | None = None,
    seed: int = 0,
) -> Stream:
    """Put a stream into an environment that rehearses; rows are drawn when a phase is loaded.

    Every phase draws anew, without repetition, from all that an old experience showed: the memory is the complete past,
    so the fair opponent is replay of as many rows, and not a buffer of as many bytes.

    Args:
        base: class- or domain-incremental stream.
        kind: power_law, lag_power, exponential, uniform (ratio * N rehearsed rows per phase), power_law_unrestricted,
            joint or sequential.
        ratio: rehearsed rows per new row, in (0, 1].
        exponent, offset, scale: of the schedule, see `counts`; the published value when None.
        num_rows: N, rows that every experience shows; None takes as many as the smallest experience has.
        buffer_rows: redraw from a buffer of this many rows, an equal share for every past experience, filled once;
            rows then repeat where a schedule wants more. None redraws from everything.
        seed: of the choice of rows and of every draw.

    Raises:
        UserError: a value outside its range, or a base that cannot be mixed.
    """
    stream = require_base(base, "power_law", SETTINGS)
    smallest = min(experience.num_samples for experience in stream.experiences)
    if num_rows is not None:
        require_integer("stream.num_rows", num_rows)
        if num_rows > smallest:
            raise UserError(f"stream.num_rows is {num_rows}; the smallest experience of the base has {smallest} rows")
    T = len(stream.experiences)
    N = num_rows or smallest
    n = counts(kind, T, N, ratio, exponent, offset, scale)
    share = None if buffer_rows is None else _share(buffer_rows, T)
    phases = _Phases(tuple(stream.experiences), n, share, seed)
    return replace(
        stream,
        info=replace(stream.info, name=f"{kind}_{stream.info.name}"),
        experiences=[phases.experience(t) for t in range(T)],
        check_batch=None if buffer_rows is None else partial(_check_batch, buffer_rows=buffer_rows),
    )


def _share(buffer_rows: int, num_experiences: int) -> int:
    """Rows of each past experience in the buffer."""
    require_integer("stream.buffer_rows", buffer_rows)
    past = max(num_experiences - 1, 1)
    if buffer_rows < past:
        raise UserError(
            f"stream.buffer_rows is {buffer_rows}; it must be at least {past}, one row for each past experience"
        )
    return buffer_rows // past


def _check_batch(batch_size: int, buffer_rows: int) -> None:
    if buffer_rows < batch_size:
        raise UserError(
            f"stream.buffer_rows is {buffer_rows}, less than one batch; it must be at least "
            f"trainer.batch_size={batch_size}"
        )


@dataclass(frozen=True, eq=False)
class _Phases:
    """What all phases share.

    Args:
        n: (T, T) rows of experience j in phase t.
        share: rows of a past experience that can be redrawn; None for all it showed.
    """

    base: tuple[Experience, ...]
    n: Tensor
    share: int | None
    seed: int

    def experience(self, t: int) -> Experience:
        practised = [self.base[j] for j in self.n[: t + 1, t].nonzero().flatten().tolist()]
        return replace(
            self.base[t],
            load=partial(self.load, t),
            num_samples=int(self.n[:, t].sum()),
            classes=tuple(sorted({c for each in practised for c in each.classes})),
            practises=tuple(each.domain for each in practised),
        )

    def load(self, t: int) -> Data:
        """The rows of phase t: the new ones first, then the rehearsed ones, oldest first."""
        picks = [(t, self.shown(t))]
        for j in self.n[:t, t].nonzero().flatten().tolist():
            rows = self.shown(j)[: self.share]
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "rehearsed", j, t))
            picks.append((j, passes(rows, int(self.n[j, t]), generator)))
        return draw(self.base, picks)

    def shown(self, j: int) -> Tensor:
        """(N,) the rows of experience j that the learner ever sees, in an order drawn once."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "shown", j))
        return torch.randperm(self.base[j].num_samples, generator=generator)[: int(self.n[j, j])]
