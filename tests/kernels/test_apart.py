"""Calls in a process of their own, which end by themselves, with an error, with their process, or not at all."""

import os
import threading
from multiprocessing import get_context

import pytest

from kernels.common import apart


def work(note, how):
    note(f"will {how}")
    if how == "raise":
        raise RuntimeError("illegal access\nand more of it")
    if how == "exit":
        os._exit(3)
    if how == "hang":
        threading.Event().wait()
    return os.getpid()


@pytest.fixture
def ask(monkeypatch):
    monkeypatch.setattr(apart, "CONTEXT", get_context("fork"))
    made = apart.Apart(work, 60)
    yield made
    made.close()


def test_calls_share_a_process(ask):
    first = ask("return")
    assert first == ask("return") != os.getpid()


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("raise", "RuntimeError: illegal access"),
        ("exit", "its process ended with exit code 3"),
        ("hang", "no sign of life for 60 s"),
    ],
)
def test_a_lost_call_costs_no_other(how, why, ask, monkeypatch):
    first, wait = ask("return"), apart.wait
    # patience ends as soon as nothing is left to come
    waits = iter([wait, wait if how != "hang" else lambda pipes, patience: []])
    monkeypatch.setattr(apart, "wait", lambda pipes, patience: next(waits)(pipes, patience))
    with pytest.raises(apart.Lost) as lost:
        ask(how)
    assert (lost.value.noted, str(lost.value)) == (f"will {how}", why)
    monkeypatch.setattr(apart, "wait", wait)
    assert ask("return") != first


def test_tasks_are_shared_in_their_order(ask):
    other = apart.Apart(work, 60)
    found = list(apart.shared(lambda ask, k: (k, ask("return")), [(k,) for k in range(6)], [ask, other]))
    assert [k for k, _ in found] == list(range(6))
    assert len({pid for _, pid in found}) <= 2


def test_an_error_without_words_is_named():
    assert apart.sentence(MemoryError()) == "MemoryError"
