"""Measure what a run would be worth if its learning rate were annealed now, while the run itself goes on.

Usage: cl fork_anneal RUN_DIR [steps=N] [final=0.1] [out=FOLDER]

  cl fork_anneal RUN_DIR                     as many steps as 15 % of those taken
  cl fork_anneal RUN_DIR steps=200 final=0.01

Copies the newest checkpoint, trains the copy on the current experience while the rate falls exponentially from where
it is to `final` times the base rate, and measures it on every domain; the last row of R is the annealed model's. The
run in RUN_DIR is only read, so it may be running, and it goes on from its own weights and optimizer: `cl resume
RUN_DIR` gives what it would have given without the fork, bit for bit.
"""

from __future__ import annotations

from rich.console import Console

from cl.cli.branch import options, origin_of, start, tell
from cl.cli.run import run_with_progress
from cl.core import UserError

SHARE = 0.15


def main(words: list[str]) -> int:
    """Fork the run in the folder given."""
    folder, found = options(words, "fork_anneal", ("steps", "final", "out"))
    steps, final = found.get("steps"), found.get("final", 0.1)
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise UserError(f"steps is {steps!r}; it must be an integer of at least 1")
    if isinstance(final, bool) or not isinstance(final, int | float) or not 0 < final <= 1:
        raise UserError(f"final is {final!r}; it must be a number above 0, up to 1")
    origin = origin_of(folder)
    payload = origin.reopened()
    experience, steps_done = payload["position"]
    steps = steps or max(1, round(SHARE * origin.step))
    rate = origin.factor(origin.config, origin.steps)
    if rate == 0:
        raise UserError("the learning rate of the run is 0 where it stands; there is nothing left to anneal")
    course = {"warmup_frac": 0.0, "cooldown_frac": 0.0, "anneal_frac": 1.0, "constant": rate, "final": min(final, rate)}
    trainer = {
        **origin.config["trainer"],
        **{"epochs": None, "max_tokens": None, "max_steps": [*origin.steps[:experience], steps_done + steps]},
        **{"schedule_span": "run", "schedule_start": origin.step, "schedule_steps": None},
    }
    config = origin.config | {"schedule": {"_target_": "cl.schedules.infinite", **course}, "trainer": trainer}
    run_dir = start(origin, config, payload, found.get("out"), "anneal")
    console = Console(markup=False)
    tell(
        console, f"a copy of {origin.run_dir} is annealed from step {origin.step} to {origin.step + steps} in {run_dir}"
    )
    tell(console, f"its rate falls from {rate:.4g} to {min(final, rate):.4g} of the base rate")
    return int(run_with_progress(config, run_dir, resume=True).status != "done")
