"""TRC2's first form, made causal: columns routed by the chunk before, a memory of slots and a low-rank corrector.

Shape legend: B rows, T tokens, K chunks that a call touches, L chunks before, D width, M columns, N state of a column,
J taps, R width of routing keys, S slots.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.backbones._cells import ages
from cl.backbones._heads import require_width
from cl.backbones._mixer import Lifetime, Mixer, in_full_precision
from cl.backbones._norm import RMSNorm
from cl.backbones._state import State
from cl.backbones.trc2_parts.convolution import convolved
from cl.core import UserError

TOPOLOGIES = ("grid", "circle")


class Trc2V1(Mixer):
    """p_t = W_p sum_{j=1..J} w_j * x_{t-j};  u_t = x_t - (1 - trust) p_t;  s_c = mean of u over chunk c.

        r  = softmax of the `top` largest of <W_q s, K_m> - gamma |tanh(W_x s + b) - P_m|^2,   s: the chunk before
        h_t = sum_{j < J, own chunk} v_j * ((1 - a_{t-j}) * b_{t-j}),   a = sigmoid(delta) sigmoid(-A)
        y_t = W_c [r_m g_tm c_tm * h_tm]_m + sum_{i=1..L} l_i * s_{c-i} + norm(softmax(beta cos(W_h u_t, X)) X)
        out = W_o (y + W_up W_down silu(W_1 u + W_2 y))

    with delta, b, c and g from W u_t for every column, and g = (1 - f) sigmoid(gate) + f, f = sigmoid(free). It is a
    block by itself: use it with `backbone.mlp=none`, as `backbone=trc2_v1` does.

    In training it adds `prediction` * mean |p - x|^2, x held, and `balance` * M * sum_m mean_t(r_m)^2, which is
    `balance` when all columns are used alike.

    Args:
        width: D.
        chunk: tokens of a chunk, counted from the start of a document.
        columns: M. top: columns that a chunk reads. state: N. taps: J of both convolutions. lateral: L.
        slots: S. rank: of the corrector.
        topology: where columns lie, P: a `grid` in the unit square around 0, or a `circle`.
        trust: paper's s_pred, what is kept of the predicted part.
        distance: paper's gamma. sharpness: paper's beta.
        prediction, balance: weights of the two terms; 0 leaves one out.

    Raises:
        UserError: a value outside its range.

    Cost: D (5 D + M (4 N + 2) + 2 S + 2 rank) multiply-adds a token and D^2 / 4 a chunk; the state holds
        (J + L + 1) D + (J - 1) M N numbers a row.
    Source: Khadangi, arXiv 2602.22479 v1: predictive subtraction, router, columns, slot memory, corrector; from notes.
    Differences: there the mean of a chunk, which every token of it sees through the route and the lateral path, is that
        of the chunk itself, so tokens see the future, and its numbers cannot be compared with anybody's; here both see
        whole chunks before only. Sizes, a map of the slots' queries, what the lateral path weighs, and that a column
        has two scalars beside 3 N numbers (there three, of which notes explain two) are our own.
    """

    lifetime = Lifetime(fast=("tail", "driven", "sum", "means", "place"))
    examples = (
        "trc2_v1(chunk=4, columns=5, top=2, state=2, slots=6, rank=3)",
        "trc2_v1(chunk=3, columns=4, top=2, state=2, taps=2, lateral=1, slots=6, rank=3, topology=circle)",
        "trc2_v1(chunk=1, columns=3, top=3, state=1, taps=1, lateral=3, slots=2, rank=1)",
    )
    places: Tensor

    def __init__(
        self,
        width: int,
        *,
        chunk: int = 16,
        columns: int = 16,
        top: int = 4,
        state: int = 8,
        taps: int = 4,
        lateral: int = 2,
        slots: int = 32,
        rank: int = 16,
        topology: str = "grid",
        trust: float = 0.5,
        distance: float = 1.0,
        sharpness: float = 8.0,
        prediction: float = 0.1,
        balance: float = 0.01,
    ) -> None:
        super().__init__()
        counts = {"chunk": chunk, "columns": columns, "top": top, "state": state, "taps": taps, "lateral": lateral}
        for name, value in {**counts, "slots": slots, "rank": rank}.items():
            require_width(name, value)
        if not 2 <= top <= columns:
            # the weight of a single column is 1 whatever the router says, so that it could not learn
            raise UserError(f"top of trc2_v1 is {top}; it must be from 2 to its number of columns, {columns}")
        weights = {"distance": distance, "sharpness": sharpness, "prediction": prediction, "balance": balance}
        for name, weight in {"trust": trust, **weights}.items():
            if not isinstance(weight, int | float) or not 0 <= weight <= (1 if name == "trust" else math.inf):
                allowed = "from 0 to 1" if name == "trust" else "of at least 0"
                raise UserError(f"{name} of trc2_v1 is {weight!r}; it must be a number {allowed}")
        self.chunk, self.top, self.lateral, self.trust = chunk, top, lateral, trust
        self.distance, self.sharpness, self.prediction, self.balance = distance, sharpness, prediction, balance
        self.sizes = (columns, state)
        self.near_JD = nn.Parameter(torch.full((taps, width), 1 / taps))
        self.predict = nn.Linear(width, width, bias=False)
        narrow = max(1, width // 4)
        self.route_query = nn.Linear(width, narrow, bias=False)
        self.route_key_MR = nn.Parameter(torch.randn(columns, narrow) * narrow**-0.5)
        self.location = nn.Linear(width, 2)
        self.register_buffer("places", _places(columns, topology), persistent=False)
        self.drive = nn.Linear(width, columns * (3 * state + 2), bias=False)
        self.log_decay_MN = nn.Parameter(torch.zeros(columns, state))
        self.inside_JX = nn.Parameter(torch.full((taps, columns * state), 1 / taps))
        self.join = nn.Linear(columns * state, width, bias=False)
        self.lateral_LD = nn.Parameter(torch.full((lateral, width), 1 / lateral))
        self.ask = nn.Linear(width, width, bias=False)
        self.slots_SD = nn.Parameter(torch.randn(slots, width))
        self.recalled_norm = RMSNorm(width, eps=1e-6)
        self.own, self.other = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def init_state(self, num_rows: int) -> State:
        taps, width = self.near_JD.shape
        return {
            "tail": self.fresh(num_rows, taps, width),
            "driven": self.fresh(num_rows, taps - 1, self.inside_JX.shape[1]),
            "sum": self.fresh(num_rows, width),
            "means": self.fresh(num_rows, self.lateral, width),
            "place": torch.zeros(num_rows, dtype=torch.int64, device=self.near_JD.device),
        }

    def piece(self, x_BTD: Tensor, state: State, reset: Tensor | None, mode: str) -> tuple[Tensor, State]:
        before_BT = ages(x_BTD.shape[1], reset, state["place"]) - 1
        near_BTD, tail = convolved(x_BTD, state["tail"], self.near_JD, before_BT, nearest=1)
        p_BTD = self.predict(near_BTD.to(x_BTD.dtype))
        u_BTD = x_BTD - (1 - self.trust) * p_BTD
        with in_full_precision(x_BTD):
            past_BKLD, chunk_BT, left = self._chunks(u_BTD, state, before_BT)
            route_BKM = self._route(past_BKLD[:, :, -1])
            lateral_BKD = (self.lateral_LD * past_BKLD).sum(2)
        route_BTM = _of_chunk(route_BKM, chunk_BT)
        read_BTX, driven = self._columns(u_BTD, route_BTM, state["driven"], before_BT % self.chunk)
        y_BTD = self.join(read_BTX) + _of_chunk(lateral_BKD, chunk_BT).to(x_BTD.dtype) + self._recalled(u_BTD)
        y_BTD = y_BTD + self.up(self.down(F.silu(self.own(u_BTD) + self.other(y_BTD))))
        left |= {"tail": tail, "driven": driven, "place": before_BT[:, -1] + 1}
        if self.training:
            left["auxiliary"] = self._terms(x_BTD, p_BTD, route_BTM, before_BT)
        return self.out(y_BTD), left

    def _chunks(self, u_BTD: Tensor, state: State, before_BT: Tensor) -> tuple[Tensor, Tensor, State]:
        """Means of the chunks before every chunk that is touched, the newest last, and 0 where a document has none.

        Returns:
            (B, K, L, D), the number (B, T) of each token's chunk, 0 being the one that was open, and what to remember.
        """
        chunk_BT = (before_BT % self.chunk == 0).cumsum(1)
        num_chunks = int(chunk_BT.max()) + 1
        index_BTD = chunk_BT.unsqueeze(2).expand_as(u_BTD)
        open_BKD = F.pad(state["sum"].unsqueeze(1), (0, 0, 0, num_chunks - 1))
        sums_BKD = open_BKD.scatter_add(1, index_BTD, u_BTD.to(open_BKD.dtype))
        # chunks of the document before each one: all tokens of a chunk say the same
        earlier_BK = chunk_BT.new_zeros(sums_BKD.shape[:2]).scatter(1, chunk_BT, before_BT // self.chunk)
        every_BSD = torch.cat((state["means"], sums_BKD / self.chunk), 1)
        past_BKLD = every_BSD.unfold(1, self.lateral, 1)[:, :num_chunks].mT
        back_L = torch.arange(self.lateral, 0, -1, device=u_BTD.device)
        past_BKLD = torch.where((earlier_BK.unsqueeze(2) >= back_L).unsqueeze(3), past_BKLD, 0)
        rows = torch.arange(len(u_BTD), device=u_BTD.device)
        last_B = chunk_BT[:, -1]
        return past_BKLD, chunk_BT, {"sum": sums_BKD[rows, last_B], "means": past_BKLD[rows, last_B]}

    def _route(self, mean_BKD: Tensor) -> Tensor:
        """(B, K, M) weight of each column, 0 where it was not chosen."""
        mean_BKD = mean_BKD.to(self.near_JD.dtype)
        here_BK12 = torch.tanh(self.location(mean_BKD)).unsqueeze(2)
        logits_BKM = self.route_query(mean_BKD) @ self.route_key_MR.T
        logits_BKM = logits_BKM - self.distance * (here_BK12 - self.places).square().sum(-1)
        best, chosen = logits_BKM.topk(self.top, -1)
        return torch.zeros_like(logits_BKM).scatter(-1, chosen, best.softmax(-1))

    def _columns(self, u_BTD: Tensor, route_BTM: Tensor, driven: Tensor, before_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, M N) what the chosen columns answer, and the tail of their convolution.

        Args:
            before_BT: tokens of the chunk before each one.
        """
        columns, state = self.sizes
        each = self.drive(u_BTD).unflatten(-1, (columns, -1)).split((state, state, state, 1, 1), -1)
        delta, b, c, gate, free = each
        decay = torch.sigmoid(delta) * torch.sigmoid(-self.log_decay_MN)
        h_BTX, driven = convolved(((1 - decay) * b).flatten(2), driven, self.inside_JX, before_BT)
        free = torch.sigmoid(free)
        open_BTM1 = (1 - free) * torch.sigmoid(gate) + free
        read_BTMN = route_BTM.unsqueeze(3) * open_BTM1 * c * h_BTX.unflatten(2, self.sizes)
        return read_BTMN.flatten(2).to(u_BTD.dtype), driven

    def _recalled(self, u_BTD: Tensor) -> Tensor:
        """(B, T, D) what the slots hold that is like the token: a Hopfield network's one step."""
        slots_SD = F.normalize(self.slots_SD, dim=-1)
        alike_BTS = F.normalize(self.ask(u_BTD), dim=-1) @ slots_SD.T
        recalled_BTD: Tensor = self.recalled_norm(
            (self.sharpness * alike_BTS).softmax(-1).to(slots_SD.dtype) @ slots_SD
        )
        return recalled_BTD.to(u_BTD.dtype)

    def _terms(self, x_BTD: Tensor, p_BTD: Tensor, route_BTM: Tensor, before_BT: Tensor) -> dict[str, Tensor]:
        """What is added to the loss; a document's first token cannot be predicted."""
        error_BT = (p_BTD - x_BTD.detach()).square().mean(2).masked_fill(before_BT == 0, 0)
        used_M = route_BTM.flatten(0, 1).mean(0)
        terms = {
            "prediction": self.prediction * error_BT.sum() / (before_BT > 0).sum().clamp(min=1),
            "balance": self.balance * len(used_M) * used_M.square().sum(),
        }
        return {name: term for name, term in terms.items() if getattr(self, name)}


def _of_chunk(x_BKX: Tensor, chunk_BT: Tensor) -> Tensor:
    """(B, T, X) for every token what holds for its chunk."""
    return x_BKX.gather(1, chunk_BT.unsqueeze(2).expand(-1, -1, x_BKX.shape[2]))


def _places(columns: int, topology: str) -> Tensor:
    """(M, 2) where columns lie, within -1 and 1.

    Raises:
        UserError: an unknown topology.

    Example:
        >>> _places(4, "grid").tolist()
        [[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]]
    """
    if topology not in TOPOLOGIES:
        raise UserError(f"topology of trc2_v1 is {topology!r}; it must be one of {', '.join(TOPOLOGIES)}")
    number_M = torch.arange(columns)
    if topology == "circle":
        angle_M = 2 * math.pi * number_M / columns
        return torch.stack((angle_M.cos(), angle_M.sin()), 1)
    side = math.isqrt(columns - 1) + 1
    return (2 * torch.stack((number_M % side, number_M // side), 1) + 1) / side - 1
