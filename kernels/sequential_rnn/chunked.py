"""GRU, LSTM and sLSTM with a matrix per head on any device: what is not sequential is taken out of the loop.

Forward: the loop holds one batched product and the gates. Backward: the gates of a piece of time are computed again at
once (one product from the kept states), the loop over the adjoint holds one product and a few multiplications, and the
weight gradient is one product over all tokens after it.

Legend: S sequences, R rows (tokens in the order of `Order`), H heads, G gates, D width; tensors of the loop are
[H, rows, G * D], states a list of P parts [H, rows, D].
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves Tensor.unflatten without types

import torch
from torch import Tensor

from kernels.common.checks import state_dtype
from kernels.sequential_rnn.order import Order
from kernels.sequential_rnn.reference import GATES, PARTS

Parts = list[Tensor]
# elements of the gates of one piece of time: the dozen tensors of the backward stay near the processor
SPAN = 2**19
_sigmoid_backward = torch.ops.aten.sigmoid_backward
_tanh_backward = torch.ops.aten.tanh_backward


class _Cell:
    """One cell: its step, the planes of its backward, and the step of its adjoint."""

    parts: int
    gates: int

    def __init__(self, r_GHDD: Tensor, bias_GHD: Tensor):
        self.width = r_GHDD.shape[-1]
        # [H, D, G * D], and back
        self.r = r_GHDD.permute(1, 2, 0, 3).flatten(2).contiguous()
        self.r_back = self.r.mT.contiguous()
        self.bias = bias_GHD.transpose(0, 1).flatten(1)[:, None]

    def split(self, x: Tensor) -> Tensor:
        """[H, rows, G * D] as [H, rows, G, D]."""
        view: Tensor = x.unflatten(-1, (self.gates, self.width))
        return view

    def inputs(self, x: Tensor) -> Tensor:
        """What can be added to the inputs once and for all."""
        return x.add_(self.bias)

    def step(self, x: Tensor, state: Parts, out: Parts) -> Parts:
        raise NotImplementedError

    def planes(self, x: Tensor, before: Parts, after: Parts) -> dict[str, Tensor]:
        """Coefficients of the adjoint of every row; `g` receives the gradient of the recurrent pre-activations."""
        raise NotImplementedError

    def back(self, p: dict[str, Tensor], adjoint: Parts) -> Parts:
        """Write `g` of one step and return the adjoint of the state before it (without the recurrent product)."""
        raise NotImplementedError

    def tokens(self, p: dict[str, Tensor]) -> Tensor:
        """Gradient of the inputs [H, rows, G * D] after the loop."""
        return p["g"]


class _GRU(_Cell):
    parts, gates = PARTS["gru"], GATES["gru"]

    def inputs(self, x: Tensor) -> Tensor:
        return x

    def step(self, x: Tensor, state: Parts, out: Parts) -> Parts:
        (h,), d = state, self.width
        recurrent = torch.baddbmm(self.bias, h, self.r)
        gate = (x[..., : 2 * d] + recurrent[..., : 2 * d]).sigmoid_()
        n = torch.addcmul(x[..., 2 * d :], gate[..., :d], recurrent[..., 2 * d :]).tanh_()
        return [torch.lerp(n, h, gate[..., d:], out=out[0])]

    def planes(self, x: Tensor, before: Parts, after: Parts) -> dict[str, Tensor]:
        (h,), d = before, self.width
        recurrent = torch.baddbmm(self.bias, h, self.r)
        gate = (x[..., : 2 * d] + recurrent[..., : 2 * d]).sigmoid_()
        r, z, recurrent_n = gate[..., :d], gate[..., d:], recurrent[..., 2 * d :]
        n = torch.addcmul(x[..., 2 * d :], r, recurrent_n).tanh_()
        into_n = _tanh_backward(1 - z, n)
        scale = torch.cat([into_n * _sigmoid_backward(recurrent_n, r), _sigmoid_backward(h - n, z), into_n * r], -1)
        return {"z": z, "n": into_n, "scale": scale, "g": recurrent, "u": torch.empty_like(n)}

    def back(self, p: dict[str, Tensor], adjoint: Parts) -> Parts:
        u = p["u"].copy_(adjoint[0])
        torch.mul(self.split(p["scale"]), u[..., None, :], out=self.split(p["g"]))
        return [u * p["z"]]

    def tokens(self, p: dict[str, Tensor]) -> Tensor:
        return torch.cat([p["g"][..., : 2 * self.width], p["u"].mul_(p["n"])], -1)


class _LSTM(_Cell):
    parts, gates = PARTS["lstm"], GATES["lstm"]

    def step(self, x: Tensor, state: Parts, out: Parts) -> Parts:
        (c, h), d = state, self.width
        pre = torch.baddbmm(x, h, self.r)
        gate = pre.sigmoid()
        c = torch.addcmul(gate[..., d : 2 * d] * c, gate[..., :d], pre[..., 2 * d : 3 * d].tanh(), out=out[0])
        return [c, torch.mul(gate[..., 3 * d :], c.tanh(), out=out[1])]

    def planes(self, x: Tensor, before: Parts, after: Parts) -> dict[str, Tensor]:
        (c, h), d = before, self.width
        pre = torch.baddbmm(x, h, self.r)
        g = pre[..., 2 * d : 3 * d].tanh()
        i, f, _, o = self.split(pre.sigmoid_()).unbind(2)
        tc = after[0].tanh()
        scale = torch.cat([_sigmoid_backward(g, i), _sigmoid_backward(c, f), _tanh_backward(i, g)], -1)
        return {
            # not `contiguous`, which copies nothing where a piece has one row and one head: `g` is written over it
            "f": f.clone(memory_format=torch.contiguous_format),
            "scale": scale,
            "c": _tanh_backward(o, tc),
            "o": _sigmoid_backward(tc, o),
            "g": pre,
        }

    def back(self, p: dict[str, Tensor], adjoint: Parts) -> Parts:
        d = self.width
        total = torch.addcmul(adjoint[0], adjoint[1], p["c"])
        three = self.split(p["g"])[..., :3, :]
        torch.mul(p["scale"].unflatten(-1, (3, d)), total[..., None, :], out=three)
        torch.mul(adjoint[1], p["o"], out=p["g"][..., 3 * d :])
        return [total.mul_(p["f"])]


class _SLSTM(_Cell):
    """Exponential input gate, all relative to the running maximum m of the log gates; n = 0 is the empty memory."""

    parts, gates = PARTS["slstm"], GATES["slstm"]
    is_sigmoid = True

    def _log_f(self, f: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid(f) if self.is_sigmoid else f

    def _weights(self, pre: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The new maximum, what is kept, what is written, and where the maximum came from the past."""
        i, f, _, _ = self.split(pre).unbind(2)
        carried = torch.where(n == 0, -torch.inf, self._log_f(f) + m)
        m = torch.maximum(carried, i)
        return m, (carried - m).exp_(), (i - m).exp_(), carried >= i

    def step(self, x: Tensor, state: Parts, out: Parts) -> Parts:
        (c, n, m, h), d = state, self.width
        pre = torch.baddbmm(x, h, self.r)
        top, keep, write, _ = self._weights(pre, n, m)
        c = torch.addcmul(keep * c, write, pre[..., 2 * d : 3 * d].tanh(), out=out[0])
        n = torch.addcmul(write, keep, n, out=out[1])
        return [c, n, out[2].copy_(top), torch.div(pre[..., 3 * d :].sigmoid() * c, n, out=out[3])]

    def planes(self, x: Tensor, before: Parts, after: Parts) -> dict[str, Tensor]:
        (c, n, m, h), (c_new, n_new, _, h_new), d = before, after, self.width
        pre = torch.baddbmm(x, h, self.r)
        _, keep, write, past = self._weights(pre, n, m)
        z, o = pre[..., 2 * d : 3 * d].tanh(), pre[..., 3 * d :].sigmoid()
        # the derivative of log sigmoid
        into_f = torch.sigmoid(-pre[..., d : 2 * d]) if self.is_sigmoid else torch.ones_like(keep)
        return {
            "keep": keep,
            "write": write,
            "past": past.to(keep.dtype),
            "o": _sigmoid_backward(c_new / n_new, o),
            "c_h": o / n_new,
            "n_h": h_new / n_new,
            "c_keep": c * keep,
            "n_keep": n * keep,
            "c_write": z * write,
            "z": _tanh_backward(write, z),
            "f": into_f,
            "g": pre,
        }

    def back(self, p: dict[str, Tensor], adjoint: Parts) -> Parts:
        dc, dn, dm, dh = adjoint
        i, f, z, o = self.split(p["g"]).unbind(2)
        dc, dn = torch.addcmul(dc, dh, p["c_h"]), torch.addcmul(dn, dh, p["n_h"], value=-1)
        carried = (dc * p["c_keep"]).addcmul_(dn, p["n_keep"])
        written = (dc * p["c_write"]).addcmul_(dn, p["write"])
        # the maximum: what is left of its gradient goes to whichever gate it is
        top = dm - carried - written
        past = top * p["past"]
        carried += past
        torch.add(written, top - past, out=i)
        torch.mul(carried, p["f"], out=f)
        torch.mul(dc, p["z"], out=z)
        torch.mul(dh, p["o"], out=o)
        return [dc * p["keep"], dn * p["keep"], carried]


