"""What a name stands for, as `cl list NAME` prints it: equations and source, arguments, every option with its value.

Lists read files and answer at once; this imports what it describes, so that what it says of options is what a run gets.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from cl.backbones._spec import PARTS, plugin, plugin_names
from cl.cli import build, listing
from cl.cli.compose import node_name

GROUPS = ("stream", "strategy", "backbone", "optimizer", "schedule", "trainer")
NEEDED = object()
"""In the place of a value that has no default."""


@dataclass(frozen=True)
class Details:
    """One thing of a name; several may share it, such as a backbone and its kernel.

    Args:
        use: how it is chosen.
        texts: what its file and its class or function say of themselves.
        options: word that sets it -> value, as the config file or else the signature has it.
    """

    use: str
    texts: list[str]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        width = max(map(len, self.options), default=0)
        told = [f"  {name:{width}}  {_word(value)}" for name, value in self.options.items()]
        return "\n\n".join([self.use, *self.texts, *(["\n".join(["Options:", *told])] if told else [])])


def details(name: str) -> list[Details]:
    """All that has this name, in the words of the command line; empty where nothing has."""
    return [*_configured(name), *_parts(name), *_kernels(name), *_experiments(name), *_avalanche(name)]


def _configured(name: str) -> Iterator[Details]:
    for group in GROUPS:
        folder = listing.ROOT / "configs" / group
        for path in sorted(folder.rglob("*.yaml")):
            full = path.relative_to(folder).with_suffix("").as_posix()
            # there is one config of the trainer, which nobody has to choose
            if name in (("trainer",) if group == "trainer" else (full, path.stem)):
                yield _of_config(group, full, path)


def _of_config(group: str, name: str, path: Path) -> Details:
    node: Mapping[str, Any] = yaml.safe_load(path.read_text())
    where = f"strategy.{node_name(name)}" if group == "strategy" else group
    target = build.target_of(where, node)
    own = {key: value for key, value in node.items() if key not in ("_target_", "defaults")}
    options = _options(target, skip=list(inspect.signature(target).parameters)[: build.KINDS[group].given])
    use = "trainer" if group == "trainer" else f"{group}={name}"
    # several configs may share a file, which then says little of each
    comment = [text] if (text := listing.comment(path)) else []
    values = {f"{where}.{key}": value for key, value in (options | own).items()}
    return Details(use, [*comment, *_texts(target)], values)


def _parts(name: str) -> Iterator[Details]:
    for folder, (_, use) in PARTS.items():
        if name in plugin_names(folder):
            target = plugin(folder, name, name)
            # what has no default comes from the layer around it
            options = {key: value for key, value in _options(target, skip=[]).items() if value is not NEEDED}
            yield Details(use.format(name), _texts(target), options)


def _kernels(name: str) -> Iterator[Details]:
    if name in (entry.name for entry in listing.kernels()):
        module = import_module(f"kernels.{name}")
        op = getattr(module, name)
        signature = inspect.signature(op)
        plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        call = f"{name}{signature.replace(parameters=plain, return_annotation=signature.empty)}"
        yield Details(f"from kernels.{name} import {name}", [*_texts(op), call])


def _experiments(name: str) -> Iterator[Details]:
    for entry in listing.experiments():
        if entry.name == name:
            yield Details(f"+experiment={name}", [(listing.ROOT / entry.file).read_text().strip()])


def _avalanche(name: str) -> Iterator[Details]:
    for entry in listing.avalanche():
        if entry.name.partition("=")[2] == name:
            yield Details(entry.name, [entry.line, "Its options are those of Avalanche's constructor."])


def _texts(target: Callable[..., Any]) -> list[str]:
    """Docstrings of a target and of its file, without those of other packages, which are pages long."""
    module = inspect.getmodule(target)
    if module is None or module.__name__.startswith("torch."):
        return []
    found = [inspect.cleandoc(each.__doc__ or "") for each in (module, target)]
    return [text for text in found if text]


def _options(target: Callable[..., Any], skip: list[str]) -> dict[str, Any]:
    parameters = inspect.signature(target).parameters.items()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {name: p for name, p in parameters if p.kind in kinds and name not in skip}
    return {name: NEEDED if p.default is p.empty else p.default for name, p in named.items()}


def _word(value: Any) -> str:
    """A value as the command line takes it."""
    if value is NEEDED:
        return "(needed)"
    return value if isinstance(value, str) else json.dumps(value, default=str)
