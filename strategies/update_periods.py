"""Update periods: some parameters move at every step, others every C-th one, by all the gradients since.

    theta_s <- theta_s - Step(sum of the gradients of the last C_s steps)    at every C_s-th step
    theta_s <- theta_s                                                        at the steps between

What moves seldom remembers longer: a continuum of memories by parameter group, for any backbone and any optimizer. At
the steps between, the optimizer leaves a slow parameter alone altogether: no momentum, no weight decay. A step whose
float16 gradients overflowed, which updates nothing, is none of the C.

    strategy=update_periods 'strategy.update_periods.periods={*.mlp.levels.1.*: 4, *.mlp.levels.2.*: 16}'

Source: the continuum memory system of Behrouz et al., "Nested Learning: The Illusion of Deep Learning Architectures",
NeurIPS 2025. Differences: the gradients are those at the weights of each step; groups are named by patterns. Gradients
that have not come to a step when the run ends are dropped; the end of an experience drops none. Slow levels that give
fast ones their initial values (the nested variant) are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from cl.core import Batch, Setting, StreamInfo, UserError
from cl.hooks import Contract, Strategy
from cl.state import Cost, TrainState, tensor_bytes
from strategies._checks import require, require_choice, require_count
from strategies._quadratic import copied


class UpdatePeriods(Strategy):
    """Let parameters move at their own pace.

    Args:
        periods: C by pattern of names, as in a shell (* is anything); the first pattern that fits counts, and what
            none fits moves at every step. None lets all do.
        reduce: of the gradients of a period: their "sum", or their "mean".

    Raises:
        UserError: a pattern that fits no parameter.

    Cost: no rows; a copy of every slow parameter.
    """

    settings = frozenset(Setting)
    contract = Contract(
        toy={"periods": {"first.*": 3}},
        zero={"periods": {}},
        why_not_better="it sets how fast parameters move, which alone protects nothing",
    )

    def __init__(self, periods: Mapping[str, int] | None = None, reduce: str = "sum") -> None:
        periods = {} if periods is None else periods
        require(isinstance(periods, Mapping), "update_periods.periods", periods, "a period for each pattern of names")
        for pattern, period in periods.items():
            require_count(f"update_periods.periods: that of {pattern}", period)
        require_choice("update_periods.reduce", reduce, ("sum", "mean"))
        self.periods, self.reduce = dict(periods), reduce
        self.slow: dict[str, int] = {}
        self.gathered: dict[str, Tensor] = {}
        self.taken = 0
        """Steps since the run began, without those that overflowed."""

    def check_model(self, model: nn.Module, info: StreamInfo) -> None:
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        for pattern in self.periods:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UserError(
                    f"update_periods.periods names {pattern!r}, which fits no parameter; there are "
                    f"{', '.join(names[:4])}{' and more' if len(names) > 4 else ''}"
                )

    def on_run_start(self, state: TrainState) -> None:
        periods = self.periods.items()
        found = {name: next((p for q, p in periods if fnmatchcase(name, q)), 1) for name in state.parameters()}
        self.slow = {name: period for name, period in found.items() if period > 1}

    def on_resume(self, state: TrainState) -> None:
        self.on_run_start(state)

    def step(self, state: TrainState, batch: Batch, update: Callable[[], None]) -> None:
        self.taken += 1
        parameters = {name: p for name, p in state.parameters().items() if name in self.slow}
        for name, p in parameters.items():
            period = self.slow[name]
            if p.grad is not None:
                gathered = self.gathered.get(name)
                self.gathered[name] = p.grad.detach().clone() if gathered is None else gathered.add_(p.grad)
            p.grad = None
            if self.taken % period == 0 and name in self.gathered:
                total = self.gathered.pop(name)
                p.grad = total / period if self.reduce == "mean" else total
        update()

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        return Cost(buffer_bytes=tensor_bytes(self.gathered))

    def state_dict(self) -> dict[str, Any]:
        return {"gathered": self.gathered, "taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gathered, self.taken = copied(state["gathered"]), state["taken"]


def require_no_carry(other: Strategy, strategies: Sequence[Strategy], does: str) -> None:
    """No gradient of an experience may step, in the next one, a network that something was done to in between.

    Args:
        does: what another strategy does when an experience begins.

    Raises:
        UserError: update periods stand beside it.
    """
    for carrying in strategies:
        if isinstance(carrying, UpdatePeriods):
            raise UserError(
                f"{other.name} {does} the network when an experience begins, and {carrying.name} would still step it "
                "by gradients of the one before; leave one of the two out"
            )
