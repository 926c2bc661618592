"""Blocks as words: `3x[linear_memory(rule=gated_delta)] + attention`.

    blocks := term { "+" term }
    term   := [ NUMBER "x" ] ( block | "[" blocks "]" )
    block  := NAME [ "(" argument { "," argument } ")" ]
    argument := NAME "=" value | block            (a block: what a wrapper wraps)
    value  := number | true | false | none | word | block with options | "[" value { "," value } "]"

Names are those of the files in `cl/backbones/mixers/` (and `mlps/`, `memory_rules/`), options those of their classes.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from cl.core import LARGEST_INTEGER, UserError

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.])"
TOKEN = re.compile(rf"\s*(?:(?P<times>\d+)\s*x\s*(?=\[|[A-Za-z_])|(?P<word>{NUMBER}|[\w.]+)|(?P<mark>[\[\]()=,+]))")
WORDS = {"true": True, "false": False, "none": None, "null": None}
MOST_BLOCKS, MOST_BRACKETS = 1000, 20
KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "bool": (bool, "true or false"),
    "int": (int, "an integer"),
    "float": ((int, float), "a finite number"),
    "str": (str, "a word"),
}
"""By annotation: what is allowed, and how a message names it."""


@dataclass(frozen=True)
class Spec:
    """One block: a name, its options, and the blocks it wraps."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    inner: tuple[Spec, ...] = ()

    def __repr__(self) -> str:
        """For messages."""
        return f"{self.name}(...)"


@dataclass(frozen=True)
class Blocks:
    """What a string of blocks says: the blocks in order, and whether it counts them (`3x`)."""

    specs: tuple[Spec, ...]
    is_counted: bool


def parse(text: str, name: str = "backbone.blocks") -> Blocks:
    """Read a string of blocks.

    Args:
        name: of the option that holds it, for messages.

    Raises:
        UserError: it cannot be read; says where.

    Example:
        >>> [spec.name for spec in parse("2x[conv + attention(window=4)] + attention").specs]
        ['conv', 'attention', 'conv', 'attention', 'attention']
    """
    if not isinstance(text, str):
        raise UserError(f"{name} is {text!r}; it must be words such as attention or 3x[linear_memory] + attention")
    deepest = max(accumulate((c in "([") - (c in ")]") for c in text), default=0)
    if deepest > MOST_BRACKETS:
        raise UserError(f"{name} has {deepest} brackets inside each other; it must have at most {MOST_BRACKETS}")
    reader = _Reader(text, name)
    specs = reader.blocks()
    if reader.peek()[0]:
        reader.refuse("+ or the end")
    return Blocks(tuple(specs), reader.is_counted)


def parse_one(text: str, name: str) -> Spec:
    """Read a string that names one block.

    Raises:
        UserError: it cannot be read, or names several.
    """
    blocks = parse(text, name)
    if len(blocks.specs) != 1 or blocks.is_counted:
        raise UserError(f"{name} is {text!r}; it must name one part, such as {blocks.specs[0].name}")
    return blocks.specs[0]


