"""docs/extending.md is true: its files, in an empty folder, pass their contracts and run from the command line."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```$', PAGE, re.M | re.S))
COMMANDS = [line for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A third party's folder, with the files of the page and nothing else."""
    path = tmp_path_factory.mktemp("third_party")
    for name, content in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content)
    return path


def run(command, folder, *more):
    words = [*shlex.split(command), *more]
    program = {"cl": [sys.executable, "-m", "cl"], "python": [sys.executable]}[words[0]]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run([*program, *words[1:]], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_what_this_file_runs():
    assert {"my_strategy.py", "my_stream.py", "my_backbone.py"} <= set(FILES)
    assert {shlex.split(line)[0] for line in COMMANDS} == {"python", "cl"}


@pytest.mark.slow
def test_contracts_pass_in_a_folder_of_ones_own(folder):
    said = run("python -m pytest -q -p no:cacheprovider", folder)
    assert int(re.search(r"(\d+) passed", said)[1]) > 60
    assert "failed" not in said


CL_RUNS = [line for line in COMMANDS if line.startswith("cl run")]


@pytest.mark.slow
@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("cl compare")])
def test_comparisons_run_in_a_folder_of_ones_own(folder, tmp_path, command):
    said = run(command, folder, f"out={tmp_path}/compared", "jobs=1")
    assert "mine" in said or "my_strategy" in said


@pytest.mark.parametrize("command", [CL_RUNS[0], *(pytest.param(line, marks=pytest.mark.slow) for line in CL_RUNS[1:])])
def test_commands_run_in_a_folder_of_ones_own(folder, tmp_path, command):
    run(command, folder, f"hydra.run.dir={tmp_path}/run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "done"
    if "mine" in command:
        assert result["strategy"][-1] == "mine"
