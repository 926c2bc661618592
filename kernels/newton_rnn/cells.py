"""The cells that Newton solves: one step, its derivative along given directions, and the adjoint of a step.

The recurrent map is a diagonal or a matrix per head; everything else is the same code.

Legend: B batch, n chunks side by side, U units ([N] or [H, D]), K directions; a state is a list of P parts [B, n, U].
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

Parts = list[Tensor]
# where to write the gradients of the three gates
Out = Sequence[Tensor | None]
NOWHERE: Out = (None, None, None)


def rough_tanh(x: Tensor) -> Tensor:
    """tanh to 2e-7 absolute; several times faster than torch's on a CPU. For first guesses."""
    return torch.mul(x, 2).sigmoid_().mul_(2).sub_(1)


_sigmoid_backward = torch.ops.aten.sigmoid_backward
_tanh_backward = torch.ops.aten.tanh_backward


class Map(Protocol):
    """The recurrent weights of all gates."""

    def add(self, x: Tensor, g: int, v: Tensor) -> Tensor:
        """x + v R_g, a new tensor."""

    def apply(self, g: int, v: Tensor) -> Tensor:
        """v R_g."""

    def back(self, g: int, d: Tensor) -> Tensor:
        """d R_g^T."""

    def gradient(self, v: Tensor, d: Tensor) -> Tensor:
        """Gradient of R_g from its inputs v and the gradient d of its outputs, summed over the leading axes."""

    def directions(self, parts: int, like: Tensor) -> Parts:
        """Unit tangents of a state: per part [K, B, n, U]."""

    def move(self, tangents: Parts, delta: Parts) -> Parts:
        """The tangent map applied to a step `delta` of the state, per part."""


class Diagonal:
    """One weight per gate and unit: r [G, N]."""

    def __init__(self, r_GN: Tensor):
        self.r = r_GN.unbind(0)

    def add(self, x: Tensor, g: int, v: Tensor) -> Tensor:
        return torch.addcmul(x, v, self.r[g])

    def apply(self, g: int, v: Tensor) -> Tensor:
        return v * self.r[g]

    back = apply

    def gradient(self, v: Tensor, d: Tensor) -> Tensor:
        return (v * d).flatten(0, -2).sum(0)

    def directions(self, parts: int, like: Tensor) -> Parts:
        shape = (1, *like.shape)
        one, zero = like.new_ones(shape), like.new_zeros(shape)
        return [torch.cat([one if k == p else zero for k in range(parts)]) for p in range(parts)]

    def move(self, tangents: Parts, delta: Parts) -> Parts:
        moved = []
        for tangent in tangents:
            total = tangent[0] * delta[0]
            for k in range(1, len(delta)):
                total.addcmul_(tangent[k], delta[k])
            moved.append(total)
        return moved


class Block:
    """One matrix per gate and head: r [G, H, D, D], a row vector times it."""

    def __init__(self, r_GHDD: Tensor):
        self.r = r_GHDD.unbind(0)
        self.transposed = r_GHDD.mT.contiguous().unbind(0)

    @staticmethod
    def _times(v: Tensor, matrix_HDD: Tensor) -> Tensor:
        heads = v.flatten(0, -3).transpose(0, 1)
        return torch.bmm(heads, matrix_HDD).transpose(0, 1).reshape(v.shape)

    def add(self, x: Tensor, g: int, v: Tensor) -> Tensor:
        return self._times(v, self.r[g]).add_(x)

    def apply(self, g: int, v: Tensor) -> Tensor:
        return self._times(v, self.r[g])

    def back(self, g: int, d: Tensor) -> Tensor:
        return self._times(d, self.transposed[g])

    def gradient(self, v: Tensor, d: Tensor) -> Tensor:
        return torch.bmm(v.flatten(0, -3).permute(1, 2, 0), d.flatten(0, -3).transpose(0, 1))

    def directions(self, parts: int, like: Tensor) -> Parts:
        width = like.shape[-1]
        eye = torch.eye(width, dtype=like.dtype, device=like.device)
        unit = eye.view(width, *[1] * (like.dim() - 1), width).expand(width, *like.shape)
        return [torch.cat([unit if k == p else torch.zeros_like(unit) for k in range(parts)]) for p in range(parts)]

    def move(self, tangents: Parts, delta: Parts) -> Parts:
        steps = torch.cat([d.movedim(-1, 0) for d in delta])[..., None]
        return [(tangent * steps).sum(0) for tangent in tangents]


