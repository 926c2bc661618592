"""python -m kernels.check_gpu: every configuration of every kernel against float64, on the card that is here.

The same kernel source has given wrong gradients on one architecture for one number of warps (flash-linear-attention
#984), so checking the winner of the tuner is not enough. What fails goes to the deny-list of this architecture and
Triton version (`KERNELS_CACHE/denied.json`), which the launcher reads; nothing else is changed. An illegal access or a
kernel that hangs costs the process it ran in: that row is denied, and the others are judged in the next process.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.bench.measure import TOLERANCE, judge
from kernels.bench.problem import Problem, Shape
from kernels.bench.shapes import PROBLEMS
from kernels.common import explain
from kernels.common.apart import Apart, Lost, Note, sentence, shared
from kernels.common.options import Options

Result = dict[str, Any]
# a kernel and its row, and why the process that ran it was lost
Broken = dict[tuple[str, str], str]
# of what was lost between two launches
NO_KERNEL = ("", "")
# widths that fill tiles, and one that fills none
SHAPES: list[Shape] = [(2, 200, 2, 64), (2, 200, 2, 128), (1, 130, 2, 40)]
# and one long enough for the kernels that join segments of time
MORE: dict[str, list[Shape]] = {"linear_scan": [(1, 1100, 1, 64)]}


def _configurations(problem: Problem, inputs: dict[str, Tensor]) -> list[tuple[Any, bool]]:
    """The launches of forward and backward with all their rows, the denied ones included; whether the walk is fused."""
    from kernels.common import triton
    from kernels.common.triton_packed import fusing

    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    found: dict[tuple[str, Any], tuple[Any, bool]] = {}
    for fused in (False, True):
        with fusing(fused), triton.recording() as launches:
            out, final = problem.op(**leaves, backend="triton")
            torch.autograd.grad([out, final], list(leaves.values()), [torch.ones_like(out), torch.ones_like(final)])
        for launch in launches:
            found.setdefault((launch.kernel.name, launch.row), (launch, fused))
    return list(found.values())


class Unjudged(Exception):
    """A row cannot be tried without another that is broken."""


def _worst(measure: Callable[..., float], device: torch.device, fused: bool, rows: dict[str, Any]) -> tuple[float, str]:
    """Worst relative error with these rows forced, by name of the kernel, and what was raised.

    Raises:
        RuntimeError: the device can do nothing more for this process.
        Unjudged: all rows of another kernel are broken.
    """
    from kernels.common import triton
    from kernels.common.triton_packed import fusing

    with ExitStack() as stack:
        stack.enter_context(fusing(fused))
        for name, row in rows.items():
            stack.enter_context(triton.forced(name, row))
        try:
            return measure(backend="triton"), ""
        except Unjudged:
            raise
        except Exception as failure:  # out of resources, a shape refused: the row is not usable, whatever the reason
            _wait(device)
            return inf, sentence(failure)


def _wait(device: torch.device) -> None:
    """Until all launches have ended; raises what an illegal access has left, now and at every later call."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def check(
    problem: Problem, shape: Shape, dtype: torch.dtype, device: torch.device, broken: Mapping[tuple[str, str], str]
) -> Iterator[Result]:
    """One result per kernel and configuration: its worst relative error over outputs and all gradients.

    `broken` is not run again, neither for its own sake nor beside another.
    """
    from kernels.common import triton

    torch.manual_seed(0)
    inputs = problem.draw(shape, dtype, device)
    try:
        explain(problem.op, **inputs, backend="triton")
    except ValueError as refusal:
        print(f"not on triton: {problem.name}: {refusal}", flush=True)
        return
    measure = judge(problem, inputs)
    found = [(launch.kernel.name, launch.row, fused) for launch, fused in _configurations(problem, inputs)]
    around: dict[str, Any] = {}
    for name, row, _ in found:
        if (name, str(row)) not in broken and any(name == other for other, _ in broken):
            around.setdefault(name, row)
    tried: list[tuple[str, Any, bool, float, str]] = []
    sound: dict[str, Any] = {}
    # the interpreter has one row of every kernel, so that one call tries them all
    at_once: dict[bool, tuple[float, str]] = {}
    for name, row, fused in found:
        if why := broken.get((name, str(row))):
            yield _result(problem, shape, dtype, (name, str(row)), why)
            continue
        try:
            outcome = at_once.get(fused) or _worst(measure, device, fused, {**around, name: row})
        except Unjudged as other:
            print(f"not judged: {name} {row}, which needs {other}", flush=True)
            continue
        if triton.INTERPRET:
            at_once[fused] = outcome
        tried.append((name, row, fused, *outcome))
        if outcome[0] <= TOLERANCE[dtype]:
            sound.setdefault(name, row)
    for name, row, fused, worst, note in tried:
        # the fault may be another kernel's default: once more among rows that are known to be right
        if not worst <= TOLERANCE[dtype] and sound:
            worst, note = _worst(measure, device, fused, {**around, **sound, name: row})
        yield _result(problem, shape, dtype, (name, str(row)), note, worst)


