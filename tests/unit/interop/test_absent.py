"""Avalanche uninstalled breaks nothing else, and costs nothing where it is installed and not used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BLOCKED = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] == "avalanche" else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def python(code, folder):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def command(words, before=BLOCKED):
    return f"{before}\nfrom cl.cli.main import main\nprint('code', main({words!r}))\nprint('avalanche' in sys.modules)"


@pytest.mark.parametrize(
    "words",
    [["run", "debug=tiny", "tracking=none", "strategy=replay"], ["list"], ["list", "avalanche"]],
    ids=" ".join,
)
def test_everything_else_works_without_it(words, tmp_path):
    assert "code 0" in python(command(words), tmp_path)


@pytest.mark.parametrize("word", ["strategy=avalanche/EWC", "stream=avalanche/SplitMNIST"])
def test_asking_for_it_is_one_sentence(word, tmp_path):
    said = python(command(["run", "debug=tiny", "tracking=none", word]), tmp_path)
    assert "code 2" in said and "pip install avalanche-lib" in said and "Traceback" not in said


@pytest.mark.parametrize("words", [["run", "debug=tiny", "tracking=none"], ["list", "avalanche"]], ids=" ".join)
def test_it_is_not_imported_unless_it_is_used(words, tmp_path):
    assert python(command(words, before="import sys"), tmp_path).strip().endswith("False")


def test_the_contract_line_is_skipped_without_it(monkeypatch):
    import cl.testing.strategy as contract
    from strategies.naive import Naive

    class Suite(contract.StrategyContract):
        strategy = Naive

    monkeypatch.setattr(contract, "find_spec", lambda name: None)
    with pytest.raises(pytest.skip.Exception, match="not installed"):
        Suite().test_through_the_avalanche_adapter_the_weights_match("class_incremental")
