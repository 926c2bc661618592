"""The state of an object graph as tensors, numbers, strings, lists and dicts, and back; nothing in it is executed.

Avalanche has no checkpoint that works with current packages, and its strategies keep what they know anywhere: in
plugins, copied models, buffers that are views of data sets, unread generators. So the whole graph is written down,
shared references and all. Reading puts values into the graph of a freshly built object wherever the two agree, which
keeps hooks and closures, and makes the rest anew: only of classes that are already imported and named in `MAY_BE_MADE`
or present in the fresh graph, without calling a constructor or anything else that the file names.
"""

from __future__ import annotations

import inspect
import logging
import operator
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MAY_BE_MADE = (
    "avalanche.",
    "torch.nn.",
    "torch.optim.",
    "torch.utils.data.",
    "torchvision.transforms.",
    "cl.backbones",
)
PLAIN = (type(None), bool, int, float, str)
DICTS = {kind.__name__: kind for kind in (dict, OrderedDict, defaultdict)}
LISTS = {kind.__name__: kind for kind in (list, tuple, set, frozenset, deque, torch.Size)}
LIST_ITERATOR: type = type(iter([]))
Node = dict[str, Any]


class Writer:
    """Writes a graph down.

    Args:
        name_of: the name of an object that belongs to the run and not to its state, or None.
    """

    def __init__(self, name_of: Callable[[Any], str | None]) -> None:
        self.name_of = name_of
        self.nodes: list[Node] = []
        self.numbers: dict[int, int] = {}
        self.kept: list[Any] = []

    def value(self, thing: Any) -> Any:
        """A plain value as it is, else [number of its node]."""
        if type(thing) in PLAIN:
            return thing
        if id(thing) not in self.numbers:
            self.numbers[id(thing)] = len(self.nodes)
            self.kept.append(thing)  # so that no number is given out twice
            node: Node = {}
            self.nodes.append(node)
            node |= self.node(thing)
        return [self.numbers[id(thing)]]

    def node(self, thing: Any) -> Node:
        name = self.name_of(thing)
        if name is not None:
            return {"is": "external", "name": name}
        if isinstance(thing, Tensor):
            return {"is": "tensor", "data": thing.detach().cpu().clone(), "flags": _flags(thing)}
        if isinstance(thing, np.ndarray):
            return {"is": "array", "data": torch.from_numpy(thing.copy())}
        if isinstance(thing, np.generic):
            return {"is": "scalar", "data": thing.item()}
        if type(thing).__name__ in DICTS and isinstance(thing, dict):
            pairs = [[self.value(key), self.value(each)] for key, each in thing.items()]
            factory = self.value(getattr(thing, "default_factory", None))
            return {"is": "dict", "kind": type(thing).__name__, "pairs": pairs, "factory": factory}
        if type(thing).__name__ in LISTS and isinstance(thing, list | tuple | set | frozenset | deque):
            return {"is": "list", "kind": type(thing).__name__} | self.items(thing)
        if isinstance(thing, range):
            return {"is": "range", "data": [thing.start, thing.stop, thing.step]}
        if isinstance(thing, torch.device | torch.dtype):
            return {"is": type(thing).__name__, "name": str(thing).removeprefix("torch.")}
        return self.code(thing)

    def items(self, things: Any) -> Node:
        if len(things) > 16 and all(type(thing) is int for thing in things):
            return {"integers": torch.tensor(list(things))}
        return {"items": [self.value(thing) for thing in things]}

    def code(self, thing: Any) -> Node:
        """Functions by name, and objects by class and attributes."""
        if isinstance(thing, type | types.FunctionType | types.BuiltinFunctionType):
            # the long names of torch's own functions contain a class that cannot be reached
            is_plain = not isinstance(thing, types.BuiltinFunctionType)
            name = [thing.__module__ or "builtins", thing.__qualname__ if is_plain else thing.__name__]
            return {"is": "named", "name": name} if _named(*name) is thing else {"is": "local", "name": name}
        if isinstance(thing, types.MethodType):
            return {"is": "method", "owner": self.value(thing.__self__), "name": thing.__func__.__name__}
        if isinstance(thing, partial):
            parts = [self.value(part) for part in (thing.func, thing.args, thing.keywords)]
            return {"is": "partial", "parts": parts}
        if isinstance(thing, types.GeneratorType):
            return self.generator(thing)
        if isinstance(thing, Enum):
            return {"is": "member", "class": _class(thing), "name": thing.name}
        if isinstance(thing, torch.Generator):
            return {"is": "generator state", "data": thing.get_state()}
        if isinstance(thing, logging.Logger):
            return {"is": "logger", "name": thing.name}
        if isinstance(thing, LIST_ITERATOR) and not operator.length_hint(thing):
            return {"is": "end"}
        if not hasattr(thing, "__dict__"):
            raise ValueError(f"a {type(thing).__module__}.{type(thing).__qualname__} cannot be written down")
        attributes = {key: self.value(each) for key, each in vars(thing).items() if not key.endswith("_hooks")}
        return {"is": "object", "class": _class(thing), "attributes": attributes}

    def generator(self, thing: types.GeneratorType[Any, Any, Any]) -> Node:
        """A generator that was not asked yet is its function and the arguments."""
        frame = thing.gi_frame
        if frame is None or inspect.getgeneratorstate(thing) != inspect.GEN_CREATED:
            raise ValueError(f"the generator {thing.__qualname__} was read already and cannot be written down")
        module, arguments = _call(thing, frame)
        given = [self.value(each) for each in arguments]
        return {"is": "generator", "name": [module, thing.__qualname__], "arguments": given}


