"""Give a run more budget on the same plan, in a folder of its own.

Usage: cl extend RUN_DIR trainer.max_steps=STEPS [stretch=true] [out=FOLDER]

  cl extend RUN_DIR trainer.max_steps=400                    or trainer.epochs=..., trainer.max_tokens=...
  cl extend RUN_DIR trainer.max_steps=400 stretch=true       the schedule is drawn anew over the longer run

The new budget counts for the experience that the run stands in (the last one, when it is done) and for those to come;
what is behind it stays. Data order, optimizer and strategies go on as if nothing had happened. So does the schedule: it
keeps the length that it was planned for, waits where a longer experience was to end and stays where all of it ends, so
that no learning rate rises unasked. With stretch=true it is the schedule of the longer run, and the rate may jump; the
command says from what to what. Where strategies closed the last experience, the run goes on from the checkpoint that
was written before they did; where there is none, one that had closed it for good is refused. A new schedule is
`cl rewarm`, the same plan `cl resume`.
"""

from __future__ import annotations

from rich.console import Console

from cl.branch import longer
from cl.cli.branch import BUDGETS, budget_in, options, origin_of, start, tell
from cl.cli.run import run_with_progress
from cl.core import UserError


def main(words: list[str]) -> int:
    """Extend the run in the folder given."""
    folder, found = options(words, "extend", (*BUDGETS, "stretch", "out"))
    budget, stretch = budget_in(found), found.get("stretch", False)
    if not budget:
        raise UserError(f"`cl extend` needs the new budget: one of {', '.join(f'{name}=N' for name in BUDGETS)}")
    if not isinstance(stretch, bool):
        raise UserError(f"stretch is {stretch!r}; it must be true or false")
    origin = origin_of(folder)
    steps = longer(origin.steps, origin.wanted(budget), origin.payload["position"])
    old = origin.trainer.schedule_steps
    kept = list(origin.steps if old is None else old)
    trainer = {"epochs": None, "max_tokens": None, "max_steps": steps, "schedule_steps": None if stretch else kept}
    config = origin.config | {"trainer": {**origin.config["trainer"], **trainer}}
    before, after = origin.factor(origin.config, origin.steps), origin.factor(config, steps)
    name = str(config["schedule"]["_target_"]).rpartition(".")[2]
    if after == 0 and not stretch:
        raise UserError(
            f"schedule {name} ended at a learning rate of 0, at which {sum(steps) - origin.step} more steps change "
            "nothing; stretch it with stretch=true, or give a new one with `cl rewarm`"
        )
    console = Console(markup=False)
    payload = origin.reopened() if origin.is_over else origin.payload
    run_dir = start(origin, config, payload, found.get("out"), "extend")
    tell(console, f"{origin.run_dir} goes on from step {origin.step} to {sum(steps)} in {run_dir}")
    how = "is stretched over the longer run" if stretch else f"keeps the {sum(kept)} steps it was planned for"
    tell(console, f"schedule {name} {how}; the factor of the next step is {after:.4g}, it was {before:.4g}")
    if origin.is_over and origin.closing():
        names = ", ".join(origin.closing())
        tell(console, f"note: {names} had closed the last experience at step {origin.step} and will close it again")
    return int(run_with_progress(config, run_dir, resume=True).status != "done")
