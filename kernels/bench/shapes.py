"""What is measured and checked: the problems (an op and how to draw its inputs) and the shapes people use.

Legend: B batch, T time, H heads, D width (K = V = D; a scan has H * D channels).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.common.dispatch import matrix_chunk
from kernels.delta_rule import delta_rule
from kernels.gated_linear_attention import gated_linear_attention
from kernels.linear_scan import linear_scan

Inputs = dict[str, Tensor]
# batch, length, heads, width
Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Problem:
    """An op with drawn inputs and its cost; `flops` counts one (token, head), forward and forward + backward."""

    name: str
    op: Callable[..., tuple[Tensor, Tensor]]
    draw: Callable[[Shape, torch.dtype, torch.device], Inputs]
    flops: Callable[[int, int], tuple[int, int]]

    def compulsory_bytes(self, inputs: Inputs, out: Tensor) -> tuple[int, int]:
        """Bytes that must move, forward and forward + backward: each input, output and gradient once per pass."""
        given = sum(x.numel() * x.element_size() for x in inputs.values())
        result = out.numel() * out.element_size()
        return given + result, 3 * given + 2 * result


def _scan(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    batch, length, heads, width = shape
    size = (batch, length, heads * width)
    a = torch.sigmoid(torch.randn(size, device=device) + 2)
    return {"a": a.to(dtype), "u": torch.randn(size, device=device).to(dtype)}


def _matrix(gate: str, delta: bool) -> Callable[[Shape, torch.dtype, torch.device], Inputs]:
    def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        q, k, v = (torch.randn(shape, device=device) for _ in range(3))
        # keys at cosine 0.5: random ones would hide a bad solve
        common = torch.randn(shape[0], 1, *shape[2:], device=device)
        k = torch.nn.functional.normalize(k + common, dim=-1)
        inputs = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}
        if delta:
            inputs["beta"] = torch.rand(shape[:3], device=device).to(dtype)
        if gate != "none":
            size = shape[:3] if gate == "scalar" else shape
            inputs["g"] = torch.nn.functional.logsigmoid(torch.randn(size, device=device) + 2)
        return inputs

    return draw


def _attention_flops(width: int, chunk: int) -> tuple[int, int]:
    forward = 4 * chunk * width + 4 * width * width
    return forward, forward + 10 * chunk * width + 10 * width * width


def _delta_flops(width: int, chunk: int) -> tuple[int, int]:
    forward, both = _attention_flops(width, chunk)
    solve = 2 * chunk * width + chunk * chunk + 2 * width * width
    return forward + solve, both + 4 * solve


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("linear_scan", linear_scan, _scan, lambda width, chunk: (2 * width, 5 * width)),
        Problem("gla_scalar", gated_linear_attention, _matrix("scalar", False), _attention_flops),
        Problem("gla_channel", gated_linear_attention, _matrix("channel", False), _attention_flops),
        Problem("deltanet", delta_rule, _matrix("none", True), _delta_flops),
        Problem("gated_deltanet", delta_rule, _matrix("scalar", True), _delta_flops),
        Problem("kda", delta_rule, _matrix("channel", True), _delta_flops),
    )
}


def chunk_of(problem: Problem, dtype: torch.dtype, device: torch.device) -> int:
    """The chunk the op takes by itself, for the count of operations."""
    if device.type == "cpu":
        return 32
    per_channel = problem.name in ("gla_channel", "kda")
    return matrix_chunk(dtype, per_channel=per_channel, wide=problem.op is delta_rule)


def shapes(problem: Problem, device: torch.device, smoke: bool) -> list[Shape]:
    """Shapes of a run: one that a test can afford, the issue's CPU shape, or the GPU list of the design."""
    if smoke:
        return [(1, 64, 2, 16)]
    if device.type == "cpu":
        return [(4, 2048, 4, 64)]
    if problem.name == "linear_scan":
        return [(8, 4096, 16, 128), (1, 131072, 4, 128), (64, 512, 4, 64)]
    return [
        (8, 512, 4, 64),
        (32, 256, 4, 32),
        (8, 1024, 8, 64),
        (4, 2048, 16, 128),
        (4, 4096, 64, 128),
        (2, 16384, 16, 128),
        (1, 65536, 16, 128),
    ]
