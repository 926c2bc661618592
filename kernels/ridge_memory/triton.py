"""The solves of ridge memory in Triton: one program per chunk and head keeps H and all iterates on chip. One launch.

States, norms and gradients are the kernels of gated linear attention and the scan (see `implicit`); this kernel is the
20-fold larger part. The iteration is that of `chunked`, step for step.

Legend: as in kernels.common.triton_chunks; the state is [R, H, K, K].
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# device functions carry no types: their arguments are pointers, tiles and constants of the compiler

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.triton import INTERPRET, Kernel, Row, host, pow2, row
from kernels.common.triton_device import chunk_bounds, decay_mask, load_gate, load_state, load_tile, running, store_tile
from kernels.common.triton_packed import Packed
from kernels.gated_linear_attention import triton as attention
from kernels.linear_scan import triton as scan

__all__ = ["attention", "scan", "solve"]


@triton.jit
def _chunk_solves(
    rhs_ptr,
    k_ptr,
    beta_ptr,
    g_ptr,
    norm_ptr,
    states_ptr,
    cu_ptr,
    first_ptr,
    seq_ptr,
    x_ptr,
    ratio,
    floor,
    steps,
    S,
    H,
    K,
    HAS_BETA: tl.constexpr,
    HAS_GATE: tl.constexpr,
    C: tl.constexpr,
    PREC: tl.constexpr,
    BK: tl.constexpr,
):
    """x = (H_t + (ratio |H_t| + floor) I)^-1 rhs of one chunk by Chebyshev iteration; every row is a token."""
    line, h = tl.program_id(0), tl.program_id(1)
    s = tl.load(seq_ptr + line)
    if s >= S:
        return
    t0, end = chunk_bounds(line, s, cu_ptr, first_ptr, C)
    i = tl.arange(0, C)
    k = load_tile(k_ptr, t0, end, h, H, K, 0, C, BK).to(tl.float32)
    state = load_state(states_ptr, line, h, H, K, K, 0, 0, BK, BK)
    size = load_tile(norm_ptr, t0, end, h, H, 1, 0, C, 1)
    strength = ratio * size + floor
    step = 1.0 / (strength + 0.5 * size)
    squeeze = 0.25 * size * size * step * step
    g = load_gate(g_ptr, t0, end, h, H, K, 0, HAS_GATE, False, C, BK)
    inner = -step * decay_mask(g, False, C)
    if HAS_BETA:
        inner *= tl.load(beta_ptr + (t0 + i) * H + h, mask=t0 + i < end, other=0.0).to(tl.float32)[None, :]
    into = -step * tl.exp(running(g, False, False))
    keep = 1.0 - strength * step
    start = load_tile(rhs_ptr, t0, end, h, H, K, 0, C, BK).to(tl.float32) * step
    x = start
    before = tl.zeros([C, BK], tl.float32)
    omega = tl.zeros([C, 1], tl.float32) + 2.0
    for _ in range(1, steps):
        omega = 4.0 / (4.0 - squeeze * omega)
        scores = tl.dot(x, tl.trans(k), input_precision=PREC) * inner
        ahead = start + keep * x + tl.dot(x, state, input_precision=PREC) * into
        ahead += tl.dot(scores, k, input_precision=PREC)
        following = before + omega * (ahead - before)
        before = x
        x = following
    store_tile(x_ptr, x, t0, end, h, H, K, 0, C, BK)


def _rows(args: dict[str, Any]) -> list[Row]:
    # eight warps: four spill at K = 128
    return [row(BK=pow2(args["K"]), warps=w, stages=1) for w in (8, 4)]


SOLVES = Kernel(_chunk_solves, _rows, ("K", "C", "PREC"))


def solve(
    rhs: Tensor,
    k: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    norm: Tensor,
    states: Tensor,
    cu_seqlens: Tensor | None,
    ratio: float,
    floor: float,
    steps: int,
    chunk: int,
    fast: bool,
) -> Tensor:
    """As `chunked.solve`; `fast` takes single tf32 products, whose error (3e-4) is that of 30 steps at ratio 0.02."""
    call = Packed([rhs, k, norm], g, cu_seqlens, k.shape[3], chunk)
    rhs_p, kp, norm_p = call.tokens
    weight = None if beta is None else host(beta.flatten(0, 1))
    x = torch.empty_like(rhs_p, dtype=torch.float32)
    common = {n: call.chunk[n] for n in ("g_ptr", "cu_ptr", "first_ptr", "seq_ptr", "S", "H", "K", "HAS_GATE", "C")}
    single = fast and not INTERPRET and torch.version.hip is None
    SOLVES.launch(
        lambda meta: (call.rows, call.heads),
        **common,
        rhs_ptr=rhs_p,
        k_ptr=kp,
        beta_ptr=kp if weight is None else weight,
        norm_ptr=norm_p,
        states_ptr=states,
        x_ptr=x,
        ratio=ratio,
        floor=floor,
        steps=steps,
        HAS_BETA=weight is not None,
        PREC="tf32" if single else call.chunk["PREC"],
    )
    return x.view(rhs.shape)
