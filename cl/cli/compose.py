"""From words on the command line to a checked config.

Two things are added to Hydra. A hyper-parameter that a config file does not mention can be set without `+`, because
its default lives in the Python signature and nowhere else; and every error becomes one sentence.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from cl.core import UserError
from cl.interop import catalog

AVALANCHE = "avalanche/"
OPEN_NODE = re.compile(r"^(strategy\.\w+|stream|backbone|optimizer|schedule|trainer|tracking)\.[\w.]+=")
"""Nodes whose keys are checked against a signature and not against what the YAML happens to mention."""
BLOCKS = re.compile(r"^(backbone\.(?:blocks|mlp))=([^'\"].*[\[(+].*)$")
"""Words for blocks, such as 3x[linear_memory(rule=delta)] + attention, which Hydra takes in quotes only."""
FOLDERS = ("out", "data.root", "hydra.run.dir", "hydra.sweep.dir")
GROUPS = ("stream", "strategy", "backbone", "optimizer", "schedule", "trainer", "tracking", "experiment", "debug")
NO_NAME = re.compile(r"null|true|false|[-+.\d]+", re.IGNORECASE)
"""What Hydra reads as something else than a name."""
SEVERAL = re.compile(r"Ambiguous value for argument '(.*?)'\n")
UNREADABLE = "{!r} is no setting; settings are written name=value, such as seed=1"


def open_signatures(overrides: Sequence[str]) -> list[str]:
    """Overrides as Hydra takes them: hyper-parameters may be new keys, and a strategy may be a dotted class name.

    Example:
        >>> open_signatures(["seed=1", "strategy.derpp.alpha=0.2", "+experiment=x"])
        ['seed=1', '++strategy.derpp.alpha=0.2', 'experiment=x']
        >>> open_signatures(["strategy=[replay,my_ideas.Mine]"])
        ['strategy=[replay]', '++strategy.my_ideas._target_=my_ideas.Mine']
        >>> open_signatures(["backbone.blocks=2x[attention]"])
        ['++backbone.blocks="2x[attention]"']
        >>> open_signatures(["out=it's (1)"])
        ["out='it\\\\'s (1)'"]
    """
    words = []
    for word in overrides:
        word = BLOCKS.sub(r'\1="\2"', word)
        # chosen like any other group, with or without the plus
        word = word.removeprefix("+") if word.startswith("+experiment=") else word
        key, _, value = word.partition("=")
        if not key:
            raise UserError(UNREADABLE.format(word))
        if key == "hydra.searchpath":
            check_folders([each.strip(" '\"").removeprefix("file://") for each in value.strip("[] ").split(",")])
        if key in FOLDERS and value not in ("", "null") and value[0] not in "'\"":
            # anything may stand in the name of a folder, and shells expand no ~ after a dotted name
            value = os.path.expanduser(value).replace("'", "\\'")
            words.append(f"{key}='{value}'")
            continue
        names = [name.strip() for name in value.strip("[] ").split(",")]
        if (group := key.lstrip("+").partition("@")[0]) in GROUPS and _names_nothing(group, names):
            raise UserError(f"there is no {group} {value!r}{_beside(value, _names(group))}")
        twice = [name for name in names if names.count(name) > 1]
        if key == "strategy" and twice:
            raise UserError(f"{word!r} names {twice[0]} twice")
        if key == "strategy" and any("." in name for name in names):
            words.append(f"strategy=[{','.join(name for name in names if '.' not in name)}]")
            words += [_own_strategy(name) for name in names if "." in name]
        elif key == "stream" and value.startswith(AVALANCHE) and "." in value:
            words += [f"stream={AVALANCHE}{catalog.OWN}", f"++stream.name={value.removeprefix(AVALANCHE)}"]
        else:
            word = word.replace(f"strategy.{AVALANCHE}", "strategy.avalanche_", 1) if "=" in word else word
            words.append(f"++{word}" if OPEN_NODE.match(word) else word)
    return words


def _names_nothing(group: str, names: Sequence[str]) -> bool:
    """A number or another word that is no name, or none at all; `strategy=[]` takes away the default."""
    return any(map(NO_NAME.fullmatch, names)) or (names == [""] and group != "strategy")


def _own_strategy(name: str) -> str:
    """A class of the user's, named in words: one of ours, or a template of Avalanche."""
    if name.startswith(AVALANCHE):
        made = f"{{_target_: cl.interop.avalanche.Own, template: {name.removeprefix(AVALANCHE)}}}"
        return f"++strategy.{node_name(name)}={made}"
    return f"++strategy.{node_name(name)}._target_={name}"