def _call(generator: types.GeneratorType[Any, Any, Any], frame: types.FrameType) -> tuple[str, list[Any]]:
    """Module of its function, and the arguments that it was called with."""
    code = generator.gi_code
    return frame.f_globals["__name__"], [frame.f_locals[name] for name in code.co_varnames[: code.co_argcount]]


def again(generator: types.GeneratorType[Any, Any, Any]) -> types.GeneratorType[Any, Any, Any]:
    """The same generator from its beginning; the one given is not touched. One that has ended stays so."""
    if generator.gi_frame is None:
        return generator
    module, arguments = _call(generator, generator.gi_frame)
    made: types.GeneratorType[Any, Any, Any] = _named(module, generator.__qualname__)(*arguments)
    return made


def _flags(tensor: Tensor) -> list[bool]:
    return [isinstance(tensor, nn.Parameter), tensor.requires_grad]


def _class(thing: Any) -> list[str]:
    return [type(thing).__module__, type(thing).__qualname__]


def _named(module: str, name: str) -> Any:
    """What is called so, without importing anything."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


class Reader:
    """Reads a graph into a fresh one.

    Args:
        external: an object of the run, by its name.
        known: classes that may be made besides those of `MAY_BE_MADE`.
    """

    def __init__(
        self, nodes: list[Node], external: Callable[[str], Any], known: set[type], device: torch.device
    ) -> None:
        self.nodes, self.external, self.known, self.device = nodes, external, known, device
        self.made: dict[int, Any] = {}
        self.claimed: set[int] = set()
        self.fresh: list[Any] = []

    def value(self, written: Any, fresh: Any = None) -> Any:
        """The value, in the place of `fresh` where both are of a kind."""
        if not isinstance(written, list):
            return written
        (number,) = written
        if number not in self.made:
            if id(fresh) in self.claimed:
                fresh = None
            elif fresh is not None:
                self.claimed.add(id(fresh))
                self.fresh.append(fresh)
            self.read(number, self.nodes[number], fresh)
        return self.made[number]

    def read(self, number: int, node: Node, fresh: Any) -> None:
        # a container is known before its content is read, so that it may contain itself
        kind = node["is"]
        if kind == "object":
            cls = self.allowed(node["class"])
            thing = self.made[number] = fresh if type(fresh) is cls else _blank(cls)
            for key, written in node["attributes"].items():
                thing.__dict__[key] = self.value(written, thing.__dict__.get(key))
        elif kind == "dict":
            same = type(fresh) is DICTS[node["kind"]]
            thing = self.made[number] = fresh if same else DICTS[node["kind"]]()
            before = dict(thing)
            thing.clear()
            if isinstance(thing, defaultdict):
                thing.default_factory = self.value(node["factory"], thing.default_factory)
            for key, written in node["pairs"]:
                key = self.value(key, _same(before, key))
                thing[key] = self.value(written, before.get(key))
        elif kind == "list" and node["kind"] == "list":
            thing = self.made[number] = fresh if type(fresh) is list else []
            thing[:] = self.listed(node, list(thing))
        else:
            self.made[number] = self.leaf(kind, node, fresh)

    def listed(self, node: Node, before: list[Any]) -> list[Any]:
        if "integers" in node:
            return node["integers"].tolist()
        before += [None] * len(node["items"])
        return [self.value(written, old) for written, old in zip(node["items"], before, strict=False)]

    def leaf(self, kind: str, node: Node, fresh: Any) -> Any:
        if kind == "list":
            return LISTS[node["kind"]](self.listed(node, list(fresh) if isinstance(fresh, tuple) else []))
        if kind == "tensor":
            return _tensor(node, fresh, self.device)
        if kind == "external":
            return self.external(node["name"])
        if kind == "local":
            if not isinstance(fresh, types.FunctionType | type):
                raise ValueError(
                    f"the checkpoint needs the function {'.'.join(node['name'])}, which cannot be found here"
                )
            return fresh
        if kind in ("named", "generator"):
            return self.function(kind, node)
        if kind == "method":
            owner = self.value(node["owner"], getattr(fresh, "__self__", None))
            return types.MethodType(getattr(type(owner), node["name"]), owner)
        if kind == "partial":
            function, arguments, named = (self.value(part) for part in node["parts"])
            return partial(function, *arguments, **named)
        if kind == "member":
            return self.allowed(node["class"])[node["name"]]
        if kind == "generator state":
            return torch.Generator().set_state(node["data"].cpu())
        simple: Mapping[str, Callable[[], Any]] = {
            "array": lambda: node["data"].cpu().numpy(),
            "scalar": lambda: node["data"],
            "range": lambda: range(*node["data"]),
            "end": lambda: iter([]),
            "logger": lambda: logging.getLogger(node["name"]),
            "device": lambda: torch.device(node["name"]),
            "dtype": lambda: getattr(torch, node["name"]),
        }
        return simple[kind]()

    def function(self, kind: str, node: Node) -> Any:
        """A function or class by name; it is not called, except generator functions, which do nothing before they are
        asked."""
        module, name = node["name"]
        found = _named(module, name)
        if (module, name) not in SAFE and not self.is_allowed(module, name, found):
            raise ValueError(f"the checkpoint names {module}.{name}, which is not Avalanche's")
        if kind == "named":
            return found
        if not inspect.isgeneratorfunction(found):
            raise ValueError(f"the checkpoint calls {module}.{name}, which is no generator function")
        return found(*(self.value(argument) for argument in node["arguments"]))

    def allowed(self, name: list[str]) -> Any:
        module, qualname = name
        cls = _named(module, qualname)
        if not isinstance(cls, type) or not self.is_allowed(module, qualname, cls):
            raise ValueError(f"the checkpoint names the class {module}.{qualname}, which is not Avalanche's")
        return cls

    def is_allowed(self, module: str, name: str, found: Any) -> bool:
        """Whether the name is the thing's own: every module is reachable through the names that others import."""
        is_own = isinstance(found, type | types.FunctionType) and (found.__module__, found.__qualname__) == (
            module,
            name,
        )
        return is_own and (f"{module}.".startswith(MAY_BE_MADE) or found in self.known)


