"""List what exists: streams, strategies, backbones, schedules, kernels and ready experiments.

Usage: cl list [streams|strategies|backbones|schedules|kernels|experiments|avalanche] [format=table|markdown]
       cl list NAME ...      # one of them, a block, a rule, an optimizer, trainer: equations, source, options

Lists are read from the first lines of the files without importing them, so they come at once. The tables in docs/ are
made by `make docs` with format=markdown.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from cl.interop import catalog

ROOT = Path(__file__).resolve().parents[2]
IMAGE_SETTINGS = ("task_incremental", "class_incremental", "domain_incremental")
SHORT = {"task_incremental": "task", "class_incremental": "class", "domain_incremental": "domain"}


@dataclass(frozen=True)
class Entry:
    """One line of a list.

    Args:
        name: what is written on the command line.
        line: first sentence of the file.
        settings: where it makes sense; empty where that says nothing.
        file: where it lives, relative to the top.
    """

    name: str
    line: str
    file: str
    settings: tuple[str, ...] = ()


def strategies() -> Iterator[Entry]:
    """Every file in strategies/; a class that declares no `settings` works in all of the image settings."""
    for path in _plugins(ROOT / "strategies"):
        tree = ast.parse(path.read_text())
        declared = [
            node.value
            for owner in tree.body
            if isinstance(owner, ast.ClassDef)
            for node in owner.body
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "settings"
        ]
        yield Entry(path.stem, _first_line(tree), _relative(path), _settings(declared) or IMAGE_SETTINGS)


def streams() -> Iterator[Entry]:
    """Every config in configs/stream/, described by the file of its `_target_`; by its comment where others share that.

    Streams of images share it too, and say their dataset.
    """
    shared = Counter(map(_target, (ROOT / "configs" / "stream").rglob("*.yaml")))
    for config in sorted((ROOT / "configs" / "stream").rglob("*.yaml")):
        path = _target_file(config)
        tree = ast.parse(path.read_text())
        dataset = re.search(r"^dataset: *(\S+)", config.read_text(), re.M)
        line = _first_line(tree) + (f" On {dataset[1]}." if dataset else "")
        if shared[_target(config)] > 1 and not dataset:
            said = comment(config)
            line = f"{said[0].upper()}{said[1:]}." if said else line
        name = config.relative_to(ROOT / "configs" / "stream").with_suffix("").as_posix()
        yield Entry(name, line, _relative(path), _settings([tree]))


def backbones() -> Iterator[Entry]:
    """Every config in configs/backbone/, described by its first comment, or else by the file it names."""
    for config in sorted((ROOT / "configs" / "backbone").rglob("*.yaml")):
        path = _target_file(config)
        line = comment(config) or _first_line(ast.parse(path.read_text()))
        yield Entry(config.stem, line, _relative(path))


def schedules() -> Iterator[Entry]:
    """Every config in configs/schedule/, described by its function."""
    path = ROOT / "cl" / "schedules.py"
    functions = {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    for config in sorted((ROOT / "configs" / "schedule").glob("*.yaml")):
        name = _target(config).rpartition(".")[2]
        yield Entry(config.stem, _first_line(functions[name]), _relative(path))


def kernels() -> Iterator[Entry]:
    """Every folder in kernels/ with a public op; its file of plain arithmetic is `reference.py`."""
    for path in sorted((ROOT / "kernels").glob("*/reference.py")):
        init = path.with_name("__init__.py")
        yield Entry(path.parent.name, _first_line(ast.parse(init.read_text())), _relative(init))


def experiments() -> Iterator[Entry]:
    """Every config in configs/experiment/, described by its first comment."""
    for config in sorted((ROOT / "configs" / "experiment").glob("*.yaml")):
        yield Entry(config.stem, comment(config), _relative(config))


def avalanche() -> Iterator[Entry]:
    """What Avalanche has, by the words that choose it; those that do not run say why."""
    file = _relative(ROOT / "cl" / "interop" / "catalog.py")
    for name, method in catalog.METHODS.items():
        line = method.line if not method.broken else f"{method.line} Does not run: it {method.broken}."
        yield Entry(f"strategy=avalanche/{name}", line, file, () if method.broken else method.settings)
    for name, benchmark in catalog.BENCHMARKS.items():
        yield Entry(f"stream=avalanche/{name}", benchmark.line, file)


LISTS: dict[str, Callable[[], Iterator[Entry]]] = {
    list_.__name__: list_ for list_ in (streams, strategies, backbones, schedules, kernels, experiments, avalanche)
}


def main(words: list[str]) -> int:
    """Print the lists asked for, all of them when none is, or all there is to know of a name."""
    options = dict(word.split("=", 1) for word in words if "=" in word)
    chosen = [word for word in words if "=" not in word]
    if others := options.keys() - {"format"}:
        return _refuse(f"{others.pop()!r} is no option of `cl list`; there is format")
    style = options.get("format", "table")
    if style not in ("table", "markdown"):
        return _refuse(f"format is {style!r}; it must be table or markdown")
    told = {word: _details(word) for word in chosen if word not in LISTS}
    for name in chosen or LISTS:
        if name in told:
            print(told[name], end="\n\n")
        elif style == "markdown":
            print(markdown(list(LISTS[name]())))
        else:
            _print_table(name, list(LISTS[name]()))
    return 0


def _details(name: str) -> str:
    """What `cl.cli.details` knows of a name.

    Raises:
        UserError: nothing has it.
    """
    from cl.cli.details import details

    found = "\n\n\n".join(map(str, details(name)))
    if not found:
        known = {entry.name.partition("=")[2] or entry.name for list_ in LISTS.values() for entry in list_()}
        near = get_close_matches(name, sorted(known), n=3)
        did = f" (did you mean {' or '.join(near)}?)" if near else ""
        _refuse(f"nothing is called {name!r}{did}; the lists are {', '.join(LISTS)}")
    return found


def markdown(entries: list[Entry]) -> str:
    """A Markdown table of entries, as in docs/."""
    has_settings = any(entry.settings for entry in entries)
    head = ["name", "what it is", *(["settings"] if has_settings else []), "file"]
    rows = [head, ["---"] * len(head)]
    for entry in entries:
        settings = [", ".join(SHORT.get(s, s) for s in entry.settings)] if has_settings else []
        rows.append([f"`{entry.name}`", entry.line.replace("|", "\\|"), *settings, f"`{entry.file}`"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _print_table(name: str, entries: list[Entry]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=name, title_justify="left", box=None, pad_edge=False)
    table.add_column("name", no_wrap=True, style="bold")
    table.add_column("what it is")
    has_settings = any(entry.settings for entry in entries)
    if has_settings:
        table.add_column("settings")
    for entry in entries:
        settings = [", ".join(SHORT.get(s, s) for s in entry.settings)] if has_settings else []
        table.add_row(entry.name, entry.line, *settings)
    console = Console(markup=False)
    console.print(table)
    console.print()


def _plugins(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_")]


def comment(config: Path) -> str:
    """First comment of a config that is for people."""
    comments = [line.lstrip("# ") for line in config.read_text().splitlines() if line.startswith("#")]
    return next((comment for comment in comments if not comment.startswith("@package")), "")


def _first_line(node: ast.AST) -> str:
    docstring = ast.get_docstring(node) or ""  # type: ignore[arg-type]
    return docstring.splitlines()[0] if docstring else ""


def _settings(nodes: list[ast.AST]) -> tuple[str, ...]:
    """Names of the settings that occur below the given nodes; `frozenset(Setting)` means all of them."""
    every = (*IMAGE_SETTINGS, "continual_pretraining")
    if any(ast.unparse(node) == "frozenset(Setting)" for node in nodes):
        return every
    found = {
        below.attr.lower()
        for node in nodes
        for below in ast.walk(node)
        if isinstance(below, ast.Attribute) and getattr(below.value, "id", "") == "Setting"
    }
    return tuple(setting for setting in every if setting in found)


def _target(config: Path) -> str:
    found = re.search(r"^_target_: *(\S+)", config.read_text(), re.M)
    return found[1] if found else ""


def _target_file(config: Path) -> Path:
    return ROOT.joinpath(*_target(config).split(".")[:-1]).with_suffix(".py")


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _refuse(sentence: str) -> int:
    from cl.core import UserError

    raise UserError(sentence)


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