def _result(
    problem: Problem, shape: Shape, dtype: torch.dtype, which: tuple[str, str], note: str, worst: float = inf
) -> Result:
    return {
        "op": problem.name,
        "shape": " ".join(map(str, shape)),
        "dtype": str(dtype).removeprefix("torch."),
        "kernel": which[0],
        "row": which[1],
        "error": worst,
        "ok": worst <= TOLERANCE[dtype],
        "note": note,
    }


def _checked(
    note: Note, name: str, shape: Shape, dtype: torch.dtype, device: torch.device, broken: Broken
) -> list[Result]:
    """Results of one op, shape and dtype; every launch is noted before it starts and waited for."""
    from kernels.common import triton

    # the default of a kernel beside the one that is checked, and nothing chosen while others use the card
    os.environ["KERNELS_AUTOTUNE"] = "0"
    # the token loop runs on the processor, whose cores the other processes use
    torch.set_num_threads(1)

    def watch(kernel: str, row: Any, run: Callable[[], None]) -> None:
        which = (kernel, str(row))
        if which in broken:
            raise Unjudged(" ".join(which))
        note(which)
        run()
        _wait(device)
        note(None)

    with triton.watched(watch):
        return list(check(PROBLEMS[name], shape, dtype, device, broken))


def _survived(ask: Apart, name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Result]:
    """The same, each time a row takes its process along from the beginning without that row."""
    broken: Broken = {}
    while True:
        try:
            found: list[Result] = ask(name, shape, dtype, device, broken)
            return found
        except Lost as loss:
            if loss.noted is None or loss.noted in broken:
                broken[NO_KERNEL] = str(loss)
                return [_result(PROBLEMS[name], shape, dtype, *each) for each in broken.items()]
            broken[loss.noted] = str(loss)


def _markdown(rows: list[dict[str, Any]], title: str) -> str:
    lines = [f"{title}: {sum(r['ok'] for r in rows)} of {len(rows)} configurations right", ""]
    lines += ["| op | B T H D | dtype | kernel | row | error | ok |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        ok = "yes" if r["ok"] else f"NO {r['note']}"
        lines.append(
            f"| {r['op']} | {r['shape']} | {r['dtype']} | {r['kernel']} | {r['row']} | {r['error']:.1e} | {ok} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Check; exit code 0 all right, 1 something was denied, 2 no card."""
    parser = Options(prog="python -m kernels.check_gpu", description=__doc__)
    parser.add_argument("--ops", default=",".join(PROBLEMS))
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time: most of the time goes into compiling")
    parser.add_argument("--patience", type=float, default=60, help="seconds for one launch, its compilation included")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument(
        "--smoke", action="store_true", help="smallest shapes (with TRITON_INTERPRET=1: no card needed)"
    )
    options = parser.parse_args(argv)
    if unknown := [name for name in options.ops.split(",") if name not in PROBLEMS]:
        parser.error(f"unknown ops {unknown[0]!r}; use {', '.join(PROBLEMS)}")
    if options.jobs < 1:
        parser.error(f"jobs is {options.jobs}; it must be at least 1")
    if not options.patience > 0:
        parser.error(f"patience is {options.patience:g}; it must be more than 0 seconds")
    from kernels.common import triton

    if not (torch.cuda.is_available() or triton.INTERPRET):
        print("check_gpu: no CUDA device here; run it on the card, or try the command itself with TRITON_INTERPRET=1")
        return 2
    device = torch.device("cpu" if triton.INTERPRET else "cuda")
    title = "interpreter" if triton.INTERPRET else triton.device_tag()
    dtypes = [torch.float32] if triton.INTERPRET else [torch.bfloat16, torch.float32, torch.float16]
    # the dtypes that most use come first, should the time not suffice
    tasks = [
        (name, shape, dtype, device)
        for dtype in dtypes
        for name in options.ops.split(",")
        for shape in ([(1, 40, 1, 16)] if options.smoke else [*SHAPES, *MORE.get(name, [])])
    ]
    rows: list[Result] = []
    wrong: set[tuple[str, str]] = set()
    for found in shared(_survived, tasks, [Apart(_checked, options.patience) for _ in range(options.jobs)]):
        rows += found
        for result in found:
            if not result["ok"]:
                print("WRONG", result, flush=True)
        # as they come, so that a check that is stopped leaves what it found
        if options.json:
            options.json.write_text(json.dumps({"device": title, "rows": rows}, indent=1))
        wrong |= {(r["kernel"], r["row"]) for r in found if not r["ok"]} - {NO_KERNEL}
        if wrong and not triton.INTERPRET:
            triton.deny(title, wrong, whole=False)
    text = _markdown(rows, title)
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    if not triton.INTERPRET:
        whole = not options.smoke and set(options.ops.split(",")) == set(PROBLEMS)
        triton.deny(title, wrong, whole=whole)
    return int(not all(r["ok"] for r in rows))


if __name__ == "__main__":
    sys.exit(main())