class _SLSTMExp(_SLSTM):
    is_sigmoid = False


_CELLS: dict[str, type[_Cell]] = {"gru": _GRU, "lstm": _LSTM, "slstm": _SLSTM, "slstm_exp": _SLSTMExp}


def _heads(rows_RGHD: Tensor, dtype: torch.dtype) -> Tensor:
    """[r, G, H, D] (or [r, H, D]) as a new [H, r, G * D]."""
    moved = rows_RGHD.movedim(-2, 0)
    return moved.to(dtype, copy=True, memory_format=torch.contiguous_format).flatten(2)


def _span(order: Order, gates: int, units: int) -> int:
    return max(16, SPAN // max(1, order.counts[0] * gates * units))


def forward(
    x_BTGHD: Tensor,
    r_GHDD: Tensor,
    bias_GHD: Tensor | None,
    s0_SPHD: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    cell_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return h [B, T, H, D], the last state [S, P, H, D] and all states [P, R, H * D] as the backward wants them."""
    dtype = state_dtype(x_BTGHD.dtype)
    batch, length, gates, heads, width = x_BTGHD.shape
    bias = r_GHDD.new_zeros(gates, heads, width) if bias_GHD is None else bias_GHD
    cell = _CELLS[cell_name](r_GHDD.to(dtype), bias.to(dtype))
    order = Order(batch, length, reset, cu_seqlens)
    state = _start(s0_SPHD, x_BTGHD, order, cell.parts)
    kept = x_BTGHD.new_empty(cell.parts, batch * length, heads * width, dtype=dtype)
    states = list(kept.view(cell.parts, heads, batch * length, width).unbind(0))
    h_BTHD = x_BTGHD.new_empty(batch, length, heads, width, dtype=dtype)
    span = _span(order, gates, heads * width)
    for begin in range(0, order.steps, span):
        end = min(begin + span, order.steps)
        x = cell.inputs(_heads(order.rows(x_BTGHD, begin, end), dtype))
        base = order.begins[begin]
        for t in range(begin, end):
            at, n = order.begins[t], order.counts[t]
            # the long sequences come first: what has ended stays in the rows behind
            now = [s[:, :n] for s in state]
            if t in order.forgets:
                now = [s.index_fill(1, order.forgets[t], 0) for s in now]
            new = cell.step(x[:, at - base : at - base + n], now, [s[:, at : at + n] for s in states])
            state = (
                new
                if n == state[0].shape[1]
                else [torch.cat([a, s[:, n:]], 1) for a, s in zip(new, state, strict=True)]
            )
        order.put(h_BTHD, states[-1][:, base : order.begins[end]].transpose(0, 1), begin, end)
    final = order.unsort(torch.stack(state, dim=0).permute(2, 0, 1, 3).contiguous())
    return h_BTHD, final, kept


def _start(s0_SPHD: Tensor | None, x: Tensor, order: Order, parts: int) -> Parts:
    """Initial states of the sorted sequences, P parts [H, S, D]."""
    dtype = state_dtype(x.dtype)
    if s0_SPHD is None:
        s0_SPHD = x.new_zeros(len(order.sequences), parts, *x.shape[3:], dtype=dtype)
    return [s.transpose(0, 1).contiguous() for s in order.sort(s0_SPHD.to(dtype)).unbind(1)]


def backward(
    dh_BTHD: Tensor,
    dfinal_SPHD: Tensor,
    x_BTGHD: Tensor,
    r_GHDD: Tensor,
    bias_GHD: Tensor | None,
    s0_SPHD: Tensor | None,
    kept: Tensor,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    cell_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, r, bias [G, H, D] and of the initial states [S, P, H, D]."""
    dtype = kept.dtype
    batch, length, gates, heads, width = x_BTGHD.shape
    bias = r_GHDD.new_zeros(gates, heads, width) if bias_GHD is None else bias_GHD
    cell = _CELLS[cell_name](r_GHDD.to(dtype), bias.to(dtype))
    order = Order(batch, length, reset, cu_seqlens)
    start = _start(s0_SPHD, x_BTGHD, order, cell.parts)
    states = list(kept.view(cell.parts, heads, batch * length, width).unbind(0))
    adjoint = [d.transpose(0, 1).clone() for d in order.sort(dfinal_SPHD.to(dtype)).unbind(1)]
    dx_BTGHD = x_BTGHD.new_empty(x_BTGHD.shape)
    dr, dbias = torch.zeros_like(cell.r), x_BTGHD.new_zeros(heads, gates * width, dtype=dtype)
    span = _span(order, gates, heads * width)
    for begin in range((order.steps - 1) // span * span, -1, -span):
        end = min(begin + span, order.steps)
        base, top = order.begins[begin], order.begins[end]
        x = cell.inputs(_heads(order.rows(x_BTGHD, begin, end), dtype))
        dh = _heads(order.rows(dh_BTHD, begin, end), dtype)
        if begin:
            # a sequence that has ended has no row here, and needs none
            first = [s[:, order.begins[begin - 1] : base] for s in states]
        else:
            first = start
        before = [order.before(s, f, begin, end) for s, f in zip(states, first, strict=True)]
        planes = cell.planes(x, before, [s[:, base:top] for s in states])
        _loop(cell, order, planes, dh, adjoint, begin, end)
        g = planes["g"]
        # the weight gradient is one product over all tokens of the piece
        dr.baddbmm_(before[-1].mT, g)
        dbias += g.sum(1)
        order.put(dx_BTGHD, cell.split(cell.tokens(planes)).movedim(0, 2), begin, end)
    dr_GHDD = dr.unflatten(2, (gates, width)).permute(2, 0, 1, 3).to(r_GHDD.dtype).contiguous()
    dbias_GHD = dbias.unflatten(1, (gates, width)).transpose(0, 1).to(bias.dtype).contiguous()
    dstart = order.unsort(torch.stack(adjoint, dim=0).permute(2, 0, 1, 3).contiguous())
    return dx_BTGHD, dr_GHDD, dbias_GHD, dstart


def _loop(
    cell: _Cell, order: Order, planes: dict[str, Tensor], dh: Tensor, adjoint: Parts, begin: int, end: int
) -> None:
    """The adjoint through steps end .. begin, in place; rows of sequences that have ended stay as they are."""
    base = order.begins[begin]
    for t in range(end - 1, begin - 1, -1):
        at, n = order.begins[t] - base, order.counts[t]
        now = {name: plane[:, at : at + n] for name, plane in planes.items()}
        active = [a[:, :n] for a in adjoint]
        active[-1] += dh[:, at : at + n]
        leaving = cell.back(now, active)
        if len(leaving) == len(active):
            leaving[-1] = torch.baddbmm(leaving[-1], now["g"], cell.r_back)
        else:
            leaving.append(torch.bmm(now["g"], cell.r_back))
        for a, new in zip(active, leaving, strict=True):
            a.copy_(new)
            if t in order.forgets:
                a.index_fill_(1, order.forgets[t], 0)
