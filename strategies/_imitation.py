"""Losses that hold a model to what it once said to some rows: what is kept of it, and how far the model is from that.

    kl    mean over tokens of KL(softmax(old / T) || softmax(new / T))
    l1    mean over tokens and units of |new - old|
    l2    mean over tokens and units of (new - old)^2
    tm    margin loss to ternary codes of the old states (strategies/_ternary.py)

Source: the four that Zhang et al., "GeRe", 2025, compare; only the margin loss is in the released code (Qznan/GeRe), of
the others its helper for KL, which has no factor T^2.

Shape legend: B rows, T tokens, D units, V vocabulary, K tokens kept of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from strategies._quadratic import Vectors
from strategies._ternary import Moments, classes, margin_terms, packed, unpacked

KINDS = ("ce", "kl", "l1", "l2", "tm")
TINY = 1e-12


@dataclass
class Said:
    """What a model says to some rows.

    Args:
        states: (B, T, D) of the layer that is imitated.
        logits: (B, T, V) of the head.
        counted: (B, T) True for tokens that take part.
    """

    states: Tensor
    logits: Tensor
    counted: Tensor


class Imitation:
    """A loss against what is kept; this one keeps nothing and is nothing: replay by labels alone."""

    def fit(self, said: Iterable[Said]) -> Vectors:
        """What is found in one pass over all rows, before anything is kept."""
        return {}

    def kept(self, said: Said, fitted: Vectors) -> Vectors:
        """What is kept of each row, (B, ...)."""
        return {}

    def terms(self, said: Said, kept: Vectors, fitted: Vectors) -> tuple[Tensor, Tensor]:
        """Distance of what the model says now from what was kept of the same rows: a sum, and the number of what is in
        it."""
        raise NotImplementedError

    def loss(self, said: Said, kept: Vectors, fitted: Vectors) -> Tensor:
        """The mean distance."""
        total, count = self.terms(said, kept, fitted)
        return total / count.clamp(min=1)


class Kl(Imitation):
    """Divergence of next-token probabilities.

    Args:
        temperature: T.
        top_k: keep the K most likely tokens and the probability of all others together; None keeps all.
    """

    def __init__(self, temperature: float = 2.0, top_k: int | None = None) -> None:
        self.temperature, self.top_k = temperature, top_k

    def _log_probabilities(self, logits_BTV: Tensor) -> Tensor:
        return (logits_BTV.float() / self.temperature).log_softmax(-1)

    def kept(self, said: Said, fitted: Vectors) -> Vectors:
        log_p = self._log_probabilities(said.logits)
        if self.top_k is None or self.top_k >= log_p.shape[-1]:
            return {"log_p": log_p}
        best = log_p.topk(self.top_k)
        return {"log_p": best.values, "tokens": best.indices.int()}

    def terms(self, said: Said, kept: Vectors, fitted: Vectors) -> tuple[Tensor, Tensor]:
        log_p, log_q = kept["log_p"], self._log_probabilities(said.logits)
        if "tokens" in kept:
            log_q = log_q.gather(-1, kept["tokens"].long())
            log_p, log_q = (torch.cat([each, _rest(each)], dim=-1) for each in (log_p, log_q))
        return _summed((log_p.exp() * (log_p - log_q)).sum(-1), said.counted)


class Features(Imitation):
    """Distance of hidden states: of power 1 or 2."""

    def __init__(self, power: int) -> None:
        self.power = power

    def kept(self, said: Said, fitted: Vectors) -> Vectors:
        return {"states": said.states.float()}

    def terms(self, said: Said, kept: Vectors, fitted: Vectors) -> tuple[Tensor, Tensor]:
        apart_BTD = (said.states.float() - kept["states"]).abs()
        return _summed((apart_BTD if self.power == 1 else apart_BTD.square()).mean(-1), said.counted)


class Margin(Imitation):
    """Ternary codes and the margin loss.

    Args:
        width: thresholds are so many standard deviations from the mean of each unit.
        reduction: of the loss, "violating" or "all".
    """

    def __init__(self, width: float = 1.0, reduction: str = "violating") -> None:
        self.width, self.reduction = width, reduction

    def fit(self, said: Iterable[Said]) -> Vectors:
        moments = Moments()
        for each in said:
            moments.add(each.states[each.counted])
        reach = self.width * moments.deviation
        return {"low": (moments.mean - reach).float(), "high": (moments.mean + reach).float()}

    def kept(self, said: Said, fitted: Vectors) -> Vectors:
        return {"codes": packed(classes(said.states.float(), fitted["low"], fitted["high"]))}

    def terms(self, said: Said, kept: Vectors, fitted: Vectors) -> tuple[Tensor, Tensor]:
        states_BTD = said.states.float()
        codes_BTD = unpacked(kept["codes"], states_BTD.shape[-1])
        return margin_terms(states_BTD, codes_BTD, fitted["low"], fitted["high"], said.counted, self.reduction)


def make_imitation(kind: str, temperature: float, top_k: int | None, width: float, reduction: str) -> Imitation:
    """The loss of one of `KINDS`; "ce" is none."""
    if kind == "kl":
        return Kl(temperature, top_k)
    if kind == "tm":
        return Margin(width, reduction)
    return Imitation() if kind == "ce" else Features(1 if kind == "l1" else 2)


def _rest(log_p: Tensor) -> Tensor:
    """Logarithm of the probability that is left."""
    return (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=TINY).log()


def _summed(values_BT: Tensor, counted_BT: Tensor) -> tuple[Tensor, Tensor]:
    return (values_BT * counted_BT).sum(), counted_BT.sum()
