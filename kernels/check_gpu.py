"""python -m kernels.check_gpu: every configuration of every kernel against float64, on the card that is here.

The same kernel source has given wrong gradients on one architecture for one number of warps (flash-linear-attention
#984), so checking the winner of the tuner is not enough. What fails goes to the deny-list of this architecture and
Triton version (`KERNELS_CACHE/denied.json`), which the launcher reads; nothing else is changed.
"""

import json
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.bench.measure import TOLERANCE, worst_error
from kernels.bench.shapes import PROBLEMS, Problem, Shape
from kernels.common import explain
from kernels.common.options import Options

# widths that fill tiles, and one that fills none
SHAPES: list[Shape] = [(2, 200, 2, 64), (2, 200, 2, 128), (1, 130, 2, 40)]
# and one long enough for the kernels that join segments of time
MORE: dict[str, list[Shape]] = {"linear_scan": [(1, 1100, 1, 64)]}


def _configurations(problem: Problem, inputs: dict[str, Tensor]) -> list[tuple[Any, bool]]:
    """The launches of forward and backward with all their rows, the denied ones included; whether the walk is fused."""
    from kernels.common import triton
    from kernels.common.triton_chunks import fusing

    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    found: dict[tuple[str, Any], tuple[Any, bool]] = {}
    for fused in (False, True):
        with fusing(fused), triton.recording() as launches:
            out, final = problem.op(**leaves, backend="triton")
            torch.autograd.grad([out, final], list(leaves.values()), [torch.ones_like(out), torch.ones_like(final)])
        for launch in launches:
            found.setdefault((launch.kernel.name, launch.row), (launch, fused))
    return list(found.values())


def _worst(problem: Problem, inputs: dict[str, Tensor], fused: bool, rows: dict[str, Any]) -> tuple[float, str]:
    """Worst relative error with these rows forced, by name of the kernel, and what was raised."""
    from kernels.common import triton
    from kernels.common.triton_chunks import fusing

    with ExitStack() as stack:
        stack.enter_context(fusing(fused))
        for name, row in rows.items():
            stack.enter_context(triton.forced(name, row))
        try:
            return worst_error(problem, inputs, backend="triton"), ""
        except Exception as failure:  # out of resources, illegal access: the row is not usable, whatever the reason
            return float("inf"), f"{type(failure).__name__}: {str(failure).splitlines()[0]}"


def check(problem: Problem, shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    """One result per kernel and configuration: its worst relative error over outputs and all gradients."""
    torch.manual_seed(0)
    inputs = problem.draw(shape, dtype, device)
    try:
        explain(problem.op, **inputs, backend="triton")
    except ValueError as refusal:
        print(f"not on triton: {problem.name}: {refusal}", flush=True)
        return
    tried: list[tuple[str, Any, bool, float, str]] = []
    sound: dict[str, Any] = {}
    for launch, fused in _configurations(problem, inputs):
        name, row = launch.kernel.name, launch.row
        tried.append((name, row, fused, *_worst(problem, inputs, fused, {name: row})))
        if tried[-1][3] <= TOLERANCE[dtype]:
            sound.setdefault(name, row)
    for name, row, fused, worst, note in tried:
        # the fault may be another kernel's default: once more among rows that are known to be right
        if not worst <= TOLERANCE[dtype] and sound:
            worst, note = _worst(problem, inputs, fused, {**sound, name: row})
        yield {
            "op": problem.name,
            "shape": " ".join(map(str, shape)),
            "dtype": str(dtype).removeprefix("torch."),
            "kernel": name,
            "row": str(row),
            "error": worst,
            "ok": worst <= TOLERANCE[dtype],
            "note": note,
        }


def _found(name: str, dtype: torch.dtype, shapes: list[Shape], device: torch.device) -> list[dict[str, Any]]:
    """Results of one op and dtype."""
    return [result for shape in shapes for result in check(PROBLEMS[name], shape, dtype, device)]


def _results(tasks: list[Any], jobs: int) -> Iterator[list[dict[str, Any]]]:
    """Of all tasks in their order; with several jobs each in a process of its own, which an illegal access ends."""
    if jobs == 1:
        yield from (task() for task in tasks)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        waiting: list[Future[list[dict[str, Any]]]] = [pool.submit(task) for task in tasks]
        yield from (each.result() for each in waiting)


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
    from kernels.common import triton

    if not (torch.cuda.is_available() or triton.INTERPRET):
        print("check_gpu: no CUDA device here; run it on the card, or try the command itself with TRITON_INTERPRET=1")
        return 2
    device = torch.device("cpu" if triton.INTERPRET else "cuda")
    title = "interpreter" if triton.INTERPRET else triton.device_tag()
    dtypes = [torch.float32] if triton.INTERPRET else [torch.bfloat16, torch.float16, torch.float32]
    tasks = []
    for name in options.ops.split(","):
        shapes: list[Shape] = [(1, 40, 1, 16)] if options.smoke else [*SHAPES, *MORE.get(name, [])]
        tasks += [partial(_found, name, dtype, shapes, device) for dtype in dtypes]
    rows: list[dict[str, Any]] = []
    for found in _results(tasks, options.jobs):
        rows += found
        for result in found:
            if not result["ok"]:
                print("WRONG", result, flush=True)
    text = _markdown(rows, title)
    print(text)
    if options.json:
        options.json.write_text(json.dumps({"device": title, "rows": rows}, indent=1))
    if options.markdown:
        options.markdown.write_text(text)
    wrong = [r for r in rows if not r["ok"]]
    if not triton.INTERPRET:
        whole = not options.smoke and set(options.ops.split(",")) == set(PROBLEMS)
        triton.deny(title, {(r["kernel"], r["row"]) for r in wrong}, whole=whole)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
