"""Calls in a process of their own: what ends it, or silences it, costs one call and neither the caller nor the next.

An illegal access on a card leaves nothing usable in its process, and a kernel that hangs cannot be stopped but with it.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from threading import Lock
from typing import Any, TypeVar

R = TypeVar("R")
Note = Callable[[Any], None]
# a fork cannot use a card that the caller has looked at
CONTEXT = get_context("spawn")
# two that start at once must not hold the ends of each other's pipe, which would then outlive its process
_STARTING = Lock()


class Lost(Exception):
    """The process of a call is gone: `noted` is what the call said last, if anything."""

    def __init__(self, noted: Any, why: str):
        super().__init__(why)
        self.noted = noted


def sentence(failure: BaseException) -> str:
    """Kind and first line of what was raised."""
    return ": ".join([type(failure).__name__, *str(failure).splitlines()[:1]])


class Apart:
    """`work(note, *given)` in a process that is started at the first call, and again after one that lost it.

    Args:
        work: a function of a module; an exception it raises ends its process.
        patience: seconds between two signs of life (notes, the result) after which the process is given up.
    """

    def __init__(self, work: Callable[..., Any], patience: float):
        self._work, self._patience = work, patience
        self._running: tuple[BaseProcess, Connection] | None = None

    def __call__(self, *given: Any) -> Any:
        """What `work` returns.

        Raises:
            Lost: it raised, its process ended, or it kept silent for too long.
        """
        process, pipe = self._running = self._running or self._start()
        noted, why = None, f"no sign of life for {self._patience:g} s"
        try:
            pipe.send(given)
            while wait([pipe], self._patience):
                kind, what = pipe.recv()
                if kind == "result":
                    return what
                if kind == "failure":
                    why = what
                    break
                noted = what
        except (EOFError, OSError):
            process.join(self._patience)
            why = f"its process ended with exit code {process.exitcode}"
        self.close()
        raise Lost(noted, why)

    def _start(self) -> tuple[BaseProcess, Connection]:
        with _STARTING:
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(theirs, self._work), daemon=True)
            process.start()
            theirs.close()
        return process, ours

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._running is not None:
            process, pipe = self._running
            process.kill()
            process.join()
            pipe.close()
            self._running = None


def shared(call: Callable[..., R], tasks: Sequence[tuple[Any, ...]], asks: Sequence[Apart]) -> Iterator[R]:
    """`call(ask, *task)` of every task in their order, each with the next process that is free."""
    idle: SimpleQueue[Apart] = SimpleQueue()
    for ask in asks:
        idle.put(ask)

    def one(task: tuple[Any, ...]) -> R:
        ask = idle.get()
        try:
            return call(ask, *task)
        finally:
            idle.put(ask)

    with ThreadPoolExecutor(len(asks)) as pool:
        yield from pool.map(one, tasks)
    for ask in asks:
        ask.close()


def _serve(pipe: Connection, work: Callable[..., Any]) -> None:
    try:
        while True:
            given = pipe.recv()
            pipe.send(("result", work(lambda what: pipe.send(("note", what)), *given)))
    except EOFError:  # the caller has gone
        return
    except Exception as failure:
        pipe.send(("failure", sentence(failure)))
