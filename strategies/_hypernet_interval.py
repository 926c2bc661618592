"""A hypernetwork whose conditions are boxes of embeddings, and the boxes of weights and outputs that follow from them.

    nested:  centre_c = eps / 2E * cos(e_c),  radius = eps / E        every box holds [-eps / 2E, eps / 2E]^E
    free:    centre_c = e_c,                  radius = eps * softmax(p_c)

The boxes of nested conditions all meet, and their intersection has a middle: one embedding, and so one set of weights,
for all of them.

Shape legend: B rows, C outputs, E width of an embedding, N numbers of a generated network, T conditions asked for.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cl.core import Batch, Output, StreamInfo, UserError
from strategies._hypernet import Hypernetwork
from strategies._interval import SUPPORTED, Interval, Unbounded, ends
from strategies._modes import evaluation_mode

ANSWERS = ("own", "universal", "entropy")
WIDEST = 1e4
"""Distance of the bounds of logits above which a network is refused: nothing can be learnt from them."""


class IntervalNetwork(Hypernetwork):
    """A hypernetwork on boxes of embeddings.

    Args:
        epsilon: paper's eps, of full size.
        nested: boxes that all meet; else boxes with free centres and radii that are learnt.
        answers: who answers at evaluation: the "own" box of a row's task, the "universal" embedding, or the box whose
            centre predicts with the least "entropy".
        further: arguments of `Hypernetwork`.
    """

    def __init__(
        self, backbone: nn.Module, info: StreamInfo, *, epsilon: float, nested: bool, answers: str, **further: Any
    ) -> None:
        self.epsilon, self.nested, self.answers = epsilon, nested, answers
        super().__init__(backbone, info, **further)
        self.widths = nn.ParameterList(
            torch.zeros_like(e)
            for e in (() if nested else self.embeddings)  # equal widths at first
        )

    # boxes

    def points(self, conditions: Sequence[int]) -> Tensor:
        """(T, E) the centres."""
        points_TE = super().points(conditions)
        return self.epsilon / (2 * points_TE.shape[1]) * points_TE.cos() if self.nested else points_TE

    def radii(self, conditions: Sequence[int], share: float = 1.0) -> Tensor:
        """(T, E), at a share of the full size."""
        if self.nested:
            points_TE = super().points(conditions)
            return torch.full_like(points_TE, share * self.epsilon / points_TE.shape[1])
        return share * self.epsilon * torch.stack([self.widths[c] for c in conditions]).softmax(1)

    def boxes(self, conditions: Sequence[int], share: float = 1.0) -> Interval:
        centres_TE, radii_TE = self.points(conditions), self.radii(conditions, share)
        return Interval.of(centres_TE - radii_TE, centres_TE + radii_TE)

    def bounds(self, conditions: Sequence[int], share: float = 1.0) -> Interval:
        """(T, N) bounds of the numbers generated from anywhere in the boxes."""
        with torch.autocast(self.seen.device.type, enabled=False):
            found: Interval = self.generator(self.boxes(conditions, share), conditions)
        return found

    def intersection(self) -> tuple[Tensor, Tensor]:
        """(E,), (E,) lower and upper end of what the boxes of all seen conditions share."""
        low_TE, up_TE = ends(self.boxes(self.seen_conditions() or [0]))
        return low_TE.amax(0), up_TE.amin(0)

    def universal(self) -> Tensor:
        """(N,) numbers generated from the middle of the intersection."""
        low_E, up_E = self.intersection()
        with torch.autocast(low_E.device.type, enabled=False):
            numbers_N: Tensor = self.generator((low_E + up_E)[None] / 2)[0]
        return numbers_N

    # answers

    def forward(self, batch: Batch) -> Output:
        if self.training:
            return self.by_condition(batch, self.conditions_of(batch))
        if self.answers == "universal":
            return self.call(self.universal(), batch, None)
        if self.answers == "own":
            return self.by_condition(batch, self.conditions_of(batch))
        return self.inferred(batch)

    def bounded(self, batch: Batch, share: float) -> Output:
        """Bounds of the logits of rows for every set of weights in the box of their condition, in evaluation mode.

        Raises:
            UserError: a layer whose bounds are not known.
        """
        condition_B = self.conditions_of(batch)
        conditions = condition_B.unique().tolist()
        bounds_TN = self.bounds(conditions, share)
        pieces, rows = [], []
        for k, c in enumerate(conditions):
            own = (condition_B == c).nonzero().squeeze(1)
            rows.append(own)
            pieces.append(self._bounded(bounds_TN[k], batch if len(conditions) == 1 else batch[own], c))
        if len(pieces) == 1:
            return pieces[0]
        back = torch.cat(rows).argsort()
        return Output(torch.cat([piece.logits for piece in pieces])[back])

    def _bounded(self, numbers_N: Tensor, batch: Batch, condition: int) -> Output:
        values = self.layout.weights(numbers_N) | self.statistics_of(condition)
        try:
            with evaluation_mode(self.backbone), torch.autocast(self.seen.device.type, enabled=False):
                output: Output = functional_call(self.backbone, values, (batch,))
        except Unbounded as unknown:
            raise UserError(self._refusal(unknown)) from None
        return output

    def _refusal(self, unknown: Unbounded) -> str:
        """Name the innermost layer that was running."""
        names = {id(module): name for name, module in self.backbone.named_modules()}
        running = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(unknown.__traceback__)]
        layer = next(module for module in reversed(running) if id(module) in names)
        where = names[id(layer)] or "the network itself"
        return (
            f"hyper_interval knows no bounds of {unknown} in layer {where} ({type(layer).__name__}) of backbone "
            f"{type(self.backbone).__name__}; it supports {SUPPORTED}"
        )

    def check(self, info: StreamInfo) -> None:
        """Send a row through, so that what cannot be bounded is refused before anything is trained.

        Raises:
            UserError: a layer without bounds, or bounds too far apart to learn from.
        """
        backbone = type(self.backbone).__name__
        for name, module in self.backbone.named_modules():
            if isinstance(module, nn.RNNBase):
                raise UserError(
                    f"hyper_interval knows no bounds of layer {name} ({type(module).__name__}) of backbone {backbone}; "
                    f"it supports {SUPPORTED}"
                )
        zeros = torch.zeros(1, dtype=torch.int64)
        row = torch.ones(1, *info.input_shape, dtype=self.embeddings[0].dtype)
        with torch.inference_mode():
            found = self.bounded(Batch(row, zeros, zeros, zeros, zeros if info.num_heads > 1 else None), 1.0)
            low_BC, up_BC = ends(found.logits)
            width = (up_BC - low_BC).max().item()
        if not width < WIDEST:
            raise UserError(
                f"hyper_interval.epsilon is {self.epsilon:g}, which leaves the logits of backbone {backbone} "
                f"{width:.0e} apart at the start; take a smaller one, so that it is below {WIDEST:.0e}, or fewer layers"
            )


def worst_case(logits_BC: Tensor, targets_B: Tensor) -> Tensor:
    """(B, C) the logits of a box that are worst for the targets: the least of the right class, the most of all others.

    Example:
        >>> box = Interval.of(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]]))
        >>> worst_case(box, torch.tensor([1])).tolist()
        [[3.0, 2.0]]
    """
    low_BC, up_BC = ends(logits_BC)
    is_right_BC = torch.nn.functional.one_hot(targets_B, low_BC.shape[1]).bool()
    return torch.where(is_right_BC, low_BC, up_BC)
