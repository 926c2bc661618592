"""From a checked config to the objects of a run.

Every object is made by calling the node's `_target_` with the node's other keys. What may be called is decided by
what the node is for (a strategy node makes a `Strategy`, and so on), so that a config read from disk runs nothing else.
A node below a stream node, such as `stream.base`, makes a stream as well.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from cl.core import LARGEST_INTEGER, Stream, UserError


@dataclass(frozen=True)
class Kind:
    """What a config node may make.

    Args:
        noun: for sentences.
        base: dotted name of the class that a `_target_` must derive from, or None for functions.
        modules: where a function may live; its parameters beyond `given` are the node's keys.
        given: how many leading parameters the caller fills in later.
    """

    noun: str
    base: str | None = None
    modules: tuple[str, ...] = ()
    given: int = 0


KINDS = {
    "stream": Kind("stream", modules=("streams",)),
    "strategy": Kind("strategy", base="cl.hooks.Strategy"),
    "backbone": Kind("backbone", base="torch.nn.Module", given=1),
    "optimizer": Kind("optimizer", base="torch.optim.Optimizer", given=1),
    "schedule": Kind("schedule", modules=("cl.schedules",), given=2),
    "trainer": Kind("trainer config", base="cl.config.TrainerConfig"),
    "tracking": Kind("tracker", base="cl.observe.Observer"),
}


OTHERS = ("seed", "limit_experiences", "data")
WRITTEN = ("claim", "origin", "suite")
"""Nodes that experiments, branches and launchers bring along."""
NUMBERS = ("float", "float | None", "float | torch.Tensor")
FREE = ("trainer.parallel", "trainer.compile")
"""Settings that a run may be resumed without: they say how it is computed, not what."""
LATER = {"backbone.dtype": "float32"}
"""Settings that came when there were checkpoints; at this value a run computes what it did without them."""


def locate(dotted: str) -> Any:
    """The object with this dotted name.

    Raises:
        UserError: the module does not import or has no such name.
    """
    module, _, name = str(dotted).rpartition(".")
    try:
        return getattr(import_module(module), name)
    except UserError:
        raise
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"_target_ {dotted!r} cannot be imported: {error}") from None


def target_of(path: str, node: Mapping[str, Any]) -> Callable[..., Any]:
    """What a node calls, after checking that it is of the node's kind."""
    kind = KINDS[path.split(".")[0]]
    if not isinstance(node, Mapping) or "_target_" not in node:
        known = f"; {path} was not selected" if path.startswith("strategy.") else ""
        raise UserError(f"{path} has no _target_{known} (choose it with {path.split('.')[0]}=NAME, see `cl list`)")
    target = locate(node["_target_"])
    if kind.base is not None:
        is_allowed = isinstance(target, type) and issubclass(target, locate(kind.base))
        wanted = f"a subclass of {kind.base}"
    else:
        is_allowed = inspect.isfunction(target) and (
            target.__module__.split(".")[0] in kind.modules
            or target.__module__ in kind.modules
            or target.__annotations__.get("return") in (Stream, "Stream")
        )
        wanted = f"a function of {' or '.join(kind.modules)}, or one annotated to return a {kind.noun.capitalize()}"
    if not is_allowed:
        raise UserError(f"{path}._target_ is {node['_target_']!r}, which makes no {kind.noun}; it must be {wanted}")
    return target


