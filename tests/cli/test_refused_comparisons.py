"""Requests of `cl compare` that are refused: the words, and below them what the sentence says."""

from __future__ import annotations

from collections.abc import Callable

REFUSED = r"""
# strategies
strategies=naive strategies=[replay,joint]
    cl: 'strategies=naive' and 'strategies=[replay,joint]' both set strategies; give one of them
strategies=3
    there is no strategy '[3]'; there are agem
strategies=[]
    strategies is empty
strategies=naive,naive
    names a composition twice: naive
strategies=[[naive,naive]]
    strategies has [naive,naive], which names a strategy twice
strategies=naive '+strategy.ewc={strength: 1}'
    is for ewc, which is not compared; strategies are naive
strategies=naive,replay strategy.ewc.strength=1
    is for ewc, which is not compared; strategies are naive, replay
# seeds and processes
seeds=0
    seeds is 0; it must be a number of seeds of at least 1
jobs=0.5
    jobs is 0.5; it must be an integer of at least 1
jobs=0
    jobs is 0; it must be an integer of at least 1, or null
# what is compared with, and where
strategies=naive,replay reference=ewc
    reference is 'ewc'; it must be one
strategies=naive reference=[naive]
    reference is ['naive']; it must be one of naive
strategies=naive launcher=pbs
    launcher is 'pbs'; it must be local, joblib
strategies=naive launcher=[joblib]
    launcher is ['joblib']; it must be local, joblib
strategies=naive seeds=1 out=/proc/x
    the folder /proc/x cannot be written
strategies=naive seeds=1 'tune={optimizer.lr: [0.1, 0.2]}' launcher=pbs
    launcher is 'pbs'; it must be local, joblib
# settings
replay
    'replay' is no setting; settings are written name=value
+experiments=demo
    no setting 'experiments'
seed=1
    `cl compare` takes strategies=..., seeds=... and out=...
strategies=naive optimizer.lr=0.1,0.2
    cl: 'optimizer.lr=0.1,0.2' gives several values; write a list in brackets, or sweep over
strategies=naive hydra.run.dir=x
    cl: 'hydra.run.dir=x' is for `cl run`; `cl compare` takes strategies=..., seeds=... and out=...
"""


def test_one_sentence_and_exit_code_2(
    words: list[str], sentence: str, is_refused: Callable[[tuple[str, ...], str], None]
) -> None:
    is_refused(("compare", "tracking=none", "debug=tiny", *words), sentence)
