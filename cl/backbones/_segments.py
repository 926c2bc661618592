"""Segment recurrence: a decoder reads a row segment by segment, and only a memory crosses the borders.

    read_s, memory_s+1 = read_segment(segment s, memory_s)

The memory is explicit. A row may be cut anywhere: of an unfinished segment the inputs are kept and read again, so that
the pieces give what the whole gives. Where a document starts, a row begins with a fresh memory; where it starts inside
a segment, tokens after that see neither the memory nor what lies before, and the memory left behind is of them alone.
Gradients flow through all segments unless `truncate` cuts them (`detached`) after every so many.

Shape legend: B rows, T tokens, P tokens of an unfinished segment, D width, m memory tokens.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cl.backbones._block import Auxiliary, add_terms
from cl.backbones._heads import require_width
from cl.backbones._mixer import Lifetime, require_mode
from cl.backbones._norm import RMSNorm
from cl.backbones._reading import steps_of
from cl.backbones._state import State, detached, where_rows
from cl.backbones.gpt import Gpt
from cl.core import Batch, Output, StreamInfo, UserError


@dataclass(frozen=True)
class Segment:
    """Some embedded tokens, no more than a segment.

    Args:
        raw: (B, T) tokens, or (B, T, F) vectors, before the embedding.
        x: (B, T, D) after it.
        reset: (B, T) True where a document starts, except at the first token: there the memory is fresh already.
        is_new: (B,) rows whose first token starts a document.
        is_whole: the memory that it leaves behind is wanted.
        has_resets: rows have separators; without any, `reset` is False everywhere.
    """

    raw: Tensor
    x: Tensor
    reset: Tensor
    is_new: Tensor
    is_whole: bool
    mode: str
    has_resets: bool

    @property
    def own_reset(self) -> Tensor | None:
        """`reset` for a decoder that sees these tokens only; None without separators, where attention needs no mask."""
        return self.reset if self.has_resets else None

    @property
    def continues(self) -> Tensor:
        """(B, T) True where a token belongs to the document that the memory is of."""
        return self.reset.cumsum(1) == 0

    @property
    def is_last(self) -> Tensor:
        """(B, T) True where a token belongs to the document that the segment ends with."""
        number_BT = self.reset.cumsum(1)
        return number_BT == number_BT[:, -1:]

    @property
    def carried_reset(self) -> Tensor | None:
        """`own_reset` for a decoder whose own state goes on over the borders: also at the first token."""
        return torch.cat((self.is_new.unsqueeze(1), self.reset[:, 1:]), 1) if self.has_resets else None

    @property
    def is_left(self) -> Tensor:
        """(B,) rows in which the document of the memory ends."""
        return self.reset.any(1)

    def around(self, before: int, after: int) -> Tensor | None:
        """`own_reset` of the tokens with as many more on both sides."""
        return nn.functional.pad(self.reset, (before, after)) if self.has_resets else None


class Segmented(Gpt):
    """A decoder that reads in segments; subclasses define `fresh_memory` and `read_segment`.

    Class attributes:
        toy: options of a form small enough for the contract's rows to cross some borders.
        lifetime: what of its memory changes when. Beside the memory, a state holds the inputs of the unfinished
            segment (`pending`) and the number of finished ones (`segments`). `decoder` is the state of the blocks, of
            which their mixers say what is cleared.

    Args:
        segment: T, tokens.
        truncate: k, segments after which the memory is detached; None never does.
        is_replayed: keep the memories at the borders only, and read each segment but the last again in the backward
            pass.
        decoder: options of `Gpt`.

    Raises:
        UserError: a value outside its range.
    """

    toy: ClassVar[dict[str, Any]] = {}
    lifetime: ClassVar[Lifetime]
    leaves_out = True
    """Texts of one segment have no use for some of the weights, which several processes must know (`World.network`)."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Options of the decoder are listed with a subclass's own, so that commands and tracking see every value."""
        super().__init_subclass__(**kwargs)
        own = list(inspect.signature(cls.__init__).parameters.values())[1:]
        if own[-1].kind is own[-1].VAR_KEYWORD:
            named = {each.name for each in own}
            decoder = [each for each in inspect.signature(Gpt).parameters.values() if each.name not in named]
            cls.__signature__ = inspect.Signature(own[:-1] + decoder)  # type: ignore[attr-defined]

    def __init__(
        self,
        info: StreamInfo,
        segment: int = 32,
        truncate: int | None = None,
        is_replayed: bool = False,
        **decoder: Any,
    ) -> None:
        require_width("segment", segment)
        if truncate is not None:
            require_width("truncate", truncate)
        if not isinstance(is_replayed, bool):
            raise UserError(f"backbone.is_replayed is {is_replayed!r}; it must be true or false")
        allowed = [name for name in inspect.signature(Gpt).parameters if name != "info"]
        for name in decoder:
            if name not in allowed:
                raise UserError(f"the decoder has no option {name!r}; its options are {', '.join(allowed)}")
        super().__init__(info, **decoder)
        self.segment, self.truncate, self.is_replayed = segment, truncate, is_replayed

    # what a subclass defines

    def fresh_memory(self, num_rows: int) -> State:
        """The memory of a document that begins."""
        raise NotImplementedError(f"{type(self).__name__} must define fresh_memory")

    def read_segment(self, part: Segment, memory: State) -> tuple[Tensor, State, Auxiliary]:
        """What the head reads of a segment (B, T, D), the memory after it, and terms of the loss."""
        raise NotImplementedError(f"{type(self).__name__} must define read_segment")

    # blocks with something between them

    def through(
        self, number: int, x_BTD: Tensor, state: State | None, reset_BT: Tensor | None, mode: str, total: Auxiliary
    ) -> tuple[Tensor, State]:
        """One block, after what `state` of it remembers; its terms are added to `total`."""
        block = self.blocks[number]
        if self.is_checkpointed and self.training and torch.is_grad_enabled():
            y_BTD, left, terms = checkpoint(block, x_BTD, state, reset_BT, mode, use_reentrant=False)
        else:
            y_BTD, left, terms = block(x_BTD, state, reset_BT, mode)
        add_terms(total, terms)
        return y_BTD, left

    # as a backbone

    def init_state(self, num_rows: int) -> State:
        """A fresh memory, and no unfinished segment."""
        p = next(self.parameters())
        # how a step's input looks is known when the first one arrives
        nothing = torch.zeros(num_rows, 0, dtype=torch.int64, device=p.device)
        return {"memory": self.fresh_memory(num_rows), "pending": nothing, "segments": torch.tensor(0)}

    def features(self, inputs: Tensor) -> Tensor:
        return self._read_all(inputs, self.init_state(len(inputs)), "chunk")[0]

    def step(self, batch: Batch, state: State | None = None, mode: str = "chunk") -> Output:
        """As `Gpt.step`; a piece that ends inside a segment costs the unfinished one again with the next piece."""
        require_mode(mode)
        hidden, left, auxiliary = self._read_all(batch.inputs, state or self.init_state(len(batch)), mode)
        return Output(self.predict(hidden, batch), hidden, state=left, auxiliary=auxiliary)

    def _read_all(self, inputs: Tensor, state: State, mode: str) -> tuple[Tensor, State, Auxiliary]:
        raw = inputs if self.is_text else steps_of(inputs, self.read_images_by)
        num_new = raw.shape[1]
        if state["pending"].shape[1]:
            raw = torch.cat((state["pending"].to(raw.dtype), raw), 1)
        memory, number = state["memory"], int(state["segments"])
        pieces, total = list(raw.split(self.segment, 1)), Auxiliary()
        read = []
        is_replayed = self.is_replayed and self.training and torch.is_grad_enabled()
        for place, piece in enumerate(pieces, 1):
            # the last one's activations are what the backward pass asks for first
            if is_replayed and place < len(pieces):
                out = checkpoint(self._read_piece, piece, memory, mode, use_reentrant=False)
            else:
                out = self._read_piece(piece, memory, mode)
            read_BTD, after, terms = out
            read.append(read_BTD)
            add_terms(total, terms)
            if piece.shape[1] == self.segment:
                memory, number = after, number + 1
                if self.truncate is not None and number % self.truncate == 0:
                    memory = detached(memory)
        pending = raw[:, raw.shape[1] // self.segment * self.segment :]
        left = {"memory": memory, "pending": pending, "segments": torch.tensor(number)}
        return self.hidden_of(torch.cat(read, 1)[:, -num_new:]), left, total

    def _read_piece(self, raw: Tensor, memory: State, mode: str) -> tuple[Tensor, State, Auxiliary]:
        found = self.resets(raw)
        reset_BT = torch.zeros(raw.shape[:2], dtype=torch.bool, device=raw.device) if found is None else found.clone()
        is_new_B = reset_BT[:, 0].clone()
        if found is not None:
            # the decoder's own state, where it is carried, is reset by the decoder
            fresh = {name: value for name, value in self.fresh_memory(len(raw)).items() if name != "decoder"}
            memory = memory | where_rows(is_new_B, fresh, memory)
            reset_BT[:, 0] = False
        is_whole = raw.shape[1] == self.segment
        part = Segment(raw, self.embed(raw), reset_BT, is_new_B, is_whole, mode, found is not None)
        return self.read_segment(part, memory)

    @property
    def commits(self) -> bool:
        """Blocks start anew in every segment: what they would write is not kept."""
        return False


class Slots(nn.Module):
    """Learned vectors that a memory begins with.

    Args:
        count: m.
        deviation: of their initial values; that of the embedding.
    """

    def __init__(self, count: int, width: int, deviation: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width).normal_(std=deviation))

    def forward(self, num_rows: int) -> Tensor:
        """(B, m, D)."""
        return kept(self.weight).unsqueeze(0).expand(num_rows, -1, -1)


