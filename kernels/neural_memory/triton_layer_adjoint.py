"""The backward of a layer of a neural memory in Triton: of its slopes, its tokens and its weights, a kernel each.

Legend: as in `triton_layer`.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# device functions carry no types: their arguments are pointers, tiles and constants of the compiler

import triton
import triton.language as tl

from kernels.common.triton_device import load_state, load_tile, store_state, store_tile


@triton.jit
def column(ptr, t0, T, C: tl.constexpr):
    """One coefficient per token, [C, 1]."""
    return load_tile(ptr, t0, t0 + T, 0, 1, 1, 0, C, 1)


@triton.jit
def memory_slope_gradients(
    h_ptr, x_ptr, d_ptr, step_ptr, push_ptr, do_ptr, dafter_ptr, dpushed_ptr, dd_ptr, dstep_ptr, dpush_ptr,
    Z, T, K, V,
    MOMENTUM: tl.constexpr, C: tl.constexpr, PREC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradient of delta, one tile of V; of step and push one part [V tiles, Z, ...]."""
    z, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v0, part = tile * BV, tile * Z + z
    t0, end = z * T, z * T + T
    scores = tl.zeros([C, C], tl.float32)
    # the keys through the gradients of the weights after
    back = tl.zeros([C, BV], tl.float32)
    back_p = tl.zeros([C, BV], tl.float32)
    for k0 in range(0, K, BK):
        x = load_tile(x_ptr, t0, end, 0, 1, K, k0, C, BK)
        h = load_tile(h_ptr, t0, end, 0, 1, K, k0, C, BK)
        scores += tl.dot(h, tl.trans(x), input_precision=PREC)
        back += tl.dot(x, load_state(dafter_ptr, z, 0, 1, K, V, k0, v0, BK, BV), input_precision=PREC)
        if MOMENTUM:
            back_p += tl.dot(x, load_state(dpushed_ptr, z, 0, 1, K, V, k0, v0, BK, BV), input_precision=PREC)
    t = tl.arange(0, C)
    d = load_tile(d_ptr, t0, end, 0, 1, V, v0, C, BV)
    do = load_tile(do_ptr, t0, end, 0, 1, V, v0, C, BV)
    # the last row of step wrote the state too
    to_state = tl.where((t == T - 1)[:, None], tl.sum(d * back, 1)[None, :], 0.0)
    dstep = -to_state - scores * tl.dot(do, tl.trans(d), input_precision=PREC)
    store_tile(dstep_ptr, dstep, part * T, part * T + T, 0, 1, T, 0, C, C)
    scores *= load_tile(step_ptr, t0, end, 0, 1, T, 0, C, C)
    dd = -column(step_ptr, (end - 1) * T, T, C) * back
    dd -= tl.dot(tl.trans(scores), do, input_precision=PREC)
    if MOMENTUM:
        dd -= column(push_ptr, t0, T, C) * back_p
        tl.store(dpush_ptr + part * T + t, -tl.sum(d * back_p, 1), mask=t < T)
    store_tile(dd_ptr, dd, t0, end, 0, 1, V, v0, C, BV)


