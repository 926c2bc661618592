"""Find plug-ins and their configs by listing folders: whatever is there is tested, nothing has to be registered."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Plugin:
    """One file of a plug-in folder.

    Args:
        name: the file's name, which is the plug-in's.
        package: import name of the folder, such as "strategies".
    """

    name: str
    package: str

    def __str__(self) -> str:
        return self.name

    @property
    def class_name(self) -> str:
        """CamelCase of the file name."""
        return camel_case(self.name)

    def module(self) -> ModuleType:
        return import_module(f"{self.package}.{self.name}")

    def load(self) -> type:
        """The class that the file is named after.

        Raises:
            AttributeError: the file defines no such class.
        """
        loaded: type = getattr(self.module(), self.class_name)
        return loaded


def camel_case(name: str) -> str:
    """The class name that belongs to a file name.

    Example:
        >>> camel_case("class_balanced")
        'ClassBalanced'
    """
    return "".join(word.capitalize() for word in name.split("_"))


def discover(package: str, is_deep: bool = False) -> list[Plugin]:
    """The plug-ins of an importable folder, by name; files that begin with an underscore are helpers.

    Args:
        is_deep: those of the folders inside it too.

    Example:
        >>> [plugin.class_name for plugin in discover("strategies") if plugin.name == "replay"]
        ['Replay']
    """
    folder = Path(next(iter(import_module(package).__path__)))
    paths = sorted(folder.rglob("*.py") if is_deep else folder.glob("*.py"))
    return [
        Plugin(path.stem, ".".join((package, *path.relative_to(folder).parts[:-1])))
        for path in paths
        if not path.stem.startswith("_")
    ]


@dataclass(frozen=True)
class Config:
    """One YAML file of a config group.

    Args:
        group: such as "strategy".
        name: path below the group's folder, without ending; what is written on the command line.
        node: its content, nested nodes of its defaults list included.
    """

    group: str
    name: str
    node: dict[str, Any]

    def __str__(self) -> str:
        return self.name

    @property
    def module(self) -> str:
        """Import name of the file that `_target_` names."""
        return str(self.node["_target_"]).rpartition(".")[0]

    def target(self) -> Any:
        """What `_target_` names.

        Raises:
            AttributeError: the module has no such name.
        """
        return _named(self.node["_target_"])

    def arguments(self, **values: Any) -> dict[str, Any]:
        """What the target is called with: interpolations resolved from `values`, nested nodes made.

        Example:
            >>> next(c for c in configs("stream") if c.name == "split_digits").arguments(seed=3)
            {'dataset': 'digits', 'seed': 3}
        """
        return {key: _made(value, values) for key, value in self.node.items() if key != "_target_"}


def _named(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    return getattr(import_module(module), name)


def _made(value: Any, values: Mapping[str, Any]) -> Any:
    """What a nested node makes, what `${a.b}` stands for, and any other value as it is."""
    if isinstance(value, dict) and "_target_" in value:
        given = {key: _made(each, values) for key, each in value.items() if key != "_target_"}
        return _named(value["_target_"])(**given)
    named = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    return reduce(lambda node, key: node[key], named[1].split("."), values) if named else value


def configs(group: str) -> list[Config]:
    """Every config of a group, by name.

    Example:
        >>> [config.node["_target_"] for config in configs("strategy") if config.name == "naive"]
        ['strategies.naive.Naive']
    """
    folder = Path(next(iter(import_module("configs").__path__))) / group
    return [
        Config(group, path.relative_to(folder).with_suffix("").as_posix(), _node(path))
        for path in sorted(folder.rglob("*.yaml"))
    ]


def _node(path: Path) -> dict[str, Any]:
    """A file's content; an entry `/GROUP@KEY: NAME` of its defaults list becomes a node under KEY."""
    import yaml

    content: dict[str, Any] = yaml.safe_load(path.read_text()) or {}
    top = next(iter(import_module("configs").__path__))
    for entry in content.pop("defaults", []) if "_target_" in content else []:
        for place, name in entry.items() if isinstance(entry, dict) else ():
            group, _, key = place.lstrip("/").partition("@")
            content[key] = _node(Path(top) / group / f"{name}.yaml") | content.get(key, {})
    return content
