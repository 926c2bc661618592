"""What a setting means for a stream: heads and task labels."""

from __future__ import annotations

from collections.abc import Sequence

from cl.core import Setting, UserError


def require_setting(value: str, allowed: Sequence[Setting]) -> Setting:
    if value not in list(allowed):
        raise UserError(f"stream.setting is {value!r}; this stream offers {', '.join(allowed)}")
    return Setting(value)


def require_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} is {value!r}; it must be an integer of at least 1")


def heads(setting: Setting, num_experiences: int) -> int:
    return num_experiences if setting == Setting.TASK_INCREMENTAL else 1


def task_of(setting: Setting, experience_id: int) -> int | None:
    return experience_id if setting == Setting.TASK_INCREMENTAL else None