class GRU:
    """z, r = sigmoid; c = tanh(x_c + (r h) R_c); h' = h + z (c - h). Gates in the order z, r, c; one part, h."""

    parts = 1

    def __init__(self, recur: Map, peephole: Tensor | None = None):
        self.recur = recur

    def _gates(self, x: Parts, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.recur.add(x[0], 0, h).sigmoid_()
        r = self.recur.add(x[1], 1, h).sigmoid_()
        return z, r, r * h

    def guess(self, x: Parts, state: Parts) -> Parts:
        """The next state, roughly."""
        z, _, reset_h = self._gates(x, state[0])
        return [torch.lerp(state[0], rough_tanh(self.recur.add(x[2], 2, reset_h)), z)]

    def step(self, x: Parts, state: Parts, out: Parts) -> Parts:
        """The next state; `out` takes h and the candidate, a tanh that the backward then need not do again."""
        z, _, reset_h = self._gates(x, state[0])
        c = torch.tanh(self.recur.add(x[2], 2, reset_h), out=out[1])
        return [torch.lerp(state[0], c, z, out=out[0])]

    def push(self, x: Parts, state: Parts, tangents: Parts, out: Parts) -> tuple[Parts, Parts]:
        """The next state and the tangents carried over the step."""
        (h,), (p,) = state, tangents
        z, r, reset_h = self._gates(x, h)
        c = torch.tanh(self.recur.add(x[2], 2, reset_h), out=out[1])
        dz = _sigmoid_backward(self.recur.apply(0, p), z)
        dr = _sigmoid_backward(self.recur.apply(1, p), r)
        dc = _tanh_backward(self.recur.apply(2, (r * p).addcmul_(h, dr)), c)
        pushed = torch.lerp(p, dc, z).addcmul_(c - h, dz)
        return [torch.lerp(h, c, z, out=out[0])], [pushed]

    def planes(self, x: Parts, before: Parts, after: Parts) -> dict[str, Tensor]:
        """Everything the adjoint of a step needs, for all tokens at once; `after` as `step` wrote it."""
        (h,), c = before, after[1]
        z, r, reset_h = self._gates(x, h)
        return {
            "keep": 1 - z,
            "z": _sigmoid_backward(c - h, z),
            "c": _tanh_backward(z, c),
            "r": _sigmoid_backward(h, r),
            "gate": r,
            "reset_h": reset_h,
            "h": h,
        }

    def matrix(self, p: dict[str, Tensor]) -> list[Tensor]:
        """Transposed Jacobian of a step (diagonal weights only)."""
        through = torch.addcmul(p["gate"], p["r"], self.recur.apply(1, torch.ones_like(p["r"][:1, :1])))
        through = self.recur.apply(2, through)
        jacobian = torch.addcmul(p["keep"], p["c"], through)
        return [jacobian.add_(self.recur.apply(0, p["z"]))]

    def factors(self, p: dict[str, Tensor]) -> list[Tensor]:
        """Of the derivative of a step, all but the matrices: five planes (`triton_block_adjoint`)."""
        return [p["keep"], p["z"], p["c"], p["gate"], p["r"]]

    def reached(self, p: dict[str, Tensor], adjoint: Parts) -> Parts:
        """The adjoint of the state as `token` and `back` take it: as it is."""
        return adjoint

    def token(self, p: dict[str, Tensor], adjoint: Parts, out: Out = NOWHERE) -> Parts:
        """Gradients of the three pre-activations from what reached the state, into `out` where given."""
        (u,) = adjoint
        dc = torch.mul(u, p["c"], out=out[2])
        return [torch.mul(u, p["z"], out=out[0]), torch.mul(self.recur.back(2, dc), p["r"], out=out[1]), dc]

    def back(self, p: dict[str, Tensor], adjoint: Parts, dx: Parts) -> Parts:
        """Adjoint of the state before the step."""
        dz, dr, dc = dx
        u = adjoint[0] * p["keep"]
        u += self.recur.back(0, dz)
        u += self.recur.back(1, dr)
        return [u.addcmul_(self.recur.back(2, dc), p["gate"])]

    def weights(self, p: dict[str, Tensor], dx: Parts) -> tuple[list[Tensor], Tensor | None]:
        """Gradients of the recurrent weights (and of the peepholes)."""
        inputs = (p["h"], p["h"], p["reset_h"])
        return [self.recur.gradient(v, d) for v, d in zip(inputs, dx, strict=True)], None


class LSTM:
    """f, o = sigmoid, coupled input gate: c' = f c + (1 - f) tanh(z), h' = o tanh(c'). Gates f, o, z; parts c, h."""

    parts = 2

    def __init__(self, recur: Map, peephole: Tensor | None = None):
        self.recur = recur
        self.peephole = None if peephole is None else peephole.unbind(0)

    def _peep(self, x: Tensor, which: int, c: Tensor) -> Tensor:
        return x if self.peephole is None else x.addcmul_(c, self.peephole[which])

    def _output(self, x: Parts, h: Tensor, after: Tensor) -> Tensor:
        return self._peep(self.recur.add(x[1], 1, h), 1, after).sigmoid_()

    def _forget(self, x: Parts, c: Tensor, h: Tensor) -> Tensor:
        return self._peep(self.recur.add(x[0], 0, h), 0, c).sigmoid_()

    def guess(self, x: Parts, state: Parts) -> Parts:
        """The next state, roughly."""
        c, h = state
        after = torch.lerp(rough_tanh(self.recur.add(x[2], 2, h)), c, self._forget(x, c, h))
        return [after, self._output(x, h, after).mul_(rough_tanh(after))]

    def step(self, x: Parts, state: Parts, out: Parts) -> Parts:
        """The next state, written to `out`: c and h."""
        c, h = state
        f, z = self._forget(x, c, h), self.recur.add(x[2], 2, h).tanh_()
        after = torch.lerp(z, c, f, out=out[0])
        return [after, torch.mul(self._output(x, h, after), after.tanh(), out=out[1])]

    def push(self, x: Parts, state: Parts, tangents: Parts, out: Parts) -> tuple[Parts, Parts]:
        """The next state and the tangents carried over the step."""
        c, h = state
        pc, ph = tangents
        f, z = self._forget(x, c, h), self.recur.add(x[2], 2, h).tanh_()
        after = torch.lerp(z, c, f, out=out[0])
        o, th = self._output(x, h, after), after.tanh()
        df = _sigmoid_backward(self._peep(self.recur.apply(0, ph), 0, pc), f)
        dz = _tanh_backward(self.recur.apply(2, ph), z)
        dc = torch.lerp(dz, pc, f).addcmul_(c - z, df)
        do = _sigmoid_backward(self._peep(self.recur.apply(1, ph), 1, dc), o)
        dh = (th * do).addcmul_(_tanh_backward(o, th), dc)
        return [after, torch.mul(o, th, out=out[1])], [dc, dh]

    def planes(self, x: Parts, before: Parts, after: Parts) -> dict[str, Tensor]:
        """Everything the adjoint of a step needs, for all tokens at once; `after` as `step` wrote it."""
        c, h = before
        f, z, o = self._forget(x, c, h), self.recur.add(x[2], 2, h).tanh_(), self._output(x, h, after[0])
        # tanh(c') from h' = o tanh(c'): a division costs a fifth of a tanh
        th = after[1] / o.clamp(min=torch.finfo(o.dtype).tiny)
        through_o = _sigmoid_backward(th, o)
        into_c = self._peep(_tanh_backward(o, th), 1, through_o)
        input_gate = 1 - f
        return {
            "f": f,
            "o": through_o,
            "into": into_c,
            "forget": _sigmoid_backward(c - z, f),
            "z": _tanh_backward(input_gate, z),
            "c": c,
            "h": h,
            "after": after[0],
        }

    def matrix(self, p: dict[str, Tensor]) -> list[Tensor]:
        """Transposed Jacobian M of a step as four planes f, i, x, o; diagonal weights only, uses the plane "f" up.

        M (c, h) = (f t, x t + o h) with t = c + i h: all that reaches the new c, by itself and through the output.
        """
        cross = self.recur.apply(0, p["forget"]).add_(self.recur.apply(2, p["z"]))
        return [self._peep(p["f"], 0, p["forget"]), p["into"], cross, self.recur.apply(1, p["o"])]

    def factors(self, p: dict[str, Tensor]) -> list[Tensor]:
        """Of the derivative of a step, all but the matrices: five planes; uses the plane "f" up."""
        return [self._peep(p["f"], 0, p["forget"]), p["forget"], p["z"], p["into"], p["o"]]

    def reached(self, p: dict[str, Tensor], adjoint: Parts) -> Parts:
        """The adjoint of h, and before it all that reaches c, by itself and through the output."""
        return [torch.addcmul(adjoint[0], adjoint[1], p["into"]), adjoint[1]]

    def token(self, p: dict[str, Tensor], adjoint: Parts, out: Out = NOWHERE) -> Parts:
        """Gradients of the three pre-activations from what reached the state, into `out` where given."""
        factors = ((adjoint[0], "forget"), (adjoint[1], "o"), (adjoint[0], "z"))
        return [torch.mul(u, p[name], out=to) for (u, name), to in zip(factors, out, strict=True)]

    def back(self, p: dict[str, Tensor], adjoint: Parts, dx: Parts) -> Parts:
        """Adjoint of the state before the step."""
        dc = self._peep(adjoint[0] * p["f"], 0, dx[0])
        dh = self.recur.back(0, dx[0])
        dh += self.recur.back(1, dx[1])
        dh += self.recur.back(2, dx[2])
        return [dc, dh]

    def weights(self, p: dict[str, Tensor], dx: Parts) -> tuple[list[Tensor], Tensor | None]:
        """Gradients of the recurrent weights and of the peepholes."""
        grads = [self.recur.gradient(p["h"], d) for d in dx]
        if self.peephole is None:
            return grads, None
        dims = (0, 1)
        return grads, torch.stack([(p["c"] * dx[0]).sum(dims), (p["after"] * dx[1]).sum(dims)])


def cell_of(name: str, r: Tensor, peephole: Tensor | None, *, is_diagonal: bool) -> GRU | LSTM:
    """The cell with its weights in the arithmetic dtype."""
    recur: Map = Diagonal(r) if is_diagonal else Block(r)
    return GRU(recur) if name == "gru" else LSTM(recur, peephole)
