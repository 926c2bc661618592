"""Everything that needs a card and none of hydra, mlflow or avalanche: one command, results as they come.

    python benchmarks/on_gpu.py OUT [--items check bench] [--seconds 400]
    python benchmarks/on_gpu.py OUT --tiny

Items run one after the other, most worth first, each for its own time at most and none beyond `--seconds` together;
what fails or is stopped does not keep others from running. OUT gets at most one file of each, `log.txt` with what all
of them printed, and `table.md`, which is printed at the end. `--tiny` tries the commands themselves, at sizes that mean
nothing, on a processor.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
LANGUAGE = ("benchmarks/language_speed.py", "--sections", "training,trainer", "--out", "OUT/language_speed_gpu.md")
MEMORY = ("benchmarks/memory_speed.py", "train", "--peers", "--out", "OUT/memory_speed_gpu.json", "--blocks")
BENCH = ("-m", "kernels.bench", "--jobs", "14")
AROUND = ("--ops", "gla_scalar,gated_deltanet", "--peers", "none")
"""Of the fused walk: programs are rows times heads where a head is 64 wide, and the threshold is at 132."""
SHAPES = [f"{rows}x2048x16x64" for rows in (2, 4, 8, 9, 16, 32)]


@dataclass(frozen=True)
class Item:
    """Arguments of Python, on a card and at a tiny size; `OUT` in them is the folder of results.

    Args:
        seconds: at most.
        variables: of the environment.
        tiny_variables: more of them without a card.
    """

    seconds: int
    words: Sequence[str]
    tiny: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)
    tiny_variables: Mapping[str, str] = field(default_factory=dict)


ITEMS: Mapping[str, Item] = {
    "tests": Item(
        # line by line, so that a run that is stopped leaves what it found
        150, (*TEST, "-v", "-v", "-n", "12", "-m", "gpu", "tests/kernels/test_gpu.py", "tests/gpu"),
        (*TEST, "-n", "0", "-m", "gpu", "tests/gpu", "tests/kernels/test_gpu.py", "--collect-only"),
    ),
    "check": Item(
        130, ("-m", "kernels.check_gpu", "--jobs", "14", "--json", "OUT/check_gpu.json"),
        ("-m", "kernels.check_gpu", "--smoke", "--ops", "linear_scan", "--jobs", "2", "--json", "OUT/check_gpu.json"),
        tiny_variables={"TRITON_INTERPRET": "1"},
    ),
    "bench": Item(
        200, (*BENCH, "--json", "OUT/kernels_gpu.json"),
        ("-m", "kernels.bench", "--smoke", "--device", "cpu", "--ops", "kda", "--json", "OUT/kernels_gpu.json"),
    ),
    "language": Item(
        90, (*LANGUAGE, "--device", "cuda", "--width", "768", "--layers", "14", "--heads", "12", "--context", "1024",
              "--batch", "16", "--steps", "20", "--repeats", "2", "--threads", "8"),
        (*LANGUAGE, "--width", "32", "--layers", "1", "--heads", "2", "--context", "32", "--batch", "4", "--steps", "4",
         "--repeats", "1"),
    ),
    "memory": Item(
        230, (*MEMORY, "gated_delta", "mamba2", "gla", "kda", "delta", "retnet", "linear", "ridge", "--tokens", "4096",
              "--rows", "8", "--width", "1024", "--layers", "12", "--heads", "8", "--warm", "16", "--cuda"),
        (*MEMORY, "gated_delta", "--tokens", "32", "--rows", "2", "--width", "32", "--layers", "1", "--repeats", "1"),
    ),
    "packed": Item(
        30, (*TEST, "-n", "4", "-m", "gpu", "-k", "packed", "tests/kernels/test_gpu.py"),
        (*TEST, "-n", "0", "-m", "gpu", "-k", "packed", "tests/kernels/test_gpu.py", "--collect-only"),
        {"KERNELS_CHECK": "1"},
    ),
    **{
        name: Item(
            40, (*BENCH, *AROUND, flag, "--shapes", *SHAPES, "--json", f"OUT/walk_{name}.json"),
            ("-m", "kernels.bench", *AROUND, flag, "--smoke", "--device", "cpu", "--json", f"OUT/walk_{name}.json"),
        )
        for name, flag in (("fused", "--fuse"), ("split", "--no-fuse"))
    },
    "fp32": Item(
        50, (*BENCH, "--dtypes", "fp32", "--peers", "none", "--json", "OUT/kernels_gpu_fp32.json"),
        ("-m", "kernels.bench", "--smoke", "--device", "cpu", "--dtypes", "fp32", "--peers", "none", "--ops", "kda",
         "--json", "OUT/kernels_gpu_fp32.json"),
    ),
}  # fmt: skip


def run(item: Item, out: Path, is_tiny: bool, seconds: float) -> tuple[str, float]:
    """How an item ended, and after how many seconds; what it printed is added to the log."""
    words = [word.replace("OUT", str(out)) for word in (item.tiny if is_tiny else item.words)]
    places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {"PYTHONPATH": os.pathsep.join(places), "PYTHONUNBUFFERED": "1", **item.variables}
    env = os.environ | variables | (item.tiny_variables if is_tiny else {})
    begin = time.monotonic()
    with (out / "log.txt").open("a") as log:
        # a session of its own, so that what the item has started ends with it
        going = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = going.wait(seconds)
            state = "done" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(going.pid, signal.SIGKILL)
            going.wait()
            state = f"stopped after {seconds:.0f} s"
    return state, time.monotonic() - begin


def last_line(log: Path, size: int) -> str:
    """The last thing printed since the log was so many bytes long."""
    lines = log.read_bytes()[size:].decode(errors="replace").strip().splitlines()
    return lines[-1][:160].replace("|", "/") if lines else ""


def main(words: Sequence[str] | None = None) -> int:
    """Run the items asked for; exit code 1 where one did not end as it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--items", nargs="+", choices=ITEMS, default=list(ITEMS))
    parser.add_argument("--seconds", type=float, default=400, help="of all items together")
    parser.add_argument("--tiny", action="store_true", help="try the commands on a processor")
    given = parser.parse_args(words)
    out, end, rows = given.out.absolute(), time.monotonic() + given.seconds, []
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    for name in given.items:
        with log.open("a") as file:
            file.write(f"\n=== {name}\n")
        size, left = log.stat().st_size, end - time.monotonic()
        state, took = run(ITEMS[name], out, given.tiny, min(left, ITEMS[name].seconds)) if left > 0 else ("no time", 0)
        rows.append(f"| {name} | {state} | {took:.0f} | {last_line(log, size)} |")
        table = "\n".join(["| item | ended | seconds | last line |", "|---|---|---|---|", *rows])
        (out / "table.md").write_text(table + "\n")
        print(f"{name}: {state}, {took:.0f} s", flush=True)
    print(table)
    return int(not all("| done |" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
