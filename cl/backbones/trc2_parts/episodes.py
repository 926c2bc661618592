"""Episodes: what was surprising enough to be stored, and what of it comes to mind.

    read     h -> store -> feedback;   h -> critic -> how surprising the text was two tokens ago
    commit   losses -> critic;   the most surprising states, and what followed them -> store

Reading changes nothing; `commit` alone writes, after the optimizer step, from what reading left behind.

Shape legend: B rows, T tokens, S = T + 2, D width, R rank, C chunks of a row, K candidates.
"""

from __future__ import annotations

from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones._heads import require_width
from cl.backbones.trc2_parts.critic import Critic
from cl.backbones.trc2_parts.events import Trace, candidates, is_current, token_losses
from cl.backbones.trc2_parts.hippocampus import Hippocampus
from cl.core import Batch, UserError

CHUNK = 64


class Episodes(nn.Module):
    """The store and the critic that says what enters it.

    Args:
        width: D.
        rank: R, width of the feedback.
        num_steps: tokens of a row.
        num_slots, top, has_gate: of the store.
        chunk: tokens that give at most one candidate; None takes 64, or the largest divisor of 64 that divides the row.
        min_surprise: normalised surprise above which a state may be stored.
        num_writes: most states stored per commit.
        discount: gamma of the critics.
        has_critic: False takes the loss of a token for its surprise, which only `commit` knows.

    Raises:
        UserError: a value outside its range, or more slots than fit into memory.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        num_steps: int,
        num_slots: int,
        top: int,
        chunk: int | None,
        min_surprise: float,
        num_writes: int,
        discount: float,
        has_gate: bool,
        has_critic: bool,
    ) -> None:
        super().__init__()
        for name, value in {"num_slots": num_slots, "top": top, "num_writes": num_writes}.items():
            require_width(name, value)
        if not isinstance(discount, int | float) or not 0 <= discount < 1:
            raise UserError(f"backbone.discount is {discount!r}; it must be a number from 0 to below 1")
        if not isinstance(min_surprise, int | float):
            raise UserError(f"backbone.min_surprise is {min_surprise!r}; it must be a number")
        if chunk is not None:
            require_width("chunk", chunk)
            if num_steps % chunk:
                raise UserError(f"backbone.chunk is {chunk}; it must divide the {num_steps} tokens of a row")
        self.chunk = gcd(CHUNK, num_steps) if chunk is None else chunk
        self.min_surprise, self.num_writes, self.has_critic = min_surprise, num_writes, has_critic
        self.hippocampus = Hippocampus(width, rank, num_slots, top, has_gate)
        self.critic = Critic(width, discount=discount)

    def forward(
        self, x_BTD: Tensor, gap_B2: Tensor, before_BT: Tensor, is_read: bool
    ) -> tuple[Tensor, Tensor, Tensor, Trace]:
        """What comes to mind, and how surprising the text has been.

        Args:
            x_BTD: states after the early columns.
            gap_B2: what the critics disagreed by at the two tokens before.
            before_BT: tokens of the document before each one.
            is_read: False answers as an empty store does.

        Returns:
            (B, T, R) feedback, (B, T) the normalised surprise known at each token, that of two tokens ago, the gap to
            hand on, and what `commit` needs.
        """
        h_BTD = F.rms_norm(x_BTD, x_BTD.shape[-1:], eps=1e-6)
        feedback_BTR, reading = self.hippocampus(h_BTD, is_read)
        gap_BS = torch.cat((gap_B2, self.critic.gap(h_BTD.detach()).to(gap_B2.dtype)), 1)
        s_BS = self.critic.surprise(gap_BS[:, :-1], gap_BS[:, 1:])
        known_BT = self.critic.normalised(s_BS[:, :-1]).masked_fill(before_BT < 2, 0)
        if not self.has_critic:
            known_BT = torch.zeros_like(known_BT)
        has_next_BT = F.pad(before_BT[:, 1:] > 0, (0, 1))
        s_BT = F.pad(s_BS[:, 2:], (0, 1)).masked_fill(~has_next_BT, 0)
        return feedback_BTR, known_BT, gap_BS[:, -2:], Trace(h_BTD.detach(), s_BT, has_next_BT, reading)

    @torch.no_grad()
    def commit(self, batch: Batch, logits: Tensor, trace: Trace, is_text: bool) -> None:
        """Let the critic learn from the losses of the stream's own rows, and store the most surprising states."""
        rows, reading = is_current(batch), trace.reading
        h_BTD, s_BT, has_next_BT = (each[rows] for each in trace[:3])
        loss_BT, is_known_BT = token_losses(logits[rows].detach(), batch.targets[rows], h_BTD.shape[1])
        if not self.has_critic:
            s_BT = loss_BT
        self.critic.note(s_BT[has_next_BT & is_known_BT])
        surprise_BT = self.critic.normalised(s_BT).masked_fill(~(has_next_BT & is_known_BT), float("-inf"))
        if self.has_critic:
            # the last token of a piece has a successor that was not read; that of a document has none
            is_last_BT = F.pad(~has_next_BT[:, :-1], (0, 1), value=not is_text)
            self.critic.learn(h_BTD, loss_BT, is_known_BT & (has_next_BT | is_last_BT), is_last_BT)
        self.hippocampus.tick(reading.share[rows].sum(0))
        row_K, token_K, found_K = candidates(surprise_BT, self.chunk, self.num_writes, self.min_surprise)
        assert reading.own is not None, "read in evaluation, where nothing is kept to be written"
        self.hippocampus.write(
            h_BTD[row_K, token_K],
            h_BTD[row_K, token_K + 1],
            found_K,
            batch.experience_id[rows][row_K],
            reading.own[rows][row_K, token_K],
            reading.stored,
            reading.clock,
        )