class _Reader:
    """Recursive descent over the words of a string; `at` is where the next one begins."""

    def __init__(self, text: str, name: str) -> None:
        self.text, self.name, self.at, self.is_counted = text, name, 0, False

    def peek(self) -> tuple[str, str]:
        """Kind and text of the next word; ("", "") at the end."""
        if not self.text[self.at :].strip():
            return "", ""
        found = TOKEN.match(self.text, self.at)
        if found is None:
            self.refuse("a name, a number or one of [ ] ( ) = , +")
        return str(found.lastgroup), found[str(found.lastgroup)]

    def take(self, mark: str | None = None, wanted: str = "a name") -> str:
        kind, word = self.peek()
        if (mark is None and kind != "word") or (mark is not None and word != mark):
            self.refuse(mark or wanted)
        self.skip()
        return word

    def skip(self) -> None:
        found = TOKEN.match(self.text, self.at)
        assert found is not None
        self.at = found.end()

    def refuse(self, wanted: str) -> NoReturn:
        rest = self.text[self.at :].strip()
        where = f"at {rest!r}" if rest else "at its end"
        raise UserError(
            f"{self.name} is {self.text!r}; {where} it must have {wanted} "
            "(an example: 3x[linear_memory(rule=gated_delta)] + attention)"
        )

    def blocks(self) -> list[Spec]:
        specs = self.term()
        while self.peek()[1] == "+":
            self.skip()
            specs += self.term()
        return specs

    def term(self) -> list[Spec]:
        count = 1
        if self.peek()[0] == "times":
            count, self.is_counted = int(self.peek()[1]), True
            if count < 1:
                self.refuse("a count of at least 1")
            self.skip()
        if self.peek()[1] != "[":
            specs = [self.block()]
        else:
            self.skip()
            specs = self.blocks()
            self.take("]")
        if count * len(specs) > MOST_BLOCKS:
            raise UserError(
                f"{self.name} is {self.text!r}, which repeats {len(specs)} blocks {count} times; it must name at most "
                f"{MOST_BLOCKS}"
            )
        return specs * count

    def block(self, name: str | None = None) -> Spec:
        name = self.take() if name is None else name
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            self.at -= len(name)
            self.refuse("a name")
        options: dict[str, Any] = {}
        inner: list[Spec] = []
        if self.peek()[1] == "(":
            self.skip()
            while self.peek()[1] != ")":
                word = self.take()
                if self.peek()[1] == "=":
                    if word in options:
                        raise UserError(
                            f"{self.name} is {self.text!r}, which gives {name} the option {word!r} twice; give it once"
                        )
                    self.skip()
                    options[word] = self.value()
                else:
                    inner.append(self.block(word))
                if self.peek()[1] != ")":
                    self.take(",")
            self.skip()
        return Spec(name, options, tuple(inner))

    def value(self) -> Any:
        if self.peek()[1] == "[":
            self.skip()
            values = []
            while self.peek()[1] != "]":
                values.append(self.value())
                if self.peek()[1] != "]":
                    self.take(",")
            self.skip()
            return values
        word = self.take(wanted="a value")
        if self.peek()[1] == "(":
            return self.block(word)
        if word.lower() in WORDS:
            return WORDS[word.lower()]
        for number in (int, float):
            try:
                read = number(word)
            except ValueError:
                continue
            if type(read) is int and abs(read) > LARGEST_INTEGER:
                raise UserError(
                    f"{self.name} is {self.text!r}, which holds {word}; an integer must be at most {LARGEST_INTEGER}"
                )
            return read
        return word


# from words to modules


PARTS: dict[str, tuple[str, str]] = {
    "mixers": ("a mixer", "backbone.blocks={}"),
    "mlps": ("an MLP", "backbone.mlp={}"),
    "memory_rules": ("a rule of linear_memory", "backbone.blocks=linear_memory(rule={})"),
    "neural_rules": ("a rule of neural_memory", "backbone.blocks=neural_memory(rule={})"),
    "rnn_cells": ("a cell of nonlinear_rnn", "backbone.blocks=nonlinear_rnn(cell={})"),
    "scan_cells": ("a cell of scan_rnn", "backbone.blocks=scan_rnn(cell={})"),
}
"""Folders of `cl/backbones/`: what a file in one is, and the words of `backbone=gpt` that choose it."""


def place_of(name: str) -> str:
    """End of a message about a name in the wrong place: what it is a name of; empty where it is none.

    Example:
        >>> place_of("titans")
        "; titans is a rule of neural_memory: backbone=gpt 'backbone.blocks=neural_memory(rule=titans)'"
    """
    found = [
        f"{what}: backbone=gpt '{words.format(name)}'"
        for folder, (what, words) in PARTS.items()
        if name in plugin_names(folder)
    ]
    return f"; {name} is {', or '.join(found)}" if found else ""


