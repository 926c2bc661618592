"""What a run on a card will launch, compiled beforehand in several processes: one would take longer than the timing.

Triton keeps what it has compiled on the disk, where the run finds it. Nothing is launched, so nothing is tuned either.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from kernels.bench.measure import passes
from kernels.bench.problem import Shape
from kernels.bench.shapes import PROBLEMS
from kernels.common import explain
from kernels.common.apart import Apart, Lost, Note, shared

# seconds for all kernels of one op and shape
PATIENCE = 300

Task = tuple[str, Shape, torch.dtype, torch.device, bool | None]


def walk(fuse: bool | None) -> AbstractContextManager[None]:
    """The fused walk forced on or off, or as the op chooses."""
    if fuse is None:
        return nullcontext()
    from kernels.common.triton_packed import fusing

    return fusing(fuse)


def compile_one(
    note: Note, name: str, shape: Shape, dtype: torch.dtype, device: torch.device, fuse: bool | None
) -> int:
    """Compile every row of every launch of one op, forward alone and with backward; returns how many."""
    problem = PROBLEMS[name]
    inputs = {n: x.requires_grad_() for n, x in problem.draw(shape, dtype, device).items()}
    if explain(problem.op, **inputs).backend != "triton":
        return 0
    from kernels.common import triton

    with walk(fuse), triton.recording() as launches:
        cotangent = torch.zeros_like(problem.op(**inputs)[0])
        for backward in (False, True):
            passes(problem.op, [inputs], cotangent, backward)()
    for launch in launches:
        launch.kernel.compile(launch.row, launch.args)
    return len(launches)


def compiled(tasks: Sequence[Task], jobs: int) -> int:
    """`compile_one` of all tasks; what fails or hangs there is left to the run, which says so."""

    def one(ask: Apart, *task: Any) -> int:
        try:
            return int(ask(*task))
        except Lost as loss:
            print(f"not compiled beforehand: {task[0]}: {loss}", flush=True)
            return 0

    return sum(shared(one, tasks, [Apart(compile_one, PATIENCE) for _ in range(min(jobs, len(tasks)))]))