def kept(x: Tensor) -> Tensor:
    """As memories are kept: float32 at least, also under autocast."""
    return x.to(torch.promote_types(torch.float32, x.dtype))


class CrossAttention(nn.Module):
    """o_t = sum_j softmax_j(q_t . k_j / sqrt(K)) v_j over slots of a memory; 0 where a row has none that is filled.

    Args:
        width: D, of what asks.
        num_heads: H; D must be a multiple of it.
        has_norm: what asks is normalised first.

    Cost: 2 D^2 multiply-adds a token and a slot, and 2 m D a token.
    """

    def __init__(self, width: int, num_heads: int, has_norm: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = RMSNorm(width, eps=1e-6) if has_norm else nn.Identity()
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: Tensor, memory_BmD: Tensor, is_filled: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What is read (B, T, D), and the weights (B, H, T, m).

        Args:
            is_filled: True where a token may look, anything that expands to (B, 1, T, m); None lets all see all.
        """
        q, k, v = (
            layer(each).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, each in ((self.query, self.norm(x_BTD)), (self.key, memory_BmD), (self.value, memory_BmD))
        )
        # a softmax over a few neighbours in memory takes several times one over rows of tokens
        score_BHmT = kept(k @ q.mT) / q.shape[-1] ** 0.5
        if is_filled is not None:
            # a token that may not look anywhere gets weights of zero, not of nan
            score_BHmT = score_BHmT.masked_fill(~is_filled.mT, torch.finfo(score_BHmT.dtype).min)
        weight_BHTm = score_BHmT.softmax(2).mT
        if is_filled is not None:
            weight_BHTm = weight_BHTm * is_filled
        read_BTD: Tensor = self.out((weight_BHTm.to(v.dtype) @ v).transpose(1, 2).flatten(2))
        return read_BTD, weight_BHTm
