"""One layer of a neural memory over a piece of a chunk in Triton: what the queries read, and the weights afterwards.

out = into * (h W) + carry * (h P) - ((h x^T) * step) delta, with the coefficients of `chunked`; W and P move by the
last rows. Two launches, the backward three: each over tiles of what it writes, sums over the other width inside, so
that no width is too wide. Gradients of coefficients come as one part per tile and are added up here: no atomics.
The kernels of the backward are in `triton_layer_adjoint`.

Legend: Z sequences times heads, T tokens of the piece (C with padding), K/V width of the layer's input and output;
everything float32.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# device functions carry no types: their arguments are pointers, tiles and constants of the compiler

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.triton import Kernel, Row, host, pow2, precision, row
from kernels.common.triton_device import load_state, load_tile, store_state, store_tile
from kernels.neural_memory.chunked import Coefficients
from kernels.neural_memory.triton_layer_adjoint import (
    column,
    memory_slope_gradients,
    memory_token_gradients,
    memory_weight_gradients,
)


@triton.jit
def _memory_read(
    h_ptr, x_ptr, d_ptr, w_ptr, p_ptr, into_ptr, step_ptr, carry_ptr, out_ptr, T, K, V,
    MOMENTUM: tl.constexpr, C: tl.constexpr, PREC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What every query reads from its own weights: one tile of V."""
    z, v0 = tl.program_id(0).to(tl.int64), tl.program_id(1) * BV
    t0, end = z * T, z * T + T
    into = column(into_ptr, t0, T, C)
    carry = column(carry_ptr, t0, T, C) if MOMENTUM else into
    scores = tl.zeros([C, C], tl.float32)
    out = tl.zeros([C, BV], tl.float32)
    for k0 in range(0, K, BK):
        h = load_tile(h_ptr, t0, end, 0, 1, K, k0, C, BK)
        x = load_tile(x_ptr, t0, end, 0, 1, K, k0, C, BK)
        scores += tl.dot(h, tl.trans(x), input_precision=PREC)
        out += into * tl.dot(h, load_state(w_ptr, z, 0, 1, K, V, k0, v0, BK, BV), input_precision=PREC)
        if MOMENTUM:
            out += carry * tl.dot(h, load_state(p_ptr, z, 0, 1, K, V, k0, v0, BK, BV), input_precision=PREC)
    scores *= load_tile(step_ptr, t0, end, 0, 1, T, 0, C, C)
    out -= tl.dot(scores, load_tile(d_ptr, t0, end, 0, 1, V, v0, C, BV), input_precision=PREC)
    store_tile(out_ptr, out, t0, end, 0, 1, V, v0, C, BV)


