"""What is measured and checked: the problems (an op and how to draw its inputs) and the shapes people use.

Legend: B batch, T time, H heads, D width (K = V = D; a scan has H * D channels).
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from kernels.bench.nonlinear import NONLINEAR
from kernels.bench.problem import Inputs, Problem, Shape
from kernels.common.dispatch import explained_by, matrix_chunk
from kernels.delta_rule import delta_rule
from kernels.gated_linear_attention import gated_linear_attention
from kernels.linear_scan import linear_scan
from kernels.memory_cache import memory_cache, routed_memory
from kernels.neural_memory import neural_memory
from kernels.recurrent_attention import recurrent_attention
from kernels.ridge_memory import ridge_memory


def _scan(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    batch, length, heads, width = shape
    size = (batch, length, heads * width)
    a = torch.sigmoid(torch.randn(size, device=device) + 2)
    return {"a": a.to(dtype), "u": torch.randn(size, device=device).to(dtype)}


def _cut_scan(inputs: Inputs) -> Inputs:
    # time enough for several segments
    return {name: x[:1, :1100, :64] for name, x in inputs.items()}


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


# memories: a state of several tensors is represented by one of them, and options are fixed here
RIDGE_STEPS, MEMORY_CHUNK, ROUTE, MEMORIES = 30, 64, 16, 4
NEURAL = ("neural_linear", "titans_linear", "titans_mlp")


def _first_tensor(op: Any, pick: Callable[[Any], Tensor], **how: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    @explained_by(partial(op.plan, **how))
    def call(**inputs: Any) -> tuple[Tensor, Tensor]:
        out, state = op(**how, **inputs)
        return out, pick(state)

    return call


@cache
def _mlp(heads: int, width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Learned start of a memory of two layers, the same for every call."""
    gen = torch.Generator().manual_seed(0)
    shapes = ((heads, width, 2 * width), (heads, 2 * width, width))
    return [(torch.randn(s, generator=gen) / s[1] ** 0.5).to(device, dtype) for s in shapes]


def _of_titans(v: Tensor, **inputs: Any) -> dict[str, Any]:
    """All arguments of a memory of two layers."""
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    return {**inputs, "v": v, "weights": _mlp(*v.shape[2:], dtype, v.device), "chunk": MEMORY_CHUNK}


@explained_by(lambda **inputs: neural_memory.plan(**_of_titans(**inputs)))  # type: ignore[attr-defined]
def _titans(**inputs: Any) -> tuple[Tensor, Tensor]:
    out, state = neural_memory(**_of_titans(**inputs))
    return out, state.weights[0]


def _memory(extra: str) -> Callable[[Shape, torch.dtype, torch.device], Inputs]:
    def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        inputs = _matrix("scalar", True)(shape, dtype, device)
        inputs["q"] = torch.nn.functional.normalize(inputs["q"].float(), dim=-1).to(dtype)
        if extra in ("neural", "momentum"):
            # correlated keys add up over a chunk: a step that keeps the memory stable
            inputs["beta"] = inputs["beta"] / MEMORY_CHUNK
        if extra == "momentum":
            inputs["momentum"] = torch.nn.functional.logsigmoid(torch.randn(shape[:3], device=device))
        if extra == "routes":
            del inputs["beta"]
            for name in ("route_q", "route_k"):
                inputs[name] = torch.randn(*shape[:3], ROUTE, device=device).to(dtype)
        if extra == "router":
            del inputs["beta"]
            inputs["router"] = torch.randn(*shape[:2], MEMORIES, device=device)
        return inputs

    return draw


def _ridge_flops(width: int, chunk: int) -> tuple[int, int]:
    solve = RIDGE_STEPS * (4 * width * width + 4 * chunk * width)
    forward, both = _attention_flops(width, chunk)
    return solve + 2 * forward, 2 * solve + 2 * both + 2 * (both - forward)


def _neural_flops(layers: int) -> Callable[[int, int], tuple[int, int]]:
    def flops(width: int, chunk: int) -> tuple[int, int]:
        # per layer: keys, slopes and queries through the weights, the update, the scores of the dual form
        forward = layers * (8 * width * width * layers + 4 * chunk * width * layers)
        return forward, 3 * forward

    return flops


