"""Rewrite the tables in docs/ that are made from the code.

    python docs/make_tables.py          # strategies.md, streams.md, backbones.md, memory.md; that in avalanche.md

A test compares the files with what this would write.
"""

from __future__ import annotations

from pathlib import Path

from cl.backbones import _tables
from cl.cli import listing
from cl.interop import catalog

PAGES = {
    "strategies": "What fights forgetting. Compose any of them, in order: `strategy=[derpp,ewc]`. `joint` and "
    "`cumulative` are references: they may look at old data. `cl list NAME` shows equations, source and options.",
    "streams": "What is learnt, and in which order. `cl list NAME` shows the options; the setting is chosen with "
    "`stream.setting=...`.",
    "backbones": "The networks; heads per task where the setting gives task labels. `cl list NAME` shows the options.",
}

MEMORY = """# Memory

The blocks of `backbone=gpt`, written in words: `backbone.blocks='3x[linear_memory(rule=gated_delta)] + attention'`.
`cl list NAME` shows the options of a block or a rule.

Made by `make docs` from what the files say of themselves.

## Rules

Each keeps a memory S of a head so that k S gives v: what it fits (the loss of one token), what it keeps of the memory
before, how it writes, and how it is read.

{rules}

## What changes when

Slow is every parameter: the optimizer changes it. Fast is the state: it changes with every token, is handed from one
piece of a text to the next, and a checkpoint in mid-text needs it. `commit`, after the optimizer step, is all that
writes what outlives a batch. Every row of a batch begins with a fresh state, also where it is replayed or evaluated:
the start of a task finds nothing of the state, and all of what `commit` has kept.

{mixers}

Around the blocks. Where a text is read in segments, the state also holds the inputs of the unfinished one and the
number of finished ones.

{backbones}
"""


def pages() -> dict[str, str]:
    """File name -> content."""
    memory = MEMORY.format(
        rules=_tables.rules_table(), mixers=_tables.mixers_table(), backbones=_tables.backbones_table()
    )
    return {"memory.md": memory} | {
        f"{name}.md": f"# {name.capitalize()}\n\n{words}\n\nMade by `make docs` from the first lines of the files.\n\n"
        f"{listing.markdown(list(listing.LISTS[name]()))}\n"
        for name, words in PAGES.items()
    }


if __name__ == "__main__":
    for name, content in pages().items():
        (Path(__file__).parent / name).write_text(content)
    page = Path(__file__).parent / "avalanche.md"
    page.write_text(catalog.with_table(page.read_text()))
