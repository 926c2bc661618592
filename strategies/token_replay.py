"""Replay inside continual pretraining: so many percent of the tokens of every step come from earlier domains.

    replayed tokens / all tokens of a step = rate / 100

What a step cannot give because rows are whole is carried over to the next one, so that the share holds over any stretch
of training to within one row of each domain: at 1 % of steps of 16 rows, one row in every sixth or seventh step.

Rows know the experience that their domain was first seen in. Of domains that were new in one mixture they are not told
apart, unless one of them was trained on without the others: such a group is past while one of its domains is, has the
share of these, and may give rows of the running one too.

Source: Ibrahim et al., "Simple and Scalable Strategies to Continually Pre-train Large Language Models", 2024: 1, 5 and
25 %, only of what was trained on before, in an order of its own.
Differences: replayed rows come on top of the stream's, where the paper keeps the tokens of a step; count tokens, or
give the stream fewer. Rows are stored (a reservoir of each domain, in equal shares), where the paper reads the old data
again; a stream does that with `stream.order`, such as [a, {a: 0.05, b: 0.95}], at as many tokens as without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from cl.buffers.base import draw_without_replacement
from cl.buffers.experience_balanced import ExperienceBalanced
from cl.core import Batch, Experience, Output, Setting, Source, Stream, UserError
from cl.hooks import Contract, Strategy
from cl.state import Cost, TrainState, tensor_bytes
from strategies._checks import require, require_count, require_number
from strategies._pooled import added, is_last


class TokenReplay(Strategy):
    """Replay a share of the tokens of every step.

    Args:
        rate: percent of all tokens that are replayed, in equal parts of every earlier domain; or a mapping from the
            name of a domain to its own percent, such as {docs: 5, code: 1}. 0 replays nothing.
        capacity: rows stored, shared equally by the domains seen. A row is what the stream delivers: documents packed
            with their borders, or one example.

    Raises:
        UserError: a domain that the stream does not have, rates of 100 percent and more, or fewer rows than domains.

    Cost: rate / (100 - rate) rows more per row of the stream, forward and backward.
    """

    settings = frozenset({Setting.CONTINUAL_PRETRAINING})
    parallel = frozenset({"ddp", "fsdp"})
    contract = Contract(toy={"rate": 25.0, "capacity": 100}, zero={"rate": 0.0}, forgets_less_by=0.25)

    def __init__(self, rate: float | Mapping[str, float] = 5.0, capacity: int = 2000) -> None:
        require_count("token_replay.capacity", capacity)
        if isinstance(rate, Mapping):
            for domain, own in rate.items():
                require_number(f"token_replay.rate of {domain}", own)
        else:
            require_number("token_replay.rate", rate)
        total = sum(rate.values()) if isinstance(rate, Mapping) else rate
        require(total < 100, "token_replay.rate", rate, "below 100 percent, all domains together")
        self.rate = dict(rate) if isinstance(rate, Mapping) else rate
        self.is_off = total == 0
        self.buffer = ExperienceBalanced(capacity)
        self.owed: dict[int, float] = {}
        self.planned: dict[int, int] = {}
        self.replayed: dict[int, int] = {}

    def check(self, stream: Stream) -> None:
        super().check(stream)
        names = list(dict.fromkeys(name for each in stream.experiences for name in _domains(each)))
        capacity, allowed = self.buffer.capacity, f"at least {len(names)}, one row for each domain of the stream"
        require(self.is_off or capacity >= len(names), "token_replay.capacity", capacity, allowed)
        for domain in self.rate if isinstance(self.rate, dict) else ():
            if domain not in names:
                raise UserError(
                    f"token_replay.rate names {domain!r}, no domain of stream {stream.info.name}; they are "
                    f"{', '.join(names)}"
                )

    def rates(self, state: TrainState) -> dict[int, float]:
        """Percent of all tokens that each stored domain gets now, by the experience that it was first seen in."""
        past = self._past(state)
        if isinstance(self.rate, dict):
            rates = {group: sum(self.rate.get(name, 0) for name in names) for group, (names, _) in past.items()}
            return {group: rate for group, rate in rates.items() if rate}
        count = sum(len(names) for names, _ in past.values())
        return {group: self.rate * len(names) / count for group, (names, _) in past.items()}

    def _past(self, state: TrainState) -> dict[int, tuple[set[str], Sequence[int]]]:
        """Domains not trained on now, and slots of rows that may be theirs, by the experience they were new in."""
        # joint training has one experience, whatever its rows say
        if self.is_off or not state.has_begun or len(state.stream.experiences) == 1:
            return {}
        every = [set(_domains(each)) for each in state.stream.experiences]
        now = every[state.experience.id]
        past: dict[int, tuple[set[str], Sequence[int]]] = {}
        for group, slots in self.buffer.members.items():
            # a domain that an earlier experience had has its rows there
            own = every[group].difference(*every[:group]) or every[group]
            if len(own) > 1:
                # a row is of what is new in the one experience and in the other, which showed it
                shown = self.buffer.columns["shown_in"].tolist()
                slots = [slot for slot in slots if not own & every[shown[slot]] <= now]
            if own - now and slots:
                past[group] = own - now, slots
        return past

    def due(self, state: TrainState, num_rows: int) -> tuple[dict[int, int], dict[int, float]]:
        """Whole rows of each domain to replay beside so many rows of the stream, and what is owed after."""
        rates, rows, owed = self.rates(state), {}, dict(self.owed)
        for group, rate in rates.items():
            owed[group] = owed.get(group, 0.0) + num_rows * rate / (100 - sum(rates.values()))
            # sums of shares such as 1/19 come out a little below the whole number that they are
            rows[group] = int(owed[group] + 1e-9)
            owed[group] -= rows[group]
        return {group: count for group, count in rows.items() if count}, owed

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        if state.micro_step == 0:
            self.planned, self.owed = self.due(state, state.step_rows)
        total = sum(self.planned.values())
        if total and is_last(state):
            for group, count in self.planned.items():
                self.replayed[group] = self.replayed.get(group, 0) + count
        return added(state, batch, total, partial(self._drawn, state), Source.REPLAY, self.name)

    def _drawn(self, state: TrainState) -> Batch:
        """The planned rows of each domain, distinct while there are enough."""
        generator, slots, past = state.seeds.named(self.name), [], self._past(state)
        for group, count in self.planned.items():
            members = torch.tensor(past[group][1])
            if count <= len(members):
                slots.append(members[draw_without_replacement(len(members), count, generator)])
            else:
                slots.append(members[torch.randint(len(members), (count,), generator=generator)])
        return state.prepare(self.buffer.rows(torch.cat(slots)), generator)

    def on_step_end(self, state: TrainState, batch: Batch, output: Output) -> None:
        if not self.is_off:
            shown_in = torch.full_like(batch.experience_id, state.experience.id)
            self.buffer.add(batch, state.seeds.named(self.name), shown_in=shown_in)

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        extra = sum(self.due(state, batch_size)[0].values())
        return Cost(extra, extra, tensor_bytes(self.buffer.columns))

    def state_dict(self) -> dict[str, Any]:
        return {"buffer": self.buffer.state_dict(), "owed": self.owed, "replayed": self.replayed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state["buffer"])
        self.owed, self.replayed = dict(state["owed"]), dict(state["replayed"])


def _domains(experience: Experience) -> tuple[str, ...]:
    """Every domain that its rows come from."""
    return experience.practises or (experience.domain,)
