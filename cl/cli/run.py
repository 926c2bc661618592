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
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict, read_write
from rich.console import Console

from cl import distributed
from cl.cli.compose import check_folders, composed, import_from_here, one_sentence, open_signatures, plain
from cl.cli.console import Pulse, matrix_table, matrix_title, metrics_line, progress_bars, progress_line, ui_command
from cl.cli.execute import execute
from cl.cli.folder import is_done, make_ready, remove_if_empty
from cl.core import UserError
from cl.result import Result

DIRS = ("hydra.run.dir=", "hydra.sweep.dir=")
NEEDS_HYDRA = re.compile(r"-|[+~]*hydra[./](?!(run|sweep)\.dir=|searchpath=)")
"""Words that ask for more of Hydra than a config: its flags, and settings of its own."""

# the log of a run is kept by `cl.cli.execute`: Hydra's would be there for a refused one too, and print what it holds
LOGGING = {"version": 1, "root": {"level": "INFO", "handlers": []}, "disable_existing_loggers": False}
ConfigStore.instance().store(group="hydra/job_logging", name="own", node=LOGGING, provider="cl")


@hydra.main(config_path="pkg://configs", config_name="run", version_base="1.3")
def _app(config: DictConfig) -> None:
    """A job of Hydra's, perhaps in a process of a launcher, where what it returns is lost and what it raises is not."""
    made = Path(HydraConfig.get().runtime.output_dir)
    try:
        result = _run(plain(config), made)
    finally:
        remove_if_empty(made)
    if result.status != "done":
        # Hydra would go on with the next run of the sweep
        raise KeyboardInterrupt


def main(words: list[str]) -> int:
    """Run what was asked for; 0 when every run of it is done."""
    import_from_here()
    check_folders(_config_dirs(words))
    words = _in_hydras_words(words)
    if not any(map(NEEDS_HYDRA.match, words)):
        return int(_run_alone(words).status != "done")
    # without this, Hydra reports errors of the request in paragraphs and exits with 1
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # argparse wants flags and overrides unmixed
    settings = [word for word in words if "=" in word and not word.startswith("-")]
    logs = [] if any("hydra/job_logging=" in word for word in settings) else ["hydra/job_logging=own"]
    flags = [word for word in words if word not in settings]
    _check_flags(flags)
    sys.argv = ["cl run", *flags, *open_signatures(settings), *logs]
    try:
        with one_sentence():
            _app()
    except OSError as error:
        if error.filename is None:  # no folder is in the way: nobody reads what Hydra prints
            raise
        raise UserError(f"the run folder {error.filename} cannot be made: {error.strerror}") from None
    return 0


def _run_alone(settings: Sequence[str]) -> Result:
    """One run without Hydra's application, which composes twice and makes the folder before anything is checked."""
    config = composed("run", settings, is_whole=True)
    with one_sentence(), read_write(config.hydra), open_dict(config.hydra):
        run_dir = Path(config.hydra.run.dir)
        config.hydra.runtime.output_dir = str(run_dir.absolute())
    # configs of one's own may ask for ${hydra:...}
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return _run(plain(config), run_dir)


def _run(config: dict[str, Any], run_dir: Path) -> Result:
    """A new run; of a comparison, it may be one that was stopped."""
    distributed.start()
    # each process has read the clock for itself
    run_dir = Path(distributed.agreed(str(run_dir)))
    if run_dir.is_relative_to(Path.cwd()):
        run_dir = run_dir.relative_to(Path.cwd())
    is_first, is_compared = distributed.rank() == 0, bool(config.get("suite"))
    goes_on = is_first and is_compared and not is_done(run_dir, config) and make_ready(run_dir)
    return run_with_progress(config, run_dir, resume=distributed.agreed(goes_on))


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


def _in_hydras_words(words: Sequence[str]) -> list[str]:
    """A run's folder is called `out` as everywhere else, and by Hydra by two names; left empty, it gets its own name.

    Example:
        >>> _in_hydras_words(["seed=1", "out=x"]), _in_hydras_words(["out=null"])
        (['seed=1', 'hydra.run.dir=x', 'hydra.sweep.dir=x'], [])
    """
    out = [word for word in words if word.startswith("out=")]
    others = [word for word in words if word not in out]
    if not out or out[0] in ("out=", "out=null"):
        return others
    if again := [word for word in others if word.lstrip("+").startswith(DIRS)]:
        raise UserError(f"{out[0]!r} and {again[0]!r} both name the folder; give one of them")
    return [*others, *(f"{name}{out[0].removeprefix('out=')}" for name in DIRS)]


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
