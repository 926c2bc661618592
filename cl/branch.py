"""From the checkpoint of one run to the start of another: what `cl extend`, `cl rewarm` and `cl fork_anneal` share.

A branch is a run folder of its own whose first checkpoint is the other run's last one, with its position and its books
adapted; going on is then the same as resuming. The folder that it came from is only read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cl.core import UserError


def reopened(payload: Mapping[str, Any], steps: Sequence[int]) -> dict[str, Any]:
    """A checkpoint that stands after an experience, moved back into it, at its last step.

    The row of R at its old end becomes a measurement inside the experience.

    Args:
        steps: optimizer steps that each experience was trained for.

    Raises:
        UserError: no experience was trained yet.
    """
    experience, steps_done = payload["position"]
    if steps_done:
        return dict(payload)
    if experience == 0:
        raise UserError("the run has taken no step yet; there is nothing to go on from")
    R, R_init, within, run_id = payload["ledger"]["result"]
    *R, row = R
    stage, step = experience - 1, payload["state"]["counters"][0]
    seen = [[stage, step, j, value] for j, value in enumerate(row) if value is not None]
    extra = [entry for entry in payload["ledger"].get("extra", []) if entry[1] != stage]
    ledger = payload["ledger"] | {"result": [R, R_init, [*within, *seen], run_id], "extra": extra}
    return {**payload, "ledger": ledger, "position": [stage, steps[stage]]}


def as_new_run(payload: Mapping[str, Any], rate: float = 1.0) -> dict[str, Any]:
    """A checkpoint for a run that is tracked on its own.

    Args:
        rate: factor of every base learning rate.
    """
    R, R_init, within, _ = payload["ledger"]["result"]
    optimizer = payload["state"]["optimizer"]
    groups = [{**group, "initial_lr": group["initial_lr"] * rate} for group in optimizer["param_groups"]]
    state = payload["state"] | {"optimizer": optimizer | {"param_groups": groups}}
    ledger = payload["ledger"] | {"result": [R, R_init, within, None]}
    kept = {key: value for key, value in payload.items() if key not in ("format", "fingerprint")}
    return kept | {"state": state, "ledger": ledger}


def longer(planned: Sequence[int], wanted: Sequence[int], position: Sequence[int]) -> list[int]:
    """Steps of each experience when those to come, and the one that the run stands in, get another budget.

    A run that is over stands at the end of its last experience.

    Raises:
        UserError: the budget gives some experience fewer steps than were planned, or none of them more.

    Example:
        >>> longer([10, 10, 10], [15, 15, 15], position=[1, 4]), longer([10, 10], [15, 15], position=[2, 0])
        ([10, 15, 15], [10, 15])
    """
    first = min(position[0], len(planned) - 1)
    steps = [*planned[:first], *wanted[first:]]
    if list(steps) == list(planned) or any(new < old for new, old in zip(steps, planned, strict=True)):
        raise UserError(
            f"the budget gives {list(wanted[first:])} steps to the experiences that are left, and "
            f"{list(planned[first:])} were planned; to extend is to give more"
        )
    return steps
