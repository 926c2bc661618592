"""A run that goes on from another one's checkpoint under a plan of its own: what its three commands share."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from cl.branch import as_new_run, reopened
from cl.checkpoint import load_latest, load_open, load_start, save
from cl.cli import build
from cl.cli.compose import composed, import_from_here, plain
from cl.cli.folder import CONFIG, RESULT, require_own, saved_config
from cl.config import TrainerConfig
from cl.core import Stream, UserError
from cl.frozen import require_unchanged
from cl.hooks import overrides
from cl.result import write_text
from cl.schedules import fitted
from cl.setup import Span, experience_steps, planned

BUDGETS = ("trainer.epochs", "trainer.max_steps", "trainer.max_tokens")
SEARCHPATH = "hydra.searchpath"
"""Where groups of one's own are."""
FOLDERS = ("out", "to", "tasks")
"""Settings that are names of folders or files, whatever they look like."""
SCIENTIFIC = re.compile(r"[+-]?[0-9]+[eE][+-]?[0-9]+")


@dataclass
class Origin:
    """The run that another one goes on from.

    Args:
        stream: as its strategies planned it.
        steps: planned for each experience.
        path, payload: its newest checkpoint.
    """

    run_dir: Path
    config: dict[str, Any]
    stream: Stream
    strategies: Sequence[Any]
    steps: list[int]
    path: Path
    payload: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.payload["state"]["counters"][0])

    @property
    def is_over(self) -> bool:
        return int(self.payload["position"][0]) == len(self.steps)

    @cached_property
    def unclosed(self) -> dict[str, Any] | None:
        """The checkpoint of the same step before strategies closed the experience, where there is one."""
        is_inside = self.payload["position"][1] > 0
        return None if is_inside else load_open(self.path.parent, self.step, build.fingerprint(self.config))

    @property
    def trainer(self) -> TrainerConfig:
        made: TrainerConfig = build.make("trainer", self.config["trainer"])
        return made

    def wanted(self, budget: Mapping[str, Any]) -> list[int]:
        """Steps of each experience under another budget.

        Raises:
            UserError: a list of steps that is not as long as the run.
        """
        steps = budget["max_steps"]
        if isinstance(steps, list) and len(steps) != len(self.steps):
            raise UserError(
                f"trainer.max_steps lists the steps of {len(steps)} experiences, and the run has {len(self.steps)}"
            )
        return experience_steps(self.stream, replace(self.trainer, **budget))

    def factor(self, config: Mapping[str, Any], steps: Sequence[int]) -> float:
        """The learning-rate factor of a plan at the step that comes next."""
        trainer = build.make("trainer", config["trainer"])
        span = Span(steps, trainer)
        schedule = fitted(build.make("schedule", config["schedule"]), span.steps, trainer.schedule_span)
        experience, steps_done = self.payload["position"]
        if experience == len(steps):
            experience, steps_done = experience - 1, self.steps[-1]
        return schedule(*span.at(experience, steps_done))

    def reopened(self) -> dict[str, Any]:
        """The checkpoint, inside the experience that it stands in or behind.

        Raises:
            UserError: no step was taken yet, or a strategy cannot go on with an experience that has ended.
        """
        payload = reopened(self.payload, self.steps)
        if self.unclosed is not None:
            is_same = not any(each.moves_weights or overrides(each, "eval_forward") for each in self.strategies)
            # a row of R that was measured on what strategies had made of the network is none of this network's
            books = {name: payload["ledger"][name] for name in ("result", "course")} if is_same else {}
            return {**self.unclosed, "ledger": self.unclosed["ledger"] | books}
        for strategy in self.strategies:
            if payload["position"] != self.payload["position"] and strategy.seals:
                raise UserError(
                    f"{strategy.name} {strategy.seals} when experience {payload['position'][0]} ended, at step "
                    f"{self.step} of {self.run_dir}, and cannot train on it any longer; start a longer run, or go on "
                    "from one that stands inside an experience"
                )
        return payload

    def closing(self) -> list[str]:
        """Strategies that acted at the end of an experience, where the run stands at one and cannot go back."""
        if self.payload["position"][1] or self.unclosed is not None:
            return []
        return [strategy.name for strategy in self.strategies if overrides(strategy, "on_experience_end")]


def origin_of(folder: str) -> Origin:
    """Read a run and its newest checkpoint.

    Raises:
        UserError: it is no run folder, or it has no checkpoint that can be read.
    """
    import_from_here()
    run_dir = Path(folder)
    config = saved_config(run_dir)
    strategies = build.make_strategies(config)
    trainer = build.make("trainer", config["trainer"])
    stream = planned(build.make_stream(config), strategies, trainer)
    path, payload = load_latest(run_dir / "checkpoints", build.fingerprint(config))
    return Origin(run_dir, config, stream, strategies, experience_steps(stream, trainer), path, payload)


