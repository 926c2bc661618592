"""The cells of `chunked`: a step, what the backward computes of all steps at once, and a step of the adjoint.

In a loop over time the calls cost more than their arithmetic: parts of the state are one tensor, a step takes its rows
out of nothing but lists, and results are written to where they stay.

Legend: H heads, R rows (tokens in the order of `Order`), n of them in one step, G gates, P parts of the state, D width.
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves Tensor.split without types

import torch
from torch import Tensor

from kernels.sequential_rnn.reference import GATES, PARTS

Planes = dict[str, Tensor]
"""Tensors [..., rows, D] of many steps, or of one."""
_sigmoid_backward = torch.ops.aten.sigmoid_backward
_tanh_backward = torch.ops.aten.tanh_backward


class Cell:
    """One cell; pre-activations and their gradients `g` are [H, rows, G * D], states and adjoints [P, H, rows, D]."""

    parts: int
    gates: int

    def __init__(self, r_GHDD: Tensor, bias_GHD: Tensor):
        self.width = r_GHDD.shape[-1]
        # [H, D, G * D], and back
        self.r = r_GHDD.permute(1, 2, 0, 3).flatten(2).contiguous()
        self.r_back = self.r.mT.contiguous()
        self.bias = bias_GHD.transpose(0, 1).flatten(1)[:, None]

    def by_gate(self, x: Tensor) -> Tensor:
        """[H, rows, G * D] as [G, H, rows, D]."""
        return x.view(*x.shape[:2], -1, self.width).permute(2, 0, 1, 3)

    def inputs(self, x: Tensor) -> Tensor:
        """What can be added to the inputs once and for all."""
        return x.add_(self.bias)

    def opened(self, state: Tensor) -> Tensor:
        """A state to go on from, given from outside or forgotten."""
        return state

    def step(self, x: Tensor, state: Tensor, out: Tensor) -> None:
        """Write the state after one step."""
        raise NotImplementedError

    def planes(self, x: Tensor, before: Tensor, after: Tensor) -> Planes:
        """Coefficients of the adjoint of every row; `g` receives the gradient of the recurrent pre-activations."""
        raise NotImplementedError

    def back(self, p: Planes, adjoint: Tensor) -> None:
        """Write `g` of one step, and the adjoint of the state before it, in place."""
        raise NotImplementedError

    def tokens(self, p: Planes) -> Tensor:
        """Gradient of the inputs [H, rows, G * D] after the loop."""
        return p["g"]


class Gru(Cell):
    """Gated recurrent unit; the reset gate acts on the recurrent product."""

    parts, gates = PARTS["gru"], GATES["gru"]

    def inputs(self, x: Tensor) -> Tensor:
        return x

    def step(self, x: Tensor, state: Tensor, out: Tensor) -> None:
        h, d = state[0], self.width
        recurrent = torch.baddbmm(self.bias, h, self.r)
        r, z = (x[..., : 2 * d] + recurrent[..., : 2 * d]).sigmoid_().split(d, -1)
        n = torch.addcmul(x[..., 2 * d :], r, recurrent[..., 2 * d :]).tanh_()
        torch.lerp(n, h, z, out=out[0])

    def planes(self, x: Tensor, before: Tensor, after: Tensor) -> Planes:
        h, d = before[0], self.width
        recurrent = torch.baddbmm(self.bias, h, self.r)
        r, z = (x[..., : 2 * d] + recurrent[..., : 2 * d]).sigmoid_().split(d, -1)
        recurrent_n = recurrent[..., 2 * d :]
        n = torch.addcmul(x[..., 2 * d :], r, recurrent_n).tanh_()
        into_n = _tanh_backward(1 - z, n)
        scale = torch.stack([into_n * _sigmoid_backward(recurrent_n, r), _sigmoid_backward(h - n, z), into_n * r])
        # `u` keeps the adjoint, which the gradient of the inputs needs
        return {
            "z": z,
            "n": into_n,
            "scale": scale,
            "g": recurrent,
            "gates": self.by_gate(recurrent),
            "u": torch.empty_like(n),
        }

    def back(self, p: Planes, adjoint: Tensor) -> None:
        u = p["u"].copy_(adjoint[0])
        torch.mul(p["scale"], u, out=p["gates"])
        torch.baddbmm(u * p["z"], p["g"], self.r_back, out=adjoint[0])

    def tokens(self, p: Planes) -> Tensor:
        return torch.cat([p["g"][..., : 2 * self.width], p["u"].mul_(p["n"])], -1)


class Lstm(Cell):
    """Long short-term memory; gates i, f, g, o."""

    parts, gates = PARTS["lstm"], GATES["lstm"]

    def step(self, x: Tensor, state: Tensor, out: Tensor) -> None:
        c, h = state.unbind(0)
        c_new, h_new = out.unbind(0)
        pre = torch.baddbmm(x, h, self.r)
        i, f, _, o = pre.sigmoid().split(self.width, -1)
        g = pre[..., 2 * self.width : 3 * self.width].tanh()
        torch.addcmul(f * c, i, g, out=c_new)
        torch.mul(o, c_new.tanh(), out=h_new)

    def planes(self, x: Tensor, before: Tensor, after: Tensor) -> Planes:
        c, h = before.unbind(0)
        pre = torch.baddbmm(x, h, self.r)
        g = pre[..., 2 * self.width : 3 * self.width].tanh()
        i, f, _, o = pre.sigmoid_().split(self.width, -1)
        tc = after[0].tanh()
        gates = self.by_gate(pre)
        return {
            # not `contiguous`, which copies nothing where a piece has one row and one head: `g` is written over it
            "f": f.clone(memory_format=torch.contiguous_format),
            "scale": torch.stack([_sigmoid_backward(g, i), _sigmoid_backward(c, f), _tanh_backward(i, g)]),
            "c": _tanh_backward(o, tc),
            "o": _sigmoid_backward(tc, o),
            "g": pre,
            "to_ifg": gates[:3],
            "to_o": gates[3],
        }

    def back(self, p: Planes, adjoint: Tensor) -> None:
        dc, dh = adjoint.unbind(0)
        dc.addcmul_(dh, p["c"])
        torch.mul(p["scale"], dc, out=p["to_ifg"])
        torch.mul(dh, p["o"], out=p["to_o"])
        dc.mul_(p["f"])
        torch.bmm(p["g"], self.r_back, out=dh)


class Slstm(Cell):
    """Exponential input gate, all relative to the running maximum m of the log gates; n = 0 is the empty memory."""

    parts, gates = PARTS["slstm"], GATES["slstm"]
    is_sigmoid = True

    def _log_f(self, f: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid(f) if self.is_sigmoid else f

    def opened(self, state: Tensor) -> Tensor:
        c, n, m, h = state
        # nothing is carried from an empty memory; no step leaves one
        return torch.stack([c, n, torch.where(n == 0, -torch.inf, m), h])

    def step(self, x: Tensor, state: Tensor, out: Tensor) -> None:
        c, n, m, h = state.unbind(0)
        c_new, n_new, top, h_new = out.unbind(0)
        i, f, z, o = torch.baddbmm(x, h, self.r).split(self.width, -1)
        carried = self._log_f(f) + m
        torch.maximum(carried, i, out=top)
        keep, write = carried.sub_(top).exp_(), (i - top).exp_()
        torch.addcmul(keep * c, write, z.tanh(), out=c_new)
        torch.addcmul(write, keep, n, out=n_new)
        torch.div(o.sigmoid() * c_new, n_new, out=h_new)

    def planes(self, x: Tensor, before: Tensor, after: Tensor) -> Planes:
        (c, n, m, h), (c_new, n_new, top, h_new) = before, after
        pre = torch.baddbmm(x, h, self.r)
        i, f, z, o = pre.split(self.width, -1)
        carried = torch.where(n == 0, -torch.inf, self._log_f(f) + m)
        keep, write, is_carried = (carried - top).exp_(), (i - top).exp_(), carried >= i
        z, o = z.tanh(), o.sigmoid()
        # the derivative of log sigmoid
        into_f = torch.sigmoid(-f) if self.is_sigmoid else torch.ones_like(keep)
        to_i, to_f, to_z, to_o = self.by_gate(pre)
        return {
            "h": torch.stack([o / n_new, -h_new / n_new]),
            # how the adjoints of c and n reach what was carried and what was written
            "c": torch.stack([c * keep, z * write]),
            "n": torch.stack([n * keep, write]),
            "carried": is_carried.to(keep.dtype),
            "written": is_carried.logical_not().to(keep.dtype),
            "keep": keep,
            "f": into_f,
            "z": _tanh_backward(write, z),
            "o": _sigmoid_backward(c_new / n_new, o),
            "g": pre,
            "to_i": to_i,
            "to_f": to_f,
            "to_z": to_z,
            "to_o": to_o,
        }

    def back(self, p: Planes, adjoint: Tensor) -> None:
        memory = adjoint[:2]
        dc, dn, dm, dh = adjoint.unbind(0)
        memory.addcmul_(dh, p["h"])
        carried, written = torch.addcmul(p["c"] * dc, p["n"], dn).unbind(0)
        # the maximum: what is left of its gradient goes to whichever gate it is
        top = dm.sub_(carried).sub_(written)
        torch.addcmul(written, top, p["written"], out=p["to_i"])
        torch.addcmul(carried, top, p["carried"], out=dm)
        torch.mul(dm, p["f"], out=p["to_f"])
        torch.mul(dc, p["z"], out=p["to_z"])
        torch.mul(dh, p["o"], out=p["to_o"])
        memory.mul_(p["keep"])
        torch.bmm(p["g"], self.r_back, out=dh)


class SlstmExp(Slstm):
    """sLSTM with an exponential forget gate."""

    is_sigmoid = False


CELLS: dict[str, type[Cell]] = {"gru": Gru, "lstm": Lstm, "slstm": Slstm, "slstm_exp": SlstmExp}
