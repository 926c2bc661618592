"""Many jobs in separate processes, a few at a time; one that dies takes nobody with it.

Processes are forked from a server that has imported the heavy packages once, so a job starts at once and still has a
process, and one thread, of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from cl.cli.main import said

PRELOADED = ["cl.cli.execute", "cl.trainer", "cl.tracking.mlflow", "cl.report.figures", "mlflow", "omegaconf"]
# the first optimizer imports it, a second or more in every job
PRELOADED += ["torch._dynamo"]
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass
class Job:
    """Something to do in a process of its own.

    Args:
        function: called as `function(send, *arguments)`; importable by name. What it sends, the parent receives.
    """

    name: str
    function: Callable[..., None]
    arguments: tuple[Any, ...] = ()


@dataclass
class Ending:
    """How a job ended: `error` is empty when all went well."""

    name: str
    error: str = ""


@dataclass
class _Running:
    job: Job
    process: Any
    channel: Connection
    error: str = field(default="")


def _work(channel: Connection, job: Job) -> None:
    import torch

    torch.set_num_threads(1)

    def send(message: Mapping[str, Any]) -> None:
        try:
            channel.send(message)
        except OSError:
            # nobody listens any more: end in order, as when told to
            signal.raise_signal(signal.SIGTERM)

    try:
        job.function(send, *job.arguments)
    except KeyboardInterrupt:
        send({"error": "interrupted"})
    except Exception as error:
        send({"error": said(error)})
    finally:
        channel.close()


def run_jobs(
    jobs: Iterable[Job], num_workers: int, on_message: Callable[[str, Mapping[str, Any]], None]
) -> Iterator[Ending]:
    """Run all jobs, at most `num_workers` at a time; yield each as it ends, in the order in which they end.

    A job that raises ends with its sentence; one that is killed ends with the signal's number. Ctrl-C tells the running
    ones to end, and is raised when they have; a second one does not wait for what they may still have to write.
    """
    os.environ.update(THREADS)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    waiting, running = deque(jobs), {}

    def end_all() -> None:
        for left in running.values():
            left.process.terminate()

    try:
        with _interruption(end_all) as is_interrupted:
            while running or (waiting and not is_interrupted()):
                while waiting and len(running) < num_workers and not is_interrupted():
                    started = _start(context, waiting.popleft())
                    running[started.channel] = started
                    if is_interrupted():  # while it started
                        started.process.terminate()
                yield from _ended(running, on_message)
            if is_interrupted():
                raise KeyboardInterrupt
    finally:
        end_all()


@contextmanager
def _interruption(act: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C call `act` and be remembered, wherever it comes; raised there, it could split a message."""
    before = signal.getsignal(signal.SIGINT)
    pressed = False

    def handler(number: int, frame: Any) -> None:
        nonlocal pressed
        signal.signal(signal.SIGINT, before)
        pressed = True
        act()

    if before is not signal.default_int_handler:  # ignored, as in a shell's background, or somebody else's
        yield lambda: False
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _ended(
    running: dict[Connection, _Running], on_message: Callable[[str, Mapping[str, Any]], None]
) -> Iterator[Ending]:
    """Wait for messages, pass them on, and yield the jobs that ended."""
    for channel in wait(list(running)):
        ending = _listen(running[channel], on_message)
        if ending is not None:
            del running[channel]
            yield ending


def _start(context: Any, job: Job) -> _Running:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, job), name=job.name)
    process.start()
    theirs.close()
    return _Running(job, process, ours)


def _listen(running: _Running, on_message: Callable[[str, Mapping[str, Any]], None]) -> Ending | None:
    """Take one message of a job; its ending when the channel is closed, by the job or by its death."""
    try:
        message = running.channel.recv()
    except (EOFError, OSError):
        running.process.join()
        code = running.process.exitcode
        if code and not running.error:
            running.error = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return Ending(running.job.name, running.error)
    running.error = message.get("error", running.error)
    on_message(running.job.name, message)
    return None
