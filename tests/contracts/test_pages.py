"""Pages lead somewhere: links and files are there, and the commands and imports that they show would be accepted."""

import ast
import re
import shlex
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from cl.cli import build, compare, listing, run
from cl.cli.compose import composed, plain, seeded
from cl.cli.details import details
from cl.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
TOPS = ("docs", "kernels", "benchmarks")
PAGES = sorted([*ROOT.glob("*.md"), *(path for top in TOPS for path in (ROOT / top).rglob("*.md"))])
HELP = [ROOT / "cl" / "cli" / f"{'listing' if name == 'list' else name}.py" for name in COMMANDS]
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
OURS = re.compile(r"`((?:cl|strategies|streams|kernels|configs|tests|docs|benchmarks)/[\w./-]*(?:\.\w+|/))[` ]")
RUN_ELSEWHERE = ("avalanche.md", "extending.md", "language.md")
"""Pages whose examples are run, each by a test of its own."""
FORM = re.compile(r"\b(NAME|COMMAND|foo)\b")
"""In a command that is a form to fill in."""
NO_SETTING = {"...", "at", "sensitivity", "figure", "out"}
"""Words that Hydra is not told."""


def by_name(path):
    return path.relative_to(ROOT).as_posix()


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page):
    """(file, anchor) of every link to a file of ours."""
    found = re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text()))
    parts = [link.partition("#") for link in found if not link.startswith("https://")]
    return [((page.parent / file).resolve() if file else page, anchor) for file, _, anchor in parts]


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_and_named_files_are_there(page):
    lost = [f"{file}#{anchor}" for file, anchor in links(page) if not file.exists()]
    lost += [f"{file}#{anchor}" for file, anchor in links(page) if anchor and anchor not in anchors(file)]
    named = [name for name in OURS.findall(BLOCK.sub("", page.read_text())) if Path(name).stem != "foo"]
    lost += [name for name in named if not (ROOT / name).exists()]
    assert not lost


def test_every_page_is_reached_from_the_readme():
    seen, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop()
        if page not in seen and page.suffix == ".md":
            seen.add(page)
            left += [file for file, _ in links(page)]
    assert not set(PAGES) - seen


SHOWN = [page for page in PAGES if page.name not in (*RUN_ELSEWHERE, "CHANGELOG.md")]


@pytest.mark.parametrize("page", [page for page in SHOWN if "```python" in page.read_text()], ids=by_name)
def test_imports_in_examples_are_there(page):
    for kind, code in BLOCK.findall(page.read_text()):
        for node in ast.walk(ast.parse(code)) if kind == "python" and ">>>" not in code else ():
            if isinstance(node, ast.ImportFrom):
                module = import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def commands(path):
    """The `cl ...` commands that a page shows, or the help of a command."""
    text = path.read_text()
    if path.suffix == ".py":
        # what it does stands behind it
        lines = [re.split(r"  +", line)[0] for line in re.findall(r"^ {2}(cl .*)$", text, re.M)]
    else:
        # a long one goes on below, further in
        blocks = [re.sub(r"( *\\)?\n +", " ", block) for _, block in BLOCK.findall(text)]
        lines = [line for block in blocks for line in block.splitlines() if line.startswith("cl ")]
        text = BLOCK.sub("", text)
        lines += re.findall(r"^ {4}(cl .*)$", text, re.M) + re.findall(r"`(cl [^`]*)`", text)
    return [line for line in lines if not FORM.search(line)]


@cache
def check(line):
    """Refuse what the command would refuse before it looks at any data or run."""
    command, *words = shlex.split(line)[1:]
    words = [word for word in words if word.partition("=")[0] not in NO_SETTING]
    settings = [word for word in words if "=" in word]
    assert command in (*COMMANDS, "--help"), f"there is no command {command}"
    if command == "run":
        run._check_flags([word for word in words if word not in settings])
        # of a sweep the first run
        settings = [word.partition(",")[0] for word in settings] if "-m" in words else settings
    if command in ("run", "explain"):
        build.settings(seeded(composed("run", settings), 0))
    elif command == "compare":
        own, others = compare.split_words(words)
        request = plain(composed("compare", own)) | {"seeds": 1}
        tried = [f"{name}={values[0]}" for name, values in (request["tune"] or {}).items()]
        compare.make_plan(request, [*others, *tried])
    elif command == "list":
        lost = [word for word in words if word not in (*listing.LISTS, *settings) and not details(word)]
        assert not lost, f"there is no {lost}"
    elif command == "reproduce":
        known = {"all", *(entry.name for entry in listing.experiments()), *settings}
        assert set(words) <= known, f"there is no {set(words) - known}"


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in (*SHOWN, *HELP) if commands(path)], ids=by_name)
def test_commands_would_be_accepted(path, tmp_path, monkeypatch):
    # a plan asks for the settings of every run by itself; data need not be there
    monkeypatch.setattr(compare, "check", lambda config: SimpleNamespace(name="stream", measure="accuracy"))
    monkeypatch.chdir(tmp_path)
    for line in commands(path):
        try:
            check(line)
        except Exception as error:
            pytest.fail(f"{line}: {error}")
