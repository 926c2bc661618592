"""Go on from a run's checkpoint under a new learning-rate schedule, in a folder of its own.

Usage: cl rewarm RUN_DIR schedule=NAME [schedule.OPTION=VALUE] [optimizer.lr=LR] [BUDGET] [stream=NAME ...] [out=FOLDER]

  cl rewarm RUN_DIR schedule=cosine schedule.warmup_frac=0.01           the rest of an unfinished stream
  cl rewarm RUN_DIR schedule=cosine trainer.max_steps=900               the last experience of a finished one, longer
  cl rewarm RUN_DIR schedule=cosine stream=text_domains stream.domains=...   another stream, from its beginning
  cl rewarm RUN_DIR schedule=cosine stream=mine 'hydra.searchpath=[file://conf]'   a stream of one's own

The new schedule begins at the checkpoint and spans what is trained from there on. Weights and optimizer state are
taken over; on the rest of the same stream the strategies and their buffers are too, while on another stream they begin
anew and R is measured before its first step. The folder that it came from is recorded in `config.yaml`.
"""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console

from cl.branch import longer
from cl.cli.branch import BUDGETS, SEARCHPATH, Origin, budget_in, changed, options, origin_of, start, tell
from cl.cli.run import run_with_progress
from cl.core import UserError


def main(words: list[str]) -> int:
    """Re-warm the run in the folder given."""
    allowed = ("schedule", "schedule.", "optimizer.lr", *BUDGETS, "stream", "stream.", SEARCHPATH, "out")
    folder, found = options(words, "rewarm", allowed)
    if not any(name.split(".")[0] == "schedule" for name in found):
        raise UserError(
            "`cl rewarm` needs a new schedule: schedule=NAME or schedule.OPTION=VALUE; see `cl list schedules`"
        )
    origin = origin_of(folder)
    lr, old_lr = found.get("optimizer.lr"), origin.config["optimizer"].get("lr")
    is_rate = isinstance(lr, int | float) and not isinstance(lr, bool) and 0 < lr < math.inf
    if lr is not None and not (is_rate and old_lr):
        raise UserError(
            f"optimizer.lr is {lr!r}; it must be positive and finite, and the run's own known (it is {old_lr!r})"
        )
    rate = 1.0 if lr is None else lr / old_lr
    config = changed(origin.config, found, ("schedule", "optimizer", "stream"))
    config["trainer"] = {**config["trainer"], "schedule_start": origin.step, "schedule_steps": None} | budget_in(found)
    if any(name.split(".")[0] == "stream" for name in found):
        return _on_another_stream(origin, config, found, rate)
    steps, payload = origin.steps, origin.payload
    if budget_in(found):
        steps = longer(steps, origin.wanted(budget_in(found)), payload["position"])
        config["trainer"] |= {"epochs": None, "max_tokens": None, "max_steps": steps}
        payload = origin.reopened() if origin.is_over else payload
    elif origin.is_over:
        raise UserError(
            f"{origin.run_dir} is done: say what to train on, another stream (stream=NAME) or a larger budget of the "
            "last experience (trainer.max_steps=STEPS)"
        )
    before, after = origin.factor(origin.config, origin.steps), origin.factor(config, steps)
    run_dir = start(origin, config, payload, found.get("out"), "rewarm", rate)
    _tell(origin, config, f"the remaining {sum(steps) - origin.step} steps", str(run_dir))
    tell(Console(markup=False), f"the factor of the next step is {after:.4g}, it was {before:.4g}")
    return int(run_with_progress(config, run_dir, resume=True).status != "done")


def _on_another_stream(origin: Origin, config: dict[str, Any], found: dict[str, Any], rate: float) -> int:
    """A run of its own whose first weights and optimizer state are the other's."""
    from cl.cli.folder import START

    config["trainer"]["schedule_start"] = 0
    run_dir = start(origin, config, origin.payload, found.get("out"), "rewarm", rate, is_anew=True)
    # not a checkpoint of this run, which has taken no step yet
    (run_dir / "checkpoints" / origin.path.name).replace(run_dir / START)
    _tell(origin, config, f"stream {str(config['stream']['_target_']).rpartition('.')[2]}", str(run_dir))
    return int(run_with_progress(config, run_dir).status != "done")


def _tell(origin: Origin, config: dict[str, Any], what: str, run_dir: str) -> None:
    name = str(config["schedule"]["_target_"]).rpartition(".")[2]
    sentence = f"{origin.run_dir} goes on from step {origin.step} in {run_dir}: schedule {name} over {what}"
    tell(Console(markup=False), sentence)
