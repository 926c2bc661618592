"""Jobs in processes of their own: how they end, and Ctrl-C wherever it comes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cl.cli.pool import Job, run_jobs

JOBS = '''
import os
import signal


def end_at_once(send):
    send({"text": "here"})


def fail(send):
    raise ValueError("a sentence")


def die(send):
    os.kill(os.getpid(), signal.SIGKILL)


def wait_to_be_told(send):
    """End in order when the pool says so, and never otherwise."""
    told, tells = os.pipe()
    os.set_blocking(tells, False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.set_wakeup_fd(tells)
    send({"text": "ready"})
    os.read(told, 1)
    send({"error": "told to end"})
'''


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What the processes do; in a module that they can import."""
    (tmp_path / "jobs_of_this_test.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "jobs_of_this_test", raising=False)
    return import_module("jobs_of_this_test")


@pytest.fixture(autouse=True)
def _interruptible(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A suite that runs in a shell's background ignores Ctrl-C."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_every_job_ends_with_what_became_of_it(jobs: ModuleType) -> None:
    heard: list[tuple[str, Mapping[str, Any]]] = []
    given = [Job("good", jobs.end_at_once), Job("bad", jobs.fail), Job("dead", jobs.die)]
    endings = {
        each.name: each.error for each in run_jobs(given, 2, lambda name, message: heard.append((name, message)))
    }
    assert endings == {"good": "", "bad": "a sentence", "dead": "killed by signal 9"}
    assert ("good", {"text": "here"}) in heard
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("where", ["message", "ending", "start"])
def test_ctrl_c_waits_for_the_running_jobs(where: str, jobs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a message is taken, in the loop of the caller, and while a process starts: no moment loses an ending."""

    def press() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def hear(name: str, message: Mapping[str, Any]) -> None:
        if where == "message" and message.get("text") == "ready":
            press()

    endings = {}
    first = Job("first", jobs.end_at_once if where == "ending" else jobs.wait_to_be_told)
    endings_of = run_jobs([first, Job("second", jobs.wait_to_be_told), Job("third", jobs.end_at_once)], 2, hear)
    if where == "start":
        from cl.cli import pool

        start = pool._start

        def start_and_press(context: Any, job: Job) -> Any:
            started = start(context, job)
            started.channel.poll(None)  # it is ready
            if job.name == "second":
                press()
            return started

        monkeypatch.setattr(pool, "_start", start_and_press)

    def take_all() -> None:
        for ending in endings_of:
            endings[ending.name] = ending.error
            if where == "ending" and ending.name == "first":
                press()

    with pytest.raises(KeyboardInterrupt):
        take_all()
    assert set(endings) == {"first", "second"}
    assert endings["second"] in ("told to end", "killed by signal 15")  # told before it could listen
    assert where != "start" or endings == {"first": "told to end", "second": "told to end"}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait(jobs: ModuleType) -> None:
    def hear(name: str, message: Mapping[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        assert not list(run_jobs([Job("deaf", jobs.wait_to_be_told)], 1, hear))


def test_where_ctrl_c_is_ignored_it_stays_ignored(jobs: ModuleType) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    endings = run_jobs([Job("good", jobs.end_at_once)], 1, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert [ending.error for ending in endings] == [""]
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
