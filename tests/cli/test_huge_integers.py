"""Integers that no 64 bits hold: one sentence and exit code 2, but for a seed, which is hashed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cl.cli.main import main

RUN = ("run", "tracking=none", "debug=tiny")
COMPARE = ("compare", "tracking=none", "debug=tiny")

CASES = {
    "steps beyond 64 bits": (
        (*RUN, "trainer.max_steps=9223372036854775808"),
        "trainer.max_steps is 9223372036854775808; an integer must be at most 9223372036854775807",
    ),
    "a list of integers beyond 64 bits": (
        (*RUN, "backbone.hidden=[8,-99999999999999999999]"),
        "backbone.hidden is -99999999999999999999; an integer must be at most",
    ),
    "blocks with an integer beyond 64 bits": (
        (*RUN, "stream=builtin_text", "backbone=gpt", "backbone.blocks=attention(window=99999999999999999999)"),
        "which holds 99999999999999999999; an integer must be at most 9223372036854775807",
    ),
    "comparison of more seeds than anybody runs": (
        (*COMPARE, "seeds=99999999999999999999"),
        "seeds is 99999999999999999999; it must be a number of seeds of at least 1 and at most 10000",
    ),
    "claims on more seeds than anybody runs": (
        ("reproduce", "seeds=99999999999999999999"),
        "seeds is '99999999999999999999'; it must be a number of at least 1 and at most 10000",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_and_exit_code_2(name: str, is_refused: Callable[[tuple[str, ...], str], None]) -> None:
    is_refused(*CASES[name])


def test_a_seed_may_be_beyond_64_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    big = "99999999999999999999"
    assert main(("run", *RUN[1:], f"seed={big}", f"stream.seed={big}", "--cfg", "job")) == 0
    assert main(("explain", "debug=tiny", f"seed={big}", f"stream.seed={big}", "at=0")) == 0
