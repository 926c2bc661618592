"""Avalanche's own tests with our code in place of theirs.

    python benchmarks/avalanche_suite.py CHECKOUT [PART ...]

CHECKOUT is a clone of ContinualAI/avalanche at tag v0.6.0, whose tests the wheel does not contain; nothing is fetched.
Two kinds of parts:

strategies: in `tests/training/test_strategies.py` the names of their strategies are bound to stand-ins, which are
    `cl.interop.avalanche.Template` with a plugin made of the strategy of ours, and the tests run as they are published:
    class-incremental and multi-task benchmarks, positional arguments that must warn, plugins beside ours.
loaders: their tests of data loaders, replay buffers, streams and templates, unchanged, while their data sets fetch
    whole batches (`fast_fetching`).

Prints one line per test and a summary; exits with 1 when a test fails that is not listed in EXPECTED.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import os
import sys
import unittest
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from cl.core import UserError
from cl.hooks import Strategy

STRATEGIES: dict[str, tuple[str, Callable[..., Strategy]]] = {}
"""Published test -> the name it uses, and our strategy from their arguments."""

LOADERS = (
    "tests.training.test_replay",
    "tests.benchmarks.utils.test_dataloaders",
    "tests.training.test_stream_completeness",
    "tests.training.test_dictionary_mbatches",
    "tests.training.test_strategies.BaseStrategyTest",
    "tests.training.test_online_strategies",
)
EXPECTED = {
    "test_lwf": "the multi-task model grows heads of its own; ours distils heads of cl.backbones.MultiHead",
    "test_synaptic_intelligence": "the multi-task model grows parameters; ours follows those it had when the run began",
}
"""Tests that fail, and why."""


def stands_in(test: str, name: str) -> Callable[[Callable[..., Strategy]], Callable[..., Strategy]]:
    """Our strategy for a published test."""

    def keep(make: Callable[..., Strategy]) -> Callable[..., Strategy]:
        STRATEGIES[test] = name, make
        return make

    return keep


@stands_in("test_naive", "Naive")
def _naive() -> Strategy:
    from strategies.naive import Naive

    return Naive()


@stands_in("test_replay", "Replay")
def _replay(mem_size: int = 200) -> Strategy:
    from strategies.replay import Replay

    return Replay(mem_size, policy="experience_balanced", update="experience_end", average="row")


@stands_in("test_cumulative", "Cumulative")
def _cumulative() -> Strategy:
    from strategies.cumulative import Cumulative

    return Cumulative()


@stands_in("test_agem", "AGEM")
def _agem(patterns_per_exp: int, sample_size: int = 64) -> Strategy:
    from strategies.agem import Agem

    return Agem(5 * patterns_per_exp, sample_size)


@stands_in("test_gem", "GEM")
def _gem(patterns_per_exp: int, memory_strength: float = 0.5) -> Strategy:
    from strategies.gem import Gem

    return Gem(5 * patterns_per_exp, memory_strength)


@stands_in("test_ewc_online", "EWC")
@stands_in("test_ewc", "EWC")
def _ewc(ewc_lambda: float, mode: str = "separate", decay_factor: float | None = None) -> Strategy:
    from strategies.ewc import Ewc

    kind = "online" if mode == "online" else "offline"
    gamma = 1.0 if decay_factor is None else decay_factor
    return Ewc(ewc_lambda, kind, gamma, importance_rows=None, convention="avalanche")


@stands_in("test_mas", "MAS")
def _mas(lambda_reg: float = 1.0, alpha: float = 0.5, verbose: bool = False) -> Strategy:
    from strategies.mas import Mas

    return Mas(lambda_reg, None, "avalanche", alpha)


@stands_in("test_lwf", "LwF")
def _lwf(alpha: Any = 1.0, temperature: float = 2.0) -> Strategy:
    from strategies.lwf import Lwf

    # theirs takes a strength for each experience; the published test gives the last ones equal
    return Lwf(alpha[-1] if isinstance(alpha, list | tuple) else alpha, temperature)


@stands_in("test_synaptic_intelligence", "SynapticIntelligence")
def _si(si_lambda: float, eps: float = 1e-7) -> Strategy:
    from strategies.si import Si

    return Si(si_lambda, eps, "avalanche")


@stands_in("test_der", "DER")
def _der(mem_size: int = 200, batch_size_mem: int | None = None, alpha: float = 0.1, beta: float = 0.5) -> Strategy:
    from strategies.derpp import Derpp

    return Derpp(mem_size, batch_size_mem, alpha, beta)


def stand_in(make: Callable[..., Strategy]) -> type:
    """A template class with their signature whose method is ours."""
    from cl.interop.avalanche import Template, as_plugin

    own = {name: p.replace(kind=p.KEYWORD_ONLY) for name, p in inspect.signature(make).parameters.items()}

    def init(
        self: Any, *, model: Any, optimizer: Any, criterion: Any = None, plugins: Any = None, **options: Any
    ) -> None:
        method = {key: options.pop(key) for key in list(options) if key in own}
        given = {} if criterion is None else {"criterion": criterion}
        both = [*(plugins or []), as_plugin(make(**method))]
        super(made, self).__init__(model=model, optimizer=optimizer, plugins=both, **given, **options)

    # Avalanche checks arguments against the signature of every class on the way up
    shown = list(inspect.signature(init).parameters.values())
    init.__signature__ = inspect.Signature([*shown[:-1], *own.values(), shown[-1]])  # type: ignore[attr-defined]
    made = type("StandIn", (Template,), {"__init__": init})
    return made


def strategy_suite() -> unittest.TestSuite:
    """The published tests of strategies, with the names of theirs bound to stand-ins while each runs."""
    module = import_module("tests.training.test_strategies")
    suite = unittest.TestSuite()
    for test, (name, make) in STRATEGIES.items():
        case = module.StrategyTest(test)
        run = getattr(case, test)

        def bound(run: Callable[[], None] = run, name: str = name, make: Callable[..., Strategy] = make) -> None:
            theirs = getattr(module, name)
            setattr(module, name, stand_in(make))
            try:
                run()
            finally:
                setattr(module, name, theirs)

        setattr(case, test, bound)
        suite.addTest(case)
    return suite


class Lines(unittest.TestResult):
    """One line per test."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, str]] = []

    def stopTest(self, test: unittest.TestCase) -> None:  # noqa: N802  (unittest's name)
        super().stopTest(test)
        short = test.id().rpartition(".")[2]
        bad = [why for failed, why in (*self.errors, *self.failures) if failed is test]
        skipped = [why for failed, why in self.skipped if failed is test]
        outcome = "skipped" if skipped else "passes"
        if bad:
            outcome = f"fails: {bad[0].strip().splitlines()[-1][:160]}"
            if short in EXPECTED:
                outcome = f"fails, as expected: {EXPECTED[short]} ({bad[0].strip().splitlines()[-1][:120]})"
        self.rows.append((test.id(), outcome))
        print(f"{outcome.split(':')[0]:20} {test.id()}", file=sys.__stdout__, flush=True)


