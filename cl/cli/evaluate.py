"""Measure a run's model on multiple-choice and generation tasks through lm-eval, offline.

Usage: cl evaluate RUN_DIR tasks=FOLDER [limit=N] [num_fewshot=K] [out=FILE]

  cl evaluate RUN_DIR tasks=my_tasks               every YAML file in the folder is a task, with its data beside it
  cl evaluate RUN_DIR tasks=my_tasks num_fewshot=3 limit=200

Takes the newest checkpoint of a run on text, finished or not. The numbers are printed, written to RUN_DIR/tasks.json
and added to the run's journal and to its MLflow run, as lm_eval/TASK/METRIC (with num_fewshot and limit in the name
where given) at the number of finished experiences. With out=FILE they are written there only, and the run stays as it
is.
Tasks that would run code of theirs are refused. Needs `pip install -e '.[lm-eval]'`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cl.cli.branch import options
from cl.cli.folder import saved_config
from cl.cli.resume import trained
from cl.core import Batch, UserError
from cl.evaluation import evaluating, predict
from cl.result import write_text


def main(words: list[str]) -> int:
    """Evaluate the run in the folder given."""
    from cl.interop import harness

    folder, found = options(words, "evaluate", ("tasks", "limit", "num_fewshot", "out"))
    for name, smallest in (("limit", 1), ("num_fewshot", 0)):
        value = found.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < smallest):
            raise UserError(f"{name} is {value!r}; it must be an integer of at least {smallest}")
    if not found.get("tasks"):
        raise UserError("`cl evaluate` needs tasks=FOLDER, a folder with lm-eval's YAML files and their data")
    tasks = harness.read_tasks(Path(found["tasks"]))
    run_dir = Path(folder)
    trainer, experiences, _ = trained(run_dir)
    state = trainer.state
    codec = state.stream.codec
    if codec is None:
        raise UserError(f"stream {state.info.name} has no text; lm-eval asks in words")

    def answer(tokens: torch.Tensor) -> torch.Tensor:
        none = torch.zeros(len(tokens), dtype=torch.long)
        batch = Batch(tokens, torch.zeros_like(tokens), none, torch.arange(len(tokens))).to(state.device)
        return predict(state, trainer.strategies, batch).logits

    with evaluating(state.model):
        size = min(trainer.config.eval_batch_size, 64)
        scores = harness.evaluate(
            answer, codec, state.info.input_shape[0], tasks, size, found.get("limit"), found.get("num_fewshot")
        )
    shots = {name: found[name] for name in ("num_fewshot", "limit") if found.get(name) is not None}
    out = Path(found.get("out") or run_dir / "tasks.json")
    report = {"step": int(state.step), "experiences": experiences, **shots, "tasks": scores}
    write_text(out, json.dumps(report, indent=1) + "\n")
    console = Console(markup=False)
    show(console, scores, int(state.step), out)
    if not found.get("out"):
        said = record(run_dir, scores, experiences, "_".join(f"{name}_{value}" for name, value in shots.items()))
        console.print(said, highlight=False, soft_wrap=True)
    return 0


def record(run_dir: Path, scores: Mapping[str, Mapping[str, float]], experiences: int, remark: str) -> str:
    """Add the scores to the run's journal and to the store that it was logged to; returns what happened."""
    from cl.tracking.scores import keep_points, score_points, send

    keep_points(run_dir, score_points(scores, experiences, remark))
    return send(run_dir, (saved_config(run_dir).get("tracking") or {}).get("uri"))


def show(console: Console, scores: Mapping[str, Mapping[str, float]], step: int, out: Path) -> None:
    """A line per task and metric."""
    table: Any = Table(title=f"lm-eval after {step} steps", title_justify="left", box=None, pad_edge=False)
    for name in ("task", "metric", "value"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for task, values in scores.items():
        for metric, value in values.items():
            table.add_row(task, metric, f"{value:.4f}")
    console.print(table)
    console.print(f"written to {out}", highlight=False, soft_wrap=True)
