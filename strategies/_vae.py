"""A variational autoencoder that makes rows like those of past experiences, and is trained beside the network.

Shape legend: B rows, X pixels of a row, D latent numbers, L labels that rows are conditioned on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from cl.buffers.base import stored_rows
from cl.core import Batch, Data
from cl.state import TrainState, tensor_bytes

ROWS_AT_A_TIME = 1000


class Vae(nn.Module):
    """Encoder and decoder of one hidden layer each; pixels are probabilities.

    With labels the prior of the latent is a unit normal around a learnt mean for each of them, and the decoder reads
    the label beside the latent (Sohn et al., "Learning Structured Output Representation using Deep Conditional
    Generative Models", 2015). The encoder never reads the label, so that rows can be encoded without it.

    Source: Kingma & Welling, "Auto-Encoding Variational Bayes", 2014.
    """

    def __init__(self, num_pixels: int, hidden: int, latent: int, num_labels: int = 0) -> None:
        super().__init__()
        self.latent, self.num_labels = latent, num_labels
        self.encoder = nn.Sequential(nn.Linear(num_pixels, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent + num_labels, hidden), nn.ReLU(), nn.Linear(hidden, num_pixels))
        self.prior_LD = nn.Parameter(torch.randn(num_labels, latent)) if num_labels else None

    def encode(self, pixels_BX: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latent."""
        mean_BD, log_variance_BD = self.encoder(pixels_BX).chunk(2, dim=1)
        return mean_BD, log_variance_BD

    def decode(self, z_BD: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """Logits of the pixels."""
        if labels_B is not None:
            z_BD = torch.cat([z_BD, F.one_hot(labels_B, self.num_labels).to(z_BD.dtype)], dim=1)
        logits_BX: Tensor = self.decoder(z_BD)
        return logits_BX

    def prior(self, labels_B: Tensor | None) -> Tensor | float:
        return 0.0 if labels_B is None or self.prior_LD is None else self.prior_LD[labels_B]

    def loss(self, pixels_BX: Tensor, noise_BD: Tensor, labels_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Negative evidence bound of each row, in nats, and the latent means.

        BCE(x, decode(z)) + KL(N(mean, variance) || N(prior, 1)),  z = mean + deviation * noise
        """
        mean_BD, log_variance_BD = self.encode(pixels_BX)
        z_BD = mean_BD + (log_variance_BD / 2).exp() * noise_BD
        logits_BX = self.decode(z_BD, labels_B)
        unlike_B = F.binary_cross_entropy_with_logits(logits_BX, pixels_BX, reduction="none").sum(1)
        apart_BD = (mean_BD - self.prior(labels_B)).square()
        return unlike_B + 0.5 * (apart_BD + log_variance_BD.exp() - log_variance_BD - 1).sum(1), mean_BD


class Generator:
    """A VAE of stored rows with its own Adam, and the copy of it that speaks for the past.

    Args:
        owner: name of the strategy, for its random draws.
        hidden, latent: widths of the VAE.
        lr: of Adam.

    Attributes:
        old: the VAE at the end of the last experience; None before.
    """

    def __init__(self, owner: str, hidden: int, latent: int, lr: float) -> None:
        self.owner, self.hidden, self.latent, self.lr = owner, hidden, latent, lr
        self.form: dict[str, Any] = {}
        """Shape and type of a stored row, its smallest and its largest number."""
        self.vae: Vae | None = None
        self.old: Vae | None = None
        self.adam: torch.optim.Adam | None = None

    def prepare(self, state: TrainState, num_labels: int = 0) -> None:
        """Build the VAE for the rows of the running experience, unless it is there."""
        if self.vae is not None:
            return
        low, high = _range(state.data)
        sample = state.data.rows(torch.arange(1)).inputs
        self.form = {
            "shape": list(sample.shape[1:]),
            "low": low,
            "high": high,
            "dtype": sample.dtype,
            "num_labels": num_labels,
        }
        with state.seeds.as_global(self.owner, "vae"):
            self.vae = self._new().to(state.device)
        self.adam = torch.optim.Adam(self.vae.parameters(), lr=self.lr)

    def _new(self) -> Vae:
        return Vae(math.prod(self.form["shape"]), self.hidden, self.latent, self.form["num_labels"])

    def pixels(self, raw: Tensor) -> Tensor:
        """Stored rows (B, ...) -> (B, X) in [0, 1], by the range of the first experience."""
        span = max(self.form["high"] - self.form["low"], 1e-12)
        pixels_BX = (raw.flatten(1).to(torch.get_default_dtype()) - self.form["low"]) / span
        return pixels_BX.clamp(0, 1)

    def noise(self, num_rows: int, generator: torch.Generator, device: torch.device) -> Tensor:
        # on the CPU, where the named generators live
        return torch.randn(num_rows, self.latent, generator=generator).to(device)

    @torch.no_grad()
    def rows(
        self, num_rows: int, generator: torch.Generator, device: torch.device, labels: Tensor | None = None
    ) -> Tensor:
        """Rows (B, ...) as they would be stored, made by the old VAE."""
        assert self.old is not None
        z_BD = self.noise(num_rows, generator, device) + self.old.prior(labels)
        pixels_BX = self.old.decode(z_BD, labels).sigmoid()
        raw = self.form["low"] + (self.form["high"] - self.form["low"]) * pixels_BX
        raw = raw.view(num_rows, *self.form["shape"])
        is_integer = not self.form["dtype"].is_floating_point
        return raw.round().to(self.form["dtype"]) if is_integer else raw

    def update(self, loss: Tensor) -> None:
        """One step of Adam."""
        assert self.vae is not None
        assert self.adam is not None
        for p, g in zip(self.vae.parameters(), torch.autograd.grad(loss, list(self.vae.parameters())), strict=True):
            p.grad = g
        self.adam.step()
        self.adam.zero_grad()

    def keep(self) -> None:
        """From now on the VAE as it is speaks for the past."""
        self.old = deepcopy(self.vae)

    @property
    def num_bytes(self) -> int:
        return tensor_bytes(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        if self.vae is None or self.adam is None:
            return {}
        return {
            "form": dict(self.form),
            "vae": dict(self.vae.state_dict()),
            "adam": self.adam.state_dict()["state"],
            "old": {} if self.old is None else dict(self.old.state_dict()),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.vae = self.old = self.adam = None
        if not saved:
            return
        # copies, because Adam writes in place and the checkpoint is not ours
        saved = tree_map_only(Tensor, torch.clone, saved)
        self.form = saved["form"]
        self.vae = self._filled(saved["vae"])
        self.old = self._filled(saved["old"]) if saved["old"] else None
        self.adam = torch.optim.Adam(self.vae.parameters(), lr=self.lr)
        self.adam.load_state_dict({"state": saved["adam"], "param_groups": self.adam.state_dict()["param_groups"]})

    def _filled(self, weights: dict[str, Tensor]) -> Vae:
        with torch.device("meta"):
            empty = self._new()
        empty.load_state_dict(weights, assign=True)
        return empty


def generated(raw: Tensor, targets: Tensor, task_id: Tensor | None) -> Batch:
    """Made rows, ready for `TrainState.prepare`; they belong to no experience, which is written as -1."""
    nowhere = torch.full((len(raw),), -1, device=raw.device)
    return Batch(raw, targets, nowhere, nowhere, task_id)


def _range(data: Data) -> tuple[float, float]:
    """Smallest and largest number in a data set."""
    ends = [(float(rows.stored.min()), float(rows.stored.max())) for rows in _pieces(data)]
    return min(low for low, _ in ends), max(high for _, high in ends)


def _pieces(data: Data) -> Iterator[Batch]:
    yield from stored_rows(data, batch_size=ROWS_AT_A_TIME)
