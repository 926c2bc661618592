"""The compiler on a machine without a card: kernels compile, and are no worse than the recorded table."""

import os
import subprocess
import sys

import pytest


def aot(*arguments):
    # the interpreter must be off, so this is another process
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = ":".join(filter(None, sys.path))
    return subprocess.run([sys.executable, "-m", "kernels.aot", *arguments], capture_output=True, text=True, env=env)


def test_a_kernel_compiles_for_hopper():
    done = aot("--smoke", "--only", "scan")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_everyday_kernels_compile_for_every_card():
    done = aot("--smoke", "--targets", "sm_80,sm_90,sm_100,gfx942")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_full_table_on_hopper():
    done = aot()
    assert done.returncode == 0, done.stdout + done.stderr


def test_worse_is_noticed():
    from kernels.aot.__main__ import problems

    recorded = {"registers": 100, "stack": 0, "shared": 10, "wgmma": 4, "mma": 0}
    assert problems("k", recorded, recorded, 100) == []
    assert "stack" in problems("k", {**recorded, "stack": 8}, recorded, 100)[0]
    assert "registers" in problems("k", {**recorded, "registers": 111}, recorded, 100)[0]
    assert "shared" in problems("k", {**recorded, "shared": 101}, recorded, 100)[0]
    assert "wgmma" in problems("k", {**recorded, "wgmma": 0}, recorded, 100)[0]
    assert "not in the table" in problems("k", recorded, None, 100)[0]
