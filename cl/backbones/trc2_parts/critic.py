"""Two critics of the loss to come, a fast and a slow one: where they disagree, something new begins.

    V_i(h) = v_i . h / |h| + b_i        i: fast, slow
    delta^i_t = rho_t - level + gamma V_i(h_{t+1}) - V_i(h_t)     rho_t: cross-entropy of token t + 1; level: its mean
    v_i += rate_i mean_t delta^i_t h_t / |h_t|,   b_i += rate_i mean_t delta^i_t
    s_t = max(0, delta^fast_t - delta^slow_t) = max(0, gamma D(h_{t+1}) - D(h_t)),   D = V_fast - V_slow

The reward cancels in s_t, so that surprise is known as soon as token t + 1 has been read, without its loss.

Source: TD(0), Sutton, 1988; two rates as in TRC2 (Khadangi, arXiv 2602.22479), equations our own.
Differences: hidden states of length 1, so that a rate means the same at every width and depth. Rewards are counted from
their running mean: as they are, the values of both critics are dominated by what every token has in common, which the
slow one learns for thousands of steps, and until then nothing would be surprising.

Shape legend: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOMENT_RATE = 0.01
LARGEST = 6.0


class Critic(nn.Module):
    """Values and running moments, all buffers: only `learn` and `note` change them.

    Args:
        width: D.
        rates: of the fast and the slow critic.
        discount: gamma.

    Cost: 2 D multiply-adds a token forward, 4 D more when it learns.
    """

    weight: Tensor
    bias: Tensor
    moments: Tensor
    level: Tensor

    def __init__(self, width: int, rates: Sequence[float] = (1e-2, 1e-3), discount: float = 0.9) -> None:
        super().__init__()
        self.rates, self.discount = tuple(rates), discount
        self.register_buffer("weight", torch.zeros(2, width))
        self.register_buffer("bias", torch.zeros(2))
        # running sums of s, s^2 and 1, each fading at the same rate
        self.register_buffer("moments", torch.zeros(3))
        # the same of rewards, and of 1
        self.register_buffer("level", torch.zeros(2))

    def gap(self, h_BTD: Tensor) -> Tensor:
        """(B, T) fast minus slow value; no gradient."""
        with torch.no_grad():
            difference_D = (self.weight[0] - self.weight[1]).to(h_BTD.dtype)
            return F.normalize(h_BTD, dim=-1) @ difference_D + (self.bias[0] - self.bias[1])

    def surprise(self, gap_B1: Tensor, next_gap_BT: Tensor) -> Tensor:
        """s of tokens whose successor has the gap `next_gap_BT`."""
        return (self.discount * next_gap_BT - gap_B1).clamp(min=0)

    def normalised(self, s: Tensor) -> Tensor:
        """(s - mean) / deviation of what was noted so far, at most `LARGEST`; 0 before anything was surprising.

        Bounded, since the first surprises would stay the largest ever: they come when hardly anything was noted.
        """
        total, square, count = self.moments.to(s.dtype)
        mean = total / count.clamp(min=1e-12)
        deviation = (square / count.clamp(min=1e-12) - mean.square()).clamp(min=0).sqrt()
        return torch.where(deviation > 0, (s - mean) / deviation.clamp(min=1e-12), 0).clamp(max=LARGEST)

    @torch.no_grad()
    def note(self, s: Tensor) -> None:
        """Take the surprises of a batch into the running moments."""
        if s.numel():
            found = torch.stack((s.mean(), s.square().mean(), torch.ones_like(s[0])))
            self.moments.mul_(1 - MOMENT_RATE).add_(MOMENT_RATE * found.to(self.moments.dtype))

    @torch.no_grad()
    def learn(self, h_BTD: Tensor, reward_BT: Tensor, is_known_BT: Tensor, is_last_BT: Tensor) -> None:
        """One step of TD(0) on a batch.

        Args:
            reward_BT: loss of what each token predicts.
            is_known_BT: which tokens have both a reward and a successor to look at, or are the last of their document.
            is_last_BT: tokens after which nothing follows: their value is the reward alone.
        """
        unit_BTD = F.normalize(h_BTD.to(self.weight.dtype), dim=-1)
        count = is_known_BT.sum().clamp(min=1)
        found = torch.stack((reward_BT.masked_fill(~is_known_BT, 0).sum() / count, is_known_BT.any()))
        self.level.lerp_(found.to(self.level.dtype), MOMENT_RATE)
        reward_BT = reward_BT - self.level[0] / self.level[1].clamp(min=1e-12)
        for number, rate in enumerate(self.rates):
            value_BT = unit_BTD @ self.weight[number] + self.bias[number]
            next_BT = F.pad(value_BT[:, 1:], (0, 1)).masked_fill(is_last_BT, 0)
            delta_BT = (reward_BT + self.discount * next_BT - value_BT).masked_fill(~is_known_BT, 0)
            self.weight[number] += rate / count * (delta_BT.unsqueeze(2) * unit_BTD).sum((0, 1))
            self.bias[number] += rate / count * delta_BT.sum()
