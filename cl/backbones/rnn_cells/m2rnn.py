"""M2RNN: a nonlinear recurrence whose state is a matrix per head.

Shape legend: B rows, T tokens, D width, H heads, K key width, V value width of a head.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from cl.backbones._cells import wide
from cl.backbones._heads import require_width
from cl.backbones.rnn_cells._base import RnnCell
from cl.core import UserError
from kernels.sequential_rnn import m2rnn


class M2rnn(RnnCell):
    """Z_t = tanh(S_{t-1} W + k_t v_t^T), S_t = f_t S_{t-1} + (1 - f_t) Z_t, o_t = S_t^T q_t, f = sigmoid(w_f x + b_f).

    Args:
        num_heads: H, each with a transition W of its own.
        key_width: K; None takes V = units / H.
        forget_bias: b_f at the start; above 0 keeps more.
        clip: bound on the elements of the gradient of S_t on its way back; None leaves it alone.

    Raises:
        UserError: units are no multiple of the heads, or a value outside its range.

    Cost: 2 D H K + D H V + H K V (V + 4) multiply-adds a token, T steps in a row; state H K V.
    Source: M2RNN (Mishra et al., 2026), its recurrence as in the code of open-lm-engine. Differences: W starts as the
        identity, f is a sigmoid of the token; no scale of q.
    """

    def __init__(
        self,
        width: int,
        units: int,
        num_heads: int = 4,
        key_width: int | None = None,
        forget_bias: float = 0.0,
        clip: float | None = None,
    ) -> None:
        super().__init__()
        require_width("num_heads", num_heads)
        if clip is not None and not clip > 0:
            raise UserError(f"clip of m2rnn is {clip!r}; it must be a number above 0, or none")
        if units % num_heads:
            raise UserError(f"m2rnn has {units} units for {num_heads} heads; they must be a multiple of the heads")
        values = units // num_heads
        keys = values if key_width is None else key_width
        require_width("key_width", keys)
        self.state_shape, self.clip = (num_heads, keys, values), clip
        self.query, self.key = (nn.Linear(width, num_heads * keys, bias=False) for _ in range(2))
        self.value, self.forget = nn.Linear(width, units, bias=False), nn.Linear(width, num_heads, bias=False)
        self.forget_bias = nn.Parameter(torch.full((num_heads,), float(forget_bias)))
        self.transition = nn.Parameter(torch.eye(values).repeat(num_heads, 1, 1))

    def drive(self, x: Tensor) -> Tensor:
        forget = wide(self.forget(x)) + self.forget_bias
        parts = [*(wide(p(x)) for p in (self.query, self.key, self.value)), forget.sigmoid()]
        return torch.cat([part.unflatten(-1, (self.state_shape[0], -1)) for part in parts], -1)

    def _parts(self, driven: Tensor) -> tuple[Tensor, ...]:
        _, keys, values = self.state_shape
        return driven.split((keys, keys, values, 1), -1)

    def advance(self, driven_B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, f = self._parts(driven_B)
        z = torch.tanh(h @ wide(self.transition) + k.unsqueeze(-1) * v.unsqueeze(-2))
        h = f.unsqueeze(-1) * h + (1 - f.unsqueeze(-1)) * z
        if self.clip is not None and h.requires_grad:
            h.register_hook(partial(torch.clamp, min=-self.clip, max=self.clip))
        return (q.unsqueeze(-2) @ h).flatten(1), h

    def run(self, driven_BT: Tensor, h0: Tensor, reset_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v, f = (part.contiguous() for part in self._parts(driven_BT))
        how = {"initial_state": h0, "reset": reset_BT, "clip": self.clip}
        o, last = m2rnn(q, k, v, f.squeeze(-1), wide(self.transition), **how)
        return o.flatten(2), last
