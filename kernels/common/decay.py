"""Decay algebra of a chunk on torch tensors: what every kind of decay answers, and one decay per head.

Every exponent is a sum of log decays over an interval of tokens, computed as such and never as a difference of two
running sums: nothing overflows, nothing cancels, and the gate gradient is the transposed sum.

Legend: as in kernels.common.chunks.
"""

import torch
from torch import Tensor


def triangle(chunk: int, like: Tensor, *, strict: bool = False) -> Tensor:
    """Lower triangle of ones [C, C]."""
    return torch.ones(chunk, chunk, dtype=like.dtype, device=like.device).tril(-1 if strict else 0)


class Decay:
    """Decay factors of every chunk. `into`: chunk start to token; `out`: token to chunk end; `total`: whole chunk."""

    def __init__(self, into_MCG: Tensor, out_MCG: Tensor, total_MG1: Tensor):
        self.into_MCG, self.out_MCG, self.total_MG1 = into_MCG, out_MCG, total_MG1

    def scores(self, q_MCK: Tensor, k_MCK: Tensor, *, strict: bool) -> Tensor:
        """P[i, j] = sum_c q[i, c] k[j, c] exp(sum of g over (j, i]) for j <= i (j < i when strict), else 0."""
        raise NotImplementedError

    def scores_backward(
        self, q_MCK: Tensor, k_MCK: Tensor, p_MCC: Tensor, dp_MCC: Tensor, kk_MCC: Tensor | None, dkk_MCC: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and g through the scores p of q and k and, if given, the strict scores kk of k and k.

        `dp` and `dkk` need not be masked and may be overwritten.
        """
        raise NotImplementedError

    def gate_gradient(self, into_MCK: Tensor, out_MCK: Tensor, states_MKV: Tensor, dstates_MKV: Tensor) -> Tensor:
        """Gradient of g from (value * gradient) of what carries `into` and `out`, and from the states `total` decays.

        `dstates` are the gradients at the chunk's end; they are overwritten.
        """
        raise NotImplementedError


class ScalarDecay(Decay):
    """One decay per head and token: the scores are masked by one matrix L[i, j].

    The running sum is kept in float64, where a difference of two is as good as the sum over the interval.
    """

    def __init__(self, g_MC1: Tensor):
        chunk, dtype = g_MC1.shape[1], g_MC1.dtype
        run_MC = g_MC1[..., 0].double().cumsum(1)
        end_M1 = run_MC[:, -1:]
        factors = (run_MC, end_M1 - run_MC, end_M1)
        super().__init__(*(x.to(dtype).exp()[..., None] for x in factors))
        # above the diagonal there is no interval: cut before too, since exp is slow where it leaves the range of floats
        self.mask_MCC = (run_MC[:, :, None] - run_MC[:, None, :]).to(dtype).tril_().exp_().tril_()
        self.lower = triangle(chunk, g_MC1)
        self.upper = triangle(chunk, g_MC1, strict=True).mT

    def scores(self, q_MCK: Tensor, k_MCK: Tensor, *, strict: bool) -> Tensor:
        p = torch.bmm(q_MCK, k_MCK.mT).mul_(self.mask_MCC)
        return p.tril_(-1) if strict else p

    def scores_backward(
        self, q_MCK: Tensor, k_MCK: Tensor, p_MCC: Tensor, dp_MCC: Tensor, kk_MCC: Tensor | None, dkk_MCC: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        through = p_MCC * dp_MCC
        inner = dp_MCC.mul_(self.mask_MCC)
        dq, dk = torch.bmm(inner, k_MCK), torch.bmm(inner.mT, q_MCK)
        if kk_MCC is not None and dkk_MCC is not None:
            through.addcmul_(kk_MCC, dkk_MCC)
            solve = dkk_MCC.mul_(self.mask_MCC).tril_(-1)
            # k stands on both sides of its own scores
            dk.baddbmm_(solve + solve.mT, k_MCK)
        # dg_s = sum over i >= s > j; what stands on the diagonal carries no decay and is not reached
        dg = torch.mm(through.view(-1, through.shape[2]), self.upper).view_as(through).mul_(self.lower).sum(1)
        return dq, dk, dg[..., None]

    def gate_gradient(self, into_MCK: Tensor, out_MCK: Tensor, states_MKV: Tensor, dstates_MKV: Tensor) -> Tensor:
        total = dstates_MKV.mul_(states_MKV).sum((1, 2), keepdim=True).mul_(self.total_MG1)
        tokens = torch.mm(into_MCK.sum(-1), self.lower).addmm_(out_MCK.sum(-1), self.upper)
        return tokens[..., None].add_(total)
