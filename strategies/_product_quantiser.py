"""Product quantisation: a vector is cut into pieces, and each is stored as the number of the nearest of its centres.

Shape legend: N vectors, D numbers of each, K codebooks, S centres in one, P positions of a map, B rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_CODEBOOK = 256
"""A code is one byte."""


class ProductQuantiser:
    """Codebooks, one for each piece of a vector; pieces differ in width by one at most.

    Args:
        codebooks: K tensors (S, width of the piece).
    """

    def __init__(self, codebooks: Sequence[Tensor]) -> None:
        self.codebooks = list(codebooks)

    @staticmethod
    def fitted(vectors_ND: Tensor, num_codebooks: int, codebook_size: int, seed: int) -> ProductQuantiser:
        """k-means in every piece, by scikit-learn.

        Args:
            num_codebooks: at most D are used.
            codebook_size: at most as many as there are different vectors are used.
        """
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning

        codebooks = []
        for piece in vectors_ND.detach().cpu().tensor_split(min(num_codebooks, vectors_ND.shape[1]), dim=1):
            num_centers = min(codebook_size, len(piece.unique(dim=0)))
            with warnings.catch_warnings():
                # fewer different rows than it counted, by rounding
                warnings.simplefilter("ignore", ConvergenceWarning)
                means = KMeans(num_centers, n_init=1, max_iter=25, random_state=seed).fit(piece.numpy())
            codebooks.append(torch.from_numpy(means.cluster_centers_).to(vectors_ND))
        return ProductQuantiser(codebooks)

    def encode(self, vectors_ND: Tensor) -> Tensor:
        """Number of the nearest centre of every piece, (N, K) uint8."""
        pieces = vectors_ND.split([book.shape[1] for book in self.codebooks], dim=1)
        nearest = []
        for piece, book in zip(pieces, self.codebooks, strict=True):
            # |x|^2 is the same for every centre
            distance_NS = book.square().sum(1) - 2 * piece.to(book.dtype) @ book.T
            nearest.append(distance_NS.argmin(1))
        return torch.stack(nearest, dim=1).to(torch.uint8)

    def decode(self, codes_NK: Tensor) -> Tensor:
        """The centres that the codes name, (N, D)."""
        codes = codes_NK.long().unbind(1)
        return torch.cat([book[code] for book, code in zip(self.codebooks, codes, strict=True)], dim=1)


class MapQuantiser:
    """Quantises what a layer puts out, at every position of a map or as one vector.

    Args:
        quantiser: of vectors.
        per_position: a map (B, channels, ...) is one vector of channels at each position; otherwise one in all.
        shape: of one output, without the rows.
    """

    def __init__(self, quantiser: ProductQuantiser, per_position: bool, shape: Sequence[int]) -> None:
        self.quantiser, self.per_position, self.shape = quantiser, per_position, tuple(shape)

    def encode(self, outputs: Tensor) -> Tensor:
        """(B, P, K) uint8."""
        vectors_ND = as_vectors(outputs, self.per_position)
        return self.quantiser.encode(vectors_ND).view(len(outputs), -1, len(self.quantiser.codebooks))

    def decode(self, codes_BPK: Tensor) -> Tensor:
        """(B, *shape)."""
        vectors_BPD = self.quantiser.decode(codes_BPK.flatten(0, 1)).view(*codes_BPK.shape[:2], -1)
        if self.per_position:
            return vectors_BPD.transpose(1, 2).reshape(len(codes_BPK), *self.shape)
        return vectors_BPD.reshape(len(codes_BPK), *self.shape)

    def __call__(self, outputs: Tensor) -> Tensor:
        """What is left of the outputs; no gradient goes through."""
        return self.decode(self.encode(outputs.detach())).to(outputs.dtype)


def as_vectors(outputs: Tensor, per_position: bool) -> Tensor:
    """(B, channels, ...) -> (B * positions, channels), or (B, all numbers)."""
    if per_position and outputs.dim() > 2:
        return outputs.flatten(2).transpose(1, 2).flatten(0, 1)
    return outputs.flatten(1)
