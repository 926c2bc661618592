"""The tables of docs/memory.md, made from what rules and mixers say of themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path

from cl.backbones._spec import plugin, plugin_names
from cl.backbones.memory_rules._rule import Row

BLOCKS = {"memory_rules": "linear_memory(rule={})", "neural_rules": "neural_memory(rule={})", "mixers": "{}"}
HEADS = {"extra": "state besides", "source": "published by"}
KEPT = "kept from task to task, by `commit`"


def rules_table() -> str:
    """Every rule as regression at test time, and the mixers that are rules of their own."""
    rows = []
    for folder, block in BLOCKS.items():
        for name in plugin_names(folder):
            row = getattr(plugin(folder, name, ""), "row", None)
            if isinstance(row, Row):
                formulas = [f"`{getattr(row, each.name)}`" for each in fields(Row) if each.name != "source"]
                rows.append([f"`{block.format(name)}`", *formulas, row.source])
    return _table(["block", *(HEADS.get(each.name, each.name) for each in fields(Row))], rows)


def mixers_table() -> str:
    """Every mixer: what of it is fast, what a document start clears, and what outlives a batch."""
    rows = []
    for name in plugin_names("mixers"):
        lifetime = plugin("mixers", name, "").lifetime
        kept = ", ".join(lifetime.kept) or "nothing"
        rows.append([f"`{name}`", _first_line(name), ", ".join(lifetime.fast), ", ".join(lifetime.cleared), kept])
    return _table(["block", "what it is", "fast: its state", "a document start clears", KEPT], rows)


def backbones_table() -> str:
    """The same of every backbone with a memory around its blocks."""
    rows = []
    for name in sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py")):
        module = import_module(f"cl.backbones.{name}")
        lifetime = getattr(getattr(module, name.title().replace("_", ""), None), "lifetime", None)
        if lifetime is not None:
            kept = ", ".join(lifetime.kept) or "nothing"
            cleared = ", ".join(lifetime.cleared) or "as its blocks"
            rows.append([f"`{name}`", _first_line(name, "."), ", ".join(lifetime.fast), cleared, kept])
    return _table(["backbone", "what it is", "fast: its memory", "a document start clears", KEPT], rows)


def _first_line(name: str, folder: str = "mixers") -> str:
    source = Path(__file__).parent / folder / f"{name}.py"
    return (ast.get_docstring(ast.parse(source.read_text())) or "").splitlines()[0]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
