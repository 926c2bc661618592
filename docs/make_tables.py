"""Rewrite the tables in docs/ that are made from the code.

    python docs/make_tables.py          # strategies.md, streams.md, backbones.md

A test compares the files with what this would write.
"""

from __future__ import annotations

from pathlib import Path

from cl.cli import listing
from cl.interop import catalog

PAGES = {
    "strategies": "What fights forgetting. Compose any of them, in order: `strategy=[derpp,ewc]`. `joint` and "
    "`cumulative` are references: they may look at old data. Options, equations and sources are in the files' "
    "docstrings.",
    "streams": "What is learnt, and in which order. Options are in the files' docstrings; the setting is chosen with "
    "`stream.setting=...`.",
    "backbones": "The networks; heads per task where the setting gives task labels.",
}


def pages() -> dict[str, str]:
    """File name -> content."""
    return {
        f"{name}.md": f"# {name.capitalize()}\n\n{words}\n\nMade by `make docs` from the first lines of the files.\n\n"
        f"{listing.markdown(list(listing.LISTS[name]()))}\n"
        for name, words in PAGES.items()
    }


if __name__ == "__main__":
    for name, content in pages().items():
        (Path(__file__).parent / name).write_text(content)
    page = Path(__file__).parent / "avalanche.md"
    page.write_text(catalog.with_table(page.read_text()))
