"""The supervised contrastive loss.

Shape legend: N rows, D width of what is compared.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cl.core import Batch, StreamInfo
from strategies._backbone import in_float


def supervised_contrastive(vectors_ND: Tensor, labels_N: Tensor, temperature: float) -> Tensor:
    """Rows of a class attract each other on the sphere, others repel.

        mean over rows i of -1 / |P(i)| sum_{p in P(i)} log(exp(z_i z_p / T) / sum_{a != i} exp(z_i z_a / T))

    P(i) are the other rows with the label of i; a row without one takes no part. z are the vectors at length 1.

    Source: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, L_out, without the factor T / 0.07 of their
    code.

    Example:
        >>> same = supervised_contrastive(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([4, 4]), 0.1)
        >>> same.item()
        0.0
    """
    classes, label_N = labels_N.unique(return_inverse=True)
    num_positive_N = label_N.bincount()[label_N] - 1
    # temperature into the vectors: matrices of all pairs are what takes the time, so few operations see them
    z_ND = F.normalize(in_float(vectors_ND), dim=1) / temperature**0.5
    if not num_positive_N.any():
        return z_ND.sum() * 0.0
    repulsion_N = _Gram.apply(z_ND).fill_diagonal_(float("-inf")).logsumexp(1)
    # the mean of products with the rows of a class is the product with their mean
    sum_CD = z_ND.new_zeros(len(classes), z_ND.shape[1]).index_add(0, label_N, z_ND)
    attraction_N = (z_ND * (sum_CD[label_N] - z_ND)).sum(1) / num_positive_N.clamp(min=1)
    return (repulsion_N - attraction_N)[num_positive_N > 0].mean()


class _Gram(torch.autograd.Function):
    """z z^T: its gradient is one product, (G + G^T) z, of which autograd would make two, most of the loss's work."""

    @staticmethod
    def forward(ctx: Any, z_ND: Tensor) -> Tensor:
        ctx.save_for_backward(z_ND)
        return z_ND @ z_ND.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient_NN,), (z_ND,) = gradients, ctx.saved_tensors
        return (gradient_NN + gradient_NN.T).to(z_ND.dtype) @ z_ND


def global_labels(batch: Batch, info: StreamInfo) -> Tensor:
    """Labels (B,) that differ between heads too."""
    return batch.targets if batch.task_id is None else batch.task_id * info.num_outputs + batch.targets
