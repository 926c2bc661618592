"""What a step frees is used again by the next one, without new pages."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy
from cl.cli.allocation import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [numpy.ones(2_000_000) for _ in range(8)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
faults()
print(faults())
"""


def faults(**variables):
    """Page faults of the second of two rounds of eight blocks of 16 MB, in a process of its own."""
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, env={"PATH": "", **variables}, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_blocks_of_megabytes_are_kept_unless_the_user_says_otherwise():
    # the threshold of the variable, which is glibc's own: pages are given back
    assert faults() < faults(MALLOC_TRIM_THRESHOLD_="131072") / 20
