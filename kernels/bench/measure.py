"""Measuring: the two ceilings of the machine, a correctness gate, and honest times (medians, cold caches, graphs)."""

# mypy: disable-error-code="no-untyped-call"
# torch leaves its CUDA events and streams without types

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kernels.bench.problem import Inputs, Problem

# relative Frobenius error a row must keep before it is timed
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Ceilings:
    """What this machine can do: copy bandwidth in bytes/s and dense matmul rate in FLOP/s, both measured."""

    bandwidth: float
    flops: float

    def floor_s(self, nbytes: int, flops: int) -> float:
        """Time below which no implementation can go."""
        return max(nbytes / self.bandwidth, flops / self.flops)


def ceilings(device: torch.device, dtype: torch.dtype, smoke: bool) -> Ceilings:
    """Measure both ceilings."""
    elements = 2**20 if smoke else (2**24 if device.type == "cpu" else 2**29)
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    copy_s = median_s(lambda: target.copy_(source), device, 5 if device.type == "cpu" else 20)
    n = 256 if smoke else (1024 if device.type == "cpu" else 8192)
    a = torch.randn(n, n, device=device).to(dtype)
    matmul_s = median_s(lambda: a @ a, device, 5 if device.type == "cpu" else 20)
    return Ceilings(2 * source.numel() * source.element_size() / copy_s, 2 * n**3 / matmul_s)


def median_s(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds of one call, after one to warm up: the median on a card, the fastest on a CPU, which others share."""
    if device.type != "cuda":
        return in_turns([call], [repeats])[0].wall_s
    call()
    torch.cuda.synchronize()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(end) for start, end in events)) / 1e3


@dataclass(frozen=True)
class Timing:
    """Of one call on a CPU: fastest wall time, and median processor time of all threads together."""

    wall_s: float
    cpu_s: float


def in_turns(calls: Sequence[Callable[[], Any]], repeats: Sequence[int]) -> list[Timing]:
    """Time calls on a CPU in turns, after one of each to warm up: what slows the machine down meets all of them."""
    seen: list[list[tuple[float, float]]] = [[] for _ in calls]
    for call in calls:
        call()
    # the shares of all calls grow alike: the next turn is of the one that has the smallest share behind it
    for _ in range(sum(repeats)):
        k = min(range(len(calls)), key=lambda i: (len(seen[i]) + 0.5) / repeats[i])
        wall, cpu = time.perf_counter(), time.process_time()
        calls[k]()
        seen[k].append((time.perf_counter() - wall, time.process_time() - cpu))
    return [Timing(min(w for w, _ in times), statistics.median(c for _, c in times)) for times in seen]


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most bytes alive at once of all that torch allocates on the CPU during the call, its result included."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = call()
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    del kept
    return max(accumulate(change for _, change in changes), default=0)


def passes(op: Callable[..., Any], sets: list[Inputs], cotangent: Tensor, backward: bool) -> Callable[[], None]:
    """One forward (and backward) per call, taking the next set of inputs each time so that none is in the L2 cache."""
    turn = 0

    def call() -> None:
        nonlocal turn
        inputs = sets[turn % len(sets)]
        turn += 1
        if backward:
            out = op(**inputs)[0]
            torch.autograd.grad(out, list(inputs.values()), cotangent)
        else:
            with torch.no_grad():
                op(**inputs)

    return call


def graph_s(call: Callable[[], None], device: torch.device, repeats: int, num_sets: int) -> float | None:
    """Median seconds under CUDA-graph replay: eager minus this is launch overhead. None where not possible.

    A graph keeps the addresses of its inputs, so it holds one call with each of the `num_sets` that `passes` takes in
    turn: replayed with a single one it would find them in the L2 cache.
    """
    if device.type != "cuda":
        return None
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(num_sets):
                call()
        return median_s(graph.replay, device, max(3, repeats // num_sets)) / num_sets
    except RuntimeError:
        return None


def launches(call: Callable[[], None], device: torch.device) -> int | None:
    """Kernels on the device per call."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return sum(int(event.count) for event in seen.key_averages() if str(event.device_type).endswith("CUDA"))


def judge(problem: Problem, inputs: Inputs) -> Callable[..., float]:
    """What measures the op with any options: its largest relative Frobenius error over output, last state and every
    gradient, on a slice, against the token loop in float64, which runs once."""
    if problem.cut is not None:
        cut = problem.cut(inputs)
    else:
        # a router has no heads, and choosing among fewer memories is another problem
        cut = {name: x[:1, :130] if name == "router" else x[:1, :130, :2] for name, x in inputs.items()}

    def run(leaves: Inputs, **how: Any) -> list[Tensor]:
        given = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
        out, final = problem.op(**given, **how)
        gen = torch.Generator().manual_seed(0)
        cotangents = [torch.randn(x.shape, generator=gen).to(x) for x in (out, final)]
        return [out.detach(), final.detach(), *torch.autograd.grad([out, final], list(given.values()), cotangents)]

    truth = run({name: x.double().cpu() for name, x in cut.items()}, backend="reference")
    return lambda **options: max(error(x, y) for x, y in zip(run(cut, **options), truth, strict=True))


def error(found: Tensor, truth: Tensor) -> float:
    """Relative Frobenius error; infinite for anything not finite."""
    difference = float((found.double().cpu() - truth).norm())
    scale = float(truth.norm())
    return difference / scale if scale and difference < float("inf") else (0.0 if difference == 0 else float("inf"))
