"""Carry out one run in its folder: check, train, record; the same for `run`, `resume` and `compare`."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from cl.checkpoint import load_start
from cl.cli import build, lock
from cl.cli.allocation import keep_freed_memory
from cl.cli.folder import CONFIG, LOG, RESULT, START, require_own
from cl.core import UserError
from cl.distributed import rank
from cl.observe import Observer
from cl.result import Result, write_text


def choices(config: Mapping[str, Any], backbone: str) -> dict[str, Any]:
    """Names that a run is reported under."""
    return {"strategy": build.strategy_names(config), "backbone": backbone}


def execute(
    config: Mapping[str, Any],
    run_dir: Path,
    *,
    resume: bool = False,
    observers: Sequence[Observer] = (),
    suite: str = "",
    say: Callable[[str], None] = print,
) -> Result:
    """Train one run in `run_dir`, from the start or from its last checkpoint.

    Args:
        config: composed and resolved (`cl.cli.compose.plain`).
        suite: id of the comparison that the run belongs to.
        say: told the sentences that a person should read.

    Raises:
        UserError: before anything is written, when the request cannot be carried out.
    """
    keep_freed_memory()
    is_first = rank() == 0
    if is_first:
        lock.require_free(run_dir)
    if not resume and is_first and (run_dir / RESULT).exists():
        raise UserError(f"{run_dir} already holds a run; go on with `cl resume {run_dir}` or choose another folder")
    if not resume and is_first:
        require_own(run_dir)
    recorders = _recorders(config, run_dir, suite) if is_first else []
    names = choices(config, _backbone_name(config))
    with warnings.catch_warnings(record=True) as early:
        trainer = build.make_trainer(config, names, run_dir, [*observers, *recorders])
    with _writing(run_dir, "made"):
        run_dir.mkdir(parents=True, exist_ok=True)
    with lock.alone(run_dir) if is_first else nullcontext():
        if not resume and is_first:
            from omegaconf import OmegaConf

            with _writing(run_dir):
                write_text(run_dir / CONFIG, OmegaConf.to_yaml(OmegaConf.create(dict(config))))
        if not resume and (run_dir / START).exists():
            load_start(run_dir / START, trainer.state)
        with _logging_to(run_dir / LOG, say) if is_first else nullcontext(), _stopping(trainer, say):
            for warning in early if is_first else ():  # there was no log yet
                warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)
            result = trainer.run(resume=resume)
        if result.status == "done" and len(recorders) > 1:
            _send_figures(run_dir, recorders)
    if result.status == "interrupted":
        say(f"interrupted; go on with `cl resume {run_dir}`")
    return result


def _backbone_name(config: Mapping[str, Any]) -> str:
    build.target_of("backbone", config.get("backbone"))  # a wrong one has no name
    return str(config["backbone"]["_target_"]).split(".")[-2]


def _recorders(config: Mapping[str, Any], run_dir: Path, suite: str) -> list[Any]:
    """The journal of the run, and its tracker when one is chosen and answers."""
    from cl.tracking import Journal, check_store

    node = config.get("tracking") or {}
    if not node.get("_target_"):
        return [Journal(run_dir, suite=suite)]
    tracker = build.make("tracking", dict(node) | {"run_dir": run_dir, "suite": suite})
    check_store(tracker.uri)
    # points on another grid could neither replace nor continue those that a store lost
    journal = Journal(run_dir, experiment=tracker.experiment, suite=suite, every_steps=tracker.every_steps)
    # the tracker first: the journal keeps the id of its run
    return [tracker, journal]


def _send_figures(run_dir: Path, recorders: Sequence[Any]) -> None:
    """Draw the run's own report into its folder and let the tracker send it."""
    from cl.report import write_report

    write_report(run_dir, run_dir)
    for recorder in recorders:
        if hasattr(recorder, "upload"):
            recorder.upload()


@contextmanager
def _writing(run_dir: Path, done: str = "written") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"the run folder {run_dir} cannot be {done}: {error.strerror or error}") from None


@contextmanager
def _logging_to(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Log lines go to the run's folder; warnings too, and a person reads them as one line each."""
    handler = logging.FileHandler(path)
    # a full disk stops the run with a sentence; logging would print a traceback for every line besides
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    aloud = logging.Handler(logging.WARNING)
    aloud.emit = lambda record: say(f"note: {record.getMessage()}")  # type: ignore[method-assign]
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.addHandler(aloud)
    root.setLevel(logging.INFO)

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        # to the file alone: a person is told below
        what = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"}
        handler.handle(logging.makeLogRecord(what | {"msg": f"{category.__name__}: {message}"}))
        if issubclass(category, UserWarning):
            say(f"note: {message}")

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    except Exception as error:
        # the way to a mistake is for the file alone; a person reads one sentence
        how = {"name": __name__, "levelno": logging.ERROR, "levelname": "ERROR", "msg": "the run failed"}
        handler.handle(logging.makeLogRecord(how | {"exc_info": (type(error), error, error.__traceback__)}))
        raise
    finally:
        root.removeHandler(aloud)
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()


@contextmanager
def _stopping(trainer: Any, say: Callable[[str], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks for a checkpoint and an orderly end; the second stops at once."""

    def handler(number: int, frame: Any) -> None:
        trainer.request_stop()
        say("stopping after this step, with a checkpoint; press again to stop at once")
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