def node_name(strategy: str) -> str:
    """Config node of a strategy: its own name, or the module of a dotted class name.

    Example:
        >>> node_name("replay"), node_name("lab.my_ideas.Mine"), node_name("avalanche/EWC")
        ('replay', 'my_ideas', 'avalanche_EWC')
    """
    if strategy.startswith(AVALANCHE):
        return catalog.node_name(strategy.removeprefix(AVALANCHE))
    return strategy.split(".")[-2] if "." in strategy else strategy


def register_avalanche() -> None:
    """Make `stream=avalanche/NAME` and `strategy=avalanche/NAME` known to Hydra, without a file for each."""
    for (group, name), node in catalog.configs().items():
        ConfigStore.instance().store(name=name, node=node, group=group, package="_global_", provider="cl.interop")


register_avalanche()


@contextmanager
def one_sentence() -> Iterator[None]:
    """Hydra's and OmegaConf's errors as `UserError`, without their help paragraphs."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_sentence(error)) from error


def _sentence(error: Exception) -> str:
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"there is no {group or 'config'} {name!r}{_beside(name, _names(group))}{_elsewhere(group, name)}"
    if several := SEVERAL.search(str(error)):
        word = several[1].lstrip("+")
        return f"{word!r} gives several values; write a list in brackets, or sweep over them with `cl run -m {word}`"
    if isinstance(error, OverrideParseException):
        return UNREADABLE.format(error.override)
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        names = [str(name) for name in cause.parent_node or () if name != "hydra"]
        return f"there is no setting {cause.full_key!r}{_beside(str(cause.key), names)}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept: list[str] = []
    for line in lines:
        if line.startswith(("full_key", "object_type", "reference_type", "Set the environment", "See https")):
            continue
        kept.append(line)
    return re.sub(r"\s+", " ", " ".join(kept)).replace("\t", " ")


def _names(group: str) -> list[str]:
    """What can be chosen; Hydra's errors know it only sometimes."""
    folder = files("configs").joinpath(*group.split("/"))
    ours = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    others = [name for owner, name in catalog.configs() if owner == group]
    return sorted([name.removesuffix(".yaml") for name in ours if name.endswith(".yaml")] + others)


def _beside(name: str, names: Sequence[str]) -> str:
    """The name that was probably meant, and all that there are."""
    nearest = "".join(f" (did you mean {near}?)" for near in get_close_matches(name, names, 1))
    return f"{nearest}; there are {', '.join(names)}" if names else ""


def _elsewhere(group: str, name: str) -> str:
    """Where a name belongs that is no backbone, but what one is made of."""
    if group != "backbone":
        return ""
    from cl.backbones._spec import place_of

    return place_of(name)


def composed(name: str, overrides: Sequence[str], is_whole: bool = False) -> DictConfig:
    """The config `name` with overrides applied, defaults of the signatures not yet filled in.

    Args:
        is_whole: with Hydra's own node.
    """
    for word in overrides:
        if "=" not in word and not word.startswith("~"):
            raise UserError(UNREADABLE.format(word))
    GlobalHydra.instance().clear()
    with one_sentence(), initialize_config_module("configs", version_base="1.3"):
        return compose(name, open_signatures(overrides), return_hydra_config=is_whole)


def check_folders(folders: Sequence[str]) -> None:
    """Refuse folders with configs of the user's own that Hydra would not read.

    Raises:
        UserError: there is no such folder, or a config in it is called as one of ours, which is found first.
    """
    for folder in [Path(each) for each in folders if each and "://" not in each]:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; configs of your own are to be read from it")
        for path in sorted(path for group in GROUPS for path in folder.glob(f"{group}/**/*.yaml")):
            group, _, name = path.relative_to(folder).with_suffix("").as_posix().rpartition("/")
            if name in _names(group):
                raise UserError(f"{path} would not be read: {name} of {group} is one of ours; give it another name")


def plain(config: Any) -> Any:
    """A config node as dicts and lists, interpolations resolved."""
    with one_sentence():
        return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def seeded(config: DictConfig, seed: int) -> dict[str, Any]:
    """A config for one seed, resolved after the seed is set, because streams take theirs from it."""
    own = config.copy()
    own.seed = seed
    resolved: dict[str, Any] = plain(own)
    return resolved


def import_from_here() -> None:
    """Let `_target_` name a module in the working directory; appended, so that it shadows nothing."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
