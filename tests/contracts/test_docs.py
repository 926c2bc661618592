"""The tables in docs/ are those that `cl list` makes; what they say of settings and of published numbers is true."""

import re
from inspect import signature
from pathlib import Path

import pytest

from cl.backbones import _tables
from cl.cli import listing
from cl.cli.reproduce import read_claims
from cl.testing import configs, discover

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["strategies", "streams", "backbones"])
def test_docs_table_is_what_the_generator_writes(name):
    table = listing.markdown(list(listing.LISTS[name]()))
    path = ROOT / "docs" / f"{name}.md"
    assert path.is_file(), f"docs/{name}.md is missing; `make docs` writes it"
    assert table in path.read_text(), f"docs/{name}.md is not up to date; run `make docs`"


def test_memory_tables_are_what_the_generator_writes():
    text = (ROOT / "docs" / "memory.md").read_text()
    assert _tables.rules_table() in text, "docs/memory.md is not up to date; run `make docs`"
    assert _tables.mixers_table() in text, "docs/memory.md is not up to date; run `make docs`"
    assert _tables.backbones_table() in text, "docs/memory.md is not up to date; run `make docs`"


@pytest.mark.parametrize(
    ("name", "group"), [("strategies", "strategy"), ("streams", "stream"), ("backbones", "backbone")]
)
def test_list_is_complete(name, group):
    entries = {entry.name: entry for entry in listing.LISTS[name]()}
    assert set(entries) == {config.name for config in configs(group)}
    without = [entry.name for entry in entries.values() if not entry.line]
    assert not without, f"no first docstring line: {without}"


def test_every_stream_says_its_settings_and_probes_the_true_ones():
    listed = {entry.name: set(entry.settings) for entry in listing.streams()}
    assert all(listed.values()), f"no settings: {[name for name, settings in listed.items() if not settings]}"
    for config in configs("stream"):
        if config.name.startswith("probes/"):
            build, given = config.target(), config.arguments(seed=0)
            is_free = "setting" in signature(build).parameters
            made = [build(**given, setting=name) for name in listed[config.name]] if is_free else [build(**given)]
            assert {str(stream.info.setting) for stream in made} == listed[config.name], config.name


def test_listed_settings_are_those_of_the_class():
    """The list is read without importing; a strategy that inherits its settings must not be listed wrongly."""
    listed = {entry.name: set(entry.settings) for entry in listing.strategies()}
    declared = {plugin.name: set(map(str, plugin.load().settings)) for plugin in discover("strategies")}
    assert listed == declared


def test_published_numbers_are_judged_by_the_claims_of_today():
    """A claim whose bound, words, source or notes changed after its page was made is another claim."""
    text = "".join((ROOT / "docs" / f"{name}.md").read_text() for name in ("reproduction", "reproduction_expensive"))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    rows = {(line[0], line[2]): line for line in lines if len(line) == 7 and line[0] not in ("claim", "---")}
    unrun = set(re.findall(r"`(\w+)`", text.partition("Not run yet:")[2]))
    claims = [(each, entry.line) for entry in listing.experiments() for each in read_claims(entry.name, entry.line)]
    for claim, what in claims:
        if claim.name in unrun:
            continue
        _, shown, _, ours, _, verdict, source = rows.pop((claim.name, claim.wanted))
        assert (shown, source) == (what, claim.source), claim.name
        assert claim.note.strip() in text and claim.differs.strip() in text, claim.name
        # a bound that every seed must keep cannot be seen from the mean
        holds = claim.is_asserted and claim.holds([float(ours.partition(" ")[0])])
        assert verdict == ("holds" if holds else "differs" if claim.is_asserted else "not asserted"), claim.name
    assert not rows, f"no claim has {list(rows)}"
