"""Learning without forgetting: on the new rows, old outputs must stay what the last model says.

    penalty = strength * sum over old heads of KL(softmax(old / T) || softmax(new / T)),  mean over current rows

`old` is the model at the end of the last experience. Only outputs that it was trained for take part: in the
class-incremental setting those of earlier classes, in the domain-incremental setting those of all labels seen, in the
task-incremental setting each earlier head on the new rows. On text it is all tokens of the vocabulary, and the mean is
over the tokens to be learnt.

Source: Li & Hoiem, "Learning without Forgetting", ECCV 2016, as in Avalanche (training/regularization.py).
Differences: the teacher predicts in evaluation mode. `convention="hinton"` multiplies by T^2, which makes gradients
independent of T to first order (Hinton et al., 2015); "plain", as in Li & Hoiem and Avalanche, does not. Mammoth's
warm-up of the new outputs is left out. Van de Ven also weights the two terms by the number of experiences.

Shape legend: B rows, C outputs of one head, F width of the last hidden layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from cl.backbones import MultiHead
from cl.core import IGNORED, Batch, Output, Setting, Stream, StreamInfo, UserError
from cl.hooks import Contract, Strategy
from cl.state import Cost, TrainState, tensor_bytes
from strategies._backbone import require_own_weights
from strategies._checks import require_choice, require_number
from strategies._modes import evaluation_mode
from strategies._quadratic import Vectors, copied, snapshot


class Lwf(Strategy):
    """Distil from the model of the last experience.

    Args:
        strength: weight of the penalty; 0 keeps no teacher.
        temperature: T; larger values look at the small probabilities too.
        convention: "plain", or "hinton", which multiplies the penalty by T^2.

    Cost: one more forward pass of the current rows per step, from the second experience on.
    """

    settings = frozenset(Setting)
    parallel = frozenset({"ddp"})
    contract = Contract(toy={"strength": 5.0}, zero={"strength": 0.0}, forgets_less_by=0.06)

    def __init__(self, strength: float = 1.0, temperature: float = 2.0, convention: str = "plain") -> None:
        require_number("lwf.strength", strength)
        require_number("lwf.temperature", temperature, above=0.0)
        require_choice("lwf.convention", convention, ("plain", "hinton"))
        self.strength, self.temperature, self.convention = strength, temperature, convention
        self.teacher: Vectors = {}
        self.old_outputs: dict[int, list[int]] = {}

    def check(self, stream: Stream) -> None:
        super().check(stream)
        if stream.info.setting == Setting.CONTINUAL_PRETRAINING:
            return
        for experience in list(stream.experiences)[:-1]:
            if not experience.classes:
                raise UserError(
                    f"lwf distils the outputs of old classes, and experience {experience.id} ({experience.name!r}) of "
                    f"stream {stream.info.name} does not say which classes it brings; take a stream that does"
                )

    def check_model(self, model: nn.Module, info: StreamInfo) -> None:
        if self.strength > 0 and info.num_heads > 1:
            require_own_weights(_heads(model)[1], "lwf")

    def penalty(self, state: TrainState, batch: Batch, output: Output) -> Tensor | None:
        if self.strength == 0 or not self.teacher:
            return None
        current, share = batch.current(), batch.parts[0].share
        state.count(forwards=batch.parts[0].elsewhere)
        with torch.no_grad(), evaluation_mode(state.model):
            old = state.forward(current, lambda rows: functional_call(state.model, self.teacher, (rows,)))
        if state.info.setting == Setting.CONTINUAL_PRETRAINING:
            learnt = current.targets != IGNORED
            return self.strength * share * self._divergence(output.logits[: len(current)][learnt], old.logits[learnt])
        total = torch.zeros((), device=state.device)
        for head, outputs in self.old_outputs.items():
            new_BC, old_BC = self._logits(state, head, output, old)
            total = total + self._divergence(new_BC[: len(current), outputs], old_BC[:, outputs])
        return self.strength * share * total

    def _logits(self, state: TrainState, head: int, new: Output, old: Output) -> tuple[Tensor, Tensor]:
        """What the model and its teacher say at an old head, for the rows of the batch; the features are shared."""
        if state.info.num_heads == 1:
            return new.logits, old.logits
        path, heads = _heads(state.model)
        teacher = {name.removeprefix(path): p for name, p in self.teacher.items() if name.startswith(path)}
        with state.autocast():
            new_BC = heads(new.features, torch.full((len(new.features),), head, device=state.device))
            with torch.no_grad():
                old_BC = functional_call(
                    heads, teacher, (old.features, torch.full((len(old.features),), head, device=state.device))
                )
        return new_BC, old_BC

    def _divergence(self, new_BC: Tensor, old_BC: Tensor) -> Tensor:
        """KL(softmax(old / T) || softmax(new / T)), mean over rows; 0 where there are none."""
        new_BC, old_BC = ((logits.float() / self.temperature).log_softmax(-1) for logits in (new_BC, old_BC))
        kl = F.kl_div(new_BC, old_BC, reduction="sum", log_target=True) / max(1, len(new_BC))
        return kl * self.temperature**2 if self.convention == "hinton" else kl

    def on_experience_end(self, state: TrainState) -> None:
        if self.strength == 0:
            return
        buffers = {name: buffer.detach().clone() for name, buffer in state.model.named_buffers()}
        self.teacher = snapshot(state) | buffers
        head = state.experience.task_id or 0
        self.old_outputs[head] = sorted({*self.old_outputs.get(head, ()), *state.experience.classes})

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        return Cost(batch_size if self.teacher else 0, 0, tensor_bytes(self.teacher))

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self.teacher, "old_outputs": self.old_outputs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.teacher, self.old_outputs = copied(state["teacher"]), dict(state["old_outputs"])


def _heads(model: nn.Module) -> tuple[str, MultiHead]:
    """The heads of a multi-head model, wherever they are inside it, and the prefix of their parameters' names."""
    for name, module in model.named_modules():
        if isinstance(module, MultiHead):
            return f"{name}." if name else "", module
    raise UserError(
        f"lwf in the task_incremental setting needs a backbone with a cl.backbones.MultiHead, and "
        f"{type(model).__name__} has none"
    )