@triton.jit
def _memory_write(
    x_ptr, d_ptr, w_ptr, p_ptr, into_ptr, step_ptr, carry_ptr, slowed_ptr, push_ptr, after_ptr, pushed_ptr, T, K, V,
    MOMENTUM: tl.constexpr, C: tl.constexpr, PREC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Weights and momentum after the piece: one tile. The last token's coefficients are those of the state."""
    z, v0, k0 = tl.program_id(0).to(tl.int64), tl.program_id(1) * BV, tl.program_id(2) * BK
    t0, end = z * T, z * T + T
    x = tl.trans(load_tile(x_ptr, t0, end, 0, 1, K, k0, C, BK))
    d = load_tile(d_ptr, t0, end, 0, 1, V, v0, C, BV)
    w = load_state(w_ptr, z, 0, 1, K, V, k0, v0, BK, BV) * tl.load(into_ptr + end - 1)
    w -= tl.dot(x, column(step_ptr, (end - 1) * T, T, C) * d, input_precision=PREC)
    if MOMENTUM:
        p = load_state(p_ptr, z, 0, 1, K, V, k0, v0, BK, BV)
        w += p * tl.load(carry_ptr + end - 1)
        p *= tl.load(slowed_ptr + z)
        p -= tl.dot(x, column(push_ptr, t0, T, C) * d, input_precision=PREC)
        store_state(pushed_ptr, p, z, 0, 1, K, V, k0, v0, BK, BV)
    store_state(after_ptr, w, z, 0, 1, K, V, k0, v0, BK, BV)


# the narrowest tile of any row: how many parts a sum over a width can come in
NARROW = 16


def _rows(args: dict[str, Any]) -> list[Row]:
    bk, bv = (min(pow2(args[name]), 32) for name in ("K", "V"))
    tiles = [(bk, bv, 8), (bk, bv, 4), (NARROW, NARROW, 4)]
    return list(dict.fromkeys(row(BK=k, BV=v, warps=warps, stages=1) for k, v, warps in tiles))


def _narrow_rows(args: dict[str, Any]) -> list[Row]:
    # a transposed operand is held by every warp: wider tiles spill
    return [row(BK=NARROW, BV=NARROW, warps=warps, stages=1) for warps in (4, 8)]


KEY = ("K", "V", "C", "MOMENTUM")
READ, WRITE = Kernel(_memory_read, _rows, KEY), Kernel(_memory_write, _narrow_rows, KEY)
SLOPES, WEIGHTS = (Kernel(fn, _narrow_rows, KEY) for fn in (memory_slope_gradients, memory_weight_gradients))
TOKENS = Kernel(memory_token_gradients, lambda args: _narrow_rows(args)[::-1], KEY)

# inputs of the op in order; those of the momentum are empty without one
NAMES = ("h", "x", "d", "w", "p", "into", "step", "carry", "slowed", "push")


class _Call:
    """The call as the kernels see it: tokens [S, H, T, K or V], weights and momentum [S, H, K, V], coefficients."""

    def __init__(self, inputs: list[Tensor]):
        given = dict(zip(NAMES, inputs, strict=True))
        self.keys, self.values = given["w"].shape[2:]
        self.tokens, self.heads = given["h"].shape[2], given["w"].shape[:2].numel()
        self.args: dict[str, Any] = {
            **{f"{name}_ptr": host(x) for name, x in given.items()},
            "Z": self.heads,
            "T": self.tokens,
            "K": self.keys,
            "V": self.values,
            "MOMENTUM": given["p"].numel() > 0,
            "C": pow2(self.tokens),
            "PREC": precision(),
        }

    def launch(self, kernel: Kernel, *axes: str, **more: Tensor) -> None:
        """Over heads and tiles of the named widths, with the arguments that the kernel has."""
        args = {name: x for name, x in (self.args | more).items() if name in kernel.fn.arg_names}
        sizes = {"BV": self.values, "BK": self.keys}
        kernel.launch(lambda meta: (self.heads, *(-(-sizes[axis] // meta[axis]) for axis in axes)), **args)


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("cl_kernels::memory_layer", mutates_args=())
def _forward(inputs: list[Tensor]) -> list[Tensor]:
    call, (out, after, pushed) = _Call(inputs), (_empty(x) for x in inputs[2:5])
    call.launch(READ, "BV", out_ptr=out)
    call.launch(WRITE, "BV", "BK", after_ptr=after, pushed_ptr=pushed)
    return [out, after, pushed]


@_forward.register_fake
def _(inputs: list[Tensor]) -> list[Tensor]:
    return [_empty(x) for x in inputs[2:5]]


@torch.library.custom_op("cl_kernels::memory_layer_backward", mutates_args=())
def _backward(cotangents: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    call, (dh, dx, dd, dw, dp) = _Call(inputs), (_empty(x) for x in inputs[:5])
    call.args |= dict(zip(("do_ptr", "dafter_ptr", "dpushed_ptr"), map(host, cotangents), strict=True))
    # a part that the chosen tile does not have stays at zero
    into, step, carry, slowed, push = inputs[5:]
    of_k, of_v = (-(-width // NARROW) for width in (call.keys, call.values))
    dinto, dcarry = (x.new_zeros(of_k, *x.shape) for x in (into, carry))
    dstep, dpush = (x.new_zeros(of_v, *x.shape) for x in (step, push))
    held = into.new_zeros(of_k * of_v, *into.shape[:2], 3)
    call.launch(SLOPES, "BV", dd_ptr=dd, dstep_ptr=dstep, dpush_ptr=dpush)
    call.launch(TOKENS, "BK", dh_ptr=dh, dx_ptr=dx, dinto_ptr=dinto, dcarry_ptr=dcarry)
    call.launch(WEIGHTS, "BV", "BK", dw_ptr=dw, dp_ptr=dp, held_ptr=held)
    sums, kept = [x.sum(0) for x in (dinto, dstep, dcarry, dpush)], held.sum(0)
    for i, d in ((0, sums[0]), (1, sums[2])) if carry.numel() else ((0, sums[0]),):
        d[:, :, -1, 0] += kept[..., i]
    dslowed = kept[..., 2].view(slowed.shape) if slowed.numel() else _empty(slowed)
    return [dh, dx, dd, dw, dp, sums[0], sums[1], sums[2], dslowed, sums[3]]


@_backward.register_fake
def _(cotangents: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    return [_empty(x) for x in inputs]


def _save(ctx: Any, inputs: tuple[list[Tensor]], output: list[Tensor]) -> None:
    ctx.save_for_backward(*inputs[0])


def _differentiate(ctx: Any, cotangents: list[Tensor]) -> Any:
    return _backward(cotangents, list(ctx.saved_tensors))


_forward.register_autograd(_differentiate, setup_context=_save)


def layer(
    h: Tensor, x: Tensor, delta: Tensor, now: Tensor, momentum: Tensor | None, c: Coefficients
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the layer of `chunked`."""
    none = h.new_empty(0)
    out, after, pushed = _forward([none if y is None else y for y in (h, x, delta, now, momentum, *c)])
    return out, after, None if momentum is None else pushed
