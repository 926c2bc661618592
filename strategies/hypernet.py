"""Hypernetworks: learn a network that generates the weights of every task from the task's embedding.

    theta_t = h(e_t; phi)                                  h generates chunk by chunk: f([e_t; c_k]; phi), k = 1 .. K
    loss    = CE(x; theta_t) + beta / |old| * sum_{j old} |theta*_j - h(e_j; phi + delta)|^2

delta is the change that the optimizer would make to phi for the cross-entropy alone; theta*_j are the weights generated
for j when the experience began. So what is remembered of an old task is one point at the generator's input.
Where rows have no task label, each domain has an embedding, and at evaluation the embedding whose prediction has the
least entropy answers (HNET+ENT).

Source: von Oswald et al., "Continual learning with hypernetworks", ICLR 2020; chrhenning/hypercl.
Differences: two optimizers are two groups of one, the same for every optimizer that works on numbers alone; make it
anew for every task, as published, with trainer.reset_optimizer=true. One head per task is generated unless
`heads=every`. `start=xavier` is the published start. With gradient clipping, delta is that of unclipped gradients.
Inference of the task by a learnt classifier (HNET+TIR) and the replay form (HNET+R) are not here.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from cl.hooks import Contract
from strategies._checks import require_choice, require_count, require_widths
from strategies._hypernet_chunks import ACTIVATIONS, ChunkGenerator
from strategies._hypernet_strategy import Generating


class Hypernet(Generating):
    """Generate weights in chunks by a multi-layer perceptron, and pin what it generates for old tasks.

    Args:
        chunk_size: numbers of a chunk; None generates all weights at once (the full hypernetwork).
        hidden: widths of the generator's hidden layers.
        embedding: width of a task's embedding.
        chunk_embedding: width of a chunk's embedding.
        learns_chunks: train the chunks' embeddings; else they stay as drawn.
        activation: relu, elu, tanh or sigmoid.
        beta, lookahead, penalty_conditions, targets, importance_rows, heads, start, embedding_lr: see `Generating`.

    Cost: a step generates the weights of one task, forward and backward, and those of `penalty_conditions` old ones
    twice that again; no rows. At evaluation without task labels, one pass of every row for each embedding.
    """

    contract = Contract(
        toy={"chunk_size": 300, "hidden": (24,), "beta": 0.1},
        why_not_zero="weights are generated, whatever the strength is",
        forgets_less_by=0.15,
    )

    def __init__(
        self,
        chunk_size: int | None = 2000,
        hidden: Sequence[int] = (32, 32),
        embedding: int = 32,
        chunk_embedding: int = 16,
        learns_chunks: bool = True,
        activation: str = "relu",
        beta: float = 0.01,
        lookahead: bool = True,
        penalty_conditions: int | None = None,
        targets: str = "weights",
        importance_rows: int | None = None,
        heads: str = "one",
        start: str = "backbone",
        embedding_lr: float | None = None,
    ) -> None:
        super().__init__(
            embedding, beta, lookahead, penalty_conditions, targets, importance_rows, heads, start, embedding_lr
        )
        require_count(f"{self.name}.chunk_size", chunk_size, none_means="the full hypernetwork")
        require_count(f"{self.name}.chunk_embedding", chunk_embedding)
        require_choice(f"{self.name}.activation", activation, tuple(ACTIVATIONS))
        self.chunk_size, self.chunk_embedding = chunk_size, chunk_embedding
        self.hidden = require_widths(f"{self.name}.hidden", hidden)
        self.learns_chunks, self.activation = learns_chunks, activation

    def make_generator(self, num_numbers: int) -> nn.Module:
        return ChunkGenerator(
            num_numbers,
            self.embedding,
            self.chunk_embedding,
            self.hidden,
            self.chunk_size,
            self.activation,
            self.learns_chunks,
        )