# a block of the width of its heads together, its inner layer four times as wide
def _block_of_attention(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    batch, length, heads, width = shape
    whole = heads * width
    inputs = {"x": torch.randn(batch, length, whole, device=device)}
    inputs |= {name: torch.randn(shape, device=device) for name in "qkv"}
    sizes: dict[str, tuple[int, ...]] = {"w_out": (heads, width, whole)}
    sizes |= {"w_k": (whole, heads, width), "w_v": (whole, heads, width)}
    sizes |= {"w_up": (whole, 4 * whole), "w_down": (4 * whole, whole)}
    for name, size in sizes.items():
        into = whole if name == "w_out" else size[0]
        inputs[name] = torch.randn(size, device=device) / into**0.5
    return {name: x.to(dtype) for name, x in inputs.items()}


def _cut_block(inputs: Inputs) -> Inputs:
    return {name: x if name.startswith("w_") else x[:1, :130] for name, x in inputs.items()}


def _block_of_attention_flops(width: int, chunk: int) -> tuple[int, int]:
    # products with the weights for four heads; attention is less than a fifth up to T = 512
    forward = 2 * 4 * (1 + 2 + 8) * width**2
    return forward, 4 * forward


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("linear_scan", linear_scan, _scan, lambda width, chunk: (2 * width, 5 * width), _cut_scan),
        Problem("gla_scalar", gated_linear_attention, _matrix("scalar", False), _attention_flops, keeps_states=True),
        Problem("gla_channel", gated_linear_attention, _matrix("channel", False), _attention_flops, keeps_states=True),
        Problem("deltanet", delta_rule, _matrix("none", True), _delta_flops, keeps_states=True),
        Problem("gated_deltanet", delta_rule, _matrix("scalar", True), _delta_flops, keeps_states=True),
        Problem(
            "gdn_normalized", partial(delta_rule, normalize=True), _matrix("scalar", True), _delta_flops, None, True
        ),
        Problem("kda", delta_rule, _matrix("channel", True), _delta_flops, keeps_states=True),
        # the ratio at which 30 steps have converged to rounding: the time does not depend on it, the check does
        Problem("ridge", partial(ridge_memory, ratio=0.1, steps=RIDGE_STEPS), _memory("ridge"), _ridge_flops),
        Problem(
            "neural_linear",
            _first_tensor(neural_memory, lambda state: state.weights[0], chunk=MEMORY_CHUNK),
            _memory("neural"),
            _neural_flops(1),
        ),
        Problem(
            "titans_linear",
            _first_tensor(neural_memory, lambda state: state.weights[0], chunk=MEMORY_CHUNK),
            _memory("momentum"),
            _neural_flops(1),
        ),
        Problem("titans_mlp", _titans, _memory("momentum"), _neural_flops(2)),
        Problem(
            "memory_cache",
            _first_tensor(memory_cache, lambda state: state.current, segment=128),
            _memory("routes"),
            _attention_flops,
        ),
        Problem("routed_memory", partial(routed_memory, top_k=2), _memory("router"), _attention_flops),
        Problem(
            "recurrent_attention",
            _first_tensor(recurrent_attention, lambda state: state.keys),
            _block_of_attention,
            _block_of_attention_flops,
            _cut_block,
        ),
        *NONLINEAR,
    )
}


def chunk_of(problem: Problem, dtype: torch.dtype, device: torch.device) -> int:
    """The chunk the op takes by itself, for the count of operations."""
    if problem.name in NEURAL:
        return MEMORY_CHUNK
    if device.type == "cpu" or problem.name == "ridge":
        return 32
    per_channel = problem.name in ("gla_channel", "kda")
    return matrix_chunk(dtype, per_channel=per_channel, wide=getattr(problem.op, "func", problem.op) is delta_rule)


def shapes(problem: Problem, device: torch.device, smoke: bool) -> list[Shape]:
    """Shapes of a run: one that a test can afford, the issue's CPU shape, or the GPU list of the design."""
    if smoke:
        return [(1, 64, 2, 16)]
    # their token loops would take minutes at the shape, or their chunks are run one after the other
    slow = problem.name in (*NEURAL, "ridge", "memory_cache", "routed_memory")
    if problem in NONLINEAR:
        # narrow batches are what Newton is for, wide ones what a card needs for the others
        newton = problem.name.startswith("newton")
        if device.type == "cpu":
            return [(4, 1024, 4, 64), (4, 2048, 4, 64)] if newton else [(4, 2048, 4, 64)]
        narrow = [(1, 16384, 8, 64), (4, 4096, 16, 128)] if newton else [(8, 512, 4, 64)]
        return [(32, 2048, 4, 64), (64, 2048, 4, 64), *narrow]
    if device.type == "cpu" and problem.name == "recurrent_attention":
        return [(2, 256, 4, 64)]
    if device.type == "cpu":
        return [(2, 512, 4, 64)] if slow else [(4, 2048, 4, 64)]
    if problem.name == "recurrent_attention":
        # the batch fills a card, and nothing else does
        return [(32, 512, 4, 64), (256, 512, 16, 64)]
    if problem.name in NEURAL:
        return [(8, 512, 4, 64), (8, 1024, 8, 64), (4, 2048, 16, 128)]
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
