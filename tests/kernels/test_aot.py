"""The compiler on a machine without a card: kernels compile, and are no worse than the recorded table."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kernels.common


def another_process(*arguments):
    # the interpreter must be off
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = ":".join(filter(None, sys.path))
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env)


def aot(*arguments):
    return another_process("-m", "kernels.aot", *arguments)


def test_a_kernel_compiles_for_hopper():
    done = aot("--smoke", "--only", "scan")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_everyday_kernels_compile_for_every_card():
    done = aot("--smoke", "--targets", "sm_80,sm_90,sm_100,gfx942")
    assert done.returncode == 0, done.stdout + done.stderr


RESETS = """
import torch
from kernels.aot.triton import compile_cases
from kernels.newton_rnn import triton as newton
from kernels.sequential_rnn import triton as cells, triton_m2rnn as matrix
one, reset = torch.ones, torch.ones(1, 1, dtype=torch.bool)

def run_newton(units):
    x, r, how = one(1, 1, 3, *units), one(3, *units, *units[1:]), (reset, None, "gru", 16, 128)
    h, c, last, _, _ = newton.forward(x, r, None, one(1, 1, *units), *how, 1e-6, 1)
    newton.backward(h, last, x, r, None, one(1, 1, *units), h, c, *how)

def run_cells():
    x, r = one(1, 1, 3, 1, 1), one(3, 1, 1, 1)
    h, last, kept = cells.forward(x, r, None, None, reset, None, "gru")
    cells.backward(h, last, x, r, None, None, kept, reset, None, "gru")

def run_matrix():
    x, f = one(1, 1, 1, 1), one(1, 1, 1)
    o, last, kept = matrix.forward(x, x, x, f, f, x, reset, None, 16, True)
    matrix.backward(o, last, x, x, x, f, f, kept, reset, None, 16, 1.0)

calls = {"newton": lambda: run_newton((1,)), "block": lambda: run_newton((1, 1)), "cells": run_cells, "m": run_matrix}
assert len(list(compile_cases(calls, ["sm_90"], all_rows=False))) == 8
"""


@pytest.mark.slow
def test_resets_and_sizes_of_one_compile():
    """No case of the table has a reset, and a size of one is a constant to the compiler."""
    done = another_process("-c", RESETS)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.grid
def test_full_table_on_hopper():
    done = aot()
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.8.0", "3.9.0"])
def test_table_holds_every_supported_version(version):
    """One Triton is installed; what the others made of every kernel was recorded with them."""
    from kernels.aot.__main__ import TABLE

    tables = json.loads(TABLE.read_text())
    table = tables[version]
    every = {key.split(" | ")[0] for rows in tables.values() for key in rows}
    assert {key.split(" | ")[0] for key in table} == every
    for kernel in ("scan_segments", "walk_states", "walk_outputs", "walk_corrected_outputs", "chunk_key_gradients"):
        for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
            assert any(key.startswith(kernel) and key.endswith(target) for key in table), (kernel, target)
    here = {key: x for key, x in table.items() if key.endswith("sm_90") and "bfloat16" in key}
    limit = 232_448
    assert all(x["shared"] <= limit for x in here.values())
    fused = {key: x for key, x in here.items() if key.startswith(("walk_outputs", "walk_corrected_outputs"))}
    # a fused walk that spills would carry its state through memory after all
    assert all(x["stack"] == 0 for x in fused.values()), fused


def test_no_device_function_has_words_for_defaults():
    """Triton 3.6 takes a default that is a string for no constant."""
    root, found = Path(kernels.common.__file__).parents[1], 0
    for path in sorted(root.rglob("triton*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list):
                found += 1
                words = [
                    x.value for x in node.args.defaults if isinstance(x, ast.Constant) and isinstance(x.value, str)
                ]
                assert not words, f"{path.name}: {node.name} has the default {words[0]!r}"
    assert found > 50


def test_worse_is_noticed():
    from kernels.aot.__main__ import problems

    recorded = {"registers": 100, "stack": 0, "shared": 10, "wgmma": 4, "mma": 0}
    assert problems("k", recorded, recorded, 100) == []
    assert "stack" in problems("k", {**recorded, "stack": 8}, recorded, 100)[0]
    assert "registers" in problems("k", {**recorded, "registers": 111}, recorded, 100)[0]
    assert "shared" in problems("k", {**recorded, "shared": 101}, recorded, 100)[0]
    assert "wgmma" in problems("k", {**recorded, "wgmma": 0}, recorded, 100)[0]
    assert "not in the table" in problems("k", recorded, None, 100)[0]