def arguments(path: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument of a node's target, defaults included.

    Raises:
        UserError: a key that the target does not take, one that it needs and does not get, a word for a truth value, or
            an integer beyond 64 bits.
    """
    target, kind = target_of(path, node), KINDS[path.split(".")[0]]
    given = {key: value for key, value in node.items() if not key.startswith("_")}
    parameters = dict(list(inspect.signature(target).parameters.items())[kind.given :])
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {name: p for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for key in given:
        if key not in named and not takes_any:
            options = ", ".join(named) or "none"
            raise UserError(f"{path} has no option {key!r}; its options are {options}")
        # a seed is hashed, whatever its size
        if key != "seed" and not _is_nested(path, given[key]):
            _check_size(f"{path}.{key}", given[key])
    for key in given.keys() & named.keys():
        _check_kind(f"{path}.{key}", given[key], str(named[key].annotation))
    missing = [name for name, p in named.items() if p.default is p.empty and name not in given]
    if missing:
        raise UserError(f"{path} needs {', '.join(missing)}; set {path}.{missing[0]}=VALUE")
    return {name: given.get(name, p.default) for name, p in named.items()} | given


def _check_size(path: str, value: Any) -> None:
    """An integer that torch cannot hold would be an error of torch's, somewhere in the run."""
    if isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            _check_size(path, each)
    elif type(value) is int and abs(value) > LARGEST_INTEGER:
        raise UserError(f"{path} is {value}; an integer must be at most {LARGEST_INTEGER}")


def _check_kind(path: str, value: Any, annotation: str) -> None:
    """Python takes any word for true, and true for the number 1; a person means neither."""
    # an annotation of torch's own is the class itself, ours are text
    kind = annotation.removeprefix("<class '").removesuffix("'>")
    if value is None and "None" in kind:
        return
    if kind in ("bool", "bool | None") and not isinstance(value, bool):
        raise UserError(f"{path} is {value!r}; it must be true or false")
    # of other integers, whoever takes them says the range; a seed may be any
    is_integer = type(value) is int if path.endswith(".seed") else not isinstance(value, bool)
    if kind in ("int", "int | None") and not is_integer:
        raise UserError(f"{path} is {value!r}; it must be an integer")
    group = path.split(".")[0]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # streams and strategies say what range it is besides
    if kind in NUMBERS and not is_number and group not in ("stream", "strategy"):
        raise UserError(f"{path} is {value!r}; it must be a number")
    if group == "stream":
        return
    if kind in ("str", "str | None") and not isinstance(value, str):
        raise UserError(f"{path} is {value!r}; it must be a name")
    if group == "backbone":
        return
    is_word = isinstance(value, str) and "str" in kind
    if kind.startswith(("Sequence[", "tuple[")) and not is_word and not isinstance(value, list | tuple):
        raise UserError(f"{path} is {value!r}; it must be a list")


def make(path: str, node: Mapping[str, Any]) -> Any:
    """Call a node's target, or prepare the call where its first arguments come later."""
    target, kwargs = target_of(path, node), arguments(path, node)
    given = {
        key: make(f"{path}.{key}", value) if _is_nested(path, value) else value
        for key, value in kwargs.items()
        if key in node
    }
    if KINDS[path.split(".")[0]].given:
        return partial(target, **given)
    try:
        return target(**given)
    except UserError as error:
        if not path.startswith("stream."):
            raise
        # streams call their options stream.NAME, and do not know what is around them
        raise UserError(re.sub(r"\bstream\.(?!base\b)(?=\w)", f"{path}.", str(error))) from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be made from {_shown(given)}: {error}") from error


def _is_nested(path: str, value: Any) -> bool:
    """Whether the value of a key is a node of the same kind: a stream around another one."""
    return path.split(".")[0] == "stream" and isinstance(value, Mapping) and "_target_" in value


def _shown(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in given.items()) or "its defaults"


def strategy_names(config: Mapping[str, Any]) -> list[str]:
    """Strategies of a config, in the order in which they compose."""
    names = list(config.get("strategy") or {})
    if "_target_" in names:
        raise UserError("a strategy has a node of its own: begin its config file with `# @package strategy.NAME`")
    if not names:
        raise UserError("no strategy is selected; choose one with strategy=NAME (see `cl list strategies`)")
    return names


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every hyper-parameter of a run, flat, the defaults of all signatures included."""
    flat: dict[str, Any] = {"seed": config["seed"], "limit_experiences": config.get("limit_experiences")}
    nodes = {name: config.get(name) for name in ("stream", "backbone", "optimizer", "schedule", "trainer")}
    nodes |= {f"strategy.{name}": config["strategy"][name] for name in strategy_names(config)}
    for path, node in nodes.items():
        flat |= _flat(path, node)
    # what another run began, where this one goes on
    flat |= {f"origin.{name}": value for name, value in (config.get("origin") or {}).items()}
    return flat


def _flat(path: str, node: Any) -> dict[str, Any]:
    """The target of a node and its arguments, those of nested nodes below their own path."""
    flat: dict[str, Any] = {path: node.get("_target_") if isinstance(node, Mapping) else node}
    for key, value in arguments(path, node).items():
        if _is_nested(path, value):
            flat |= _flat(f"{path}.{key}", value)
        elif key not in ("root", "download", "cache"):
            flat[f"{path}.{key}"] = value
    return flat


def fingerprint(config: Mapping[str, Any]) -> str:
    """Short hash of everything that decides what a run computes; where data lie and who tracks it do not."""
    deciding = {k: v for k, v in settings(config).items() if k not in FREE and LATER.get(k, ...) != v}
    content = json.dumps(deciding, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def make_trainer(config: Mapping[str, Any], names: Mapping[str, Any], run_dir: Path, observers: Sequence[Any]) -> Any:
    """The trainer of a run, everything checked, nothing trained."""
    from cl.trainer import Trainer

    # `+name=value` makes a node of anything, a misspelt group too
    if unknown := [name for name in config if name not in (*KINDS, *OTHERS, *WRITTEN)]:
        raise UserError(f"a run has no setting {unknown[0]!r}; there are {', '.join((*KINDS, *OTHERS))}")
    if type(config["seed"]) is not int or config["seed"] < 0:
        raise UserError(f"seed is {config['seed']!r}; it must be an integer of at least 0")
    flat = settings(config)
    stream, strategies = make_stream(config), make_strategies(config)
    optimizer = make("optimizer", config["optimizer"])
    check_optimizer(optimizer)
    # a strategy that brings a loop of its own says so
    trainer = next((strategy.trainer for strategy in strategies if hasattr(strategy, "trainer")), Trainer)
    return trainer(
        stream,
        make("backbone", config["backbone"]),
        strategies,
        optimizer=optimizer,
        schedule=make("schedule", config["schedule"]),
        config=make("trainer", config["trainer"]),
        seed=config["seed"],
        run_dir=run_dir,
        observers=observers,
        names=names,
        settings=flat,
        fingerprint=fingerprint(config),
    )


def make_stream(config: Mapping[str, Any]) -> Stream:
    """The stream of a run, before its strategies plan it."""
    stream: Stream = make("stream", config["stream"])
    limit = config.get("limit_experiences")
    if limit is None:
        return stream
    if type(limit) is not int or limit < 1:
        raise UserError(f"limit_experiences is {limit!r}; it must be an integer of at least 1, or null")
    return stream.first(limit)


def make_strategies(config: Mapping[str, Any]) -> list[Any]:
    """The strategies of a run, named as their config nodes."""
    strategies = [make(f"strategy.{name}", config["strategy"][name]) for name in strategy_names(config)]
    for name, strategy in zip(strategy_names(config), strategies, strict=True):
        strategy.name = name
    return strategies


def check_optimizer(optimizer: Callable[..., Any]) -> None:
    """Build it once on a throw-away parameter, so that a wrong value is a sentence and not a failed run."""
    import torch

    for key, value in optimizer.keywords.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"optimizer.{key} is {value}; it must be a finite number")
    try:
        optimizer([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(f"optimizer cannot be made from {_shown(optimizer.keywords)}: {error}") from None
