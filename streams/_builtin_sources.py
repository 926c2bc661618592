"""Text that every Python carries: the language reference, docstrings, source code, and sums told in words.

What is read depends on the version of Python; the stream's content hash tells two versions apart.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import import_module
from pathlib import Path

HOLD_OUT = 16
"""Every so many-th document is measured on."""
NUM_SUMS = 8000


def library_files() -> list[Path]:
    """The modules of the standard library that are single files, by name."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def version_key() -> str:
    """Digest of what the texts below are made from, without reading it."""
    sizes = [(path.name, path.stat().st_size) for path in library_files()]
    parts = (sys.version_info[:3], sizes, Path(__file__).read_text())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def docs() -> Iterator[str]:
    """English: the topics of the language reference, and the docstrings of each module of the library."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name].strip() + "\n"
    for text, _ in library():
        if text:
            yield text


def code() -> Iterator[str]:
    """Python: the modules of the library without their docstrings."""
    for _, source in library():
        if source.strip():
            yield source


@lru_cache(maxsize=1)
def library() -> list[tuple[str, str]]:
    """Docstrings and remaining source of each module; a few million letters, to be let go with `cache_clear`."""
    return [_divided(path) for path in library_files()]


def _divided(path: Path) -> tuple[str, str]:
    try:
        source = path.read_text("utf-8")
        statements = ast.parse(source).body
    except (OSError, UnicodeDecodeError, SyntaxError):
        return "", ""
    lines = source.splitlines(keepends=True)
    texts: list[str] = []
    _take_docstring(statements, texts, lines)
    waiting: list[ast.stmt] = list(statements)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            _take_docstring(node.body, texts, lines)
            waiting[:0] = node.body
        elif isinstance(node, ast.If | ast.Try):
            waiting[:0] = node.body
    return "\n\n".join(texts) + "\n" * bool(texts), "".join(lines)


def _take_docstring(body: list[ast.stmt], texts: list[str], lines: list[str]) -> None:
    """Move the docstring that a body begins with from the lines to the texts."""
    first = body[0] if body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        texts.append(inspect.cleandoc(first.value.value))
        last = first.end_lineno or first.lineno
        lines[first.lineno - 1 : last] = [""] * (last - first.lineno + 1)


NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo", "Ines", "Jon", "Kira", "Leo", "Mona", "Nils")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pencils", "shells", "stamps", "stones", "tickets")


def arithmetic() -> Iterator[str]:
    """Sums told in words, with the steps and the answer written as in GSM8K; the same on every machine."""
    draw = random.Random(0)
    for _ in range(NUM_SUMS):
        yield _PROBLEMS[draw.randrange(len(_PROBLEMS))](draw)


def _names(draw: random.Random) -> tuple[str, str, str]:
    who = draw.randrange(len(NAMES))
    other = (who + 1 + draw.randrange(len(NAMES) - 1)) % len(NAMES)
    return NAMES[who], NAMES[other], THINGS[draw.randrange(len(THINGS))]


def _gift(draw: random.Random) -> str:
    who, other, what = _names(draw)
    have, more = draw.randrange(12, 90), draw.randrange(2, 10)
    less = draw.randrange(1, have)
    given = have * more
    total = have + given
    return (
        f"{who} has {have} {what}. {other} gives {who} {more} times as many. Then {who} loses {less} {what}. How many "
        f"{what} does {who} have now?\n{other} gives {have}*{more} = <<{have}*{more}={given}>>{given} {what}.\n"
        f"{who} then has {have}+{given} = <<{have}+{given}={total}>>{total} {what}.\n"
        f"After the loss there are {total}-{less} = <<{total}-{less}={total - less}>>{total - less} {what}.\n"
        f"#### {total - less}\n"
    )


def _shop(draw: random.Random) -> str:
    who, _, what = _names(draw)
    count, price, extra = draw.randrange(2, 40), draw.randrange(2, 30), draw.randrange(5, 60)
    cost = count * price
    return (
        f"{who} buys {count} {what} for ${price} each and a bag for ${extra}. How much does {who} pay?\n"
        f"The {what} cost {count}*{price} = $<<{count}*{price}={cost}>>{cost}.\n"
        f"Altogether {who} pays {cost}+{extra} = $<<{cost}+{extra}={cost + extra}>>{cost + extra}.\n"
        f"#### {cost + extra}\n"
    )


def _share(draw: random.Random) -> str:
    who, other, what = _names(draw)
    friends, each, rest = draw.randrange(2, 13), draw.randrange(3, 30), draw.randrange(0, 20)
    total = friends * each + rest
    return (
        f"{who} collects {total} {what}, keeps {rest} of them and shares the others equally among {friends} friends. "
        f"{other} is one of the friends. How many {what} does {other} get?\n"
        f"To share there are {total}-{rest} = <<{total}-{rest}={total - rest}>>{total - rest} {what}.\n"
        f"{other} gets {total - rest}/{friends} = <<{total - rest}/{friends}={each}>>{each} {what}.\n#### {each}\n"
    )


def _week(draw: random.Random) -> str:
    who, other, what = _names(draw)
    first, more, days = draw.randrange(3, 40), draw.randrange(2, 25), draw.randrange(2, 8)
    second = first + more
    return (
        f"Every day {who} sells {first} {what}, and {other} sells {more} more than {who}. How many {what} do they sell "
        f"together in {days} days?\n{other} sells {first}+{more} = <<{first}+{more}={second}>>{second} {what} a day.\n"
        f"Together they sell {first}+{second} = <<{first}+{second}={first + second}>>{first + second} {what} a day.\n"
        f"In {days} days that is {first + second}*{days} = <<{first + second}*{days}={(first + second) * days}>>"
        f"{(first + second) * days} {what}.\n#### {(first + second) * days}\n"
    )


_PROBLEMS: tuple[Callable[[random.Random], str], ...] = (_gift, _shop, _share, _week)


def general() -> Iterator[str]:
    """What the compiled modules say of themselves, one document each; no other text here holds it."""
    for name in sorted(sys.builtin_module_names):
        try:
            module = import_module(name)
        except ImportError:
            continue
        found: dict[str, None] = {}
        for owner in (module, *vars(module).values()):
            members = vars(owner).values() if inspect.isclass(owner) else ()
            for item in (owner, *members):
                # plain values have the docstring of their class
                is_documented = callable(item) or inspect.ismodule(item) or inspect.isdatadescriptor(item)
                text = inspect.getdoc(item) if is_documented else None
                if text and len(text) > 40:
                    found[text] = None
        if found:
            yield "\n\n".join(found) + "\n"
