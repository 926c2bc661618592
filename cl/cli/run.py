"""Train one composition of strategies on a stream.

Usage: cl run [name=value ...] [Hydra's flags]

  cl run stream=permuted_mnist strategy=replay backbone=mlp seed=0 data.root=DATA
  cl run 'strategy=[derpp,ewc]' strategy.derpp.alpha=0.2      two strategies, in this order
  cl run +experiment=NAME                                     a ready experiment
  cl run debug=tiny                                           the same, in seconds
  cl run out=FOLDER                                           the folder of the run, or of all runs of a sweep
  cl run -m strategy=naive,replay seed=0,1,2                  Hydra's sweep
  cl run --cfg job                                            the composed config
  torchrun --nproc_per_node=2 -m cl run trainer.parallel=ddp  one run in several processes

A Hydra application: `cl run --hydra-help` shows its flags, `cl list` the names to choose from. Every option of a
class can be set, whether its config file mentions it or not: strategy.replay.capacity=500.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from cl import distributed
from cl.cli.compose import check_folders, import_from_here, one_sentence, open_signatures, plain
from cl.cli.console import Pulse, matrix_table, matrix_title, metrics_line, progress_bars, progress_line, ui_command
from cl.cli.execute import execute, remove_if_empty
from cl.core import UserError
from cl.result import Result

_outcomes: list[Result | Exception] = []
_there_before: set[Path] = set()


@hydra.main(config_path="pkg://configs", config_name="run", version_base="1.3")
def _app(config: DictConfig) -> None:
    distributed.start()
    # each process has read the clock for itself
    run_dir = Path(distributed.agreed(HydraConfig.get().runtime.output_dir))
    if run_dir.is_relative_to(Path.cwd()):
        run_dir = run_dir.relative_to(Path.cwd())
    try:
        _outcomes.append(run_with_progress(plain(config), run_dir))
    except Exception as error:
        # Hydra would print a paragraph of its own; `main` raises it again
        _outcomes.append(error)
    finally:
        remove_if_empty(run_dir, run_dir.resolve() in _there_before)
        if distributed.rank():
            remove_if_empty(Path(HydraConfig.get().runtime.output_dir))


def main(words: list[str]) -> int:
    """Run Hydra's application; 0 when every run of it is done."""
    import_from_here()
    # without this, Hydra reports errors of the request in paragraphs and exits with 1
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # argparse wants flags and overrides unmixed
    settings = [word for word in words if "=" in word and not word.startswith("-")]
    check_folders(_config_dirs(words))
    named = [text for word in settings for text in _in_hydras_words(word)]
    sys.argv = ["cl run", *(word for word in words if word not in settings), *open_signatures(named)]
    if distributed.rank():
        sys.argv.append("hydra/job_logging=disabled")
    _check_flags(sys.argv[1:])
    _outcomes.clear()
    try:
        with one_sentence():
            _app()
    except OSError as error:
        if error.filename is None:  # no folder is in the way: nobody reads what Hydra prints
            raise
        raise UserError(f"the run folder {error.filename} cannot be made: {error.strerror}") from None
    for outcome in _outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return int(any(outcome.status != "done" for outcome in _outcomes if isinstance(outcome, Result)))


def _check_flags(words: Sequence[str]) -> None:
    """Read the words as Hydra is going to, which prints its whole usage before the sentence on a wrong flag.

    Raises:
        UserError: a flag that it does not have, or a value that the flag does not take.
    """

    def refuse(sentence: str) -> NoReturn:
        raise UserError(f"{sentence}; `cl run --hydra-help` shows Hydra's flags")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args(words)


def _config_dirs(words: Sequence[str]) -> list[str]:
    """Folders with configs of the user's own.

    Example:
        >>> _config_dirs(["--config-dir", "conf", "strategy=mine"]), _config_dirs(["--config-dir=conf"])
        (['conf'], ['conf'])
    """
    flags = [(*word.partition("="), after) for word, after in zip(words, [*words[1:], ""], strict=True)]
    return [folder or after for flag, _, folder, after in flags if flag in ("--config-dir", "-cd")]


def _in_hydras_words(word: str) -> list[str]:
    """A run's folder is called `out` as everywhere else, and by Hydra by two names."""
    name, _, folder = word.partition("=")
    if name == "out" and Path(folder).expanduser().is_dir():
        _there_before.add(Path(folder).expanduser().resolve())
    return [f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}"] if name == "out" else [word]


def run_with_progress(config: dict[str, Any], run_dir: Path, resume: bool = False) -> Result:
    """One run with a progress bar, its table and its folder printed."""
    console = Console(quiet=distributed.rank() > 0, markup=False)
    name = "+".join(config.get("strategy") or ["run"])
    with progress_bars(console) as bars:
        task = bars.add_task("starting", name=name, total=None)

        def show(message: dict[str, Any]) -> None:
            bars.update(task, total=message["total"], completed=message["done"], description=progress_line(message))

        suite = str(config.get("suite", ""))
        result = execute(config, run_dir, resume=resume, observers=[Pulse(show)], suite=suite, say=bars.console.print)
    show_result(console, result, run_dir, (config.get("tracking") or {}).get("uri"))
    return result


def show_result(console: Console, result: Result, run_dir: Path, uri: str | None = None) -> None:
    """R, its summary, and where everything is; `uri` of the store where the config names one."""
    if result.R:
        console.print(matrix_title(result), highlight=False, soft_wrap=True)
        console.print(matrix_table(result))
        console.print(metrics_line(result), highlight=False)
    console.print(f"run folder: {run_dir}", highlight=False, soft_wrap=True)
    if result.mlflow_run_id:
        command = ui_command(run_dir, result.mlflow_run_id, uri)
        console.print(f"forgetting curves: `{command}`", highlight=False, soft_wrap=True)