SAFE = {("builtins", name) for name in ("int", "float", "list", "dict", "set", "str", "bool")} | {
    ("torch.utils.data._utils.collate", "default_collate"),
    ("torch", "zeros"),
}


def _same(before: Mapping[Any, Any], key: Any) -> Any:
    """The fresh key at the same place, where keys are objects."""
    return None if not isinstance(key, list) else next(iter(before), None)


def _blank(cls: type[object]) -> Any:
    thing = cls.__new__(cls)
    if isinstance(thing, nn.Module):
        nn.Module.__init__(thing)  # the empty tables of hooks
    return thing


def _tensor(node: Node, fresh: Any, device: torch.device) -> Tensor:
    data, (is_parameter, requires_grad) = node["data"], node["flags"]
    is_same = isinstance(fresh, Tensor) and fresh.shape == data.shape and fresh.dtype == data.dtype and fresh.is_leaf
    if is_same and isinstance(fresh, nn.Parameter) == is_parameter:
        with torch.no_grad():
            fresh.copy_(data)
        return fresh.requires_grad_(requires_grad)
    data = data.clone().to(fresh.device if isinstance(fresh, Tensor) else device)
    return nn.Parameter(data, requires_grad) if is_parameter else data.requires_grad_(requires_grad)


def classes_in(thing: Any, seen: set[int] | None = None) -> Iterator[type]:
    """Classes of the objects in a graph."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, (*PLAIN, Tensor, type, types.FunctionType)):
        return
    seen.add(id(thing))
    yield type(thing)
    inner = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple | set) else ()
    for each in [*inner, *vars(thing).values()] if hasattr(thing, "__dict__") else list(inner):
        yield from classes_in(each, seen)


def write(root: dict[str, Any], name_of: Callable[[Any], str | None]) -> dict[str, Any]:
    """A graph that begins with these attributes.

    Example:
        >>> loop = [1]
        >>> loop.append(loop)
        >>> written = write({"a": loop, "b": loop}, lambda thing: None)
        >>> found = read(written, {"a": None, "b": None}, print, set(), torch.device("cpu"))
        >>> found["a"] is found["b"] is found["a"][1], found["a"][0]
        (True, 1)
    """
    writer = Writer(name_of)
    return {"root": {key: writer.value(each) for key, each in root.items()}, "nodes": writer.nodes}


def read(
    written: Mapping[str, Any],
    fresh: Mapping[str, Any],
    external: Callable[[str], Any],
    known: set[type],
    device: torch.device,
) -> dict[str, Any]:
    """The attributes that were written, put into the fresh ones where both agree."""
    reader = Reader(written["nodes"], external, known, device)
    return {key: reader.value(each, fresh.get(key)) for key, each in written["root"].items()}
