"""Deep generative replay: rows of the past are made by a variational autoencoder, and labelled by the last model.

    loss = 1 / k * CE(current) + (1 - 1 / k) * weight * L(made rows)          (weighting="experience")
    loss =         CE(current) +               weight * L(made rows)          (weighting="equal")

k counts the experiences, this one included. L is the cross-entropy with the last model's answer (labels="hard"), or
T^2 times the cross-entropy with its softened probabilities, 0 for outputs it had not learnt (labels="soft"). The
autoencoder learns beside the network, by Adam, one step for each of the network's, from the current rows and from rows
that it made itself at the end of the last experience, in the same shares.

Source: Shin et al., "Continual Learning with Deep Generative Replay", NeurIPS 2017; shares, labels and autoencoder as
in van de Ven & Tolias, "Generative replay with feedback connections", 2018 (GMvandeVen/continual-learning).
Differences: one hidden layer on each side of the autoencoder. In the task-incremental setting every made row is shown
to one old head, drawn at random, in place of all of them. The autoencoder's own work is not counted in rows, which are
those of the backbone.

Shape legend: B rows, C outputs of one head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cl.core import Batch, Output, Source, Stream, UserError
from cl.hooks import Contract, Strategy
from cl.state import Cost, TrainState
from strategies._backbone import Teacher, in_float
from strategies._checks import require_choice, require_count, require_number
from strategies._pooled import Spread
from strategies._vae import Generator, generated


class GenerativeReplay(Strategy):
    """Replay rows that an autoencoder makes.

    Args:
        replay_batch_size: rows made per step; None takes as many as the step has of the stream.
        weight: factor of their loss; 0 trains no autoencoder.
        labels: "hard" or "soft".
        weighting: "experience" or "equal".
        temperature: T of soft labels.
        hidden, latent: widths of the autoencoder.
        generator_lr: of its Adam.

    Cost: replay_batch_size more rows forward and backward per step, and once more forward for their labels.
    """

    contract = Contract(
        toy={"labels": "soft", "generator_lr": 0.03, "hidden": 128, "latent": 8},
        zero={"weight": 0.0},
        forgets_less_by=0.15,
    )

    def __init__(
        self,
        replay_batch_size: int | None = None,
        weight: float = 1.0,
        labels: str = "hard",
        weighting: str = "experience",
        temperature: float = 2.0,
        hidden: int = 400,
        latent: int = 20,
        generator_lr: float = 0.001,
    ) -> None:
        batch_size = "the rows that the step has of the stream"
        require_count("generative_replay.replay_batch_size", replay_batch_size, none_means=batch_size)
        require_number("generative_replay.weight", weight)
        require_choice("generative_replay.labels", labels, ("hard", "soft"))
        require_choice("generative_replay.weighting", weighting, ("experience", "equal"))
        require_number("generative_replay.temperature", temperature, above=0.0)
        require_count("generative_replay.hidden", hidden)
        require_count("generative_replay.latent", latent)
        require_number("generative_replay.generator_lr", generator_lr, above=0.0)
        self.replay_batch_size, self.weight, self.labels = replay_batch_size, weight, labels
        self.weighting, self.temperature = weighting, temperature
        self.generator = Generator(self.name, hidden, latent, generator_lr)
        self.teacher = Teacher()
        self.old_outputs: dict[int, list[int]] = {}
        self.spread = Spread()
        self._answers: Tensor | None = None
        self._made: Tensor | None = None

    def check(self, stream: Stream) -> None:
        for experience in list(stream.experiences)[:-1]:
            if not experience.classes:
                raise UserError(
                    f"generative_replay asks the last model for old classes, and experience {experience.id} "
                    f"({experience.name!r}) of stream {stream.info.name} does not say which classes it brings"
                )

    def on_experience_start(self, state: TrainState) -> None:
        if self.weight > 0:
            self.generator.prepare(state)

    def on_batch(self, state: TrainState, batch: Batch) -> Batch:
        self._answers = None
        if not self.teacher:
            return batch
        rows, answers_BC = self.spread.shown(state, batch, lambda: self._drawn(state))
        current_share, made_share = self._shares(state)
        if self.labels == "soft" and len(rows):
            self._answers = (answers_BC / self.temperature).softmax(1)
        first, *others = batch.parts
        scaled = replace(batch, parts=(replace(first, weight=current_share * first.weight), *others))
        weight = made_share * self.weight * self.spread.factor if self.labels == "hard" else 0.0
        return scaled.extended(rows, Source.REPLAY, self.name, weight)

    def _drawn(self, state: TrainState) -> tuple[Batch, Tensor]:
        """The made rows of a step, and the last model's logits."""
        draws = state.seeds.named(self.name)
        raw = self._made = self.generator.rows(self.replay_batch_size or state.step_rows, draws, state.device)
        unknown = torch.zeros(len(raw), dtype=torch.int64, device=raw.device)
        rows = state.prepare(generated(raw, unknown, self._heads(state, raw)), draws)
        answers_BC = self._old_answers(state, rows)
        rows.targets = answers_BC.argmax(1)
        return rows, answers_BC

    def _heads(self, state: TrainState, raw: Tensor) -> Tensor | None:
        """An old head for every made row, where there are several."""
        if state.info.num_heads == 1:
            return None
        heads = torch.tensor(sorted(self.old_outputs))
        drawn = torch.randint(len(heads), (len(raw),), generator=state.seeds.named(self.name))
        return heads[drawn].to(raw.device)

    def _old_answers(self, state: TrainState, rows: Batch) -> Tensor:
        """The last model's logits (B, C), minus infinity at outputs that it had not learnt."""
        logits_BC = in_float(self.teacher(state, rows).logits)
        is_old = torch.zeros(max(self.old_outputs) + 1, logits_BC.shape[1], dtype=torch.bool, device=logits_BC.device)
        for head, outputs in self.old_outputs.items():
            is_old[head, outputs] = True
        return logits_BC.masked_fill(~is_old[rows.heads], float("-inf"))

    def _shares(self, state: TrainState) -> tuple[float, float]:
        """Of the current rows and of the made ones."""
        num = state.experience.id + 1
        return (1 / num, 1 - 1 / num) if self.weighting == "experience" else (1.0, 1.0)

    def penalty(self, state: TrainState, batch: Batch, output: Output) -> Tensor | None:
        if self._answers is None:
            return None
        rows = batch.parts_of(self.name)[0].rows
        # over all outputs, so that made rows also say what they are not: one of the new classes
        log_share_BC = (in_float(output.logits[rows]) / self.temperature).log_softmax(1)
        soft_B = -(self._answers * log_share_BC).sum(1)
        factor = self.weight * self._shares(state)[1] * self.spread.factor
        return factor * self.temperature**2 * soft_B.mean()

    def on_step_end(self, state: TrainState, batch: Batch, output: Output) -> None:
        if self.weight == 0:
            return
        share, made_share = self._shares(state)
        loss = self._bound(state, batch.stored)
        if self._made is not None:
            loss = share * loss + made_share * self._bound(state, self._made)
        self.generator.update(loss)
        self._made = None

    def _bound(self, state: TrainState, raw: Tensor) -> Tensor:
        """Mean negative evidence bound of stored rows."""
        noise = self.generator.noise(len(raw), state.seeds.named(self.name), state.device)
        return self.generator.vae.loss(self.generator.pixels(raw.to(state.device)), noise)[0].mean()

    def on_experience_end(self, state: TrainState) -> None:
        if self.weight == 0:
            return
        self.generator.keep()
        self.teacher.take(state)
        head = state.experience.task_id or 0
        self.old_outputs[head] = sorted({*self.old_outputs.get(head, ()), *state.experience.classes})

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        num = (self.replay_batch_size or batch_size) if self.teacher else 0
        return Cost(2 * num, num, self.generator.num_bytes + self.teacher.num_bytes)

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self.generator.state_dict(),
            "teacher": self.teacher.state_dict(),
            "old_outputs": self.old_outputs,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.load_state_dict(state["generator"])
        self.teacher.load_state_dict(state["teacher"])
        self.old_outputs = dict(state["old_outputs"])
