"""Generate a long vector by a recurrent network, first layer first, so that later weights depend on earlier ones.

    (h_k, s_k) = LSTM([e; c_k], (h_{k-1}, s_{k-1})),   chunk_k = V h_k + v,   k = 1 .. K

The number of units can grow. Units of every size are there from the start, so that an optimizer, a checkpoint and other
strategies see the same tensors throughout; those beyond the active ones are not computed. When units become active,
what they would say to older units and to V is 0: everything generated until then stays as it is.

Shape legend: D inputs (a condition's and a chunk's embedding), E width of a condition's embedding, H units, K chunks,
M numbers of a chunk, N numbers, T conditions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from strategies._hypernet_distances import Finish, generated


class RecurrentGenerator(nn.Module):
    """Embeddings (T, E) -> numbers (T, N).

    Args:
        num_numbers: N.
        embedding: E.
        chunk_embedding: width of a step's own embedding.
        sizes: units in use after each growth, rising.
        chunk_size: M; a layer with more numbers takes several steps.
        gated: number of conditions, each of which goes on using as many units as it was `assign`ed; 0 lets all use
            the active ones.

    Cost: K steps one after the other, each 4 H (D + H) + M H multiply-adds a condition.
    """

    def __init__(
        self,
        num_numbers: int,
        embedding: int,
        chunk_embedding: int,
        sizes: Sequence[int],
        chunk_size: int,
        gated: int = 0,
    ) -> None:
        super().__init__()
        self.num_numbers, self.sizes = num_numbers, list(sizes)
        size, width, units = min(chunk_size, num_numbers), embedding + chunk_embedding, max(sizes)
        self.num_chunks = -(-num_numbers // size)
        self.chunks_KE = nn.Parameter(torch.randn(self.num_chunks, chunk_embedding))
        # gates: input, forget, cell, output
        self.inputs_4HD = nn.Parameter(torch.empty(4, units, width))
        self.recurrent_4HH = nn.Parameter(torch.empty(4, units, units))
        self.bias_4H = nn.Parameter(torch.zeros(4, units))
        self.last = nn.Linear(units, size)
        first = self.sizes[0]
        for gate in range(4):
            nn.init.xavier_uniform_(self.inputs_4HD.data[gate])
            nn.init.orthogonal_(self.recurrent_4HH.data[gate, :first, :first])
            nn.init.uniform_(self.recurrent_4HH.data[gate, first:], -(units**-0.5), units**-0.5)
            nn.init.zeros_(self.recurrent_4HH.data[gate, :first, first:])
        nn.init.xavier_uniform_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.register_buffer("growths", torch.zeros((), dtype=torch.int64))
        self.register_buffer("units_C", torch.full((gated,), units))
        self.growths: Tensor
        self.units_C: Tensor

    @property
    def active(self) -> int:
        """Units in use."""
        return self.sizes[int(self.growths)]

    @property
    def num_active(self) -> int:
        """Parameters in use."""
        units, width = self.active, self.inputs_4HD.shape[2]
        return self.chunks_KE.numel() + 4 * units * (width + units + 1) + len(self.last.bias) * (units + 1)

    @torch.no_grad()
    def grow(self) -> tuple[int, int]:
        """Take more units into use; returns how many there were, and are."""
        old = self.active
        if int(self.growths) + 1 < len(self.sizes):
            self.growths += 1
        new = self.active
        self.recurrent_4HH[:, :old, old:new] = 0
        self.last.weight[:, old:new] = 0
        return old, new

    def assign(self, condition: int) -> None:
        """A condition is learnt with the units that are active now."""
        if len(self.units_C):
            self.units_C[condition] = self.active

    def forward(self, embeddings_TE: Tensor, conditions: Sequence[int] = (), finish: Finish = generated) -> Tensor:
        """Generate; units that a condition does not use stay silent for it.

        Args:
            finish: what becomes of the last layer.
        """
        units, num = self.active, embeddings_TE.shape[0]
        every = (self.num_chunks, num, -1)
        inputs_KTD = torch.cat([embeddings_TE.expand(*every), self.chunks_KE.unsqueeze(1).expand(*every)], dim=2)
        # one product for the inputs of all steps; only the recurrence has to wait
        inputs_4HD, recurrent_4HH = self.inputs_4HD[:, :units], self.recurrent_4HH[:, :units, :units]
        given_KTG = inputs_KTD @ inputs_4HD.flatten(0, 1).T + self.bias_4H[:, :units].flatten()
        recurrent_HG = recurrent_4HH.flatten(0, 1).T
        mask_TH = None
        if len(self.units_C) and conditions:
            used_T = self.units_C[list(conditions)]
            mask_TH = (torch.arange(units, device=used_T.device) < used_T[:, None]).to(embeddings_TE.dtype)
        hidden_TH = cell_TH = embeddings_TE.new_zeros(num, units)
        steps = []
        for given_TG in given_KTG:
            i, f, g, o = (given_TG + hidden_TH @ recurrent_HG).chunk(4, dim=1)
            # forget gates start open, as usual
            cell_TH = (f + 1).sigmoid() * cell_TH + i.sigmoid() * g.tanh()
            hidden_TH = o.sigmoid() * cell_TH.tanh()
            if mask_TH is not None:
                hidden_TH = hidden_TH * mask_TH
            steps.append(hidden_TH)
        return finish(torch.stack(steps, dim=1), self.last.weight[:, :units], self.last.bias, self.num_numbers)
