"""Recorded losses: a change without numerical effect leaves them as they are. `make golden` rewrites them."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).with_name("rewrite.py")
spec = importlib.util.spec_from_file_location("golden_rewrite", PATH)
rewrite = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = rewrite  # where dataclasses and NamedTuples look their module up
spec.loader.exec_module(rewrite)


@pytest.mark.parametrize("golden", rewrite.GOLDENS, ids=lambda golden: golden.path.stem)
def test_losses_are_as_recorded(golden):
    changed = rewrite.differences(golden.path.read_text(), rewrite.recorded(golden))
    assert not changed, "\n".join([*changed, "if this is meant, run `make golden` and say why in CHANGELOG.md"])


def test_every_file_belongs_to_a_run():
    assert {path.name for path in PATH.parent.glob("*.txt")} == {golden.path.name for golden in rewrite.GOLDENS}


def test_a_difference_is_seen():
    old = "# x\nloss 0 1.5\nloss 1 0.25\nR 0 0.5 1.0\n"
    assert rewrite.differences(old, old) == []
    assert rewrite.differences(old, old.replace("0.25", "0.2500001")) == []
    assert rewrite.differences(old, old.replace("0.25", "0.250001")) == ["loss 1: 0.25 became 0.250001"]
    assert rewrite.differences(old, old.replace("0.5 1.0", "0.51 1.0")) == []
    assert rewrite.differences(old, old.replace("0.5 1.0", "0.53 1.0")) == ["R 0: 0.5 became 0.53"]
    assert rewrite.differences(old, old.replace("R 0 0.5 1.0", "R 0 0.5")) != []