def options(words: Sequence[str], command: str, allowed: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The run folder and the settings of a command.

    Args:
        allowed: names of settings, or their beginnings where they end in a dot.

    Raises:
        UserError: another number of folders than one, or a setting that the command does not take.
    """
    import yaml

    folders = [word for word in words if "=" not in word]
    if len(folders) != 1:
        raise UserError(f"`cl {command}` takes one run folder, got {len(folders)}: {' '.join(folders) or 'none'}")
    found = {}
    for word in words:
        name, is_setting, text = word.partition("=")
        if not is_setting:
            continue
        if name not in allowed and not any(name.startswith(each) for each in allowed if each.endswith(".")):
            shown = ", ".join(f"{each}NAME" if each.endswith(".") else each for each in allowed)
            raise UserError(f"{name!r} is no setting of `cl {command}`; its settings are {shown}")
        try:
            if name in FOLDERS:
                found[name] = os.path.expanduser(text)
                continue
            # YAML reads 1e-3 as a word
            found[name] = float(text) if SCIENTIFIC.fullmatch(text) else yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"{word!r} cannot be read; write {name}=VALUE") from None
    return folders[0], found


def budget_in(found: Mapping[str, Any]) -> dict[str, Any]:
    """The budget among the settings of a command, as keys of the trainer; the other two kinds become null."""
    given = {name.partition(".")[2]: found[name] for name in BUDGETS if name in found}
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are given; a budget is exactly one of {', '.join(BUDGETS)}")
    return {"epochs": None, "max_steps": None, "max_tokens": None} | given if given else {}


def changed(config: Mapping[str, Any], found: Mapping[str, Any], groups: Sequence[str]) -> dict[str, Any]:
    """A config with settings of `groups` changed; `group=NAME` takes that option in place of the old node."""
    new = copy.deepcopy(dict(config))
    for group in groups:
        own = {name: value for name, value in found.items() if name == group or name.startswith(f"{group}.")}
        if group in own:
            if SEARCHPATH in found:
                own[SEARCHPATH] = found[SEARCHPATH]
            words = [f"{name}={_written(value)}" for name, value in own.items()]
            data = [f"data.root={config['data']['root']}"] if (config.get("data") or {}).get("root") else []
            new[group] = plain(composed("run", [*words, *data, f"seed={config['seed']}"])[group])
            continue
        for name, value in own.items():
            node = new[group]
            *path, key = name.split(".")[1:]
            for part in path:
                node = node.setdefault(part, {})
            node[key] = value
    return new


def _written(value: Any) -> str:
    import json

    return "null" if value is None else value if isinstance(value, str) else json.dumps(value)


def start(
    origin: Origin,
    config: dict[str, Any],
    payload: dict[str, Any],
    out: str | None,
    verb: str,
    rate: float = 1.0,
    is_anew: bool = False,
) -> Path:
    """Make the folder of the new run, from which `cl resume` goes on; returns it.

    Args:
        is_anew: only weights and the optimizer's state are taken over.

    Raises:
        UserError: it holds a run already, or other files, or the new run cannot be carried out.
    """
    folder = Path(out) if out else origin.run_dir.with_name(f"{origin.run_dir.resolve().name}-{verb}-{origin.step}")
    if (folder / CONFIG).exists() or (folder / RESULT).exists():
        raise UserError(f"{folder} already holds a run; choose another folder with out=FOLDER")
    require_own(folder)
    config["origin"] = {
        "verb": verb,
        "run": str(origin.run_dir.resolve()),
        "checkpoint": origin.path.name,
        "step": origin.step,
        "fingerprint": build.fingerprint(origin.config),
    }
    # what is wrong is said before anything is written
    trainer = build.make_trainer(config, {}, run_dir=None, observers=())
    if is_anew:
        load_start(origin.path, trainer.state)
    else:
        require_unchanged(trainer.state.model, payload["state"].get("frozen", {}))
    from omegaconf import OmegaConf

    fingerprint = build.fingerprint(config)
    try:
        save(folder / "checkpoints", origin.step, as_new_run(payload, rate), fingerprint)
        write_text(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(config)))
    except OSError as error:
        raise UserError(f"the run folder {folder} cannot be written: {error.strerror or error}") from None
    return folder


def tell(console: Console, sentence: str) -> None:
    """One line of what the command is about to do."""
    console.print(sentence, highlight=False, soft_wrap=True)
