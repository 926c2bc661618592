"""docs/avalanche.md: its code runs, its table is the catalog's."""

import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("avalanche")
from cl.cli.main import main
from cl.interop import catalog
from cl.interop._quiet import quiet

PAGE = Path(__file__).resolve().parents[3] / "docs" / "avalanche.md"
BLOCKS = re.findall(r"^```(\w+)[^\n]*\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    with quiet():
        for kind, code in BLOCKS:
            if kind == "python":
                exec(compile(code, str(PAGE), "exec"), names)
    assert names["result"].status == "done" and len(names["result"].R) == 5
    assert names["strategy"].clock.train_iterations > 0


@pytest.mark.slow
def test_commands_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = [line for kind, code in BLOCKS if kind == "sh" for line in code.splitlines()]
    assert len(commands) >= 8
    for line in commands:
        program, *words = shlex.split(line)
        assert program == "cl" and main(words) == 0, line


def test_table_is_what_the_generator_writes():
    page = PAGE.read_text()
    assert catalog.with_table(page) == page, "run `make docs`"
    assert all(f"`{name}`" in page for name in catalog.METHODS)
