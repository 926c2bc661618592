"""What a call of recurrent attention works on, and the block behind the attention: its steps and their gradients.

Legend: B batch, T time, t tokens of a chunk, H heads, Z = B * H, K/V key/value width, E = K + V, D model width, M inner
width, N positions kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu

from kernels.common.checks import state_dtype
from kernels.recurrent_attention.reference import EPSILON
from kernels.recurrent_attention.tiles import Scores


def _norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """x over the root of its mean square, and one over that root."""
    rate = x.square().mean(-1, keepdim=True).add_(EPSILON).rsqrt_()
    return x * rate, rate


def _norm_back(dz: Tensor, z: Tensor, rate: Tensor) -> Tensor:
    return torch.addcmul(dz, z, (dz * z).mean(-1, keepdim=True), value=-1).mul_(rate)


class Call:
    """The inputs in the arithmetic dtype: tokens per head, queries with the scale in them, weights as matrices."""

    def __init__(
        self,
        tokens: Sequence[Tensor],
        weights: Sequence[Tensor],
        kept_BHNE: Tensor,
        first_BT: Tensor | None,
        slopes: Tensor | None,
        scale: float,
    ):
        dtype = state_dtype(tokens[0].dtype)
        self.batch, self.length, self.heads, self.width = tokens[1].shape
        self.x = tokens[0].to(dtype)
        q, self.own_k, self.own_v = (t.to(dtype).transpose(1, 2).flatten(0, 1) for t in tokens[1:])
        self.q = q * scale
        self.own_score = (self.q * self.own_k).sum(-1, keepdim=True)
        w_out, w_k, w_v, *inner = (w.to(dtype) for w in weights)
        # up and down, or nothing
        self.inner = inner
        self.out, self.kv = w_out.flatten(0, 1), torch.cat([w_k, w_v], dim=-1).flatten(1)
        self.kept = kept_BHNE.to(dtype).flatten(0, 1)
        if first_BT is not None and not bool(first_BT.any()):
            first_BT = None
        slopes_Z = None if slopes is None else slopes.to(dtype).repeat(self.batch)
        self.scores = Scores(self.heads, slopes_Z, first_BT, self.kept.shape[1])

    def split(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        return kv[..., : self.width], kv[..., self.width :]

    def by_head(self, x_ZtX: Tensor) -> Tensor:
        """[B, H, t, X]."""
        return x_ZtX.view(self.batch, self.heads, *x_ZtX.shape[1:])

    def joined(self, x_ZtX: Tensor) -> Tensor:
        """Heads beside each other, [B, t, H * X]."""
        return self.by_head(x_ZtX).transpose(1, 2).flatten(2)

    def step(self, x_BD: Tensor, a_ZV: Tensor) -> tuple[Tensor, Tensor]:
        """Output of a token from its attention, and the key and value [Z, E] it leaves."""
        y = torch.addmm(x_BD, a_ZV.reshape(self.batch, -1), self.out)
        if self.inner:
            up, down = self.inner
            y = torch.addmm(y, gelu(_norm(y)[0] @ up), down)
        return y, (_norm(y)[0] @ self.kv).view(len(a_ZV), -1)


class Piece:
    """A chunk in the backward: what needs only saved numbers, for its tokens together; then `back`, token by token."""

    def __init__(self, call: Call, now: slice, y_BTD: Tensor, kv_ZTE: Tensor, a_ZTV: Tensor):
        self.call, self.a, self.q = call, a_ZTV[:, now], call.q[:, now]
        self.keys, self.values = call.split(kv_ZTE[:, now])
        self.a_joined = call.joined(self.a)
        self.z, self.z_rate = _norm(y_BTD[:, now])
        if call.inner:
            self.n, self.n_rate = _norm(call.x[:, now] + self.a_joined @ call.out)
            self.h = self.n @ call.inner[0]
            self.dh = torch.empty_like(self.h)

    def back(self, dy: Tensor, dkv: Tensor, p_ZNQ: Tensor, da: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x [B, t, D] and of the chunk's scores [Z, keys, queries]; completes dy, dkv, da and along.

        Args:
            dy, dkv: gradients from outside and from later chunks. p_ZNQ: weights of the chunk's keys for its queries.
            da, along: where to write the gradient of the attention, and its product with the attention.
        """
        dx, ds, length = torch.empty_like(dy), torch.zeros_like(p_ZNQ), dy.shape[1]
        dk, dv = self.call.split(dkv)
        for i in range(length - 1, -1, -1):
            one, later = slice(i, i + 1), slice(i + 1, length)
            if i + 1 < length:
                weight = p_ZNQ[:, one, later]
                slope = torch.bmm(self.values[:, one], da[:, later].mT).sub_(along[:, later].mT).mul_(weight)
                ds[:, one, later] = slope
                dk[:, one] += torch.bmm(slope, self.q[:, later])
                dv[:, one] += torch.bmm(weight, da[:, later])
            dx[:, i], dy[:, i] = self._through_block(i, dy[:, i], dkv[:, i])
            da[:, i] = (dx[:, i] @ self.call.out.mT).view(len(da), -1)
            along[:, i] = (da[:, i] * self.a[:, i]).sum(-1, keepdim=True)
        return dx, ds

    def _through_block(self, i: int, dy_BD: Tensor, dkv_ZE: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the sum before the inner layer and, its key and value counted, of the output."""
        call = self.call
        dz = dkv_ZE.reshape(call.batch, -1) @ call.kv.mT
        dy_BD = dy_BD + _norm_back(dz, self.z[:, i], self.z_rate[:, i])
        if not call.inner:
            return dy_BD, dy_BD
        up, down = call.inner
        self.dh[:, i] = torch.ops.aten.gelu_backward(dy_BD @ down.mT, self.h[:, i])
        return dy_BD + _norm_back(self.dh[:, i] @ up.mT, self.n[:, i], self.n_rate[:, i]), dy_BD

    def weight_gradients(self, dx: Tensor, dy: Tensor, dkv: Tensor) -> list[Tensor]:
        """Of the matrices out, kv and, with an inner layer, up and down: products over all tokens of the chunk."""
        pairs = [(self.a_joined, dx), (self.z, self.call.joined(dkv))]
        if self.call.inner:
            pairs += [(self.n, self.dh), (gelu(self.h), dy)]
        return [x.flatten(0, 1).mT @ d.flatten(0, 1) for x, d in pairs]
