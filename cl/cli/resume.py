"""Go on with an interrupted run exactly where it stopped.

Usage: cl resume RUN_DIR [trainer.parallel=none|ddp|fsdp]

The run continues from its last good checkpoint, with the settings it was started with; the result is the same, bit
for bit on a CPU, as that of a run that was never interrupted. A finished run is left as it is.

Another number of processes may go on: `torchrun --nproc_per_node=2 -m cl resume RUN_DIR trainer.parallel=ddp`, with
the same losses up to rounding and dropout, which processes that are new draw anew. More steps are `cl extend`, another
learning-rate schedule is `cl rewarm`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from cl.cli import build
from cl.cli.compose import import_from_here
from cl.cli.folder import RESULT, is_over, saved_config
from cl.cli.run import run_with_progress, show_result
from cl.config import TrainerConfig
from cl.core import UserError
from cl.distributed import rank
from cl.result import Result


def main(words: list[str]) -> int:
    """Resume the run in the folder given."""
    chosen = [word.partition("=")[2] for word in words if word.startswith("trainer.parallel=")]
    folders = [word for word in words if not word.startswith("trainer.parallel=")]
    if len(folders) != 1:
        raise UserError(f"`cl resume` takes one run folder, got {len(folders)} words: {' '.join(folders) or 'none'}")
    import_from_here()
    run_dir = Path(folders[0])
    config = saved_config(run_dir)
    if chosen:
        config["trainer"]["parallel"] = TrainerConfig(parallel=chosen[-1]).parallel
    if (run_dir / RESULT).exists():
        try:
            result = Result.load(run_dir / RESULT)
        except ValueError as error:
            raise UserError(f"{error}; delete it, and the same command goes on from the checkpoint") from None
        if is_over(run_dir, result):
            console = Console(quiet=rank() > 0, markup=False)
            console.print("this run is done")
            show_result(console, result, run_dir, (config.get("tracking") or {}).get("uri"))
            return 0
    return int(run_with_progress(config, run_dir, resume=True).status != "done")


def trained(run_dir: Path) -> tuple[Any, int, int]:
    """A run as its newest checkpoint left it, in this process alone, to be looked at and not to go on.

    Returns:
        its trainer, the experience that comes next, and the steps done in it.
    """
    import_from_here()
    config = saved_config(run_dir)
    # how it was computed does not matter here
    config["trainer"] = {**config["trainer"], "parallel": "none", "compile": False}
    trainer = build.make_trainer(config, {}, run_dir, ())
    return trainer, *trainer.keeper.restore()
