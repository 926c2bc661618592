"""Driving a chunked op over time: sections of a few chunks, dense or packed, forward and backward.

A section is as many chunks as make about `ROWS` matrices: its temporaries stay in the cache and in the allocator's
hands (fresh pages cost more than the arithmetic), and the memory of the backward does not grow with T but for what is
kept: the inputs and the state at every chunk start.

Legend: as in kernels.common.chunks; n chunks of one section; Z = B*H; R rows of kept chunk states.
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves Tensor.unflatten without types

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.common.checks import state_dtype
from kernels.common.chunks import put_chunks
from kernels.common.varlen import groups, num_chunks

ROWS = 64
Tokens = Sequence[Tensor | None]
# (tokens, state [Z, K, V], where to write the chunk states [n, Z, K, V]) -> output rows [M, C, V], new state
ForwardSection = Callable[[Tokens, Tensor, Tensor], tuple[Tensor, Tensor]]
# (tokens, gradient of the output, chunk states [n, Z, K, V], gradient of the last state) -> gradients of the tokens as
# rows [M, C, D], of the state
BackwardSection = Callable[[Tokens, Tensor, Tensor, Tensor], tuple[list[Tensor | None], Tensor]]
# (tokens, chunk states [n * Z, K, V]) -> output [B, t, H, V]
ReadSection = Callable[[Tokens, Tensor], Tensor]


def start_of(h0: Tensor | None, q_BTHK: Tensor, v_BTHV: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The initial states [S, H, K, V] in the arithmetic dtype, zeros when None."""
    dtype = state_dtype(v_BTHV.dtype)
    if h0 is not None:
        return h0.to(dtype).contiguous()
    sequences = q_BTHK.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v_BTHV.new_zeros(sequences, *q_BTHK.shape[2:], v_BTHV.shape[3], dtype=dtype)


def _cut(tokens: Tokens, begin: int, end: int) -> list[Tensor | None]:
    return [None if x is None else x[:, begin:end] for x in tokens]


def _span(state_BHKV: Tensor, chunk: int) -> int:
    """Tokens of one section."""
    return max(1, ROWS // (state_BHKV.shape[0] * state_BHKV.shape[1])) * chunk


def _forward_dense(
    section: ForwardSection, tokens: Tokens, out: Tensor, h0_BHKV: Tensor, chunk: int, kept_NZKV: Tensor | None
) -> Tensor:
    state, span, length = h0_BHKV.flatten(0, 1), _span(h0_BHKV, chunk), out.shape[1]
    scratch = state.new_empty(0 if kept_NZKV is not None else min(span, length + chunk - 1) // chunk, *state.shape)
    for begin in range(0, length, span):
        end = min(begin + span, length)
        n = -(-(end - begin) // chunk)
        states = scratch[:n] if kept_NZKV is None else kept_NZKV[begin // chunk : begin // chunk + n]
        rows, state = section(_cut(tokens, begin, end), state, states)
        put_chunks(out[:, begin:end], rows)
    return state.view_as(h0_BHKV)


def _backward_dense(
    section: BackwardSection, tokens: Tokens, grads: Tokens, do: Tensor, dfinal_BHKV: Tensor, kept: Tensor, chunk: int
) -> Tensor:
    dstate, span, length = dfinal_BHKV.flatten(0, 1), _span(dfinal_BHKV, chunk), do.shape[1]
    for begin in range((length - 1) // span * span, -1, -span):
        end = min(begin + span, length)
        states = kept[begin // chunk : -(-end // chunk)]
        parts, dstate = section(_cut(tokens, begin, end), do[:, begin:end], states, dstate)
        for grad, part in zip(grads, parts, strict=True):
            if grad is not None and part is not None:
                put_chunks(grad[:, begin:end] if grad.dim() == 4 else grad[:, begin:end, :, None], part)
    return dstate.view_as(dfinal_BHKV)


def forward(
    section: ForwardSection, tokens: Tokens, v: Tensor, h0: Tensor, cu_seqlens: Tensor | None, chunk: int, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run all tokens; `h0` [S, H, K, V] in the arithmetic dtype.

    Returns:
        output like v, last states [S, H, K, V], kept chunk states [R, H, K, V] (empty unless `save`).
    """
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    rows = num_chunks(v.shape[0], v.shape[1], chunk, cu_seqlens) if save else 0
    shape = h0.shape[1:]
    if cu_seqlens is None:
        kept = h0.new_empty(rows, *shape)
        place = kept.view(-1, h0.shape[0] * shape[0], *shape[1:]) if save else None
        return out, _forward_dense(section, tokens, out, h0, chunk, place).clone(), kept
    kept, final = h0.new_zeros(rows, *shape), h0.clone()
    for group in groups(cu_seqlens, chunk):
        padded = [group.gather(x) for x in tokens]
        start = h0[group.rows]
        o = group.gather(v)
        assert o is not None
        place = start.new_empty(group.chunks, start.shape[0] * shape[0], *shape[1:]) if save else None
        final[group.rows] = _forward_dense(section, padded, o, start, chunk, place)
        group.scatter(out, o)
        if place is not None:
            group.put_chunks(kept, place.unflatten(1, start.shape[:2]).transpose(0, 1))
    return out, final, kept


def backward(
    section: BackwardSection,
    tokens: Tokens,
    do: Tensor,
    dfinal: Tensor,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    chunk: int,
) -> tuple[list[Tensor | None], Tensor]:
    """Gradients of all tokens (None where a token tensor is None) and of the initial states [S, H, K, V]."""
    grads = [None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in tokens]
    dfinal = dfinal.to(kept.dtype)
    if cu_seqlens is None:
        states = kept.view(-1, dfinal.shape[0] * dfinal.shape[1], *dfinal.shape[2:])
        return grads, _backward_dense(section, tokens, grads, do, dfinal, states, chunk).clone()
    dh0 = dfinal.clone()
    for group in groups(cu_seqlens, chunk):
        padded = [group.gather(x) for x in tokens]
        parts = [None if x is None else torch.empty_like(x) for x in padded]
        states = group.take_chunks(kept).transpose(0, 1).flatten(1, 2)
        do_padded = group.gather(do)
        assert do_padded is not None
        dh0[group.rows] = _backward_dense(section, padded, parts, do_padded, dfinal[group.rows], states, chunk)
        for grad, part in zip(grads, parts, strict=True):
            if grad is not None and part is not None:
                group.scatter(grad, part)
    return grads, dh0


def _read_dense(section: ReadSection, tokens: Tokens, out: Tensor, states_NZKV: Tensor, chunk: int) -> None:
    span, length = max(1, ROWS // states_NZKV.shape[1]) * chunk, out.shape[1]
    for begin in range(0, length, span):
        end = min(begin + span, length)
        out[:, begin:end] = section(
            _cut(tokens, begin, end), states_NZKV[begin // chunk : -(-end // chunk)].flatten(0, 1)
        )


def read(
    section: ReadSection, tokens: Tokens, like: Tensor, kept: Tensor, cu_seqlens: Tensor | None, chunk: int
) -> Tensor:
    """Run a section that only reads the chunk states kept by `forward`; the result has the shape of `like`."""
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    if cu_seqlens is None:
        _read_dense(section, tokens, out, kept.view(-1, like.shape[0] * like.shape[2], *kept.shape[2:]), chunk)
        return out
    for group in groups(cu_seqlens, chunk):
        part = group.gather(like)
        assert part is not None
        states = group.take_chunks(kept).transpose(0, 1).flatten(1, 2)
        _read_dense(section, [group.gather(x) for x in tokens], part, states, chunk)
        group.scatter(out, part)
    return out