def main() -> int:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path, help="clone of ContinualAI/avalanche at v0.6.0")
    parser.add_argument("parts", nargs="*", help="strategies, loaders (both when none is named)")
    given = parser.parse_args()
    if not (given.checkout / "tests" / "training" / "test_strategies.py").is_file():
        raise UserError(f"{given.checkout} is no checkout of Avalanche: it has no tests/training/test_strategies.py")
    unknown = set(given.parts) - {"strategies", "loaders"}
    if unknown:
        raise UserError(f"{unknown.pop()!r} is no part; the parts are strategies, loaders")
    os.environ |= {"FAST_TEST": "True", "USE_GPU": "False"}
    # before the package `tests` that the wheel of another version may have installed
    sys.path.insert(0, str(given.checkout))
    return run(given.parts or ["strategies", "loaders"])


def run(parts: list[str]) -> int:
    """Run the parts and print what came out; 1 when a test fails that should not."""
    from cl.interop._quiet import quiet
    from cl.interop.avalanche import fast_fetching

    result = Lines()
    with contextlib.redirect_stdout(io.StringIO()), quiet():
        if "strategies" in parts:
            strategy_suite().run(result)
        if "loaders" in parts:
            with fast_fetching():
                unittest.defaultTestLoader.loadTestsFromNames(LOADERS).run(result)
    wrong = [row for row in result.rows if row[1].startswith("fails:")]
    for name, why in result.rows:
        if why.startswith("fails"):
            print(f"{name}\n    {why}")
    passed = sum(why == "passes" for _, why in result.rows)
    print(f"{passed} of {len(result.rows)} pass, {len(wrong)} fail unexpectedly")
    return int(bool(wrong))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"avalanche_suite: {error}")