def plugin_names(folder: str) -> list[str]:
    """Names of the files in a folder of `cl/backbones/`; those that begin with an underscore are helpers."""
    place = Path(__file__).with_name(folder)
    return [path.stem for path in sorted(place.glob("*.py")) if not path.stem.startswith("_")]


def plugin(folder: str, name: str, option: str) -> type:
    """The class that `cl/backbones/FOLDER/NAME.py` is named after.

    Raises:
        UserError: there is no such file.
    """
    if name not in (names := plugin_names(folder)):
        raise UserError(f"{option} names {name!r}; it must be one of {', '.join(names)}{place_of(name)}")
    loaded: type = getattr(
        import_module(f"cl.backbones.{folder}.{name}"), "".join(word.capitalize() for word in name.split("_"))
    )
    return loaded


def build(
    spec: Spec, folder: str, option: str, width: int, fixed: Mapping[str, Any] | None = None, **shared: Any
) -> nn.Module:
    """The module that a spec stands for.

    Args:
        folder: of `cl/backbones/` where its class lives.
        option: name of the option that holds it, for messages.
        fixed: options that the layer around it decides, and the spec may not.
        shared: options that a class gets when it takes them and the spec does not set them, such as `num_heads`.

    Raises:
        UserError: an unknown name, an option that the class does not take, or a value of another kind or that it
            refuses.
    """
    fixed = {} if fixed is None else fixed
    cls = plugin(folder, spec.name, option)
    parameters = inspect.signature(cls).parameters
    taken = [name for name in parameters if name not in ("width", "inner", *fixed)]
    for name, value in spec.options.items():
        if name not in taken:
            allowed = ", ".join(taken) or "none"
            raise UserError(f"{option} gives {spec.name} the option {name!r}; its options are {allowed}")
        _require_kind(f"{name} of {spec.name}", value, str(parameters[name].annotation))
    if len(spec.inner) != ("inner" in parameters):
        wanted = "one block to wrap" if "inner" in parameters else "options only, as name=value"
        raise UserError(f"{option} gives {spec.name} {len(spec.inner)} blocks; it takes {wanted}")
    inner: dict[str, Callable[[int], nn.Module]] = {}
    if spec.inner:
        inner["inner"] = partial(build, spec.inner[0], folder, option, **shared)
    own = {name: value for name, value in shared.items() if name in taken} | dict(spec.options)
    made: nn.Module = cls(width, **inner, **own, **fixed)
    return made


def _require_kind(name: str, value: Any, annotation: str) -> None:
    """Raise `UserError` where a value is not what the annotation says; lists are left to whoever takes them."""
    word, *others = annotation.split(" | ")
    if word not in KINDS or (value is None and "None" in others) or (isinstance(value, Spec) and "Spec" in others):
        return
    kind, wanted = KINDS[word]
    # to Python true is an integer as well
    is_kind = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
    if not is_kind or (isinstance(value, float) and not math.isfinite(value)):
        raise UserError(f"{name} is {value!r}; it must be {wanted}{' or none' if 'None' in others else ''}")


def build_mixer(text: str, width: int, **shared: Any) -> nn.Module:
    """The mixer that words stand for.

    Example:
        >>> type(build_mixer("attention(window=4)", width=16, num_heads=2)).__name__
        'Attention'
    """
    return build(parse_one(text, "backbone.blocks"), "mixers", "backbone.blocks", width, **shared)


def build_rule(rule: str | Spec, width: int, num_heads: int, key_width: int, value_width: int) -> Any:
    """The memory rule that `linear_memory(rule=...)` names: a word, or a word with options.

    Raises:
        UserError: as `build`.
    """
    spec = rule if isinstance(rule, Spec) else parse_one(rule, "rule of linear_memory")
    shape = {"num_heads": num_heads, "key_width": key_width, "value_width": value_width}
    return build(spec, "memory_rules", "rule of linear_memory", width, shape)