@triton.jit
def memory_token_gradients(
    h_ptr, x_ptr, d_ptr, w_ptr, p_ptr, into_ptr, step_ptr, carry_ptr, push_ptr, do_ptr, dafter_ptr, dpushed_ptr,
    dh_ptr, dx_ptr, dinto_ptr, dcarry_ptr, Z, T, K, V,
    MOMENTUM: tl.constexpr, C: tl.constexpr, PREC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries h and the keys x, one tile of K; of into and carry one part [K tiles, Z, T]."""
    z, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k0, part = tile * BK, tile * Z + z
    t0, end = z * T, z * T + T
    written = column(step_ptr, (end - 1) * T, T, C)
    push = column(push_ptr, t0, T, C) if MOMENTUM else written
    scores = tl.zeros([C, C], tl.float32)
    of_w = tl.zeros([C, BK], tl.float32)
    of_p = tl.zeros([C, BK], tl.float32)
    for v0 in range(0, V, BV):
        d = load_tile(d_ptr, t0, end, 0, 1, V, v0, C, BV)
        do = load_tile(do_ptr, t0, end, 0, 1, V, v0, C, BV)
        scores += tl.dot(do, tl.trans(d), input_precision=PREC)
        of_w += tl.dot(do, tl.trans(load_state(w_ptr, z, 0, 1, K, V, k0, v0, BK, BV)), input_precision=PREC)
        if MOMENTUM:
            of_p += tl.dot(do, tl.trans(load_state(p_ptr, z, 0, 1, K, V, k0, v0, BK, BV)), input_precision=PREC)
    scores *= load_tile(step_ptr, t0, end, 0, 1, T, 0, C, C)
    t = tl.arange(0, C)
    h = load_tile(h_ptr, t0, end, 0, 1, K, k0, C, BK)
    dh = column(into_ptr, t0, T, C) * of_w
    tl.store(dinto_ptr + part * T + t, tl.sum(h * of_w, 1), mask=t < T)
    if MOMENTUM:
        dh += column(carry_ptr, t0, T, C) * of_p
        tl.store(dcarry_ptr + part * T + t, tl.sum(h * of_p, 1), mask=t < T)
    dh -= tl.dot(scores, load_tile(x_ptr, t0, end, 0, 1, K, k0, C, BK), input_precision=PREC)
    store_tile(dh_ptr, dh, t0, end, 0, 1, K, k0, C, BK)
    # in a loop of its own: less is alive at once
    dx = tl.zeros([C, BK], tl.float32)
    for v0 in range(0, V, BV):
        d = load_tile(d_ptr, t0, end, 0, 1, V, v0, C, BV)
        dw = load_state(dafter_ptr, z, 0, 1, K, V, k0, v0, BK, BV)
        dx -= written * tl.dot(d, tl.trans(dw), input_precision=PREC)
        if MOMENTUM:
            dp = load_state(dpushed_ptr, z, 0, 1, K, V, k0, v0, BK, BV)
            dx -= push * tl.dot(d, tl.trans(dp), input_precision=PREC)
    h = load_tile(h_ptr, t0, end, 0, 1, K, k0, C, BK)
    dx -= tl.dot(tl.trans(scores), h, input_precision=PREC)
    store_tile(dx_ptr, dx, t0, end, 0, 1, K, k0, C, BK)


@triton.jit
def memory_weight_gradients(
    h_ptr, w_ptr, p_ptr, into_ptr, carry_ptr, slowed_ptr, do_ptr, dafter_ptr, dpushed_ptr, dw_ptr, dp_ptr, held_ptr,
    Z, T, K, V,
    MOMENTUM: tl.constexpr, C: tl.constexpr, PREC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients of W and P, one tile; one part [tiles, Z, 3] of those of what the state keeps: into, carry, slowed."""
    z, v0, k0 = tl.program_id(0).to(tl.int64), tl.program_id(1) * BV, tl.program_id(2) * BK
    t0, end = z * T, z * T + T
    held = held_ptr + ((tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * Z + z) * 3
    h = tl.trans(load_tile(h_ptr, t0, end, 0, 1, K, k0, C, BK))
    do = load_tile(do_ptr, t0, end, 0, 1, V, v0, C, BV)
    dafter = load_state(dafter_ptr, z, 0, 1, K, V, k0, v0, BK, BV)
    w = load_state(w_ptr, z, 0, 1, K, V, k0, v0, BK, BV)
    tl.store(held, tl.sum(tl.sum(w * dafter, 1), 0))
    dw = dafter * tl.load(into_ptr + end - 1)
    dw += tl.dot(h, column(into_ptr, t0, T, C) * do, input_precision=PREC)
    store_state(dw_ptr, dw, z, 0, 1, K, V, k0, v0, BK, BV)
    if MOMENTUM:
        p = load_state(p_ptr, z, 0, 1, K, V, k0, v0, BK, BV)
        dp = load_state(dpushed_ptr, z, 0, 1, K, V, k0, v0, BK, BV)
        tl.store(held + 1, tl.sum(tl.sum(p * dafter, 1), 0))
        tl.store(held + 2, tl.sum(tl.sum(p * dp, 1), 0))
        dp = dp * tl.load(slowed_ptr + z) + dafter * tl.load(carry_ptr + end - 1)
        dp += tl.dot(h, column(carry_ptr, t0, T, C) * do, input_precision=PREC)
        store_state(dp_ptr, dp, z, 0, 1, K, V, k0, v0, BK, BV)
