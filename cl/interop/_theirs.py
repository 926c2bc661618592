"""A strategy of Avalanche as one of ours: chosen by name, with its own signature, run by `cl.interop._host`."""

from __future__ import annotations

import inspect
from functools import cache
from importlib import import_module
from typing import Any, ClassVar

from cl.core import Setting, Stream, UserError
from cl.hooks import Contract, Strategy
from cl.interop._quiet import quiet, require_avalanche
from cl.interop.catalog import METHODS, Method
from cl.state import Cost

_PASSED_ON = {"self", "args", "kwargs", "base_kwargs"}
_PARTS = {"model", "feature_extractor", "classifier", "slda_model", "optimizer", "criterion", "device", "plugins"}
_LOOP = {"train_mb_size", "train_epochs", "train_passes", "eval_mb_size", "eval_every", "peval_mode", "evaluator"}
OURS = frozenset(_PASSED_ON | _PARTS | _LOOP)
"""Arguments that the run fills in."""


class Theirs(Strategy):
    """A strategy of Avalanche, in Avalanche's own training template, on a stream and a backbone of ours.

    It trains alone: the run's loop is Avalanche's (`trainer`), rows come in our order wherever the strategy trains on
    the experience's own rows, and everything else (measuring, tracking, resuming, reporting) is ours. Runs are paired
    by seed: initial weights and order are those of our strategies.

    Class attributes:
        method: what the catalog says of it.
        kind: its class.

    Source: Lomonaco et al., "Avalanche: an End-to-End Library for Continual Learning", CVPR Workshops 2021, version
    0.6.0; each method's paper is named there.
    """

    method: ClassVar[Method]
    kind: ClassVar[type]
    contract = Contract(why_not_zero="is another library's", why_not_better="is another library's")

    def __init__(self, **options: Any) -> None:
        _check(type(self), options)
        self.options = options
        self.host: Any = None

    @property
    def trainer(self) -> type:
        """The loop that runs it."""
        from cl.interop._host import HostingTrainer

        return HostingTrainer

    def plan(self, stream: Stream) -> Stream:
        from cl.interop._host import as_one_experience

        return as_one_experience(stream) if self.method.recipe == "joint" else stream

    def cost(self, state: Any, batch_size: int) -> Cost:
        return Cost(buffer_bytes=self.host.kept_bytes() if self.host else 0)

    def state_dict(self) -> dict[str, Any]:
        return self.host.state_dict() if self.host else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.host.load_state_dict(state)

    def on_resume(self, state: Any) -> None:
        self.host.put_in_place()


class Own(Theirs):
    """A template class of the user's, as `strategy=avalanche/my_module.MyStrategy`.

    Args:
        template: dotted name of the class; its constructor takes what `SupervisedTemplate` takes, and `options`.
    """

    def __init__(self, template: str, **options: Any) -> None:
        cls = strategy_class(template)
        _check(cls, options)
        self.method, self.kind, self.options, self.host = cls.method, cls.kind, options, None  # type: ignore[misc]


def _check(cls: type, options: dict[str, Any]) -> None:
    known = inspect.signature(cls).parameters
    for option in options:
        if option not in known:
            raise UserError(f"avalanche/{cls.__name__} has no option {option!r}; it takes {_shown(cls)}")
    missing = [name for name, p in known.items() if p.default is p.empty and name not in options]
    if missing:
        raise UserError(f"avalanche/{cls.__name__} needs {', '.join(missing)}; it takes {_shown(cls)}")


def _shown(cls: type) -> str:
    shown = [
        name if p.default is p.empty else f"{name}={p.default!r}"
        for name, p in inspect.signature(cls).parameters.items()
    ]
    return ", ".join(shown) or "no options"


@cache
def strategy_class(name: str) -> type[Theirs]:
    """The class behind `strategy=avalanche/NAME`, whose signature is that of Avalanche's class.

    Args:
        name: in the catalog, or the dotted name of a template class of the user's.

    Raises:
        UserError: there is no such strategy, or it does not run with current packages.

    Example:
        >>> sorted(inspect.signature(strategy_class("Replay")).parameters)
        ['mem_size']
    """
    if name not in METHODS and "." not in name:
        raise UserError(f"Avalanche has no strategy {name!r}; it has {', '.join(working())}, see `cl list strategies`")
    method = METHODS.get(name) or Method("A template of the user's.", name)
    if method.broken:
        raise UserError(f"strategy avalanche/{name} does not run: it {method.broken}")
    require_avalanche()
    module, _, attribute = method.target.rpartition(".")
    try:
        with quiet():
            # what is deprecated there is hidden in a function that warns
            kind = inspect.unwrap(getattr(import_module(module), attribute))
    except (ImportError, AttributeError) as error:
        raise UserError(f"strategy avalanche/{name} cannot be imported: {error}") from None
    parameters = inspect.signature(kind.__init__).parameters.values()
    own = [
        p.replace(kind=p.KEYWORD_ONLY, annotation=p.empty)
        for p in parameters
        if p.name not in OURS.union(method.filled) and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    given = method.given
    own = [p.replace(default=given[p.name]) if p.name in given and p.default is p.empty else p for p in own]
    members = {
        "__doc__": f"{method.line}\n\nSource: {method.target}, avalanche-lib 0.6.0.",
        "__signature__": inspect.Signature(own),
        "method": method,
        "kind": kind,
        "settings": frozenset(map(Setting, method.settings)),
    }
    return type(attribute, (Theirs,), members)


def working() -> list[str]:
    """Names of the strategies that run."""
    return [name for name, method in METHODS.items() if not method.broken]
