"""Generate a long vector in chunks: a small network answers each chunk's own embedding together with the condition's.

    chunk_k = f([e; c_k]),  k = 1 .. K = ceil(N / chunk);   the surplus of the last chunk is cut off

Shape legend: E width of a condition's embedding, K chunks, N numbers, T conditions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from strategies._hypernet_distances import Finish, generated

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "elu": nn.ELU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
"""Monotone ones, through which bounds can be propagated."""


class ChunkGenerator(nn.Module):
    """Embeddings (T, E) -> numbers (T, N).

    Args:
        num_numbers: N.
        embedding: E.
        chunk_embedding: width of a chunk's embedding; not used when all numbers are one chunk.
        hidden: widths of the hidden layers.
        chunk_size: numbers of a chunk; None generates all of them at once.
        activation: a key of `ACTIVATIONS`.
        learns_chunks: train the chunks' embeddings; else they stay as drawn.

    Cost: K * (E + chunk_embedding) * hidden + ... + K * hidden[-1] * chunk_size multiply-adds a condition.
    """

    def __init__(
        self,
        num_numbers: int,
        embedding: int,
        chunk_embedding: int,
        hidden: Sequence[int],
        chunk_size: int | None,
        activation: str,
        learns_chunks: bool,
    ) -> None:
        super().__init__()
        self.num_numbers, size = num_numbers, min(chunk_size or num_numbers, num_numbers)
        self.num_chunks = -(-num_numbers // size)
        width = embedding
        if self.num_chunks > 1:
            width += chunk_embedding
            chunks_KE = torch.randn(self.num_chunks, chunk_embedding)
            if learns_chunks:
                self.chunks_KE = nn.Parameter(chunks_KE)
            else:
                self.register_buffer("chunks_KE", chunks_KE)
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise((width, *hidden)):
            layers += [nn.Linear(width_in, width_out), ACTIVATIONS[activation]()]
        self.body = nn.Sequential(*layers)
        self.last = nn.Linear(hidden[-1] if hidden else width, size)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, embeddings_TE: Tensor, conditions: Sequence[int] = (), finish: Finish = generated) -> Tensor:
        """Generate; which conditions the embeddings belong to makes no difference.

        Args:
            finish: what becomes of the last layer.
        """
        if self.num_chunks == 1:
            rows = embeddings_TE.unsqueeze(1)
        else:
            every = (embeddings_TE.shape[0], self.num_chunks, -1)
            rows = torch.cat([embeddings_TE.unsqueeze(1).expand(*every), self.chunks_KE.expand(*every)], dim=2)
        return finish(self.body(rows), self.last.weight, self.last.bias, self.num_numbers)
