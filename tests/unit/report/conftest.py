"""Hand-made results: two experiences, numbers that can be checked in the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from cl.result import Result

MakeResult = Callable[..., Result]


@pytest.fixture
def make_result() -> MakeResult:
    def make(
        strategy: str = "naive",
        seed: int = 0,
        R: Sequence[Sequence[float | None]] = ((0.9, 0.1), (0.6, 0.8)),
        **changes: Any,
    ) -> Result:
        domains = [f"domain {j}" for j in range(len(R[0]))] if R else ["domain 0", "domain 1"]
        result = Result(
            stream="toy",
            strategy=strategy.split("+"),
            backbone="mlp",
            setting="domain_incremental",
            seed=seed,
            experiences=domains,
            domains=domains,
            trained=list(range(len(domains))),
            measure="accuracy",
            R=[list(row) for row in R],
            R_init=[0.1] * len(domains),
            cost={"forwards": 1000, "backwards": 500, "buffer_bytes": 0, "train_s": 2.0, "train_samples_per_s": 500.0},
            env={"python": "3.11.7", "device": "cpu", "versions": {"torch": "2.9"}},
            status="done",
        )
        for name, value in changes.items():
            setattr(result, name, value)
        return result

    return make


@pytest.fixture
def runs(make_result: MakeResult) -> list[Result]:
    """Two seeds of naive, replay and joint, and one failed run of ewc."""
    joint = {"experiences": ["everything"], "trained": [-1]}
    return [
        make_result("naive", 0, [[0.9, 0.1], [0.6, 0.8]]),
        make_result("naive", 1, [[0.8, 0.1], [0.4, 0.8]]),
        make_result(
            "replay", 0, [[0.9, 0.1], [0.8, 0.8]], cost={"forwards": 2000, "backwards": 1000, "buffer_bytes": 2048}
        ),
        make_result(
            "replay", 1, [[0.8, 0.1], [0.7, 0.9]], cost={"forwards": 2000, "backwards": 1000, "buffer_bytes": 2048}
        ),
        make_result("joint", 0, [[0.95, 0.85]], **joint),
        make_result("joint", 1, [[0.95, 0.95]], **joint),
        make_result("ewc", 0, [[0.9, 0.2]], status="failed", error="the loss is not finite at step 7"),
    ]
