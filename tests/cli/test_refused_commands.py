"""Requests of the other commands that are refused: the words, and below them what the sentence says."""

from __future__ import annotations

from collections.abc import Callable

REFUSED = r"""
# no command
rum
    'rum' is no command (did you mean run?); the commands are run, compare
comparee
    'comparee' is no command (did you mean compare?); the commands are run, compare
Run
    'Run' is no command (did you mean run?); the commands are
help me
    'me' is no command; the commands are
# explain
explain tracking=none debug=tiny at=3 at=30
    cl: 'at=3' and 'at=30' both set at; give one
explain debug=tiny at=1000
    at is '1000'; it must be a step from 0 to
explain debug=tiny sensitivity=2 figure=y.xyz
    figure is 'y.xyz'; it must be a file that ends in
explain debug=tiny sensitivity=2 figure=/proc/x/y.png
    the folder /proc/x cannot be written
# resume
resume
    takes one run folder, got 0
resume .
    is not a run folder: it has no config.yaml
# report
report .
    there is no result.json under
report absent
    absent is not a folder
# list
list optimisers
    nothing is called 'optimisers'; the lists are streams, strategies
list streams=3
    'streams' is no option of `cl list`; there is format
# reproduce
reproduce seeds=abc
    seeds is 'abc'; it must be a number of at least 1
reproduce sedes=3
    sedes=3: nothing is run without the name of a claim
reproduce split_mnist_sgd jobs=0
    jobs is '0'; it must be a number of at
reproduce split_mnist_sgd tracking=none data.root=null
    data set mnist needs data.root
reproduce split_mnist_sgd tracking=none out=/proc/x
    the folder /proc/x cannot be written
reproduce split_mnist_sgd tracking=none page=/proc/x/page.md
    the folder /proc/x cannot be written
reproduce cold_fusion
    'cold_fusion' is no claim; the claims are all
reproduce split_mnist_er_20
    'split_mnist_er_20' is no claim (did you mean split_mnist_er_200?); the claims are all
# ui
ui port=99999
    port is '99999'; it must be a number from 1 to 65535
ui
    there is no store at
# doctor
doctor uri=x
    'uri=x' is no option of `cl doctor`
"""


def test_one_sentence_and_exit_code_2(
    words: list[str], sentence: str, is_refused: Callable[[tuple[str, ...], str], None]
) -> None:
    is_refused(tuple(words), sentence)
