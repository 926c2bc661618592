"""Generative kernel continual learning: every task is classified by ridge regression on rows that a VAE makes.

    f(x) = Y_c (ridge * I + K)^-1 k(x),   K = phi(X_c)^T phi(X_c),   k(x) = phi(X_c)^T phi(x)
    loss = CE(scale * f(x)),  X_c a coreset of rows of the running experience, drawn anew in every step

phi(x) is the backbone's hidden layer at length 1 (kernel="linear"), or random Fourier features of it, whose product is
about exp(-|a - b|^2 / (2 length^2)) (kernel="fourier"). The backbone is trained without replay. What remembers is a VAE
conditioned on task and class, which learns beside it, from current rows and from rows that it made itself at the end
of the last experience:

    bound(current) / k + (1 - 1 / k) bound(made) + contrast * SupCon(latent means of both, by class)

k counts the running experience and the finished tasks. At evaluation the VAE makes the coreset of each past task anew,
so that no row is stored; classes of the running experience are judged by its own rows, also where a task came back.

Source: Derakhshani et al., "Generative Kernel Continual Learning", arXiv 2112.13410; the classifier is that of the same
authors' "Kernel Continual Learning", ICML 2021. No official code was found: shares, the prior of the VAE by class, unit
length and scale are our reading. The VAE's own work is not counted in rows, which are those of the backbone.

Shape legend: B rows, N rows of a coreset, C outputs of one head, F width of the last hidden layer, M of the kernel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.buffers.base import draw_without_replacement
from cl.core import Batch, Output, Setting, Source, Stream, StreamInfo, UserError
from cl.hooks import Contract, Strategy
from cl.state import Cost, TrainState
from strategies._backbone import in_float, require_backbone
from strategies._checks import require_choice, require_count, require_number
from strategies._contrastive import global_labels, supervised_contrastive
from strategies._vae import Generator, generated


class GenerativeKernel(Strategy):
    """Classify by kernel ridge regression on a coreset that a conditional VAE makes.

    Args:
        coreset_size: rows for each class; of the running experience as many in all, whatever their classes.
        ridge: paper's lambda.
        kernel: "linear" or "fourier".
        num_fourier, length: number of random Fourier features, and length scale of their kernel.
        scale: of the predictions in the loss; ridge regression gives numbers between about 0 and 1.
        contrast: factor of the supervised contrastive term on the latent; 0 leaves it out.
        contrast_temperature: of that term.
        hidden, latent: widths of the VAE.
        generator_lr: of its Adam.

    Cost: coreset_size rows for each class of the experience, forward and backward, per step.
    """

    settings = frozenset({Setting.TASK_INCREMENTAL})
    contract = Contract(
        toy={"coreset_size": 40, "ridge": 1.0, "scale": 5.0, "generator_lr": 0.03, "hidden": 128, "latent": 8},
        why_not_zero="its classifier is another one, whatever the arguments are",
        acts_at_once=True,
        forgets_less_by=0.05,
    )

    def __init__(
        self,
        coreset_size: int = 20,
        ridge: float = 0.1,
        kernel: str = "linear",
        num_fourier: int = 1024,
        length: float = 0.5,
        scale: float = 10.0,
        contrast: float = 1.0,
        contrast_temperature: float = 0.1,
        hidden: int = 400,
        latent: int = 20,
        generator_lr: float = 0.001,
    ) -> None:
        for name, count in (("coreset_size", coreset_size), ("num_fourier", num_fourier)):
            require_count(f"generative_kernel.{name}", count)
        for name, count in (("hidden", hidden), ("latent", latent)):
            require_count(f"generative_kernel.{name}", count)
        positive = {"ridge": ridge, "length": length, "scale": scale, "contrast_temperature": contrast_temperature}
        for name, number in (positive | {"generator_lr": generator_lr}).items():
            require_number(f"generative_kernel.{name}", number, above=0.0)
        require_number("generative_kernel.contrast", contrast)
        require_choice("generative_kernel.kernel", kernel, ("linear", "fourier"))
        self.coreset_size, self.ridge, self.kernel, self.scale = coreset_size, ridge, kernel, scale
        self.num_fourier, self.length = num_fourier, length
        self.contrast, self.contrast_temperature = contrast, contrast_temperature
        self.generator = Generator(self.name, hidden, latent, generator_lr)
        self.learnt: dict[int, list[int]] = {}
        """Classes of every task that was finished."""
        self._core: Batch | None = None
        self.is_running = False
        """Whether an experience is being trained on."""

    def check(self, stream: Stream) -> None:
        for experience in stream.experiences:
            if not experience.classes:
                raise UserError(
                    f"generative_kernel makes rows of given classes, and experience {experience.id} "
                    f"({experience.name!r}) of stream {stream.info.name} does not say which classes it brings"
                )

    def check_model(self, model: nn.Module, info: StreamInfo) -> None:
        require_backbone(model, "generative_kernel", "features")

    # the classifier

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        if state.micro_step == 0:
            self._core = self._own_rows(state, self._draws(state))
        first, *others = batch.parts
        owned = replace(batch, parts=(replace(first, weight=0.0), *others))
        return owned.extended(self._core, Source.CURRENT, self.name, weight=0.0)

    def penalty(self, state: TrainState, batch: Batch, output: Output) -> Tensor | None:
        core = batch.parts_of(self.name)[0].rows
        prediction_BC = self._prediction(
            state, output.features[: batch.num_current], output.features[core], batch.targets[core]
        )
        return F.cross_entropy(self.scale * prediction_BC, batch.targets[: batch.num_current])

    def _prediction(self, state: TrainState, hidden_BF: Tensor, core_NF: Tensor, targets_N: Tensor) -> Tensor:
        """Ridge regression (B, C) of one-hot labels on the kernel."""
        phi_BM, phi_NM = self._phi(state, hidden_BF), self._phi(state, core_NF)
        labels_NC = F.one_hot(targets_N, state.info.num_outputs).to(phi_NM.dtype)
        kernel_NN = phi_NM @ phi_NM.T + self.ridge * torch.eye(len(phi_NM), dtype=phi_NM.dtype, device=phi_NM.device)
        return phi_BM @ phi_NM.T @ torch.linalg.solve(kernel_NN, labels_NC)

    def _phi(self, state: TrainState, hidden_BF: Tensor) -> Tensor:
        """Features whose product is the kernel."""
        unit_BF = F.normalize(in_float(hidden_BF), dim=1)
        if self.kernel == "linear":
            return unit_BF
        # the same ones whenever they are asked for, so that nobody has to keep them
        draws = state.seeds.fresh(self.name, "fourier")
        directions_FM = torch.randn(unit_BF.shape[1], self.num_fourier, generator=draws).to(unit_BF)
        phases_M = 2 * torch.pi * torch.rand(self.num_fourier, generator=draws).to(unit_BF)
        return (2 / self.num_fourier) ** 0.5 * (unit_BF @ directions_FM / self.length + phases_M).cos()

    def eval_forward(self, state: TrainState, batch: Batch) -> Output | None:
        """Tasks that were never trained on get no preference."""
        with state.autocast():
            output = state.model(batch)
        logits_BC = torch.zeros_like(in_float(output.logits))
        for task in batch.heads.unique().tolist():
            rows = self._coreset(state, task)
            if rows is not None:
                with state.autocast():
                    core_NF = state.model(rows).features
                is_asked = batch.heads == task
                logits_BC[is_asked] = self._prediction(state, output.features[is_asked], core_NF, rows.targets).to(
                    logits_BC.dtype
                )
        return Output(logits_BC, output.hidden)

    def _coreset(self, state: TrainState, task: int) -> Batch | None:
        """The same rows of a task until the VAE is another one, or its experience over."""
        draws = state.seeds.fresh(self.name, "coreset", task)
        is_own = self.is_running and state.has_begun and state.experience.task_id == task
        own = state.experience.classes if is_own else ()
        rows = [self._own_rows(state, draws)] if is_own else []
        past = [label for label in self.learnt.get(task, ()) if label not in own]
        if past:
            targets_N = torch.tensor(past, device=state.device).repeat_interleave(self.coreset_size)
            rows.append(self._made(state, torch.full_like(targets_N, task), targets_N, draws))
        return Batch.cat(rows) if rows else None

    def _own_rows(self, state: TrainState, draws: torch.Generator) -> Batch:
        """A coreset of the running experience."""
        size = self.coreset_size * len(state.experience.classes)
        return state.prepare(state.data.rows(draw_without_replacement(len(state.data), size, draws)))

    # the memory

    def on_experience_start(self, state: TrainState) -> None:
        self.is_running = True
        self.generator.prepare(state, num_labels=state.info.num_heads * state.info.num_outputs)

    def on_step_end(self, state: TrainState, batch: Batch, output: Output) -> None:
        share = 1 / (len(self.learnt) + 1)
        bound_B, mean_BD = self._bound(state, batch.stored, global_labels(batch, state.info))
        loss, means, labels = share * bound_B.mean(), [mean_BD], [global_labels(batch, state.info)]
        if self.learnt:
            past = torch.tensor([(task, label) for task, every in self.learnt.items() for label in every])
            drawn = past[torch.randint(len(past), (len(batch),), generator=self._draws(state))].to(state.device)
            task_B, target_B = drawn.unbind(1)
            labels.append(task_B * state.info.num_outputs + target_B)
            raw = self.generator.rows(len(batch), self._draws(state), state.device, labels[-1])
            bound_B, mean_BD = self._bound(state, raw, labels[-1])
            loss = loss + (1 - share) * bound_B.mean()
            means.append(mean_BD)
        if self.contrast > 0:
            apart = supervised_contrastive(torch.cat(means), torch.cat(labels), self.contrast_temperature)
            loss = loss + self.contrast * apart
        self.generator.update(loss)

    def _bound(self, state: TrainState, raw: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        noise = self.generator.noise(len(raw), self._draws(state), state.device)
        return self.generator.vae.loss(self.generator.pixels(raw.to(state.device)), noise, labels_B)

    def _made(self, state: TrainState, task_N: Tensor, targets_N: Tensor, draws: torch.Generator) -> Batch:
        """Rows of the given classes, as the VAE remembers them, ready for the model."""
        labels_N = task_N * state.info.num_outputs + targets_N
        raw = self.generator.rows(len(labels_N), draws, state.device, labels_N)
        return state.prepare(generated(raw, targets_N, task_N))

    def _draws(self, state: TrainState) -> torch.Generator:
        return state.seeds.named(self.name)

    def on_experience_end(self, state: TrainState) -> None:
        self.is_running = False
        self.generator.keep()
        task = state.experience.task_id
        self.learnt[task] = sorted({*self.learnt.get(task, ()), *state.experience.classes})

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        rows = 0
        if state.has_begun:
            # the kernel needs them beside every micro-batch
            rows = state.micro_steps * min(self.coreset_size * len(state.experience.classes), len(state.data))
        return Cost(rows, rows, self.generator.num_bytes)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.state_dict(), "learnt": self.learnt, "is_running": self.is_running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.load_state_dict(state["generator"])
        self.learnt = {task: list(classes) for task, classes in state["learnt"].items()}
        self.is_running = state["is_running"]
