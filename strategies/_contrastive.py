"""The supervised contrastive loss.

Shape legend: N rows, D width of what is compared.
"""

from __future__ import annotations

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
        -0.0
    """
    z_ND = F.normalize(in_float(vectors_ND), dim=1)
    itself_NN = torch.eye(len(z_ND), dtype=torch.bool, device=z_ND.device)
    logits_NN = (z_ND @ z_ND.T / temperature).masked_fill(itself_NN, float("-inf"))
    log_share_NN = logits_NN - logits_NN.logsumexp(1, keepdim=True)
    is_positive_NN = (labels_N[:, None] == labels_N[None, :]) & ~itself_NN
    num_positive_N = is_positive_NN.sum(1)
    if not num_positive_N.any():
        return z_ND.sum() * 0.0
    attraction_N = log_share_NN.where(is_positive_NN, 0.0).sum(1) / num_positive_N.clamp(min=1)
    return -attraction_N[num_positive_N > 0].mean()


def global_labels(batch: Batch, info: StreamInfo) -> Tensor:
    """Labels (B,) that differ between heads too."""
    return batch.targets if batch.task_id is None else batch.task_id * info.num_outputs + batch.targets
