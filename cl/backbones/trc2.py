"""TRC2: columns of attention and experts, a thalamic router between them, and a store of surprising events.

    H = E[x]
    for each column l:  q = W_q U + W_s s^l;  H = H + attention(q, W_k U, W_v U);  H = H + experts(norm H)
    s^{l+1} = thalamus_l(H) + [l >= injection] feedback(store, H^injection)         s^1 = 0
    after the optimizer step: the critic learns from the losses, and the most surprising states enter the store

W_s starts at zero and the store empty, so that the first step is that of the mixture of experts, bit for bit
(`backbone=gpt` with the same widths and `mlp=moe(shared=1)`). Rows that are replayed take the plain road: no side input
reaches them, and nothing of them is stored. A forward changes nothing; `commit` alone writes, and only in training.

Source: Khadangi, "Efficient Continual Learning in Language Models via Thalamically Routed Cortical Columns", arXiv
2602.22479, v2 to v5. What is published there of the method is the list of parts and how they are wired; equations and
sizes are our own. Differences: the chunk-routed network of v1, which goes by the same name, lets tokens see the future
of their chunk, and is another model, of which `backbone=trc2_v1` is a causal form. Replay and its controller are a
strategy (`strategy=consolidation`), so that every backbone can have them.

Shape legend: B rows, T tokens, D width, R rank, N slots.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cl.backbones._block import Auxiliary, add_terms
from cl.backbones._cells import ages
from cl.backbones._heads import require_width
from cl.backbones._mixer import Lifetime
from cl.backbones._reading import draw, num_steps
from cl.backbones._state import State
from cl.backbones.gpt import Gpt
from cl.backbones.trc2_parts.episodes import Episodes
from cl.backbones.trc2_parts.events import Trace, is_current
from cl.backbones.trc2_parts.thalamus import Thalamus
from cl.core import Batch, Output, StreamInfo, UserError

READS_STORE = ("always", "training", "never")


class Trc2(Gpt):
    """Columns with a thalamic side path and a hippocampal store, over text or images read as sequences.

    Args:
        width, num_layers, num_heads, num_kv_heads, mlp_width, mlp, read, rope_base, dropout, is_tied, is_checkpointed:
            as of `backbone=gpt`; one column per layer.
        injection: columns before the store is read, 1 to num_layers - 1; None takes half of them.
        rank: R, width of the side inputs, a multiple of `groups`; None takes about an eighth of `width`.
        groups: of the side input that share gates and compete among themselves.
        num_slots: N, events stored.
        top: slots read at a time.
        chunk: tokens that give at most one candidate; it must divide the row. None takes 64, or the largest divisor
            of 64 that does.
        min_surprise: normalised surprise above which a state may be stored.
        num_writes: most states stored per commit, so that a step cannot turn the whole store over.
        discount: gamma of the critics.
        has_thalamus, has_past, has_competition: ablations of the router: none, no mean of the past, no competition.
        has_hippocampus, has_gate, has_critic: of the store: none, no feedback gate, no critic. Surprise is then the
            normalised loss of a token, which only writes can use.
        is_replay_bypassed: rows that are replayed get no side input.
        starts_closed: begin with W_s = 0; False draws it.
        reads_store: "always"; "training", which measures as if the store were empty; or "never".

    Raises:
        UserError: a value outside its range, or more slots than fit into memory.

    Cost: of `gpt`, and a column 2 D R more; the store (N + 13 D) D / 4 multiply-adds a token, and 9/4 N D numbers.
    """

    toy: ClassVar[dict[str, Any]] = {
        "width": 32,
        "num_slots": 16,
        "mlp": "moe(experts=2, top=2, shared=1)",
        "min_surprise": -9.0,
        "discount": 0.999,
        "starts_closed": False,
    }
    lifetime = Lifetime(fast=("decoder", "side"), resets=("side",), kept=("episodes.hippocampus", "episodes.critic"))

    def __init__(
        self,
        info: StreamInfo,
        width: int = 96,
        num_layers: int = 4,
        num_heads: int = 4,
        num_kv_heads: int | None = 2,
        mlp_width: int | None = None,
        mlp: str = "moe(experts=8, top=2, shared=1)",
        injection: int | None = None,
        rank: int | None = None,
        groups: int = 8,
        num_slots: int = 512,
        top: int = 8,
        chunk: int | None = None,
        min_surprise: float = 1.5,
        num_writes: int = 8,
        discount: float = 0.9,
        has_thalamus: bool = True,
        has_past: bool = True,
        has_competition: bool = True,
        has_hippocampus: bool = True,
        has_gate: bool = True,
        has_critic: bool = True,
        is_replay_bypassed: bool = True,
        starts_closed: bool = True,
        reads_store: str = "always",
        read: str = "rows",
        rope_base: float | None = 10_000.0,
        dropout: float = 0.0,
        is_tied: bool = False,
        is_checkpointed: bool = False,
    ) -> None:
        sizes = {"width": width, "num_layers": num_layers, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
        reading = {"mlp_width": mlp_width, "mlp": mlp, "read": read, "rope_base": rope_base, "dropout": dropout}
        super().__init__(info, **sizes, **reading, is_tied=is_tied, is_checkpointed=is_checkpointed)
        require_width("groups", groups)
        rank = -(-width // (8 * groups)) * groups if rank is None else rank
        require_width("rank", rank)
        if reads_store not in READS_STORE:
            raise UserError(f"backbone.reads_store is {reads_store!r}; it must be one of {', '.join(READS_STORE)}")
        self.injection = _injection(injection, num_layers)
        self.is_replay_bypassed, self.reads_store = is_replay_bypassed, reads_store
        # drawn after everything that the plain decoder has, whose weights are then the same
        first = 1 if has_thalamus else self.injection if has_hippocampus else num_layers
        # surprise is known after the early columns only
        is_alert = [has_hippocampus and has_critic and n + 1 >= self.injection for n in range(num_layers - 1)]
        self.thalami = nn.ModuleDict(
            {
                str(n): Thalamus(width, rank, groups, is_alert[n], has_past, has_competition)
                for n in range(num_layers - 1)
                if has_thalamus
            }
        )
        self.shifts = nn.ModuleDict({str(n): nn.Linear(rank, width, bias=False) for n in range(first, num_layers)})
        self.episodes = None
        if has_hippocampus:
            steps = num_steps(info, read)
            self.episodes = Episodes(
                width, rank, steps, num_slots, top, chunk, min_surprise, num_writes, discount, has_gate, has_critic
            )
        draw(nn.ModuleList(m for m in (self.thalami, self.shifts, self.episodes) if m is not None), num_layers)
        for shift in self.shifts.values() if starts_closed else ():
            nn.init.zeros_(shift.weight)

    # reading

    def init_state(self, num_rows: int) -> State:
        like = torch.zeros((), dtype=torch.promote_types(torch.float32, self.norm.weight.dtype))
        like = like.to(self.norm.weight.device)
        side: State = {number: part.init_state(num_rows, like) for number, part in self.thalami.items()}
        side |= {"count": like.new_zeros(num_rows, dtype=torch.int64), "gap": like.new_zeros(num_rows, 2)}
        return super().init_state(num_rows) | {"side": side}

    def read(
        self, x_BTD: Tensor, state: State | None = None, *, reset: Tensor | None = None, mode: str = "chunk"
    ) -> tuple[Tensor, State, Auxiliary]:
        return self._read(x_BTD, state, reset, mode)[:3]

    def step(self, batch: Batch, state: State | None = None, mode: str = "chunk") -> Output:
        read_BTD, left, auxiliary, _ = self._read_batch(batch, state, mode)
        hidden = self.hidden_of(read_BTD)
        return Output(self.predict(hidden, batch), hidden, state=left, auxiliary=auxiliary)

    def forward(self, batch: Batch, start: int = 0) -> Output:
        if start or self.between:
            return super().forward(batch, start)
        read_BTD, _, auxiliary, trace = self._read_batch(batch, None, "chunk")
        hidden = self.hidden_of(read_BTD)
        return Output(self.predict(hidden, batch), hidden, state=trace if self.training else None, auxiliary=auxiliary)

    def _read_batch(self, batch: Batch, state: State | None, mode: str) -> tuple[Tensor, State, Auxiliary, Any]:
        is_open_B = is_current(batch) if self.is_replay_bypassed and len(batch.parts) > 1 else None
        return self._read(self.embed(batch.inputs), state, self.resets(batch.inputs), mode, is_open_B)

    def _read(
        self, x_BTD: Tensor, state: State | None, reset: Tensor | None, mode: str, is_open_B: Tensor | None = None
    ) -> tuple[Tensor, State, Auxiliary, Trace | None]:
        """As `read`, with what `commit` needs.

        Args:
            is_open_B: rows that get side inputs; all of them without it.
        """
        if mode == "recurrent" and x_BTD.shape[1] > 1:
            return self._token_by_token(x_BTD, state, reset, is_open_B)
        state = self.init_state(len(x_BTD)) if state is None else state
        before_BT = ages(x_BTD.shape[1], reset, state["side"]["count"]) - 1
        left: State = {"side": {"count": before_BT[:, -1] + 1, "gap": state["side"]["gap"]}}
        auxiliary: Auxiliary = {}
        side_BTR = feedback_BTR = trace = None
        surprise_BT = torch.zeros_like(before_BT, dtype=state["side"]["gap"].dtype)
        for number, block in enumerate(self.blocks):
            arguments = (x_BTD, state[str(number)], reset, mode, self._shift(number, side_BTR, is_open_B))
            if self.is_checkpointed and self.training and torch.is_grad_enabled():
                x_BTD, left[str(number)], terms = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x_BTD, left[str(number)], terms = block(*arguments)
            add_terms(auxiliary, terms)
            if number + 1 == self.injection and self.episodes is not None:
                is_read = self.reads_store == "always" or (self.reads_store == "training" and self.training)
                recalled = self.episodes(x_BTD, state["side"]["gap"], before_BT, is_read)
                feedback_BTR, surprise_BT, left["side"]["gap"], trace = recalled
            if number + 1 < len(self.blocks):
                side_BTR = feedback_BTR
                if str(number) in self.thalami:
                    routed = (x_BTD, state["side"][str(number)], before_BT, surprise_BT)
                    side_BTR, left["side"][str(number)] = self.thalami[str(number)](*routed)
                    side_BTR = side_BTR if feedback_BTR is None else side_BTR + feedback_BTR
        return self.norm(x_BTD), left, auxiliary, trace

    def _token_by_token(
        self, x_BTD: Tensor, state: State | None, reset: Tensor | None, is_open_B: Tensor | None
    ) -> tuple[Tensor, State, Auxiliary, None]:
        outputs, auxiliary = [], {}
        for t in range(x_BTD.shape[1]):
            own_reset = None if reset is None else reset[:, t : t + 1]
            y_B1D, state, auxiliary, _ = self._read(x_BTD[:, t : t + 1], state, own_reset, "recurrent", is_open_B)
            outputs.append(y_B1D)
        assert state is not None
        return torch.cat(outputs, 1), state, auxiliary, None

    def _shift(self, number: int, side_BTR: Tensor | None, is_open_B: Tensor | None) -> Tensor | None:
        """What is added to the queries of a column."""
        if side_BTR is None:
            return None
        if is_open_B is not None:
            side_BTR = torch.where(is_open_B.view(-1, 1, 1), side_BTR, 0)
        shift: Tensor = self.shifts[str(number)](side_BTR.to(self.norm.weight.dtype))
        return shift

    # writing

    @property
    def commits(self) -> bool:
        return self.episodes is not None

    def commit(self, batch: Batch, output: Output) -> None:
        if self.episodes is not None and self.training:
            self.episodes.commit(batch, output.logits, output.state, self.is_text)


def _injection(injection: int | None, num_layers: int) -> int:
    found = num_layers // 2 if injection is None else injection
    if not isinstance(found, int) or isinstance(found, bool) or not 1 <= found < num_layers:
        raise UserError(
            f"backbone.injection is {injection!r} for {num_layers} columns; it must be an integer from 1 to "
            f"backbone.num_layers - 1 = {num_layers - 1}, of which there must be at least one"
        )
    return found
