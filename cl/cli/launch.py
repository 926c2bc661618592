"""A comparison through one of Hydra's launchers: a sweep of `cl run` over the seeds for each composition."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from rich.console import Console

from cl.cli.compare import Plan
from cl.cli.folder import is_done
from cl.core import UserError

LAUNCHERS = {"joblib": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit"}
"""Launcher -> plugin: the package `hydra-<plugin>-launcher` with the module `hydra_<plugin>_launcher`."""


def launch(plan: Plan, launcher: str, console: Console) -> dict[str, str]:
    """Run what is not done; returns the sentence of each run that did not finish.

    A cluster's launcher gets all compositions at once; a local one gets them one after another, because each sweep
    already fills the machine.
    """
    todo: dict[str, list[int]] = {}
    for folder, config in plan.runs.items():
        if not is_done(folder, config):
            todo.setdefault(folder.parent.name, []).append(config["seed"])
    commands = {label: sweep(plan, label, seeds, launcher) for label, seeds in todo.items()}
    processes: dict[str, subprocess.Popen[bytes]] = {}
    for label, command in commands.items():
        console.print(f"{label}: {' '.join(command[2:])}", highlight=False, markup=False, soft_wrap=True)
        processes[label] = subprocess.Popen(command)
        if launcher == "joblib":
            processes[label].wait()
    for process in processes.values():
        process.wait()
    return {str(folder): "did not finish" for folder, config in plan.runs.items() if not is_done(folder, config)}


def require_launcher(launcher: Any) -> None:
    """Raise `UserError` where there is no such launcher, or its plugin is not installed."""
    if launcher not in list(LAUNCHERS):
        raise UserError(f"launcher is {launcher!r}; it must be local, {', '.join(LAUNCHERS)}")
    plugin = LAUNCHERS[launcher]
    if find_spec(f"hydra_plugins.hydra_{plugin}_launcher") is None:
        raise UserError(
            f"launcher is {launcher!r}, which needs the package hydra-{plugin}-launcher; install it, or take another: "
            f"local, {', '.join(LAUNCHERS)}"
        )


def sweep(plan: Plan, label: str, seeds: Sequence[int], launcher: str) -> list[str]:
    """The command that runs one composition on all its seeds."""
    own: Mapping[str, Any] = {
        "seed": ",".join(map(str, seeds)),
        "hydra/launcher": launcher,
        "hydra.sweep.dir": plan.out / label,
        "hydra.sweep.subdir": "seed-${seed}",
        "+suite": plan.suite,
    }
    if launcher == "joblib":
        own = {**own, "hydra.launcher.n_jobs": plan.jobs}
    return [
        sys.executable,
        "-m",
        "cl",
        "run",
        "-m",
        *(f"{key}={value}" for key, value in own.items()),
        *plan.words[label],
    ]
